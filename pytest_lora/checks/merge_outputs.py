"""One layer's output, merged and unmerged, on the inputs it really gets.

Two questions.  In the dtype in use: are the two outputs as close as the roundings on both ways
allow?  And in float64, where rounding is negligible: is the layer's own unmerged forward what its
merge stands for?  The second is what ties the scaling of ``forward`` to that of ``merge``.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.checks.merge_layers import merge
from pytest_lora.loading import one_line
from pytest_lora.numerics.output_bound import LinearLengths, linear_distance
from pytest_lora.numerics.rounding import unit
from pytest_lora.numerics.streaming import widened
from pytest_lora.probe import plain_experts
from pytest_lora.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_lora.checks.merge_layers import LowRankLayer

__all__ = [
    "WideDistance",
    "attribute",
    "first_tensor",
    "forward_distance",
    "from_weight",
    "lengths_of",
    "native_distance",
    "wide_distance",
]

_MOST_OUTPUTS = 1 << 20
"""Outputs compared per layer: bounds the memory of the comparison, not of the layer."""

_WIDE_ROUNDINGS = 16
"""Float32 roundings per operand allowed in methods whose code fixes float32 for some steps."""


def first_tensor(output: Any) -> torch.Tensor:
    """The output, or the first of several (attention returns its weights, too)."""
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


_WEIGHT_ROUNDINGS = 8
"""Roundings to the weight's dtype allowed in methods without a rounding analysis of their own."""


