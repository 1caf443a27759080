"""Memory of loading, inference, a training step and a merge, for an adapter on its base.

On a GPU the adapter is put on its real base and the peak of allocated bytes is measured; the
prediction stands beside it in the evidence.  Without one the prediction is what there is, and says
so: its value is an interval, from the predicted peak to that with its margin.

A measurement counts what the job needs: everything above what others had allocated before, the
base's own weights included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.memory.allocator import round_up
from pytest_lora.memory.autocast import region
from pytest_lora.memory.jobs import generate
from pytest_lora.memory.livebytes import further_tensors, storages
from pytest_lora.memory.measured import MeasuredMemory, is_out_of_memory, measure_gpu_memory
from pytest_lora.memory.plot import curve_of
from pytest_lora.memory.records import MemoryPeak, MemoryPrediction, NotPredictable
from pytest_lora.memory.workload import (
    Workload,
    checkpoint,
    make_batches,
    make_optimizer,
    training_step,
)
from pytest_lora.records import Json, Measurement
from pytest_lora.sizes import GIB, format_bytes

if TYPE_CHECKING:
    from pytest_lora.memory.plan import MemoryPlan
    from pytest_lora.subject import Subject

__all__ = [
    "exhausted",
    "measure_memory_inference",
    "measure_memory_load",
    "measure_memory_merge",
    "measure_memory_train_step",
    "of_measured",
    "of_prediction",
]

_UNIT = "GiB of GPU memory"
_Run = Callable[[], object]
_NOTHING: Mapping[str, int] = MappingProxyType({})


def measure_memory_load(plan: MemoryPlan) -> Measurement:
    """Peak memory with the base on the device and the adapter being put on it, in GiB.

    Measured, the base is let go first and read again, so that it is one load and not two.

    Raises:
        CannotRun: nothing can be measured here and nothing predicted; the reason is in it.
    """
    return _measure(plan, "load", _loading)


def measure_memory_inference(plan: MemoryPlan) -> Measurement:
    """Peak memory of inference in GiB: one forward pass, or a prompt and ``new_tokens`` after it.

    Raises:
        CannotRun: nothing can be measured here and nothing predicted; the reason is in it.
    """
    return _measure(plan, "inference", _inferring)


def measure_memory_train_step(plan: MemoryPlan) -> Measurement:
    """Peak memory of an optimizer step of the adapter, its state included, in GiB.

    Raises:
        CannotRun: nothing can be measured here and nothing predicted; the reason is in it.
    """
    return _measure(plan, "train_step", _training)


def measure_memory_merge(plan: MemoryPlan) -> Measurement:
    """Peak memory of ``merge_and_unload`` in GiB.  Measured, the base is read again afterwards.

    Raises:
        CannotRun: nothing can be measured here and nothing predicted; the reason is in it.
        NotApplicable: the method cannot be merged.
    """
    return _measure(plan, "merge", _merging)


_Prepare = Callable[["Subject", Workload], AbstractContextManager[tuple[Mapping[str, int], _Run]]]
"""From a subject and a workload: the bytes there before, by device, and what to run."""


def _measure(plan: MemoryPlan, job: str, prepare: _Prepare) -> Measurement:
    workload = plan.make(job)
    if job == "merge" and getattr(workload.adapter, "is_prompt_learning", False):
        raise NotApplicable(f"adapters of {workload.method} cannot be merged")
    if plan.subject is None or workload.quantisation:
        return _predicted(plan, job)
    predicted, remarks = None, []
    try:
        predicted = plan.predict(job)
    except NotPredictable as error:
        remarks = [f"not predicted: {error}"]
    with prepare(plan.subject, workload) as (there, run):
        taken = MeasuredMemory()
        try:
            with measure_gpu_memory(timeline=True) as taken:
                run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return exhausted(taken, error, there=there)
    return of_measured(taken, predicted, there=there, remarks=remarks)


def _predicted(plan: MemoryPlan, job: str) -> Measurement:
    try:
        return of_prediction(plan.predict(job))
    except NotPredictable as reason:
        lacking = "no CUDA device" if plan.subject is None else "no quantised base"
        raise CannotRun(f"{reason}; and there is {lacking} to measure", missing=True) from None


# ------------------------------------------------------------------------------- jobs, really done


@contextmanager
def _loading(subject: Subject, _workload: Workload) -> Iterator[tuple[Mapping[str, int], _Run]]:
    subject.release()

    def load() -> None:
        subject.base.reload()
        assert subject.model is not None

    yield _bytes(subject.base.module), load


@contextmanager
def _inferring(subject: Subject, workload: Workload) -> Iterator[tuple[Mapping[str, int], _Run]]:
    with subject.attached() as model:

        def infer() -> None:
            [batch] = [_on(subject, batch) for batch in make_batches(workload)[:1]]
            with torch.no_grad(), region(batch, workload.autocast):
                if workload.new_tokens:
                    generate(model, batch, workload.new_tokens)
                else:
                    model(**batch)

        yield _bytes(model), infer


@contextmanager
def _training(subject: Subject, workload: Workload) -> Iterator[tuple[Mapping[str, int], _Run]]:
    with subject.attached(is_trainable=True) as model:
        checkpoint(model, workload)

        def train() -> None:
            """Two steps: the optimizer's state comes with the first."""
            batches = [_on(subject, batch) for batch in make_batches(workload)]
            optimizer = make_optimizer(workload, model)
            for _ in range(2):
                training_step(model, optimizer, batches, workload.clip, workload.autocast)

        yield _bytes(model), train


