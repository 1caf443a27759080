"""``assert_*`` for memory: measured on a GPU, predicted without one, and always saying which.

A verdict on a prediction has three outcomes: the peak and its margin stay below the ceiling
(passed), the peak alone exceeds it (failed), or the ceiling lies within the margin (inconclusive:
raised as well, lest it pass for a promise).  A verdict on a measurement has two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, emit
from pytest_lora.report.text import explain
from pytest_lora.sizes import GIB, parse_bytes

if TYPE_CHECKING:
    from pytest_lora.memory.measured import MeasuredMemory
    from pytest_lora.memory.plan import MemoryPlan
    from pytest_lora.memory.records import MemoryPrediction

__all__ = [
    "assert_gpu_memory",
    "assert_memory_inference",
    "assert_memory_load",
    "assert_memory_merge",
    "assert_memory_train_step",
    "assert_memory_unchanged",
    "assert_no_memory_left",
    "judge_measured",
    "judge_predicted",
    "limit_memory",
    "out_of_memory",
    "prediction_of",
]

Ceiling = str | int | Bound
"""``"14 GiB"``, a number of bytes, or a bound in GiB."""


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
        CannotRun: there is neither a GPU and a step, nor a prediction; or the step
            allocates nothing on one.
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
    return judge_predicted(prediction_of(predicted), ceiling, name)


def prediction_of(given: MemoryPrediction | Callable[[], MemoryPrediction]) -> MemoryPrediction:
    """A prediction as it is given: made already, or a function that makes it.

    Raises:
        UsageError: it is neither.
    """
    from pytest_lora.memory.records import MemoryPrediction

    made = given() if callable(given) else given
    if not isinstance(made, MemoryPrediction):
        raise UsageError(
            f"predicted={made!r} is no prediction: give what predict_memory(...) returns, or a "
            "function that returns it"
        )
    return made


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
    return judge_measured(
        taken, ceiling, name, None if predicted is None else prediction_of(predicted)
    )


def judge_measured(
    taken: MeasuredMemory,
    ceiling: int,
    name: str = "step",
    predicted: MemoryPrediction | None = None,
) -> Measurement:
    """Hold a measurement to a ceiling in bytes; emits the result.

    Raises:
        CannotRun: nothing was allocated on any device, so that nothing can be judged.
        CheckFailed: the peak of allocated bytes exceeds the ceiling.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.memory import of_measured

    if not any(device.allocated for device in taken.devices):
        raise CannotRun(
            "nothing was allocated on any CUDA device: what was measured does not run there"
        )

    return _judge("gpu_memory", name, of_measured(taken, predicted), ceiling)


def judge_predicted(prediction: MemoryPrediction, ceiling: int, name: str = "step") -> Measurement:
    """Hold a prediction and its margin to a ceiling in bytes; emits the result.

    Raises:
        CheckFailed: it does not fit, or is too close to call (the result is INCONCLUSIVE then).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.memory import of_prediction

    return _judge("gpu_memory", name, of_prediction(prediction), ceiling)


def out_of_memory(taken: MeasuredMemory, ceiling: int, name: str, error: BaseException) -> None:
    """The device ran out of memory: that exceeds any ceiling.

    Raises:
        CheckFailed: always.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.memory import exhausted

    _judge("gpu_memory", name, exhausted(taken, error), ceiling)


def assert_memory_load(plan: MemoryPlan, *, max_memory: Ceiling | None) -> Measurement:
    """Putting the adapter on its base takes at most ``max_memory``, the base included.

    With the plan's subject on a GPU it is measured, else predicted; the unit says which.

    Args:
        plan: the adapter, its base and what is done with them (the fixture ``lora_memory_plan``).
        max_memory: a size such as ``"14 GiB"``, bytes, or a bound in GiB; None makes no verdict.

    Raises:
        CheckFailed: it takes more, or a prediction is too close to call.
        CannotRun: nothing can be measured and nothing predicted.
        NotApplicable: there is no ceiling.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.memory import measure_memory_load

    return _of_plan("memory_load", plan, measure_memory_load, max_memory)


def assert_memory_inference(plan: MemoryPlan, *, max_memory: Ceiling | None) -> Measurement:
    """Inference takes at most ``max_memory``, the model included; as :func:`assert_memory_load`."""
    __tracebackhide__ = True
    from pytest_lora.checks.memory import measure_memory_inference

    return _of_plan("memory_inference", plan, measure_memory_inference, max_memory)


def assert_memory_train_step(plan: MemoryPlan, *, max_memory: Ceiling | None) -> Measurement:
    """A training step takes at most ``max_memory``, the model included; as
    :func:`assert_memory_load`.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.memory import measure_memory_train_step

    return _of_plan("memory_train_step", plan, measure_memory_train_step, max_memory)


def assert_memory_merge(plan: MemoryPlan, *, max_memory: Ceiling | None) -> Measurement:
    """Merging takes at most ``max_memory``, the model included; as :func:`assert_memory_load`."""
    __tracebackhide__ = True
    from pytest_lora.checks.memory import measure_memory_merge

    return _of_plan("memory_merge", plan, measure_memory_merge, max_memory)


