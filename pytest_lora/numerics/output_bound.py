"""How far two computed outputs of a linear layer, merged and unmerged, may lie apart.

Both are compared with the exact ``y = x (W + s B A)^T + b``; the bound on their distance is the sum
of the two bounds.  Everything is bounded by lengths of rows (Cauchy-Schwarz), so that it costs no
second product:

* merged: the merged weight's own rounding, the sum of k products, the rounding of the result;
* unmerged: the base product, the product with A, the product with B, the scaling, the sum.

These are worst cases over all signs of the rounding errors, about ``sqrt(k)`` above what is seen.
They tie the two code paths together in the dtype they are used in; the sharp statements are the
one at the weights (:mod:`pytest_lora.numerics.merge_bound`) and the one in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pytest_lora.numerics.rounding import gamma, precision, smallest, unit

__all__ = ["LinearLengths", "linear_bound", "linear_distance"]

_SLACK = 1.01
"""Covers products of several (1 + u) and lengths that were themselves computed in float32."""


@dataclass(frozen=True, slots=True)
class LinearLengths:
    """Lengths that bound a linear layer with k inputs, d outputs and an update of rank r.

    Attributes:
        merged: lengths of the rows of the merged weight, (d,).
        delta: ``|s| |B_j| |A|`` with the Frobenius norm of A, (d,); bounds the rows of the delta.
        bias: magnitudes of base bias plus scaled adapter bias, (d,) or a zero.
        inputs, rank: k and r.
        weight, factors: dtypes of the base weight and of the factors.
    """

    merged: torch.Tensor
    delta: torch.Tensor
    bias: torch.Tensor
    inputs: int
    rank: int
    weight: torch.dtype
    factors: torch.dtype


def linear_distance(
    x: torch.Tensor, merged: torch.Tensor, unmerged: torch.Tensor, lengths: LinearLengths
) -> float:
    """The largest distance of two outputs in multiples of its bound.

    ``x`` is (n, k), exactly as the layer got it; the outputs are (n, d).
    """
    bound = linear_bound(x, lengths)
    gap = (merged.double() - unmerged.double()).abs()
    gap = torch.where(merged == unmerged, 0.0, gap)  # equal infinities agree
    ratio = torch.where(gap == 0, 0.0, gap / bound)
    return float(ratio.nan_to_num(torch.inf, torch.inf).max()) if ratio.numel() else 0.0


def linear_bound(x: torch.Tensor, lengths: LinearLengths) -> torch.Tensor:
    """The bound itself, (n, d) in float64; either output is also that close to the exact one."""
    return _merged_error(x, lengths) + _unmerged_error(x, lengths)


def _row_lengths(x: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
    return lengths * _SLACK


def _low(lengths: LinearLengths) -> float:
    """Unit roundoff of half precision factors, to which every intermediate result is rounded."""
    low = precision(lengths.factors) < precision(torch.float32)
    return unit(lengths.factors) if low else 0.0


def _underflow(lengths: LinearLengths) -> float:
    return 4 * lengths.inputs * (smallest(lengths.weight) + smallest(lengths.factors))


def _merged_error(x: torch.Tensor, lengths: LinearLengths) -> torch.Tensor:
    u = unit(lengths.weight)
    sums = torch.promote_types(lengths.weight, torch.float32)
    factors = torch.promote_types(lengths.factors, torch.float32)
    of_delta = gamma(lengths.rank, factors) + 3 * unit(factors) + 3 * _low(lengths) + u
    of_weight = 2 * u * lengths.merged + of_delta * lengths.delta
    size = _row_lengths(x) * lengths.merged + lengths.bias
    total = _row_lengths(x) * of_weight + (gamma(lengths.inputs + 1, sums) + 2 * u) * size
    return _SLACK * total + _underflow(lengths)


def _unmerged_error(x: torch.Tensor, lengths: LinearLengths) -> torch.Tensor:
    u = unit(lengths.weight)
    sums = torch.promote_types(lengths.weight, torch.float32)
    factors = torch.promote_types(lengths.factors, torch.float32)
    size = _row_lengths(x) * (lengths.merged + lengths.delta) + lengths.bias
    of_base = (gamma(lengths.inputs + 1, sums) + 2 * u) * size
    casts = unit(lengths.factors) if precision(lengths.factors) < precision(x.dtype) else 0.0
    of_products = gamma(lengths.inputs, factors) + gamma(lengths.rank + 1, factors)
    of_adapter = of_products + 4 * unit(factors) + 4 * _low(lengths) + casts
    adapter = of_adapter * (_row_lengths(x) * lengths.delta + lengths.bias)
    return _SLACK * (of_base + adapter + 2 * u * size) + _underflow(lengths)
