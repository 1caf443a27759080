"""One training step under the counter: traced on the meta device, or really run.

Both count the same way and run the same code; a prediction for the CPU and a real run there agree
to the byte (``benchmarks/memory_truth.py``).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from pytest_lora.memory.allocator import CachingAllocator, round_up
from pytest_lora.memory.kernels import (
    CpuKernels,
    CudaKernels,
    autocast_on_meta,
    cuda_workspaces,
    optimizers_on_meta,
)
from pytest_lora.memory.livebytes import LiveBytes
from pytest_lora.memory.shadows import Shadows
from pytest_lora.memory.workload import (
    Workload,
    make_batches,
    make_model,
    make_optimizer,
    training_step,
)

__all__ = ["count_steps", "fill_state", "run_step", "trace_on_cpu", "trace_on_cuda"]

Tensors = list[dict[str, torch.Tensor]]


def trace_on_cuda(
    workload: Workload, kernels: CudaKernels, *, replay: bool = True, timeline: bool = False
) -> LiveBytes:
    """The step as a GPU would run it, without one.

    Args:
        workload: what to run.
        kernels: the attention kernels to assume; holds what was chosen afterwards.
        replay: replay the caching allocator as well.
        timeline: keep what was alive after every operator.

    Raises:
        NotPredictable: memory depends on what a trace does not know.
    """
    counter = LiveBytes(
        device="meta",
        rounding=round_up,
        workspaces=cuda_workspaces(),
        allocator=CachingAllocator() if replay else None,
        shadows=Shadows(),
        vocabulary=workload.vocabulary,
        timeline=timeline,
    )
    return _trace(workload, counter, kernels, optimizers_on_meta(foreach=True))


def trace_on_cpu(workload: Workload, *, timeline: bool = False) -> LiveBytes:
    """The step as the CPU would run it, without doing the work: what the truth is held against."""
    counter = LiveBytes(shadows=Shadows(), vocabulary=workload.vocabulary, timeline=timeline)
    return _trace(workload, counter, CpuKernels(), optimizers_on_meta(foreach=False))


def _trace(
    workload: Workload, counter: LiveBytes, *patches: AbstractContextManager[Any]
) -> LiveBytes:
    assert counter.shadows is not None
    with ExitStack() as stack:
        for patch in (autocast_on_meta(), *patches):
            stack.enter_context(patch)
        model = make_model(workload, "meta")
        batches = [
            {name: counter.shadows.to_meta(tensor) for name, tensor in batch.items()}
            for batch in make_batches(workload)
        ]
        optimizer = make_optimizer(workload, model)
        if workload.step is None:
            fill_state(optimizer)
        count_steps(counter, model, optimizer, batches, _step_of(workload), _steps(workload, 1))
    return counter


def run_step(workload: Workload, device: str = "cpu", *, timeline: bool = False) -> LiveBytes:
    """The step really run: two of them, since the optimizer's state comes with the first."""
    torch.manual_seed(0)
    model = make_model(workload, device)
    batches = [
        {name: tensor.to(device) for name, tensor in batch.items()}
        for batch in make_batches(workload)
    ]
    optimizer = make_optimizer(workload, model)
    gc.collect()
    counter = LiveBytes(
        device=None if device == "cpu" else device.partition(":")[0],
        rounding=(lambda count: count) if device == "cpu" else round_up,
        vocabulary=workload.vocabulary,
        timeline=timeline,
    )
    count_steps(counter, model, optimizer, batches, _step_of(workload), 2)
    return counter


def count_steps(
    counter: LiveBytes,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Tensors,
    step: Callable[[Any, torch.optim.Optimizer, Any], object],
    steps: int,
) -> None:
    """Run ``steps`` steps under ``counter``, which is shown what was there before."""
    counter.track_module(model)
    for batch in batches:
        for name, tensor in batch.items():
            counter.track(tensor, "batch", name)
    counter.track_optimizer(optimizer)
    with counter:
        for _ in range(steps):
            step(model, optimizer, batches)


def _step_of(workload: Workload) -> Callable[[Any, torch.optim.Optimizer, Any], object]:
    if workload.step is not None:
        return workload.step
    return lambda model, optimizer, batches: training_step(model, optimizer, batches, workload.clip)


def _steps(workload: Workload, plain: int) -> int:
    """A step of the user's own is run twice: its first one creates the optimizer's state."""
    return 2 if workload.step is not None else plain


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its state, so that one traced step is a step of a running job."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
