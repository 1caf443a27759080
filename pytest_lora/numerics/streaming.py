"""Running one module at a time differently: with other weights, or in another format.

A model is never copied.  A module works for the length of its own forward pass on tensors it was
lent and has its own back afterwards, so that extra memory is that of one module.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["computing_in", "intercepted", "widened"]


@contextlib.contextmanager
def intercepted(
    modules: Mapping[str, torch.nn.Module],
    make: Callable[[str, torch.nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Replace the forward of each module by ``make(name, module, its own forward)``."""
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.__dict__["forward"] = make(name, module, module.forward)
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]


@contextlib.contextmanager
def widened(module: torch.nn.Module, dtype: torch.dtype, *, recurse: bool = True) -> Iterator[None]:
    """Let every floating-point parameter and buffer of the module be ``dtype`` for a while."""
    floating = [t for t in _tensors(module, recurse=recurse) if t.is_floating_point()]
    before = [t.data for t in floating]
    try:
        for tensor in floating:
            tensor.data = tensor.data.to(dtype, copy=True)  # what is written into is given up
        yield
    finally:
        for tensor, data in zip(floating, before, strict=True):
            tensor.data = data


@contextlib.contextmanager
def computing_in(
    model: torch.nn.Module,
    dtype: torch.dtype,
    *,
    whole: Callable[[torch.nn.Module], bool] = lambda module: False,
) -> Iterator[None]:
    """Let the whole model compute in ``dtype``, widening one module's weights at a time.

    Args:
        model: any model whose modules use their own tensors, and those of others only inside
            modules that ``whole`` picks.
        dtype: the format to compute in.  Where the model's code itself names a format for some
            step, that step stays in it.
        whole: modules to widen together with everything inside them.
    """
    units = _units(model, whole)

    def make(name: str, module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wide(*args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode(False), torch.no_grad():
                args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
                with widened(module, dtype, recurse=whole(module)):
                    return forward(*args, **kwargs)

        return wide

    with intercepted(units, make):
        yield


def _units(
    model: torch.nn.Module, whole: Callable[[torch.nn.Module], bool]
) -> dict[str, torch.nn.Module]:
    """The modules that hold tensors themselves, and the ones to be taken as a whole."""
    found: dict[str, torch.nn.Module] = {}
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if whole(module):
            found[prefix] = module
            continue
        if any(True for _ in (*module.parameters(False), *module.buffers(False))):
            found[prefix] = module
        waiting += [(f"{prefix}.{name}", child) for name, child in module.named_children()]
    return found


def _tensors(module: torch.nn.Module, *, recurse: bool) -> list[torch.Tensor]:
    """Parameters and buffers, each once, from one walk: some of PEFT's layers replace their
    parameters whenever they are walked.
    """
    found: dict[int, torch.Tensor] = {}
    for part in module.modules() if recurse else (module,):
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors as ``dtype``, inside plain containers too."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