@contextmanager
def _merging(subject: Subject, _workload: Workload) -> Iterator[tuple[Mapping[str, int], _Run]]:
    if subject.base.spec is None:
        raise CannotRun(
            "merging writes into the base's weights, and a base that was passed in cannot be read "
            "again afterwards",
            missing=True,
        )
    try:
        with subject.attached() as model, torch.no_grad():
            if not hasattr(model, "merge_and_unload"):
                raise NotApplicable(f"adapters of {subject.adapter.peft_type} cannot be merged")
            yield _bytes(model), model.merge_and_unload
    finally:
        subject.base.reload()


def _on(subject: Subject, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(subject.base.device) for name, tensor in batch.items()}


def _bytes(model: torch.nn.Module) -> dict[str, int]:
    """What a model's tensors take on each device, each storage once."""
    named = [*model.named_parameters(), *further_tensors(model)]
    found = [part for _, tensor in named for part in storages(tensor)]
    parts = {(str(part.device), part.data_ptr()): part for part in found}
    taken: Counter[str] = Counter()
    for (device, _), part in parts.items():
        taken[device] += round_up(part.nbytes())
    return dict(taken)


# ------------------------------------------------------------------------------- evidence


def of_prediction(prediction: MemoryPrediction) -> Measurement:
    """A prediction as a measurement: from the predicted peak up to that with its margin."""
    return Measurement(
        value=prediction.predicted / GIB,
        unit=f"{_UNIT}, predicted",
        count=1,
        low=prediction.predicted / GIB,
        high=prediction.at_most / GIB,
        where=_place(prediction.peak),
        details={
            "predicted": prediction.to_dict(),
            **_seen(prediction.peak),
            "notes": prediction.lines(),
        },
    )


def of_measured(
    taken: MeasuredMemory,
    predicted: MemoryPrediction | None = None,
    *,
    there: Mapping[str, int] = _NOTHING,
    remarks: Sequence[str] = (),
) -> Measurement:
    """What a block took on the fullest device, and what was ``there`` before of its own, in bytes
    by device: where a model is spread, each device counts its own part.
    """
    own, total = _fullest(taken, there)
    details: dict[str, Json] = {"devices": [device.to_dict() for device in taken.devices]}
    notes = [*taken.lines(), *remarks]
    if own:
        details["own_before"] = own
        notes.insert(0, f"of which {format_bytes(own)} are the model itself, loaded before")
    if predicted is not None:
        details["predicted"] = predicted.to_dict()
        error = predicted.predicted / max(1, total) - 1
        notes.append(f"predicted {format_bytes(predicted.predicted)}: {error:+.1%}")
    return Measurement(
        value=total / GIB,
        unit=f"{_UNIT}, measured",
        count=len(taken.devices),
        where=_place(taken.peak),
        details={**details, **_seen(taken.peak), "notes": notes},
    )


def _fullest(taken: MeasuredMemory, there: Mapping[str, int]) -> tuple[int, int]:
    """Of the fullest device: what was there before, and that with what the block took."""
    taken_by = {device.device: device.allocated for device in taken.devices}
    each = [(there.get(name, 0), there.get(name, 0) + peak) for name, peak in taken_by.items()]
    return max(each, key=lambda pair: pair[1])


def exhausted(
    taken: MeasuredMemory, error: BaseException, *, there: Mapping[str, int] = _NOTHING
) -> Measurement:
    """A device that ran out of memory: more than any ceiling."""
    said = " ".join(str(error).split())[:240]
    own = max((there.get(device.device, 0) for device in taken.devices), default=0)
    return Measurement(
        value=math.inf,
        unit=f"{_UNIT}, measured",
        count=max(1, len(taken.devices)),
        details={
            "devices": [device.to_dict() for device in taken.devices],
            **({"own_before": own} if own else {}),
            **_seen(taken.peak),
            "notes": [f"the device ran out of memory: {said}", *taken.lines()],
        },
    )


def _place(peak: MemoryPeak | None) -> str | None:
    """Where the peak was: the operator, its module, the phase."""
    if peak is None:
        return None
    return f"{peak.op} of {peak.module or 'no module'}, {peak.phase}"


def _seen(peak: MemoryPeak | None) -> dict[str, Json]:
    """What a peak consisted of, and the way there where its timeline was kept."""
    if peak is None:
        return {}
    return {"peak": peak.to_dict(), **({"curve": curve_of(peak)} if peak.timeline else {})}
