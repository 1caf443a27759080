"""LoRA layers that do nothing wrong, each with a habit that not every layer has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Layer(nn.Module):
    """Several adapters, of which at most one is at work."""

    merges_in_eval = False

    def __init__(self, base: nn.Linear, r: int, alpha: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.active: str | None = "one"
        self.merged: str | None = None
        self.on = True
        self.new("one", r, alpha)

    def new(self, name: str, r: int, alpha: int) -> None:
        weight = self.base.weight
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.A[name] = nn.Parameter(torch.randn(r, weight.shape[1], **like) / r)
        self.B[name] = nn.Parameter(torch.zeros(weight.shape[0], r, **like))
        self.scaling[name] = alpha / r

    def delta(self, name: str) -> torch.Tensor:
        return self.scaling[name] * self.B[name] @ self.A[name]

    @torch.no_grad()
    def put_in(self) -> None:
        if self.merged is None and self.on and self.active is not None:
            self.base.weight += self.delta(self.active)
            self.merged = self.active

    @torch.no_grad()
    def take_out(self) -> None:
        if self.merged is not None:
            self.base.weight -= self.delta(self.merged)
            self.merged = None

    def settle(self) -> None:
        if self.merges_in_eval and not self.training:
            self.put_in()

    def train(self, mode: bool = True) -> Layer:
        super().train(mode)
        if self.merges_in_eval and mode:
            self.take_out()
        self.settle()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if self.merged is None and self.on and self.active is not None:
            A, B = self.A[self.active], self.B[self.active]
            y = y + self.scaling[self.active] * (x @ A.T) @ B.T
        return y


def layers(model: nn.Module) -> dict[str, Layer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}


class Single:
    """One adapter, which can be switched off."""

    layer: type[Layer] = Layer

    def attach(self, model: nn.Module, targets: list[str], r: int, alpha: int) -> nn.Module:
        model.requires_grad_(False)
        for name in targets:
            setattr(model, name, self.layer(getattr(model, name), r, alpha))
        return model

    def factors(self, model: nn.Module, name: str = "one") -> dict[str, Any]:
        return {
            where: (layer.A[name], layer.B[name])
            for where, layer in layers(model).items()
            if name in layer.A
        }

    def disable(self, model: nn.Module) -> None:
        for layer in layers(model).values():
            layer.take_out()
            layer.on = False

    def enable(self, model: nn.Module) -> None:
        for layer in layers(model).values():
            layer.on = True
            layer.settle()


class Several(Single):
    """With adapters that come, take turns, and go."""

    def add(self, model: nn.Module, name: str, targets: list[str], r: int, alpha: int) -> None:
        for where, layer in layers(model).items():
            if where in targets:
                layer.new(name, r, alpha)
                layer.A[name].requires_grad_(False)
                layer.B[name].requires_grad_(False)

    def activate(self, model: nn.Module, name: str) -> None:
        for layer in layers(model).values():
            layer.take_out()
            layer.active = name if name in layer.A else None
            for key in layer.A:
                layer.A[key].requires_grad_(key == name)
                layer.B[key].requires_grad_(key == name)
            layer.settle()

    def delete(self, model: nn.Module, name: str) -> None:
        for layer in layers(model).values():
            if name in layer.A:
                if layer.active == name:
                    layer.take_out()
                    layer.active = None
                del layer.A[name], layer.B[name], layer.scaling[name]


class _InEval(Layer):
    merges_in_eval = True


class MergesInEval(Several):
    """As loralib's layers do."""

    layer = _InEval


class _Buffered(Layer):
    def __init__(self, base: nn.Linear, r: int, alpha: int) -> None:
        super().__init__(base, r, alpha)
        self.register_buffer("in_use", torch.tensor(self.scaling["one"]))


class KeepsWhatIsInUse(Several):
    """The scaling at work is a buffer, as one has it for a compiler."""

    layer = _Buffered

    def activate(self, model: nn.Module, name: str) -> None:
        super().activate(model, name)
        for layer in layers(model).values():
            if name in layer.scaling:
                layer.get_buffer("in_use").fill_(layer.scaling[name])


class FreezesWhatIsMerged(Single):
    """Merged for good: the factors train no more."""

    def merge(self, model: nn.Module) -> None:
        for layer in layers(model).values():
            layer.put_in()
            layer.A["one"].requires_grad_(False)
            layer.B["one"].requires_grad_(False)


class DropsWhatIsMerged(Single):
    """Merged for good: the factors are gone."""

    def factors(self, model: nn.Module, name: str = "one") -> dict[str, Any]:
        return {where: (at.A[name], at.B[name]) for where, at in layers(model).items()}

    def merge(self, model: nn.Module) -> None:
        for layer in layers(model).values():
            if "one" in layer.A:
                layer.put_in()
                layer.active = layer.merged = None
                del layer.A["one"], layer.B["one"]


class RefusesMergedBases(Several):
    """Merged for good, which it says itself: then nothing is added any more."""

    disable = enable = None  # type: ignore[assignment]

    def merge(self, model: nn.Module) -> None:
        for layer in layers(model).values():
            layer.put_in()

    def unmerge(self, model: nn.Module) -> None:
        raise NotImplementedError("merged for good")

    def add(self, model: nn.Module, name: str, targets: list[str], r: int, alpha: int) -> None:
        if any(layer.merged for layer in layers(model).values()):
            raise RuntimeError("the base has an adapter merged into it")
        super().add(model, name, targets, r, alpha)
