"""An independent witness of a step's peak: the allocator's events, as the profiler sees them."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pytest_lora.memory.livebytes import further_tensors, storages
from pytest_lora.memory.workload import (
    Workload,
    make_batches,
    make_model,
    make_optimizer,
    training_step,
)


def profiled_peak(workload: Workload) -> int:
    """Peak bytes of two real steps on the CPU: what was there, and the profiler's events on top.

    Left out is the state of the random generator that checkpointing keeps for every block: it is
    made outside the dispatcher, and on a GPU it is host memory.
    """
    torch.manual_seed(0)
    model, batches = make_model(workload, "cpu"), make_batches(workload)
    optimizer = make_optimizer(workload, model)
    there = [*model.parameters(), *(tensor for _, tensor in further_tensors(model))]
    there += [tensor for batch in batches for tensor in batch.values()]
    there += [v for state in optimizer.state.values() for v in state.values()]
    parts = [part for item in there if isinstance(item, torch.Tensor) for part in storages(item)]
    sizes = {part.data_ptr(): part.nbytes() for part in parts}
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(2):
            training_step(model, optimizer, batches, workload.clip, workload.autocast)
    blocks = workload.config.num_hidden_layers if workload.checkpointing else 0
    return sum(sizes.values()) + _peak(recorded) - blocks * torch.get_rng_state().nbytes


def _peak(recorded: Any) -> int:
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
