"""Memory ceilings in whole runs: made where one is set, and never a pass without one."""

from __future__ import annotations

import json

import pytest
from adapter_maker import write_adapter
from example import FIXTURES, NEEDS_EXAMPLE

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

ADAPTER = f"--lora-adapter={FIXTURES / 'adapters' / 'attention-lora'}"
CEILINGS = {
    "load": "1 GiB", "inference": "1 GiB", "train_step": "1 GiB", "merge": "1 GiB"
}  # fmt: skip
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here to measure on")


def words(**ceilings: str) -> list[str]:
    return [f"--lora-memory-{job.replace('_', '-')}={size}" for job, size in ceilings.items()]


def collected(pytester: pytest.Pytester, *arguments: str) -> list[str]:
    result = pytester.runpytest_inprocess("--collect-only", "-q", *arguments)
    return [line.partition("[")[0] for line in result.outlines if "test_memory" in line]


def test_without_a_ceiling_no_memory_check_is_made(pytester: pytest.Pytester) -> None:
    assert collected(pytester, ADAPTER) == []


def test_each_ceiling_makes_its_check(pytester: pytest.Pytester) -> None:
    found = collected(pytester, ADAPTER, *words(merge="1 GiB", load="2 GB"))
    assert found == ["lora/test_memory::test_memory_load", "lora/test_memory::test_memory_merge"]


def test_a_profile_sets_ceilings_for_some_adapters(pytester: pytest.Pytester) -> None:
    for name in ("small", "large"):
        write_adapter(pytester.path / "adapters" / name)
    (pytester.path / "lora.toml").write_text(
        '[adapters."*/large"]\nmemory_load = "1 GiB"\ngpu_profile = "24gb"\n'
    )
    arguments = ("--collect-only", "-q", "--lora-adapter=adapters/*", "--lora-checks=memory_load")
    result = pytester.runpytest_inprocess(*arguments)
    result.stdout.fnmatch_lines(["lora/test_memory::test_memory_load[[]adapters/large[]]"])
    result.stdout.no_fnmatch_line("*adapters/small*")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-checks=memory_load"], "memory_load has no ceiling; set one*--lora-memory-load"),
        (["--lora-memory-load=14"], "--lora-memory-load: got '14'*a size with its unit"),
        ([*words(load="1 GiB"), "--lora-gpu-profile=h100"], "GPU profile 'h100'*h100-80gb"),
        (["--lora-memory-workload=rows=3"], "--lora-memory-workload: got*batch=4"),
    ],
)
def test_requests_that_cannot_be_meant(
    pytester: pytest.Pytester, arguments: list[str], message: str
) -> None:
    result = pytester.runpytest_inprocess(ADAPTER, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *{message}*"])


@NO_GPU
@NEEDS_EXAMPLE
def test_without_a_gpu_ceilings_are_held_by_prediction_and_no_weights_are_read(
    pytester: pytest.Pytester,
) -> None:
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.makeconftest(
        "import pytest_lora.loading as loading\n"
        "def refuse(*_): raise AssertionError('weights were read')\n"
        "loading.load_weights = refuse\n"
    )
    tight = {**CEILINGS, "train_step": "10 MiB"}
    result = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "-m", "lora", "--lora-strict", "--lora-report=report.json",
        "--lora-gpu-profile=24gb", "--lora-memory-workload=batch=2 sequence=512",
        ADAPTER, *words(**tight), f"--lora-checks={','.join(f'memory_{job}' for job in CEILINGS)}",
    )  # fmt: skip
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["memory_train_step FAILED*predicted not to fit*"])
    result.stdout.fnmatch_lines(["*to move the bound: --lora-memory-train-step=SIZE*"])
    [report] = [json.loads((pytester.path / "report.json").read_text())]
    found = {result["check"]: result for result in report["results"]}
    details = found["memory_train_step"]["measurement"]["details"]
    assert details["predicted"]["profile"] == "l4-24gb"
    assert details["predicted"]["request"]["sequence"] == 512
    assert details["curve"]["columns"]


@NO_GPU
@NEEDS_EXAMPLE
def test_what_needs_a_measurement_skips_without_a_gpu_and_fails_strictly(
    pytester: pytest.Pytester,
) -> None:
    pytest.importorskip("bitsandbytes")
    arguments = [
        "-p", "no:cacheprovider", ADAPTER, "--lora-checks=memory_load",
        "--lora-memory-load=1 GiB", "--lora-memory-workload=quantisation=nf4",
    ]  # fmt: skip
    plain = pytester.runpytest_inprocess("-rs", *arguments)
    plain.assert_outcomes(skipped=1)
    plain.stdout.fnmatch_lines(["*cannot be predicted*no CUDA device*"])
    strict = pytester.runpytest_inprocess(*arguments, "--lora-strict")
    strict.assert_outcomes(failed=1)
    strict.stdout.fnmatch_lines(["*--lora-strict does not allow*no CUDA device*"])
