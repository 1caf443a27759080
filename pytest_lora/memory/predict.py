"""The peak memory of a step on a GPU, from configurations alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pytest_lora.errors import UsageError
from pytest_lora.loading import parse_dtype
from pytest_lora.memory.depth import extrapolate as from_shallow
from pytest_lora.memory.kernels import CudaKernels
from pytest_lora.memory.profiles import GpuProfile, find_profile
from pytest_lora.memory.records import MemoryPeak, MemoryPrediction
from pytest_lora.memory.tracing import trace_on_cuda
from pytest_lora.memory.workload import Workload, read_adapter_config, read_config

if TYPE_CHECKING:
    import torch

    from pytest_lora.memory.workload import MakeOptimizer, Step

__all__ = ["MARGIN", "make_workload", "predict_memory"]

MARGIN = 0.05
"""Relative error that verdicts allow for.

Not earned yet: it is to be replaced by the worst case of ``benchmarks/gpu_memory.py``, rounded up,
once that has run on a GPU.  See docs/memory.md.
"""


def predict_memory(
    model: PretrainedConfigLike,
    adapter: AdapterLike = None,
    *,
    batch: int,
    sequence: int,
    dtype: str | torch.dtype = "bfloat16",
    adapter_dtype: str | torch.dtype = "auto",
    attention: str = "sdpa",
    checkpointing: bool | str = False,
    quantisation: str = "",
    optimizer: str | MakeOptimizer = "adamw",
    padding: str = "padded",
    accumulation: int = 1,
    clip: float | None = None,
    task: str = "",
    inputs: Mapping[str, torch.Tensor] | None = None,
    step: Step | None = None,
    profile: str | GpuProfile = "h100-80gb",
    margin: float = MARGIN,
    extrapolate: bool = False,
    timeline: bool = False,
) -> MemoryPrediction:
    """Predicted peak of allocated CUDA memory of one training step.

    Nothing is downloaded but a configuration, no weights are made, and no GPU is asked for: the
    step runs on the meta device, every storage it makes is counted, and operators that CUDA would
    run differently are replaced.  The method, what it has been held against and what it cannot see:
    docs/memory.md.

    Args:
        model: a transformers configuration, a model directory, or an id on the hub.
        adapter: a PEFT configuration or an adapter folder; None trains the whole model.
        batch: rows of one batch.
        sequence: tokens of a row.
        dtype: of the base model.
        adapter_dtype: of the adapter; "auto" is PEFT's own rule, float32 on a half-precision base.
        attention: attention implementation of transformers: "sdpa" or "eager".
        checkpointing: False, True (as transformers recommends: "non-reentrant"), or "reentrant".
        quantisation: "" or "nf4", "nf4-single" (without double quantisation), "fp4", "fp4-single".
        optimizer: "adamw", "adamw_fused", "adamw_foreach", "adamw_loop", "adam", "sgd",
            "sgd_momentum", "adagrad", "rmsprop", "adafactor", or a function from a list of
            parameters to a torch optimizer.
        padding: "padded" (a mask with padding, the default and the most memory), "full" (a mask
            without), "none" (no mask).
        accumulation: batches per optimizer step.
        clip: largest norm of the gradients, where they are clipped.
        task: PEFT's name of the task; default: the adapter's, else the architecture's.
        inputs: the batch itself (CPU tensors), for models that take other things than tokens.
        step: the user's own ``step(model, optimizer, batches)``; it is run twice.
        profile: the card, by name; see :mod:`pytest_lora.memory.profiles`.
        margin: relative error that the verdict allows for.
        extrapolate: trace three shallow models where that is exact; allocated and reserved bytes
            are then not replayed.
        timeline: keep what was alive after every operator, to be drawn.

    Raises:
        NotPredictable: memory depends on something a trace does not know; the message names it.
        UsageError: an argument cannot be meant.
    """
    if not 0 <= margin < 1:
        raise UsageError(f"margin {margin!r} is not a share between 0 and 1")
    started = time.process_time()
    card = find_profile(profile)
    workload = make_workload(
        model,
        adapter,
        batch=batch,
        sequence=sequence,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        attention=attention,
        checkpointing=checkpointing,
        quantisation=quantisation,
        optimizer=optimizer,
        padding=padding,
        accumulation=accumulation,
        clip=clip,
        task=task,
        inputs=inputs,
        step=step,
    )
    found = _shallow(workload, card) if extrapolate else None
    found = found or _whole(workload, card, timeline=timeline)
    peak, allocated, reserved, kernels, method = found
    return MemoryPrediction(
        peak=peak,
        allocated=allocated,
        reserved=reserved,
        workspaces=card.workspaces,
        margin=margin,
        profile=card.name,
        usable=card.usable,
        kernels=kernels,
        request=workload.describe(),
        versions=versions(),
        method=method,
        seconds=time.process_time() - started,
    )


PretrainedConfigLike = Any
"""A ``transformers.PretrainedConfig``, a path, or an id on the hub."""
AdapterLike = Any
"""A ``peft.PeftConfig``, the path of an adapter folder, or None."""

_CHECKPOINTING = {False: "", True: "non-reentrant"}
_Found = tuple[MemoryPeak, "int | None", "int | None", dict[str, int], str]


def _whole(workload: Workload, card: GpuProfile, *, timeline: bool) -> _Found:
    kernels = CudaKernels(card.attention)
    counter = trace_on_cuda(workload, kernels, timeline=timeline)
    replayed = counter.allocator
    assert replayed is not None
    return (
        counter.peak,
        replayed.peak_allocated,
        replayed.peak_reserved,
        dict(kernels.chosen),
        "traced whole",
    )


def _shallow(workload: Workload, card: GpuProfile) -> _Found | None:
    def trace(shallow: Workload) -> tuple[MemoryPeak, Mapping[str, int]]:
        kernels = CudaKernels(card.attention)
        peak = trace_on_cuda(shallow, kernels, replay=False, timeline=True).peak
        return peak, kernels.chosen

    found = from_shallow(workload, trace)
    if found is None:
        return None
    peak, kernels = found
    return peak, None, None, dict(kernels), "extrapolated exactly from three depths"


def make_workload(
    model: PretrainedConfigLike,
    adapter: AdapterLike,
    *,
    dtype: str | torch.dtype,
    adapter_dtype: str | torch.dtype = "auto",
    checkpointing: bool | str = False,
    **others: Any,
) -> Workload:
    """A workload from arguments as :func:`predict_memory` takes them.

    Raises:
        UsageError: an argument cannot be meant.
        CannotRun: a configuration cannot be read.
    """
    base = parse_dtype(dtype)
    if base is None:
        raise UsageError("dtype: a prediction needs a format, not auto, as in dtype='bfloat16'")
    how = checkpointing if isinstance(checkpointing, str) else _CHECKPOINTING[checkpointing]
    return Workload(
        config=read_config(model),
        adapter=read_adapter_config(adapter),
        dtype=base,
        adapter_dtype=parse_dtype(adapter_dtype),
        checkpointing=how,
        **others,
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that a prediction depends on."""
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