def _of_plan(
    check: str,
    plan: MemoryPlan,
    measure: Callable[[MemoryPlan], Measurement],
    max_memory: Ceiling | None,
) -> Measurement:
    __tracebackhide__ = True
    if max_memory is None:
        raise NotApplicable(
            f"no ceiling is set: --lora-{check.replace('_', '-')}='14 GiB', or {check} in lora.toml"
        )
    if not isinstance(max_memory, Bound):
        max_memory = Bound.at_most(parse_bytes(max_memory) / GIB, "argument")
    started = time.perf_counter()
    measurement = measure(plan)
    seconds = time.perf_counter() - started
    return _decide(check, plan.adapter.name, measurement, max_memory, seconds=seconds)


@contextmanager
def limit_memory(max_memory: str | int, *, name: str = "block") -> Iterator[MeasuredMemory]:
    """The block makes at most ``max_memory`` of tensors that are alive at once, on any device.

    Exact and repeatable: live bytes of tensor storages, seen where operators make them; never the
    process's resident memory.  Of tensors that other threads made, or a library that maps a file,
    those count that are left at the end.

    Raises:
        CannotRun: it made no tensor at all that could be seen.
        CheckFailed: it made more.
        UsageError: the size cannot be read.
    """
    __tracebackhide__ = True
    from pytest_lora.memory.measured import measure_cpu_memory

    ceiling = parse_bytes(max_memory)
    with measure_cpu_memory() as taken:
        yield taken
    assert taken.peak is not None
    if not taken.operators and not taken.unseen:
        raise CannotRun(
            "no operator of torch ran in the block on this thread and no tensor came of it, so "
            "there is no memory to judge"
        )
    measurement = Measurement(
        value=taken.allocated / GIB,
        unit="GiB of live tensors",
        count=1,
        details={
            "bytes": taken.allocated,
            "peak": taken.peak.to_dict(),
            "notes": taken.lines()[1:],
        },
    )
    _judge("limit_memory", name, measurement, ceiling)


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
    from pytest_lora.memory.golden import differences, entry_of, read_baseline, record

    path, now = Path(baseline), entry_of(prediction)
    if update:
        record(path, name, now)
    entries: Mapping[str, Mapping[str, Any]] = {name: now} if update else read_baseline(path)
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


def assert_no_memory_left(
    cycle: Callable[[], object], *, cycles: int = 3, name: str = "cycle"
) -> Measurement:
    """Live tensor bytes return to the start: what ``cycle()`` makes, nothing holds afterwards.

    For loading and deleting a model, attaching and unloading an adapter, a request of a server.
    Exact: nothing left means no byte, after one run that may fill caches. What takes the place of
    something as large is not left.

    Args:
        cycle: what to run, ``1 + cycles`` times.
        cycles: runs that are counted.
        name: what the result is called in the report.

    Raises:
        CannotRun: the cycle has nothing to do with tensors.
        CheckFailed: tensors are left; the message names the largest and who made them.
        UsageError: ``cycles`` is not a positive whole number.
    """
    __tracebackhide__ = True
    from pytest_lora.memory.measured import measure_memory_left

    return _decide(
        "memory_left",
        name,
        measure_memory_left(cycle, cycles=cycles),
        Bound.at_most(0, "definition of the check"),
        "something outlives the cycle and holds them: a global, a hook, a cache, a graph that was "
        "kept with a loss, or the frames of a caught exception",
    )


def _remedy(measurement: Measurement) -> str:
    """What would bring the peak down, from what it consists of and how the job was set up."""
    from pytest_lora.memory.advice import advice
    from pytest_lora.memory.records import MemoryPeak

    details: Mapping[str, Any] = measurement.details
    if "peak" not in details:
        return ""
    peak = MemoryPeak.from_dict(details["peak"])
    return "; ".join(advice(peak, details.get("predicted", {}).get("request"))[:3])


def _judge(check: str, name: str, measurement: Measurement, ceiling: int) -> Measurement:
    __tracebackhide__ = True
    return _decide(check, name, measurement, Bound.at_most(ceiling / GIB, "argument"))


def _decide(
    check: str,
    name: str,
    measurement: Measurement,
    bound: Bound,
    remedy: str = "",
    *,
    seconds: float = 0.0,
) -> Measurement:
    __tracebackhide__ = True
    outcome = bound.judge(measurement)
    result = CheckResult(
        check=check,
        adapter=name,
        outcome=outcome,
        reason=_REASONS.get(outcome, "") if measurement.low is not None else "",
        advice="" if outcome is Outcome.PASSED else remedy or _remedy(measurement),
        measurement=measurement,
        bound=bound,
        seconds=seconds,
    )
    emit(result)
    if outcome is not Outcome.PASSED:
        raise CheckFailed(explain(result), result)
    return measurement


_REASONS = {
    Outcome.FAILED: "predicted not to fit",
    Outcome.INCONCLUSIVE: "too close to call: the ceiling lies within the prediction's margin",
}
