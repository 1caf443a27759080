"""Base models that are larger than a device: accelerate places them, and every weight stays real.

What does not fit the GPUs accelerate leaves in memory or on disk, puts a tensor without data (on
the meta device) in its place, and brings the numbers in for the length of a module's forward.
Nothing could be judged about such weights between two forwards, and PEFT would place them anew.  So
its placement is kept and its hooks on what was left behind are replaced: the weights are tensors
again, in memory or mapped from their files, and visit the device block by block.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.errors import CannotRun
from pytest_lora.sizes import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Placing", "make_readable", "require_readable"]

_AWAY = ("cpu", "disk")


class Placing:
    """The arguments that let ``from_pretrained`` place a model, and what becomes of it.

    Args:
        device_map: accelerate's policy: ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``.
        max_memory: ``device=size`` for GPUs by number and for ``cpu``; empty for what is free.
        device: a CPU keeps the model off any GPU.
    """

    def __init__(self, device_map: str, max_memory: Sequence[str], device: torch.device) -> None:
        sizes = {_place(name): parse_bytes(size) for name, _, size in map(_pair, max_memory)}
        if device.type == "cpu":
            sizes = {name: size for name, size in sizes.items() if name == "cpu"}
        self.folder = tempfile.mkdtemp(prefix="pytest-lora-")
        self.options: dict[str, Any] = {"device_map": device_map, "offload_folder": self.folder}
        if sizes or device.type == "cpu":
            self.options["max_memory"] = sizes or {"cpu": 1 << 62}

    def finish(self, model: torch.nn.Module) -> None:
        """Make the model's weights readable; the folder goes when the model goes."""
        weakref.finalize(model, shutil.rmtree, self.folder, ignore_errors=True)
        make_readable(model)

    def abandon(self) -> None:
        """After a model that did not load."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _pair(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _place(name: str) -> str | int:
    return int(name) if name.isdecimal() else name


def make_readable(model: torch.nn.Module) -> None:
    """Give every weight that accelerate left behind its numbers, and its block a way to the device.

    Raises:
        CannotRun: a weight remains without numbers.
    """
    from transformers import PreTrainedModel

    places: Mapping[str, Any] = model.__dict__.pop("hf_device_map", {})
    devices = {name: _device_of(model.get_submodule(name)) for name, at in places.items()
               if at in _AWAY}  # fmt: skip
    for module in model.modules():
        hook = _offloading(module)
        if hook is not None:
            _take_back(module, hook)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    require_readable(model)
    for name, device in devices.items():
        if device is not None and device.type != "cpu":
            _let_visit(model.get_submodule(name), device)


def require_readable(model: torch.nn.Module) -> None:
    """Raise CannotRun for a model some of whose weights have no numbers between two forwards."""
    named = (*model.named_parameters(), *model.named_buffers())
    missing = [name for name, tensor in named if tensor.is_meta]
    if missing:
        raise CannotRun(
            f"{len(missing)} tensors of the base model are offloaded, {missing[0]} the first: they "
            "hold no numbers that could be judged; let pytest-lora load it with --lora-device-map, "
            "which keeps them readable"
        )


def _offloading(module: torch.nn.Module) -> Any:
    """Accelerate's hook that brings this module's weights in, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((item for item in hooks if getattr(item, "offload", False)), None)


def _device_of(block: torch.nn.Module) -> torch.device | None:
    """Where a block that is kept elsewhere runs."""
    for module in block.modules():
        hook = _offloading(module)
        if hook is not None:
            return torch.device(hook.execution_device)
    return None


def _take_back(module: torch.nn.Module, hook: Any) -> None:
    from accelerate.hooks import remove_hook_from_module

    stored = hook.weights_map
    remove_hook_from_module(module)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            value = torch.nn.Parameter(stored[name], requires_grad=parameter.requires_grad)
            module._parameters[name] = value


def _let_visit(block: torch.nn.Module, device: torch.device) -> None:
    """Run a block, and what an adapter has added to it by then, on the device."""
    forward = block.forward

    def visiting(*args: Any, **kwargs: Any) -> Any:
        with _on_device(block, device):
            return forward(*args, **kwargs)

    block.forward = visiting


@contextlib.contextmanager
def _on_device(block: torch.nn.Module, device: torch.device) -> Iterator[None]:
    moved = [(t, t.data) for t in (*block.parameters(), *block.buffers()) if t.device != device]
    try:
        for tensor, data in moved:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in moved:
            tensor.data = data
