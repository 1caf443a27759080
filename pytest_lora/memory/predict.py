"""The peak memory of a training step or another job on a GPU, from configurations alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_lora.errors import UsageError
from pytest_lora.installed import installed_version
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
    from pytest_lora.safetensors_header import TensorInfo

__all__ = ["MARGIN", "make_workload", "predict_memory", "predict_workload"]

MARGIN = 0.05
"""Relative error that verdicts allow for.

Not earned yet: it is to be replaced by the worst case of ``benchmarks/gpu_memory.py``, rounded up,
once that has run on a GPU.  See docs/memory.md.
"""


def predict_memory(
    model: PretrainedConfigLike,
    adapter: AdapterLike = None,
    *,
    job: str = "train_step",
    batch: int | None = None,
    sequence: int | None = None,
    new_tokens: int = 0,
    dtype: str | torch.dtype = "bfloat16",
    adapter_dtype: str | torch.dtype = "auto",
    autocast: str | torch.dtype = "",
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
    """Predicted peak of allocated CUDA memory of one training step, or of another ``job``.

    Nothing is downloaded but a configuration, no weights are made, and no GPU is asked for: the
    job runs on the meta device, every storage it makes is counted, and operators that CUDA would
    run differently are replaced.  The method, what it has been held against and what it cannot see:
    docs/memory.md.

    Args:
        model: a transformers configuration, a model directory, or an id on the hub.
        adapter: a PEFT configuration or an adapter folder; None trains the whole model.
        job: "train_step"; "inference" (a forward pass, or ``generate()`` with ``new_tokens``);
            "load" (the adapter put on a base that is on the card); "merge" (``merge_and_unload``).
        batch: rows of one batch; needed for a training step and inference.
        sequence: tokens of a row, of the prompt where tokens are generated; needed likewise.
        new_tokens: tokens to generate, greedily and with a cache; none ends early.
        dtype: of the base model.
        adapter_dtype: of the adapter; "auto" is PEFT's own rule, float32 on a half-precision base.
        autocast: "" or the format of a ``torch.autocast`` around the forward pass: "bfloat16" for
            what ``transformers.Trainer(bf16=True)`` does; see :mod:`pytest_lora.memory.autocast`.
        attention: attention implementation of transformers: "sdpa" or "eager".
        checkpointing: False, True (as transformers recommends: "non-reentrant"), or "reentrant".
        quantisation: "" or "nf4", "nf4-single" (without double quantisation), "fp4", "fp4-single".
        optimizer: "adamw", "adamw_fused", "adamw_foreach", "adamw_loop", "adam", "sgd",
            "sgd_momentum", "adagrad", "rmsprop", "adafactor"; of bitsandbytes "adam_8bit",
            "adamw_8bit", "lion_8bit", and "paged_adamw" and "paged_lion" with "_32bit" or "_8bit";
            or a function from a list of parameters to an optimizer.
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
    card = find_profile(profile)
    workload = make_workload(
        model,
        adapter,
        job=job,
        batch=batch,
        sequence=sequence,
        new_tokens=new_tokens,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        autocast=autocast,
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
    return predict_workload(
        workload, card, margin=margin, extrapolate=extrapolate, timeline=timeline
    )


def predict_workload(
    workload: Workload,
    card: GpuProfile,
    *,
    margin: float = MARGIN,
    extrapolate: bool = False,
    timeline: bool = False,
) -> MemoryPrediction:
    """The same for a workload that has been made already."""
    if not isinstance(margin, int | float) or not 0 <= margin < 1:
        raise UsageError(f"margin {margin!r} is not a share between 0 and 1")
    started = time.process_time()
    found = _shallow(workload, card) if extrapolate else None
    found = found or _whole(workload, card, timeline=timeline)
    return MemoryPrediction(
        peak=found.peak,
        allocated=found.allocated,
        reserved=found.reserved,
        workspaces=found.handles * card.cublas_workspace,
        margin=margin,
        profile=card.name,
        usable=card.usable,
        kernels=found.kernels,
        request=workload.describe(),
        versions=versions(),
        method=found.method,
        seconds=time.process_time() - started,
        managed=found.managed,
    )


PretrainedConfigLike = Any
"""A ``transformers.PretrainedConfig``, a path, or an id on the hub."""
AdapterLike = Any
"""A ``peft.PeftConfig``, an adapter or the path of its folder, or None."""

_CHECKPOINTING = {False: "", True: "non-reentrant"}


class _Found(NamedTuple):
    peak: MemoryPeak
    allocated: int | None
    reserved: int | None
    kernels: dict[str, int]
    handles: int
    """Of cuBLAS: one for each thread that multiplies, forward and backward being two."""
    managed: int
    method: str


def _whole(workload: Workload, card: GpuProfile, *, timeline: bool) -> _Found:
    kernels = CudaKernels(card.attention)
    counter = trace_on_cuda(workload, kernels, timeline=timeline)
    replayed = counter.allocator
    assert replayed is not None
    return _Found(
        counter.peak,
        replayed.peak_allocated,
        replayed.peak_reserved,
        dict(kernels.chosen),
        len(counter.multiplying),
        counter.left_out,
        "traced whole",
    )


def _shallow(workload: Workload, card: GpuProfile) -> _Found | None:
    last = None

    def trace(shallow: Workload) -> tuple[MemoryPeak, Mapping[str, int]]:
        nonlocal last
        kernels = CudaKernels(card.attention)
        last = trace_on_cuda(shallow, kernels, replay=False, timeline=True)
        if last.left_out:
            raise _Unfit
        return last.peak, kernels.chosen

    try:
        found = from_shallow(workload, trace)
    except _Unfit:
        return None
    if found is None or last is None:
        return None
    peak, kernels = found
    method = "extrapolated exactly from three depths"
    return _Found(peak, None, None, dict(kernels), len(last.multiplying), 0, method)


class _Unfit(Exception):
    """What is left out of the count is not followed through the depths."""


def make_workload(
    model: PretrainedConfigLike,
    adapter: AdapterLike,
    *,
    dtype: str | torch.dtype,
    adapter_dtype: str | torch.dtype = "auto",
    autocast: str | torch.dtype = "",
    checkpointing: bool | str = False,
    job: str = "train_step",
    batch: int | None = None,
    sequence: int | None = None,
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
    if job in ("train_step", "inference") and (batch is None or sequence is None):
        raise UsageError(f"the memory of a {job} depends on batch and sequence: give both")
    how = checkpointing if isinstance(checkpointing, str) else _CHECKPOINTING.get(checkpointing)
    if how is None:
        raise UsageError(f"checkpointing {checkpointing!r} is neither True nor False, nor its kind")
    workload = Workload(
        config=read_config(model),
        adapter=read_adapter_config(adapter),
        file=_tensors_of(adapter),
        job=job,
        batch=1 if batch is None else batch,
        sequence=1 if sequence is None else sequence,
        dtype=base,
        adapter_dtype=parse_dtype(adapter_dtype),
        autocast=_half(autocast) if autocast else None,
        checkpointing=how,
        **others,
    )
    _require_used(workload)
    return workload


_UNUSED: Mapping[str, object] = {
    "checkpointing": "", "accumulation": 1, "clip": None, "optimizer": "adamw", "step": None
}  # fmt: skip
"""What belongs to training alone, and its value where nothing is said."""


def _require_used(workload: Workload) -> None:
    """What is asked for must count: a number that ignores it would be that of something else."""
    unused = {} if workload.job == "train_step" else dict(_UNUSED)
    if workload.job != "inference":
        unused["new_tokens"] = 0
    for name, plain in unused.items():
        if getattr(workload, name) != plain:
            owner = "inference" if name == "new_tokens" else "train_step"
            raise UsageError(f"{name} belongs to job={owner!r}, not to {workload.job!r}")


def _half(autocast: str | torch.dtype) -> torch.dtype:
    """The format of that name; "auto", which would be none, is no format of autocast."""
    try:
        found = parse_dtype(autocast)
    except UsageError:
        found = None
    if found is None:
        raise UsageError(f"autocast {autocast!r} is neither bfloat16 nor float16")
    return found


def _tensors_of(adapter: AdapterLike) -> Mapping[str, TensorInfo] | None:
    """The tensors of an adapter's file, where it is given as a folder."""
    from pytest_lora.adapter import Adapter, read_adapter

    known = read_adapter(adapter) if isinstance(adapter, str | Path) else adapter
    return known.tensors if isinstance(known, Adapter) else None


def versions() -> dict[str, str]:
    """Versions of the libraries that a prediction depends on."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    found = {name: installed_version(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}
