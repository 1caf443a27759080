"""Ceilings by marker, clean frames, lost contexts: pytest's side, on machines without a GPU too."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from pytest_lora import gpu_tests  # noqa: E402

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here to measure on")

PREDICTED = """
    import dataclasses
    import pytest
    from pytest_lora.memory.records import MemoryPeak, MemoryPrediction

    def predicted():
        peak = MemoryPeak(2**30, {"logits": 2**30}, "aten.mm", "lm_head", "forward", {})
        return MemoryPrediction(
            peak, 2**30, 2**30, 0, 0.05, "h100-80gb", 2**36, {}, {}, {}, "by hand"
        )
"""


@NO_GPU
def test_without_a_gpu_the_prediction_is_judged_and_the_body_left_alone(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        PREDICTED
        + """
    @pytest.mark.limit_gpu_memory("2 GiB", predicted=predicted)
    def test_fits():
        raise AssertionError("a body for a GPU ran without one")

    @pytest.mark.limit_gpu_memory("1000 MiB", predicted=predicted)
    def test_does_not_fit():
        pass

    @pytest.mark.limit_gpu_memory("1025 MiB", predicted=predicted)
    def test_too_close():
        pass

    import unittest

    class TestOfUnittest(unittest.TestCase):
        @pytest.mark.limit_gpu_memory("2 GiB", predicted=predicted)
        def test_fits(self):
            raise AssertionError("a body for a GPU ran without one")

        @pytest.mark.limit_gpu_memory("1 MiB", predicted=predicted)
        def test_does_not_fit_either(self):
            pass

        @pytest.mark.limit_gpu_memory("2 GiB")
        def test_needs_a_gpu(self):
            pass
    """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=3, skipped=1)
    result.stdout.fnmatch_lines(
        ["gpu_memory FAILED for *test_does_not_fit: 1 GiB of GPU memory, predicted*"]
    )
    result.stdout.fnmatch_lines(["*logits take 1.00 GiB*"])
    result.stdout.fnmatch_lines(["*too close to call*"])


@NO_GPU
def test_without_a_gpu_and_a_prediction_it_skips_or_fails_strictly(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.limit_gpu_memory("2 GiB")
        def test_measured():
            pass
        """
    )
    plain = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rs")
    plain.assert_outcomes(skipped=1)
    plain.stdout.fnmatch_lines(["*torch sees none here*"])
    pytester.runpytest_inprocess("-p", "no:cacheprovider", "--lora-strict").assert_outcomes(
        failed=1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("", "write limit_gpu_memory"), ('"2 GiB", limit=1', "write limit_gpu_memory"),
     ('"two GiB"', "size 'two GiB'")],
)  # fmt: skip
def test_a_marker_that_cannot_be_meant_is_an_error(
    pytester: pytest.Pytester, arguments: str, message: str
) -> None:
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.limit_gpu_memory({arguments})
        def test_it():
            pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*{message}*"])


def test_after_a_lost_context_gpu_tests_stop_with_the_cause(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tests, "_device_is_lost", lambda: True)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_poisons():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        @pytest.mark.gpu
        def test_needs_a_gpu():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def test_needs_none():
            pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(failed=1, skipped=1, passed=1)
    result.stdout.fnmatch_lines(["*test_poisons left the CUDA context unusable*illegal memory*"])


def test_a_lost_context_is_known_beneath_our_own_errors() -> None:
    error = ValueError("the model fails on the probe inputs")
    error.__context__ = RuntimeError("CUDA error: device-side assert triggered")
    assert gpu_tests._cuda_error(error)
    error.__context__ = RuntimeError("shapes cannot be multiplied")
    assert not gpu_tests._cuda_error(error)
    assert not gpu_tests._cuda_error(None)


def test_what_a_test_started_on_a_device_fails_in_that_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's fault is seen where somebody waits for it: after the test, not in the next one."""
    started: list[str] = []

    def wait(_device: int) -> None:
        if started:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "started", started, raising=False)
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.mark.gpu
        def test_is_sound():
            pass

        @pytest.mark.gpu
        def test_launches_a_bad_kernel():
            torch.started.append("kernel")

        @pytest.mark.gpu
        def test_comes_next():
            pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:randomly", "-rs")
    result.assert_outcomes(passed=1, failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*test_launches_a_bad_kernel left the CUDA context unusable*"])


def test_other_failures_do_not_stop_the_others(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tests, "_device_is_lost", lambda: True)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_fails():
            raise RuntimeError("shapes cannot be multiplied")

        @pytest.mark.gpu
        def test_passes():
            pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1, passed=1)


class Held:
    """Stands for a model that a failed test's frame still holds."""


def fail(holds: list[Any]) -> None:
    held = Held()
    holds.append(weakref.ref(held))
    raise ValueError("first")


def test_frames_of_a_failed_test_let_go_of_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    holds: list[Any] = []
    error: BaseException | None = None
    try:
        try:
            fail(holds)
        except ValueError:
            fail(holds)
    except ValueError as caught:
        error = caught
    assert error is not None
    assert all(ref() is not None for ref in holds)
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    gpu_tests.clean_up()
    assert [ref() for ref in holds] == [None, None]


def test_without_a_gpu_in_use_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the cache of a device that nobody uses was emptied")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    gpu_tests.clean_up()
