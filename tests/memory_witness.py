"""An independent witness of a step's peak: the allocator's events, as the profiler sees them."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pytest_lora.memory.livebytes import storages
from pytest_lora.memory.workload import (
    Workload,
    make_batches,
    make_model,
    make_optimizer,
    training_step,
)


def profiled_peak(workload: Workload) -> int:
    """Peak bytes of two real steps on the CPU: what was there, and the profiler's events on top."""
    torch.manual_seed(0)
    model, batches = make_model(workload, "cpu"), make_batches(workload)
    optimizer = make_optimizer(workload, model)
    tensors = [*model.parameters(), *model.buffers(), *(t for b in batches for t in b.values())]
    sizes = {part.data_ptr(): part.nbytes() for tensor in tensors for part in storages(tensor)}
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(2):
            training_step(model, optimizer, batches, workload.clip)
    return sum(sizes.values()) + _peak(recorded)


def _peak(recorded: Any) -> int:
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
