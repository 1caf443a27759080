"""``assert_*`` for memory: measured on a GPU, predicted without one, and always saying which.

A verdict on a prediction has three outcomes: the peak and its margin stay below the ceiling
(passed), the peak alone exceeds it (failed), or the ceiling lies within the margin (inconclusive:
raised as well, lest it pass for a promise).  A verdict on a measurement has two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_lora.errors import CannotRun, CheckFailed, UsageError
from pytest_lora.records import Bound, CheckResult, Json, Measurement, Outcome, emit
from pytest_lora.report.text import explain
from pytest_lora.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from pytest_lora.memory.measured import MeasuredMemory
    from pytest_lora.memory.records import MemoryPeak, MemoryPrediction

__all__ = [
    "assert_gpu_memory",
    "assert_memory_unchanged",
    "judge_measured",
    "judge_predicted",
    "limit_memory",
    "out_of_memory",
]

GIB = 1 << 30
_UNIT = "GiB of GPU memory"


def assert_gpu_memory(
    step: Callable[[], object] | None = None,
    *,
    max_memory: str | int,
    predicted: MemoryPrediction | Callable[[], MemoryPrediction] | None = None,
    name: str = "step",
) -> Measurement:
    """``step()`` needs at most ``max_memory`` of GPU memory above what was there before.

    With a CUDA device the step is run and its peak of allocated bytes measured; where ``predicted``
    is given too, both numbers are recorded side by side.  Without one the prediction is judged, and
    the step is not run.

    Args:
        step: what to run; needed where there is a GPU.
        max_memory: bytes, or a text such as ``"14 GiB"``.
        predicted: a prediction, or a function that makes one.
        name: what the result is called in the report.

    Raises:
        CheckFailed: it needs more (or runs out of memory), or a prediction is too close to call.
        CannotRun: there is neither a GPU and a step, nor a prediction.
        UsageError: the size cannot be read.
    """
    __tracebackhide__ = True
    import torch

    ceiling = parse_bytes(max_memory)
    if step is not None and torch.cuda.is_available():
        return _measured(step, ceiling, predicted, name)
    if predicted is None:
        raise CannotRun(
            "no CUDA device here to measure on, and no prediction given: pass "
            "predicted=predict_memory(...)",
            missing=True,
        )
    return judge_predicted(_prediction(predicted), ceiling, name)


def _prediction(given: MemoryPrediction | Callable[[], MemoryPrediction]) -> MemoryPrediction:
    return given() if callable(given) else given


def _measured(
    step: Callable[[], object],
    ceiling: int,
    predicted: MemoryPrediction | Callable[[], MemoryPrediction] | None,
    name: str,
) -> Measurement:
    __tracebackhide__ = True
    from pytest_lora.memory.measured import is_out_of_memory, measure_gpu_memory

    try:
        with measure_gpu_memory() as taken:
            step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory(taken, ceiling, name, error)
    return judge_measured(taken, ceiling, name, predicted and _prediction(predicted))


def judge_measured(
    taken: MeasuredMemory,
    ceiling: int,
    name: str = "step",
    predicted: MemoryPrediction | None = None,
) -> Measurement:
    """Hold a measurement to a ceiling in bytes; emits the result.

    Raises:
        CheckFailed: the peak of allocated bytes exceeds the ceiling.
    """
    __tracebackhide__ = True
    details: dict[str, Json] = {"devices": [device.to_dict() for device in taken.devices]}
    notes = taken.lines()
    if predicted is not None:
        details["predicted"] = predicted.to_dict()
        error = predicted.predicted / max(1, taken.allocated) - 1
        notes.append(f"predicted {format_bytes(predicted.predicted)}: {error:+.1%}")
    measurement = Measurement(
        value=taken.allocated / GIB,
        unit=f"{_UNIT}, measured",
        count=len(taken.devices),
        details={**details, "notes": notes},
    )
    request = predicted.request if predicted else None
    return _judge("gpu_memory", name, measurement, ceiling, _remedy(taken.peak, request))


def judge_predicted(prediction: MemoryPrediction, ceiling: int, name: str = "step") -> Measurement:
    """Hold a prediction and its margin to a ceiling in bytes; emits the result.

    Raises:
        CheckFailed: it does not fit, or is too close to call (the result is INCONCLUSIVE then).
    """
    __tracebackhide__ = True
    measurement = Measurement(
        value=prediction.predicted / GIB,
        unit=f"{_UNIT}, predicted",
        count=1,
        low=prediction.predicted / GIB,
        high=prediction.at_most / GIB,
        details={"predicted": prediction.to_dict(), "notes": prediction.lines()},
    )
    remedy = _remedy(prediction.peak, prediction.request)
    return _judge("gpu_memory", name, measurement, ceiling, remedy)


def out_of_memory(taken: MeasuredMemory, ceiling: int, name: str, error: BaseException) -> None:
    """The device ran out of memory: that exceeds any ceiling.

    Raises:
        CheckFailed: always.
    """
    __tracebackhide__ = True
    said = " ".join(str(error).split())[:240]
    measurement = Measurement(
        value=math.inf,
        unit=f"{_UNIT}, measured",
        count=max(1, len(taken.devices)),
        details={
            "devices": [device.to_dict() for device in taken.devices],
            "notes": [f"the device ran out of memory: {said}", *taken.lines()],
        },
    )
    _judge("gpu_memory", name, measurement, ceiling, _remedy(taken.peak, None))


@contextmanager
def limit_memory(max_memory: str | int, *, name: str = "block") -> Iterator[MeasuredMemory]:
    """The block makes at most ``max_memory`` of tensors that are alive at once, on any device.

    Exact and repeatable: live bytes of tensor storages, seen where operators make them; never the
    process's resident memory.

    Raises:
        CheckFailed: it made more.
        UsageError: the size cannot be read.
    """
    __tracebackhide__ = True
    from pytest_lora.memory.measured import measure_cpu_memory

    ceiling = parse_bytes(max_memory)
    with measure_cpu_memory() as taken:
        yield taken
    measurement = Measurement(
        value=taken.allocated / GIB,
        unit="GiB of live tensors",
        count=1,
        details={"bytes": taken.allocated, "notes": taken.peak.lines() if taken.peak else []},
    )
    _judge("limit_memory", name, measurement, ceiling, "")


def assert_memory_unchanged(
    prediction: MemoryPrediction,
    baseline: Path | str,
    name: str,
    *,
    update: bool = False,
) -> Measurement:
    """The predicted live bytes are, to the byte, those recorded in a file.

    A prediction repeats exactly, so one integer finds a lost checkpointing flag, one more target
    module, or an upcast; nothing is noise.  Another version of a library may change the number: the
    message then says so.

    Args:
        prediction: of the step to watch over.
        baseline: a JSON file, to be committed.
        name: of this configuration in it.
        update: record the number instead of holding to it.

    Raises:
        CheckFailed: the number changed; the message says what else did.
        UsageError: nothing is recorded under that name, or the file is no baseline.
    """
    __tracebackhide__ = True
    from pytest_lora.memory.golden import differences, entry_of, read_baseline, write_baseline

    path, now = Path(baseline), entry_of(prediction)
    entries = read_baseline(path)
    if update:
        write_baseline(path, {**entries, name: now})
        entries = {name: now}
    if name not in entries:
        known = ", ".join(sorted(entries)) or "nothing"
        raise UsageError(
            f"{path} records nothing under {name!r} (it has {known}); record it once with "
            "assert_memory_unchanged(..., update=True) and commit the file"
        )
    problems = differences(entries[name], now)
    measurement = Measurement(
        value=abs(prediction.peak.live - entries[name]["live_bytes"]),
        unit="bytes more or less than recorded",
        count=1,
        where=str(problems[0]) if problems else None,
        details={
            "problems": [problem.to_dict() for problem in problems],
            "notes": [*prediction.lines()] if problems else [],
        },
    )
    remedy = "if the change is meant, record it with update=True" if problems else ""
    return _decide("memory_unchanged", name, measurement, Bound.at_most(0, "recorded"), remedy)


def _remedy(peak: MemoryPeak | None, request: object) -> str:
    if peak is None:
        return ""
    from pytest_lora.memory.advice import advice

    return "; ".join(advice(peak, request if isinstance(request, dict) else None)[:3])


def _judge(
    check: str, name: str, measurement: Measurement, ceiling: int, remedy: str
) -> Measurement:
    __tracebackhide__ = True
    return _decide(check, name, measurement, Bound.at_most(ceiling / GIB, "argument"), remedy)


def _decide(
    check: str, name: str, measurement: Measurement, bound: Bound, remedy: str
) -> Measurement:
    __tracebackhide__ = True
    outcome = bound.judge(measurement)
    result = CheckResult(
        check=check,
        adapter=name,
        outcome=outcome,
        reason=_REASONS.get(outcome, "") if measurement.low is not None else "",
        advice="" if outcome is Outcome.PASSED else remedy,
        measurement=measurement,
        bound=bound,
    )
    emit(result)
    if outcome is not Outcome.PASSED:
        raise CheckFailed(explain(result), result)
    return measurement


_REASONS = {
    Outcome.FAILED: "predicted not to fit",
    Outcome.INCONCLUSIVE: "too close to call: the ceiling lies within the prediction's margin",
}
