"""Taking a module tree back to what it was, from references, whatever was done to it.

PEFT changes a base model in place: it swaps child modules, turns gradients off, replaces methods,
edits the configuration, and may assign new data to a weight.  Undoing this through PEFT's own
``unload`` would trust the code under test.  A :class:`Structure` therefore keeps references (no
tensor is copied) to everything a tree is made of and puts them back.

What it cannot undo is a write *into* the memory of a tensor; that is what fingerprints are for.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Structure", "on_clones"]

_CONTAINERS = (dict, OrderedDict, list, set)


class _ModuleState(NamedTuple):
    module: torch.nn.Module
    kind: type[torch.nn.Module]
    attributes: dict[str, Any]
    contents: dict[str, Any]


class _TensorState(NamedTuple):
    tensor: torch.Tensor
    data: torch.Tensor
    requires_grad: bool
    grad: torch.Tensor | None
    attributes: dict[str, Any]


class Structure:
    """A module tree at one moment: modules, parameter objects, flags, hooks, configurations.

    Holds a reference to every module and tensor of the tree, and copies of nothing but small
    Python containers, so taking one costs microseconds per module.
    """

    def __init__(self, root: torch.nn.Module) -> None:
        self._modules = [_module_state(module) for module in root.modules()]
        self._names = dict(root.named_modules(remove_duplicate=True))
        self._tensors = list(_tensor_states(root))
        self._configs = [(config, _plain_copy(config)) for config in _configs(root)]

    def restore(self) -> None:
        """Put everything back.  Idempotent."""
        for state in self._modules:
            _restore_module(state)
        for tensor in self._tensors:
            _restore_tensor(tensor)
        for config, attributes in self._configs:
            _restore_config(config, attributes)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer of the tree's *own* modules as they hold it now.

        Names are those at the time the structure was taken, also while adapter layers are wrapped
        around the modules; a tied tensor appears under each of its names.  A quantised parameter is
        followed by the tensors it is read back with, such as the scales of its blocks.
        """
        states = {id(state.module): state for state in self._modules}
        for prefix, module in self._names.items():
            contents = states[id(module)].contents
            for kind in ("_parameters", "_buffers"):
                for name, then in contents[kind].items():
                    now = getattr(module, kind).get(name)
                    tensor = then if now is None else now
                    if tensor is not None:
                        full = f"{prefix}.{name}" if prefix else name
                        yield full, tensor
                        for part, held in _parts(tensor):
                            yield f"{full}.{part}", held

    def owner(self, name: str) -> tuple[torch.nn.Module, str]:
        """The module that holds the tensor ``name``, and the tensor's name within it."""
        prefix, _, leaf = name.rpartition(".")
        return self._names[prefix], leaf


@contextlib.contextmanager
def on_clones(module: torch.nn.Module) -> Iterator[None]:
    """Let ``module`` work on copies of its tensors for a while; then it has its own ones back.

    The tensor objects stay the same and only their memory is exchanged, so that a weight tied to
    another module's stays tied.
    """
    structure = Structure(module)
    try:
        for _, tensor in structure.tensors():
            tensor.data = tensor.data.clone()
        yield
    finally:
        structure.restore()


def _module_state(module: torch.nn.Module) -> _ModuleState:
    attributes = dict(module.__dict__)
    contents = {
        name: value.copy() for name, value in attributes.items() if type(value) in _CONTAINERS
    }
    return _ModuleState(module, type(module), attributes, contents)


def _tensor_states(root: torch.nn.Module) -> Iterator[_TensorState]:
    for tensor in (*root.parameters(), *root.buffers()):
        yield _tensor_state(tensor)
        for _, held in _parts(tensor):
            yield _tensor_state(held)


def _tensor_state(tensor: torch.Tensor) -> _TensorState:
    grad = tensor.grad if tensor.is_leaf else None
    return _TensorState(tensor, tensor.detach(), tensor.requires_grad, grad, dict(vars(tensor)))


def _parts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What bitsandbytes keeps beside a 4-bit weight, in an object of its own: no parameters."""
    state = getattr(tensor, "quant_state", None)
    for prefix, holder in (("", state), ("state2.", getattr(state, "state2", None))):
        for name, value in vars(holder).items() if holder is not None else ():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value


def _configs(root: torch.nn.Module) -> list[Any]:
    """Configuration objects reachable from the tree, nested ones included, each once."""
    found: dict[int, Any] = {}
    waiting = [
        value
        for module in root.modules()
        for name, value in vars(module).items()
        if name in ("config", "generation_config")
    ]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "__dict__") or isinstance(config, type):
            continue
        found[id(config)] = config
        waiting.extend(value for value in vars(config).values() if hasattr(value, "to_dict"))
    return list(found.values())


def _plain_copy(config: Any) -> dict[str, Any]:
    """The attributes, containers copied, nested configurations kept by reference."""
    return _copied(vars(config))


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: copy.deepcopy(value) if isinstance(value, dict | list | set) else value
        for name, value in attributes.items()
    }


def _restore_module(state: _ModuleState) -> None:
    module = state.module
    if type(module) is not state.kind:
        module.__class__ = state.kind  # parametrizations derive a class of their own
    module.__dict__.clear()
    module.__dict__.update(state.attributes)
    for name, contents in state.contents.items():
        container = state.attributes[name]
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(contents)


def _restore_tensor(state: _TensorState) -> None:
    tensor = state.tensor
    vars(tensor).clear()
    vars(tensor).update(state.attributes)
    if not _same_memory(tensor, state.data):
        tensor.data = state.data
    if tensor.requires_grad != state.requires_grad:
        tensor.requires_grad_(state.requires_grad)
    if tensor.is_leaf:
        tensor.grad = state.grad


def _same_memory(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    if tensor.dtype != data.dtype or tensor.shape != data.shape or tensor.device != data.device:
        return False
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return True
    return tensor.data_ptr() == data.data_ptr() and tensor.stride() == data.stride()


def _restore_config(config: Any, attributes: dict[str, Any]) -> None:
    vars(config).clear()
    vars(config).update(_copied(attributes))
