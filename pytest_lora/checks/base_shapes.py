"""The modules and shapes of a base model, without its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora import loading
from pytest_lora.errors import CannotRun

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_lora.adapter import Adapter

__all__ = ["BaseModule", "BaseShapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseModule:
    """One module.

    Attributes:
        name: its path.
        kind: ``linear``, ``conv1d`` (GPT-2's transposed linear), ``conv``, ``embedding`` or
            ``other``; ``unknown`` where only the shape of its tensors is known.
        shapes: those of the parameters it holds itself, by their names in it.
    """

    name: str
    kind: str
    shapes: Mapping[str, Shape]

    @property
    def features(self) -> tuple[tuple[int, int], ...]:
        """``(in, out)`` as a linear layer; both readings where the orientation is not known."""
        shape = self.shapes.get("weight", ())
        if len(shape) != 2:
            return ()
        straight, swapped = (shape[1], shape[0]), (shape[0], shape[1])
        return {"linear": (straight,), "conv1d": (swapped,), "unknown": (straight, swapped)}.get(
            self.kind, ()
        )


@dataclass(frozen=True)
class BaseShapes:
    """All modules of a base model.

    Attributes:
        title: class and place, for messages.
        modules: by path.
        model: the model on the meta device; None where only the checkpoint's headers were readable.
        input, output: paths of the input and output embeddings, where there are any.
        tied: whether those two share one weight.
    """

    title: str
    modules: Mapping[str, BaseModule]
    model: torch.nn.Module | None = None
    input: str | None = None
    output: str | None = None
    tied: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embedding."""
        shape = self.modules[self.input].shapes.get("weight") if self.input else None
        return shape[0] if shape else None

    @classmethod
    def from_directory(cls, path: Path, adapter: Adapter) -> BaseShapes:
        """From the configuration in ``path``, in the class that ``adapter``'s task calls for.

        Where the configuration needs code that is not run here, from the names and shapes in the
        headers of the weights.

        Raises:
            CannotRun: neither can be had.
        """
        try:
            spec = loading.spec_for(path, adapter, device="cpu")
            config = loading.base_config(path)
            if spec.num_labels is not None:
                config.num_labels = spec.num_labels
            model = loading.meta_model(spec.model_class, config)
        except CannotRun as reason:
            return cls._from_headers(path, reason)
        return cls.from_model(model, f"{type(model).__name__} in {path}")

    @classmethod
    def from_model(cls, model: torch.nn.Module, title: str) -> BaseShapes:
        """From a model on any device; a real one gets a twin on the meta device."""
        twin = on_meta(model)
        modules = {name: _describe(name, module) for name, module in twin.named_modules() if name}
        inputs, outputs = _embedding(twin, "input"), _embedding(twin, "output")
        names = {id(module): name for name, module in twin.named_modules()}
        weights = [getattr(module, "weight", None) for module in (inputs, outputs)]
        return cls(
            title,
            modules,
            twin,
            names.get(id(inputs)),
            names.get(id(outputs)),
            tied=weights[0] is not None and weights[0] is weights[1],
        )

    @classmethod
    def _from_headers(cls, path: Path, reason: CannotRun) -> BaseShapes:
        try:
            headers = loading.weight_headers(path)
        except CannotRun:
            raise reason from None
        shapes: dict[str, dict[str, Shape]] = {}
        for header in headers:
            for key, info in header.tensors.items():
                module, _, leaf = key.rpartition(".")
                shapes.setdefault(module, {})[leaf] = info.shape
        modules = {name: BaseModule(name, "unknown", held) for name, held in shapes.items()}
        note = f"judged by the tensors in the weights' headers alone, because {reason}"
        return cls(f"the weights in {path}", modules, notes=(note,))


def on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of ``model`` whose tensors are all on the meta device; none is copied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _describe(name: str, module: torch.nn.Module) -> BaseModule:
    held = module.named_parameters(recurse=False)
    return BaseModule(name, _kind(module), {leaf: tuple(p.shape) for leaf, p in held})


def _kind(module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return "conv"
    return "conv1d" if type(module).__name__ == "Conv1D" else "other"


def _embedding(model: torch.nn.Module, which: str) -> Any:
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None
