"""PEFT's tuner layers as the merge checks see them: what adapts a layer, and what a merge does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_lora.checks.four_bit import doubt_about, is_four_bit, read_back
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import one_line
from pytest_lora.numerics.merge_bound import LowRankUpdate
from pytest_lora.numerics.rounding import Ball, is_floating_format

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

__all__ = [
    "LowRankLayer",
    "NotMergeable",
    "adapters_of",
    "as_text",
    "base_tensors",
    "describe",
    "is_token_layer",
    "merge",
    "mergeable_layers",
    "quantisation_of",
    "tuner_layers",
    "unmerge",
]

_LORA_MODULE = "peft.tuners.lora.layer"
_FOUR_BIT_MODULE = "peft.tuners.lora.bnb"
_REFUSAL = re.compile(r"\b(?:un)?merg(?:e|ing)\b|not supported", re.IGNORECASE)
_CONVOLUTIONS = frozenset({"Conv1d", "Conv2d", "Conv3d"})


class NotMergeable(Exception):
    """PEFT says by design that this layer cannot be merged (or unmerged)."""


@dataclass(frozen=True, slots=True)
class LowRankLayer:
    """A LoRA layer whose merge has a formula.

    Attributes:
        update: ``s B A`` (and DoRA's magnitudes), oriented like :meth:`matrix`.
        shape: shape of the weight it is merged into.
        transposed: whether the update's matrix is the transposed weight (DoRA on layers that
            store their weight as (in, out)).
        bias: the adapter's own bias (``lora_bias``), or ``None``.
        kind: ``linear``, ``conv1d`` (GPT-2's transposed linear), ``embedding`` or ``convolution``.
        four_bit: whether the weight is held in 4-bit blocks, so that a merge quantises it again.
    """

    update: LowRankUpdate
    shape: tuple[int, ...]
    transposed: bool
    bias: torch.Tensor | None
    kind: str
    four_bit: bool = False

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the (d, k) matrix the update is given for; a view."""
        return weight.T if self.transposed else weight.flatten(1)

    def place(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """The index in the weight of an index in :meth:`matrix`."""
        if self.transposed:
            return index[::-1]
        row, rest = index
        inner: list[int] = []
        for size in reversed(self.shape[1:]):
            rest, here = divmod(rest, size)
            inner.append(here)
        return (row, *reversed(inner))

    def bias_ball(self) -> Ball:
        """``s`` times the adapter's bias, with the error a computed one may have."""
        if self.bias is None:
            raise ValueError("this layer has no adapter bias")
        wide = self.update.accumulator
        ball = Ball.exact(self.bias).scaled(self.update.scaling, wide)
        return ball if wide == self.bias.dtype else ball.rounded(self.bias.dtype)


def tuner_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """``(qualified name, layer)`` of every PEFT tuner layer, outermost first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def mergeable_layers(model: Any) -> dict[str, Any]:
    """The tuner layers that the active adapter has weights in, by name.

    Raises:
        NotApplicable: there are none, or their base weights are quantised in another way than
            plain LoRA's in 4-bit blocks.
    """
    config = model.peft_config[model.active_adapter]
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if config.is_prompt_learning:
        raise NotApplicable(f"{kind} adds virtual tokens, not weights: there is nothing to merge")
    layers = {name: layer for name, layer in tuner_layers(model) if adapters_of(layer)}
    if not layers:
        raise NotApplicable(f"no layer of this {kind} adapter can be merged into a base weight")
    for name, layer in layers.items():
        reason = quantisation_of(layer)
        if reason and not _is_known_four_bit(layer):
            raise NotApplicable(
                f"{name}: {reason}; a merge quantises the weight again, and the rounding analysis "
                "is for floating-point weights, and for plain LoRA on bitsandbytes' 4-bit ones"
            )
    return layers


def base_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """The floating-point parameters of the base layer by name, sharing its memory.

    A weight in 4-bit blocks is among them, read back.
    """
    named = dict(layer.get_base_layer().named_parameters())
    found = {name: p.detach() for name, p in named.items() if p.is_floating_point()}
    blocks = {name: read_back(p) for name, p in named.items() if is_four_bit(p)}
    return {**blocks, **found}


def as_text(tensor: torch.Tensor) -> str:
    """Dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def adapters_of(layer: Any) -> list[str]:
    """The active adapters that have parameters in this layer."""
    containers = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    present = {key for held in containers if held is not None for key in _keys(held)}
    return [name for name in layer.active_adapters if name in present]


def _keys(container: Any) -> Iterator[str]:
    """Adapter names of a ModuleDict, ParameterDict or BufferDict; none of anything else."""
    return iter(container.keys() if hasattr(container, "keys") else ())


def is_token_layer(layer: Any) -> bool:
    """Whether the layer replaces single embedding rows (PEFT's trainable tokens)."""
    return type(layer).__name__ == "TrainableTokensLayer"


def quantisation_of(layer: Any) -> str:
    """What makes the base layer's weight a quantised one; empty for a plain floating weight."""
    base = layer.get_base_layer()
    for name, parameter in base.named_parameters():
        if is_four_bit(parameter) and doubt_about(parameter):
            return f"{name} is a {type(parameter).__name__}, {doubt_about(parameter)}"
        if hasattr(parameter, "__tensor_flatten__") or hasattr(parameter, "quant_state"):
            return f"{name} is a {type(parameter).__name__}"
        if not is_floating_format(parameter.dtype):
            return f"{name} is {parameter.dtype}"
    if getattr(base, "weight", None) is None and hasattr(base, "qweight"):
        return f"{type(base).__name__} holds packed integers"
    return ""


def _is_known_four_bit(layer: Any) -> bool:
    adapters = adapters_of(layer)
    weight = getattr(layer.get_base_layer(), "weight", None)
    if len(adapters) != 1 or not is_four_bit(weight) or doubt_about(weight):
        return False
    known = describe(layer, adapters[0], safe_merge=False)
    return known is not None and known.four_bit


def merge(layer: Any, *, safe_merge: bool, names: Sequence[str] = ()) -> str:
    """Merge the layer with PEFT's own call; returns what went wrong, empty if nothing did.

    With ``names`` these adapters, one after the other; else those that are active.

    Raises:
        NotMergeable: PEFT refuses by design.
    """

    def carry_out() -> None:
        if not names:
            layer.merge(safe_merge=safe_merge)
        for name in names:
            layer.merge(safe_merge=safe_merge, adapter_names=[name])

    return _attempt(carry_out)


def unmerge(layer: Any) -> str:
    """Likewise for unmerging."""
    return _attempt(layer.unmerge)


def _attempt(call: Callable[[], None]) -> str:
    try:
        call()
    except NotImplementedError as error:
        raise NotMergeable(one_line(error)) from None
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = str(error)
        if "NaN" not in text and _REFUSAL.search(text):
            raise NotMergeable(one_line(error)) from None
        return one_line(error)
    return ""


def describe(layer: Any, adapter: str, *, safe_merge: bool) -> LowRankLayer | None:
    """The formula of the layer's merge, or ``None`` where PEFT computes something else."""
    cls = type(layer)
    if cls.__module__ == _FOUR_BIT_MODULE and cls.__name__ == "Linear4bit":
        return _describe_four_bit(layer, adapter)
    if cls.__module__ != _LORA_MODULE or not _plain_or_dora(layer, adapter):
        return None
    if cls.__name__ == "Linear":
        return _describe_linear(layer, adapter, safe_merge)
    if cls.__name__ == "Embedding":
        return _describe_embedding(layer, adapter)
    if cls.__name__ in _CONVOLUTIONS:
        return _describe_convolution(layer, adapter, safe_merge)
    return None


def _plain_or_dora(layer: Any, adapter: str) -> bool:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    return variant is None or type(variant).__name__.startswith("Dora")


def _magnitude(layer: Any, adapter: str) -> torch.Tensor | None:
    held = layer.lora_magnitude_vector
    if not layer.use_dora.get(adapter, False) or adapter not in held:
        return None
    vector: torch.Tensor = held[adapter].weight
    return vector.detach().flatten()


def _bias(layer: Any, adapter: str) -> torch.Tensor | None:
    if not getattr(layer, "lora_bias", {}).get(adapter, False):
        return None
    bias: torch.Tensor = layer.lora_B[adapter].bias
    return bias.detach()


def _describe_linear(layer: Any, adapter: str, safe_merge: bool) -> LowRankLayer:
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    swapped = bool(layer.fan_in_fan_out)
    kind = "conv1d" if swapped else "linear"
    return _matrix_layer(layer, adapter, A, B, swapped=swapped, kind=kind, rounds=safe_merge)


def _describe_four_bit(layer: Any, adapter: str) -> LowRankLayer | None:
    if getattr(layer, "lora_variant", {}).get(adapter) is not None:
        return None
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    update = LowRankUpdate(B, A, float(layer.scaling[adapter]))
    shape = tuple(layer.get_base_layer().weight.quant_state.shape)
    return LowRankLayer(update, shape, False, _bias(layer, adapter), "linear", four_bit=True)


def _describe_embedding(layer: Any, adapter: str) -> LowRankLayer:
    A, B = layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()
    return _matrix_layer(layer, adapter, A, B, swapped=True, kind="embedding", rounds=True)


def _matrix_layer(
    layer: Any,
    adapter: str,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    swapped: bool,
    kind: str,
    rounds: bool,
) -> LowRankLayer:
    """A layer with a matrix for a weight; ``swapped`` if it is stored as (in, out).

    Plain LoRA is judged as stored, for the sake of memory order; DoRA needs whole output rows.
    """
    magnitude = _magnitude(layer, adapter)
    transposed = swapped and magnitude is not None
    left, right = (A.T, B.T) if swapped and not transposed else (B, A)
    update = LowRankUpdate(left, right, float(layer.scaling[adapter]), magnitude, rounds)
    shape = tuple(layer.get_base_layer().weight.shape)
    return LowRankLayer(update, shape, transposed, _bias(layer, adapter), kind)


def _describe_convolution(layer: Any, adapter: str, safe_merge: bool) -> LowRankLayer | None:
    base = layer.get_base_layer()
    if base.groups != 1:
        return None
    A = layer.lora_A[adapter].weight.detach().flatten(1)
    B = layer.lora_B[adapter].weight.detach().flatten(1)
    scaling = float(layer.scaling[adapter])
    update = LowRankUpdate(B, A, scaling, _magnitude(layer, adapter), safe_merge)
    return LowRankLayer(
        update, tuple(base.weight.shape), False, _bias(layer, adapter), "convolution"
    )