def _rows(inputs: torch.Tensor, width: int) -> torch.Tensor:
    """The inputs as rows, no more of them than give a bounded number of outputs."""
    return inputs.reshape(-1, inputs.shape[-1])[: max(1, _MOST_OUTPUTS // max(width, 1))]


# ----------------------------------------------------------------------- in the dtype in use


def lengths_of(known: LowRankLayer, merged_weight: torch.Tensor, base: Any) -> LinearLengths:
    """What bounds a linear layer's outputs, from the merged weight and the factors."""
    update, bias = known.update, getattr(base, "bias", None)
    matrix = known.matrix(merged_weight)
    if known.kind == "conv1d":
        rows, factor, other = matrix.T, update.A.T, update.B
    else:
        rows, factor, other = matrix, update.B, update.A
    delta = _lengths(factor) * (abs(update.scaling) * float(other.double().norm()))
    size = torch.zeros_like(delta) if bias is None else bias.detach().double().abs()
    if known.bias is not None:
        size = size + known.bias.double().abs() * abs(update.scaling)
    return LinearLengths(
        merged=_lengths(rows),
        delta=delta,
        bias=size,
        inputs=rows.shape[1],
        rank=factor.shape[1],
        weight=merged_weight.dtype,
        factors=update.dtype,
    )


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    return lengths.double()


def native_distance(
    inputs: torch.Tensor, merged: torch.Tensor, unmerged: torch.Tensor, lengths: LinearLengths
) -> float:
    """Distance of the two outputs in multiples of its bound, for linear layers."""
    width = merged.shape[-1]
    x = _rows(inputs, width)
    a, b = (output.reshape(-1, width)[: x.shape[0]] for output in (merged, unmerged))
    return linear_distance(x, a, b, lengths)


def from_weight(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What a linear layer with that weight puts out, in float64, for the rows that are compared."""
    x = _rows(inputs, weight.shape[0])
    return torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )


# ----------------------------------------------------------------------- in float64


def forward_distance(
    layer: Any,
    known: LowRankLayer,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    output: torch.Tensor,
) -> float:
    """The unmerged forward of a plain LoRA layer against ``s B A x``, in float64.

    The base layer is left out on both sides, so that no weight has to be widened.  The bound is
    that of two float64 evaluations.
    """
    inputs = args[0]
    if known.kind in ("linear", "conv1d"):
        inputs = _rows(inputs, output.shape[-1])
        shape = (*inputs.shape[:-1], output.shape[-1])
    else:
        inputs = inputs[: max(1, _MOST_OUTPUTS * len(inputs) // max(output.numel(), 1))]
        shape = (len(inputs), *output.shape[1:])
    if inputs.is_floating_point():
        inputs = inputs.double()
    structure = Structure(layer)
    try:
        base = layer.base_layer
        layer.base_layer = _Silent(base, torch.Size(shape))
        with widened(layer, torch.float64):
            found = first_tensor(forward(inputs, *args[1:]))
    finally:
        structure.restore()
    expected = _delta_output(known, inputs, base)
    gap = (found.double() - expected).abs()
    bound = _wide_bound(known, inputs)
    return float((gap / bound).nan_to_num(torch.inf, torch.inf).max()) if gap.numel() else 0.0


class _Silent(torch.nn.Module):
    """Stands for a base layer and contributes nothing; everything else about it stays the same."""

    def __init__(self, base: torch.nn.Module, shape: torch.Size) -> None:
        super().__init__()
        self._base, self._shape = [base], shape  # in a list: its weights are not this module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._base[0], name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(self._shape, dtype=torch.float64, device=x.device)


def _delta_output(known: LowRankLayer, x: torch.Tensor, base: Any) -> torch.Tensor:
    """What the merged delta, and the scaled bias, add to the base layer's output."""
    update = known.update
    A, B, s = update.A.double(), update.B.double(), update.scaling
    bias = None if known.bias is None else known.bias.double() * s
    if known.kind == "embedding":
        scale = getattr(base, "embed_scale", 1.0)
        rows: torch.Tensor = (B[x] @ A) * s * (scale if type(base) is not torch.nn.Embedding else 1)
        return rows
    if known.kind == "convolution":
        delta = ((B @ A) * s).view(known.shape)
        convolved: torch.Tensor = base._conv_forward(x, delta, bias)
        return convolved
    result = (x @ B) @ A * s if known.kind == "conv1d" else (x @ A.T) @ B.T * s
    return result if bias is None else result + bias


def _wide_bound(known: LowRankLayer, x: torch.Tensor) -> float:
    update = known.update
    operations = 8 * (update.A.numel() // update.A.shape[0] + update.A.shape[0] + 8)
    size = float(x.norm()) if x.is_floating_point() else float(x.numel())
    reach = abs(update.scaling) * float(update.A.double().norm() * update.B.double().norm())
    bias = 0.0 if known.bias is None else float(known.bias.double().norm()) * abs(update.scaling)
    tiny = 2.0**-1000
    return operations * unit(torch.float64) * (reach * size + bias) + tiny


@dataclass(frozen=True, slots=True)
class WideDistance:
    """A layer merged and unmerged in float64, each in multiples of what is allowed.

    Attributes:
        output: merged output against unmerged output; 0 if the layer was not given any input.
        weights: the weights merged in the dtype in use against those merged in float64.
        unknown: why the layer's code could not be run in float64; empty if it could.
    """

    output: float = 0.0
    weights: float = 0.0
    unknown: str = ""


def wide_distance(
    layer: Any,
    forward: Callable[..., Any],
    call: tuple[tuple[Any, ...], dict[str, Any]] | None,
    native: Mapping[str, torch.Tensor],
    *,
    names: Sequence[str] = (),
) -> WideDistance:
    """Widen a layer to float64, run it unmerged, let PEFT merge it, and run it again.

    ``call`` is what the layer was called with, if it was; ``native`` holds base tensors as merged
    in the dtype in use, by name; ``names`` are adapters to merge in turn rather than all at once.

    Outputs may differ, as root mean squares, by ``16 u sqrt(k)`` of the output with float32's u:
    sixteen float32 roundings of every operand of k products, for code that fixes float32 in some
    steps.  Weights may differ, as Frobenius norms, by ``8 u`` of the weight with its dtype's u.
    """
    structure = Structure(layer)
    outputs: list[torch.Tensor] = []
    try:
        with plain_experts(layer), widened(layer, torch.float64):
            if call:
                outputs.append(_run_wide(forward, call))
            failure = merge(layer, safe_merge=False, names=names)
            if failure:
                return WideDistance(unknown=failure)
            if call:
                outputs.append(_run_wide(forward, call))
            base = layer.get_base_layer()
            weights = max((_weight_ratio(base, *item) for item in native.items()), default=0.0)
    except (RuntimeError, TypeError, ValueError) as error:
        return WideDistance(unknown=one_line(error))
    finally:
        structure.restore()
    return WideDistance(_output_ratio(outputs, _fan_in(layer)), weights)


def _run_wide(
    forward: Callable[..., Any], call: tuple[tuple[Any, ...], dict[str, Any]]
) -> torch.Tensor:
    args, kwargs = call
    output = forward(*map(_double, args), **{name: _double(item) for name, item in kwargs.items()})
    return first_tensor(output).double()


def _weight_ratio(base: Any, name: str, native: torch.Tensor) -> float:
    wide = attribute(base, name).double()
    allowed = _WEIGHT_ROUNDINGS * unit(native.dtype) * float(wide.norm())
    return _ratio(float((native.double() - wide).norm()), allowed)


def attribute(module: Any, name: str) -> torch.Tensor:
    """The tensor of a dotted name, parameter or not."""
    tensor: torch.Tensor = operator.attrgetter(name)(module)
    return tensor.detach()


def _output_ratio(outputs: list[torch.Tensor], fan_in: int) -> float:
    if not outputs:
        return 0.0
    unmerged, merged = outputs
    allowed = _WIDE_ROUNDINGS * unit(torch.float32) * fan_in**0.5 * float(unmerged.norm())
    return _ratio(float((merged - unmerged).norm()), allowed)


def _ratio(gap: float, allowed: float) -> float:
    if gap == 0:
        return 0.0
    return gap / allowed if allowed > 0 and math.isfinite(gap) else math.inf


def _double(item: Any) -> Any:
    floating = isinstance(item, torch.Tensor) and item.is_floating_point()
    return item.double() if floating else item


def _fan_in(layer: Any) -> int:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return weight.numel() // weight.shape[0] if weight is not None and weight.ndim else 1
