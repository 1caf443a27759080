"""A workload under the counter: traced on the meta device, or really run.

Both count the same way and run the same code; a prediction for the CPU and a real run there agree
to the byte (``benchmarks/memory_truth.py``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import one_line
from pytest_lora.memory.allocator import CachingAllocator, round_up
from pytest_lora.memory.autocast import Autocast
from pytest_lora.memory.jobs import count
from pytest_lora.memory.kernels import (
    CpuKernels,
    CudaKernels,
    cuda_workspaces,
    optimizers_on_meta,
)
from pytest_lora.memory.livebytes import LiveBytes, exact
from pytest_lora.memory.records import NotPredictable
from pytest_lora.memory.shadows import Shadows
from pytest_lora.memory.workload import Workload

__all__ = ["run_step", "trace_on_cpu", "trace_on_cuda"]


def trace_on_cuda(
    workload: Workload, kernels: CudaKernels, *, replay: bool = True, timeline: bool = False
) -> LiveBytes:
    """The workload as a GPU would run it, without one.

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
    patches = (kernels, optimizers_on_meta(foreach=True), Autocast("cuda"))
    return _trace(workload, counter, *patches)


def trace_on_cpu(workload: Workload, *, timeline: bool = False) -> LiveBytes:
    """The workload as the CPU would run it, without doing it: what the truth is held against."""
    counter = LiveBytes(shadows=Shadows(), vocabulary=workload.vocabulary, timeline=timeline)
    patches = (CpuKernels(), optimizers_on_meta(foreach=False), Autocast("cpu"))
    return _trace(workload, counter, *patches)


def _trace(
    workload: Workload, counter: LiveBytes, *patches: AbstractContextManager[Any]
) -> LiveBytes:
    assert counter.shadows is not None
    with ExitStack() as stack:
        for patch in (counter.shadows.constants(), *patches):
            stack.enter_context(patch)
        try:
            count(workload, counter, "meta")
        except (CannotRun, UsageError):  # in our own words already
            raise
        except Exception as error:  # whatever torch, transformers or PEFT raise without a device
            if workload.step is not None:
                raise  # it is the user's own code, whose traceback says more
            raise NotPredictable(
                f"this {workload.job.replace('_', ' ')} cannot be traced without a device: "
                f"{one_line(error)}"
            ) from error
    return counter


def run_step(workload: Workload, device: str = "cpu", *, timeline: bool = False) -> LiveBytes:
    """The same with real tensors: a training step twice, as its first makes the optimizer's state.

    Where there is no CUDA device the bytes are counted as they are, on one as its allocator rounds.
    """
    torch.manual_seed(0)
    on_cpu = torch.device(device).type == "cpu"
    counter = LiveBytes(
        device=None if on_cpu else torch.device(device).type,
        rounding=exact if on_cpu else round_up,
        vocabulary=workload.vocabulary,
        timeline=timeline,
    )
    count(workload, counter, device)
    return counter
