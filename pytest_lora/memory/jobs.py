"""What a workload does: a training step, inference, a load, a merge; each under a counter.

The same code runs on the meta device for a prediction and on a real one for the truth.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.errors import UsageError
from pytest_lora.loading import FORMATS, one_line, quiet
from pytest_lora.memory.autocast import region
from pytest_lora.memory.kernels import adapters_on_meta
from pytest_lora.memory.livebytes import LiveBytes, exact
from pytest_lora.memory.paged import page_states
from pytest_lora.memory.quantised import merges_on_meta
from pytest_lora.memory.records import NotPredictable
from pytest_lora.memory.workload import (
    Batch,
    Workload,
    add_adapter,
    make_base,
    make_batches,
    make_model,
    make_optimizer,
    training_step,
)

if TYPE_CHECKING:
    from pytest_lora.memory.workload import Step

__all__ = ["count", "fill_state", "generate"]


def count(workload: Workload, counter: LiveBytes, device: str) -> None:
    """Do what ``workload`` says on ``device``, under ``counter``.

    Raises:
        NotPredictable: it cannot be built, or (on the meta device) depends on what nobody knows.
    """
    _JOBS[workload.job](workload, counter, device)


# ------------------------------------------------------------------------------- training


def _train_step(workload: Workload, counter: LiveBytes, device: str) -> None:
    """A step as it is once the optimizer has its state: that is the second of a real run.

    On the meta device the state is made beforehand, which gives the same bytes in half the time; a
    step of the user's own is run twice there too.
    """
    model = make_model(workload, device)
    batches = [_on(device, counter, batch) for batch in make_batches(workload)]
    optimizer = make_optimizer(workload, model)
    if device == "meta":
        page_states(optimizer, counter.leave_out)
    filled = device == "meta" and workload.step is None
    if filled:
        fill_state(optimizer)
    _begin(counter, model, batches)
    counter.track_optimizer(optimizer)
    with counter:
        for _ in range(1 if filled else 2):
            if workload.step is not None:
                _own_step(workload.step, counter, model, optimizer, batches)
            else:
                training_step(model, optimizer, batches, workload.clip, workload.autocast)


def _own_step(step: Step, counter: LiveBytes, model: Any, optimizer: Any, batches: Any) -> None:
    before = counter.operators
    step(model, optimizer, batches)
    if counter.operators == before:
        raise UsageError(
            "step(model, optimizer, batches) ran no operator on this thread, so there is no memory "
            "to predict"
        )


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its state, so that one traced step is a step of a running job."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------- inference


def _inference(workload: Workload, counter: LiveBytes, device: str) -> None:
    """One forward pass over the batch, or a prompt and the greedy tokens after it."""
    model = make_model(workload, device)
    [batch] = [_on(device, counter, batch) for batch in make_batches(workload)[:1]]
    _begin(counter, model, [batch])
    with counter, torch.no_grad(), region(batch, workload.autocast):
        if workload.new_tokens:
            generate(model, batch, workload.new_tokens)
        else:
            model(**batch)


def generate(model: Any, batch: Batch, new_tokens: int) -> None:
    """``new_tokens`` greedy tokens in each row, with the cache of keys and values.

    Nothing ends early: how long answers of a trained model are is not known beforehand, so that
    this is what the longest take.

    Raises:
        NotPredictable: the model does not generate.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    if not getattr(base, "can_generate", bool)():
        raise NotPredictable(
            f"{type(base).__name__} does not generate; new_tokens=0 is one forward pass"
        )
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    with quiet():
        model.generate(
            **batch,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
        )


# ------------------------------------------------------------------------------- load and merge


def _load(workload: Workload, counter: LiveBytes, device: str) -> None:
    """The base's weights, then PEFT's way of putting an adapter on it: new weights, and the file's
    beside them until they are copied.
    """
    from peft import set_peft_model_state_dict

    if workload.adapter is None:
        raise UsageError("job 'load' puts an adapter on its base: name the adapter")
    base = make_base(workload, device)
    _begin(counter, base, [])
    if getattr(workload.adapter, "is_prompt_learning", False):
        raise NotPredictable(
            f"the load of {workload.method} cannot be predicted: PEFT computes the prompt meanwhile"
        )
    if workload.quantisation:
        raise NotPredictable(
            "a load on a base in 4 bits cannot be predicted: PEFT has the layers describe "
            "themselves meanwhile, in as many bytes as their numbers have digits"
        )
    with counter, torch.device(device), adapters_on_meta(), quiet():
        model = add_adapter(base, workload)
        held = _file(model, workload)
        file = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in held}
        set_peft_model_state_dict(model, file)


def _file(model: Any, workload: Workload) -> list[tuple[str, Sequence[int], torch.dtype]]:
    """What the adapter's file holds, or would if it were saved now."""
    from peft import get_peft_model_state_dict

    if workload.file:
        unknown = {info.dtype for info in workload.file.values()} - FORMATS.keys()
        if unknown:
            raise NotPredictable(f"the adapter's file has tensors in {', '.join(sorted(unknown))}")
        return [(name, info.shape, FORMATS[info.dtype]) for name, info in workload.file.items()]
    saved = get_peft_model_state_dict(model)
    return [(name, tensor.shape, tensor.dtype) for name, tensor in saved.items()]


def _merge(workload: Workload, counter: LiveBytes, device: str) -> None:
    """``merge_and_unload``: the updates added to the weights, layer by layer."""
    model: Any = make_model(workload, device)
    if not hasattr(model, "merge_and_unload"):
        raise NotPredictable(f"{workload.method} cannot be merged")
    _begin(counter, model, [])
    with _merging(workload, counter, device), counter, torch.no_grad(), quiet():
        try:
            model.merge_and_unload()
        except ValueError as error:  # some methods merge into plain layers only
            raise NotPredictable(f"{workload.method} cannot be merged: {one_line(error)}") from None


def _merging(
    workload: Workload, counter: LiveBytes, device: str
) -> contextlib.AbstractContextManager[None]:
    if device != "meta" or not workload.quantisation:
        return contextlib.nullcontext()
    return merges_on_meta(counter, through_host=counter.rounding is not exact)


# ------------------------------------------------------------------------------- common


_JOBS: Mapping[str, Callable[[Workload, LiveBytes, str], None]] = {
    "train_step": _train_step,
    "inference": _inference,
    "load": _load,
    "merge": _merge,
}


def _on(device: str, counter: LiveBytes, batch: Batch) -> Batch:
    if device != "meta":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    assert counter.shadows is not None
    return {name: counter.shadows.to_meta(tensor) for name, tensor in batch.items()}


def _begin(counter: LiveBytes, model: torch.nn.Module, batches: list[Batch]) -> None:
    """Show the counter what is there before."""
    gc.collect()
    counter.track_module(model)
    for batch in batches:
        for name, tensor in batch.items():
            counter.track(tensor, "batch", name)
