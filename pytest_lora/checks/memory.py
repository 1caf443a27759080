"""Memory of loading, inference, one training step and merging, for an adapter on its base.

On a CUDA device the peak of allocated bytes above what was there before; on the CPU the peak of
live tensor bytes, counted exactly where operators make them.  Never the process's resident memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pytest_lora.errors import NotApplicable
from pytest_lora.memory.measured import MeasuredMemory, measure_cpu_memory, measure_gpu_memory
from pytest_lora.memory.workload import training_step
from pytest_lora.probe import output_of
from pytest_lora.records import Json, Measurement

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = [
    "measure_memory_inference",
    "measure_memory_load",
    "measure_memory_merge",
    "measure_memory_train_step",
]

GIB = 1 << 30


def measure_memory_load(subject: Subject) -> Measurement:
    """Peak memory of reading the base model from disk and attaching the adapter, in GiB.

    The base is dropped first, so that what is measured is one load and not two.

    Raises:
        CannotRun: the base model was passed in, not loaded.
    """

    def load() -> None:
        subject.base.reload()
        assert subject.model is not None

    subject.release()
    return _measure(subject, load)


def measure_memory_inference(subject: Subject) -> Measurement:
    """Peak memory of a forward pass on the probe inputs, above the loaded model, in GiB."""
    model, inputs = subject.model, subject.inputs
    return _measure(subject, lambda: output_of(model, inputs))


def measure_memory_train_step(subject: Subject) -> Measurement:
    """Peak memory of two AdamW steps of the adapter on the probe inputs, above the loaded model.

    Two, since the optimizer's state comes with the first.  In GiB.

    Raises:
        NotApplicable: the model gives no loss for the probe inputs.
    """
    with subject.attached(is_trainable=True) as model:
        batch = _with_labels(model, subject.inputs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise NotApplicable("the adapter has nothing to train")

        def train() -> None:
            optimizer = torch.optim.AdamW(trained, lr=0.0)
            for _ in range(2):
                training_step(model.train(), optimizer, [batch])

        return _measure(subject, train)


def _with_labels(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The probe inputs with labels, where the model can make a loss of them."""
    batch = dict(inputs)
    if "labels" not in batch and "input_ids" in batch:
        batch["labels"] = batch["input_ids"].clone()
    try:
        with torch.no_grad():
            loss = getattr(model(**batch), "loss", None)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NotApplicable(f"the model gives no loss for the probe inputs: {error}") from None
    if loss is None:
        raise NotApplicable("the model gives no loss for the probe inputs")
    return batch


def measure_memory_merge(subject: Subject) -> Measurement:
    """Peak memory of merging the adapter into the base and taking it out again, in GiB.

    Raises:
        NotApplicable: the method cannot be merged.
    """
    model = subject.model
    merge = getattr(model.base_model, "merge_adapter", None)
    if merge is None:
        raise NotApplicable("adapters of this method cannot be merged")

    def merge_and_back() -> None:
        merge()
        model.base_model.unmerge_adapter()

    with torch.no_grad():
        return _measure(subject, merge_and_back)


def _measure(subject: Subject, run: Callable[[], object]) -> Measurement:
    on_gpu = subject.base.device.type == "cuda"
    with _counted(on_gpu) as taken:
        run()
    details: dict[str, Json] = {
        "devices": [device.to_dict() for device in taken.devices],
        "notes": taken.lines(),
    }
    return Measurement(
        value=taken.allocated / GIB,
        unit="GiB of GPU memory" if on_gpu else "GiB of live tensors",
        count=len(taken.devices),
        where=taken.lines()[0],
        details=details,
    )


@contextmanager
def _counted(on_gpu: bool) -> Iterator[MeasuredMemory]:
    with measure_gpu_memory() if on_gpu else measure_cpu_memory() as taken:
        yield taken
