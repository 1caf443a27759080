"""Tests on a GPU: a ceiling by marker, nothing left over from one test to the next, and one cause
instead of many when the device's context is lost.

torch is touched only where a test has loaded it, so that other runs stay as light as they are.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.fixtures import RUN
from pytest_lora.sizes import parse_bytes

if TYPE_CHECKING:
    from types import TracebackType

    from pytest_lora.memory.records import MemoryPrediction

__all__ = [
    "MARKER",
    "clean_up",
    "judge_without_gpu",
    "limited",
    "note_lost_context",
    "refuse_lost_context",
]

MARKER = "limit_gpu_memory"
_GPU_MARKERS = (MARKER, "gpu")
_LOST = pytest.StashKey[str]()


# ---------------------------------------------------------------------------------- the ceiling


def _ceiling(item: pytest.Item) -> tuple[int, Any] | None:
    """The marker's size in bytes and its prediction; None where the test has no such marker.

    Raises:
        UsageError: the marker's arguments cannot be meant.
    """
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return None
    unknown = set(marker.kwargs) - {"predicted"}
    if len(marker.args) != 1 or unknown:
        raise UsageError(
            f'{item.nodeid}: write {MARKER}("14 GiB") or {MARKER}("14 GiB", predicted=function)'
        )
    return parse_bytes(marker.args[0]), marker.kwargs.get("predicted")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def limited(item: pytest.Item) -> Iterator[None]:
    """Around a test's call: where it has the marker and there is a GPU, measure and judge it.

    Devices work behind the program's back: what a test started on one is waited for, so that its
    failure is this test's and not the next one's.
    """
    limit = _ceiling(item)
    if limit is None or not _has_gpu():
        yield
        _settle()
        return
    from pytest_lora.memory.measured import is_out_of_memory, measure_gpu_memory
    from pytest_lora.memory_assertions import judge_measured, out_of_memory

    ceiling, predicted = limit
    try:
        with measure_gpu_memory() as taken:
            yield
            _settle()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory(taken, ceiling, item.nodeid, error)
    judge_measured(taken, ceiling, item.nodeid, _made(predicted))


def _settle() -> None:
    """Wait for all devices in use; raises what failed there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    from pytest_lora.memory.measured import synchronise

    synchronise()


def judge_without_gpu(item: pytest.Item) -> bool:
    """Instead of a test's body where there is no GPU: judge its prediction.

    Returns:
        True if that was done, False if the test has no such marker or there is a GPU to measure on.

    Raises:
        CannotRun: the marker names no prediction (a skip with that reason).
    """
    limit = _ceiling(item)
    if limit is None or _has_gpu():
        return False
    from pytest_lora.memory_assertions import judge_predicted

    ceiling, predicted = limit
    prediction = _made(predicted)
    if prediction is None:
        # A skip; with --lora-strict, which allows none, the plain failure.
        raise CannotRun(
            f"{MARKER} measures on a CUDA device, and torch sees none here; name a prediction, "
            f'{MARKER}("14 GiB", predicted=function), to judge it without one',
            missing=not item.config.stash[RUN].settings.strict,
        )
    judge_predicted(prediction, ceiling, item.nodeid)
    return True


def _made(predicted: Any) -> MemoryPrediction | None:
    from pytest_lora.memory_assertions import prediction_of

    made = predicted() if callable(predicted) else predicted
    return None if made is None else prediction_of(made)


# ---------------------------------------------------------------------- from one test to the next


def clean_up() -> None:
    """After a test: let go of what its failure holds, and give cached device memory back.

    A traceback keeps the local variables of every frame it passed, and the interpreter keeps the
    last traceback; on a GPU that is a model that stays until the next failure.  Called after
    debuggers had their turn.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    _forget(getattr(sys, "last_value", None))
    _forget(getattr(sys, "last_exc", None))
    from pytest_lora.memory.measured import empty_caches

    try:
        empty_caches()
    except RuntimeError:  # a lost context cannot be emptied, and says so elsewhere
        return


def _forget(error: BaseException | None) -> None:
    """Clear the frames of an exception and of those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        trace: TracebackType | None = error.__traceback__
        if trace is not None:
            traceback.clear_frames(trace)
        error = error.__cause__ or error.__context__


def note_lost_context(item: pytest.Item, error: BaseException | None) -> None:
    """Remember, after a failure, whether the device still answers at all.

    An illegal access or a failed assertion on the device makes every later call in the process
    fail with the same message, whatever it does.
    """
    stash = item.session.config.stash
    if error is None or _LOST in stash or not _cuda_error(error):
        return
    if _device_is_lost():
        said = " ".join(str(error).split())[:200]
        stash[_LOST] = f"{item.nodeid} left the CUDA context unusable: {said}"


def _cuda_error(error: BaseException | None) -> bool:
    """Whether CUDA, or a library on it, is spoken of in an exception or in what led to it."""
    while error is not None:
        if any(name in str(error) for name in ("CUDA", "cuDNN")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _device_is_lost() -> bool:
    """Whether waiting for the devices fails, which it does for ever once a context is lost."""
    try:
        _settle()
    except RuntimeError:
        return True
    return False


def refuse_lost_context(item: pytest.Item) -> None:
    """Before a test that needs a GPU: skip with the first cause, which has failed the run already,
    instead of failing with an echo of it.

    Raises:
        CannotRun: an earlier test has lost the context.
    """
    lost = item.session.config.stash.get(_LOST, None)
    if lost is not None and _needs_gpu(item):
        raise CannotRun(f"{lost}; tests on a GPU need a new process now", missing=True)


def _needs_gpu(item: pytest.Item) -> bool:
    if any(item.get_closest_marker(name) for name in _GPU_MARKERS):
        return True
    return "lora_device" in getattr(item, "fixturenames", ())
