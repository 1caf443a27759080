"""Weights in 4-bit blocks (bitsandbytes' NF4 and FP4), and how a merge into them is judged.

A block of ``n`` consecutive elements is stored as one scale ``a``, the largest magnitude in it, and
sixteen possible multiples of it: ``w = a c[i]`` with the code ``c`` of the format (T. Dettmers et
al., QLoRA, 2023, section 3).  With double quantisation the scales, less their mean, are stored in
8-bit blocks of 256 in the same way.

Merging computes ``M = W + s B A`` from the dequantised ``W`` and quantises ``M`` again.  So the
merged weight is no rounding of ``M`` in the usual sense: an element moves by up to half a gap of
the code times its block's scale, which dwarfs most deltas.  But which of the sixteen codes it gets
is certain unless ``M / a`` lies within the rounding error of the middle between two of them.  The
bound therefore is an interval per element: from the lowest to the highest code that the rounding
errors of ``M`` and ``a`` admit, times what the stored scale can be.  Derivation: docs/numerics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pytest_lora.numerics.merge_bound import LowRankUpdate, WeightError, evaluate
from pytest_lora.numerics.rounding import Ball, gamma, half_ulp, precision, unit

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BlockFormat", "Scales", "dequantise", "judge_requantised"]

_SINGLE = torch.float32
"""Scales, their mean and the ratios to them are computed in float32."""
_STEPS = 4 * unit(_SINGLE)
"""Relative error of ``M / a``: the reciprocal, the product, the code's own and its middle's."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How a tensor is stored in blocks.

    Attributes:
        code: the multiples of a block's scale, (16,) or (256,), ascending, float64.
        size: elements per block.
        dtype: what the tensor is dequantised to.
        scales: how the scales themselves are stored; ``None`` for float32.
    """

    code: torch.Tensor
    size: int
    dtype: torch.dtype
    scales: BlockFormat | None = None

    def holds_like(self, other: BlockFormat) -> bool:
        """Whether two tensors are stored alike, whatever they are read back as."""
        if (self.size, self.scales is None) != (other.size, other.scales is None):
            return False
        return torch.equal(self.code, other.code)

    @property
    def middles(self) -> torch.Tensor:
        """Where the nearer of two neighbouring codes changes."""
        return (self.code[1:] + self.code[:-1]) / 2


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a stored 4-bit weight, as bitsandbytes holds them.

    Attributes:
        absmax: one per block, float32; or 8-bit codes of these where ``outer`` is given.
        outer: scales of the scales, one per 256 of them, float32.
        outer_code: the 256 multiples of these.
        offset: the mean that was taken off before.
    """

    absmax: torch.Tensor
    outer: torch.Tensor | None = None
    outer_code: torch.Tensor | None = None
    offset: torch.Tensor | float = 0.0

    def values(self) -> torch.Tensor:
        """The scales, float32."""
        if self.outer is None or self.outer_code is None:
            return self.absmax.float()
        codes = self.outer_code[self.absmax.long()]
        return codes * self.outer.repeat_interleave(256)[: codes.numel()] + self.offset


def dequantise(
    packed: torch.Tensor,
    scales: Scales,
    code: torch.Tensor,
    *,
    shape: tuple[int, ...],
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight of ``shape`` in ``dtype`` from two codes per byte, the first in the high half.

    Args:
        packed: any shape and dtype of as many bytes as half the elements.
        scales: one per ``size`` elements.
        code: the sixteen multiples in the order of their 4-bit numbers.
        shape: of the weight.
        size: elements per block.
        dtype: of the result.
    """
    flat = packed.contiguous().view(torch.uint8).reshape(-1)
    numbers = torch.stack((flat >> 4, flat & 0xF), dim=1).reshape(-1)[: math.prod(shape)]
    each = scales.values().repeat_interleave(size)[: numbers.numel()]
    return (code.float()[numbers.long()] * each).to(dtype).reshape(shape)


# ---------------------------------------------------------------------------------- the verdict


def judge_requantised(
    before: torch.Tensor, after: torch.Tensor, update: LowRankUpdate, form: BlockFormat
) -> WeightError:
    """Judge a weight that was dequantised, updated and quantised again.

    Args:
        before: the weight, dequantised, (d, k), in any floating dtype.
        after: what it became, likewise.
        update: what was added, plain LoRA; with its scaling negated for an unmerge.
        form: how ``after`` is stored.

    Returns:
        ``worst`` in multiples of the bound; the noise is what quantising again takes away, most of
        which is no fault of the merge.
    """
    stored = _stored_scales(before, update, form)
    total = WeightError()
    for rows in _chunks(before, form):
        merged = _merged(before[rows], update, rows)
        ball = _requantised(merged, _of_rows(stored, rows, before, form), form)
        total = total.joined(_judged(before[rows], after[rows], merged, ball).moved(rows.start))
    return total


def _judged(old: torch.Tensor, new: torch.Tensor, merged: Ball, ball: Ball) -> WeightError:
    error = evaluate(ball, new, old.double())
    change, made = merged.mid - old.double(), new.double() - old.double()
    return replace(
        error,
        changed=int((new != old).sum()),
        noise=float((made - change).square().sum()),
        effect=float(change.square().sum()),
        along=float((made * change).sum()),
    )


def _chunks(weight: torch.Tensor, form: BlockFormat) -> Iterator[slice]:
    """Rows that make whole blocks, of the scales as well; few enough to stay small."""
    d, k = weight.shape
    whole = form.size * (form.scales.size if form.scales else 1)
    least = whole // math.gcd(whole, k)
    rows = least * max(1, (1 << 19) // (least * k))
    for start in range(0, d, rows):
        yield slice(start, min(start + rows, d))


def _merged(old: torch.Tensor, update: LowRankUpdate, rows: slice) -> Ball:
    """``W + s B A`` in the wider of the two dtypes, as it is before it is quantised."""
    delta = Ball.product(update.B[rows], update.A, update.accumulator)
    if precision(update.dtype) < precision(_SINGLE):
        delta = delta.rounded(update.dtype)
    delta = delta.scaled(update.scaling, update.dtype)
    return Ball.exact(old).plus(delta, torch.promote_types(old.dtype, update.dtype))


@dataclass(frozen=True, slots=True)
class _Range:
    """Numbers from ``low`` to ``high``, element by element; float64."""

    low: torch.Tensor
    high: torch.Tensor

    def __getitem__(self, index: slice) -> _Range:
        return _Range(self.low[index], self.high[index])

    def spread(self, size: int, count: int) -> _Range:
        """One for each of ``count`` elements in blocks of ``size``."""
        return _Range(*(x.repeat_interleave(size)[:count] for x in (self.low, self.high)))

    def widened(self, by: torch.Tensor) -> _Range:
        return _Range(self.low - by, self.high + by)

    def magnitudes(self) -> _Range:
        least = torch.maximum(self.low, -self.high).clamp_min(0)
        return _Range(least, torch.maximum(self.low.abs(), self.high.abs()))

    def times(self, other: _Range) -> _Range:
        corners = torch.stack(
            [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        )
        return _Range(corners.amin(0), corners.amax(0))


def _largest(values: _Range, size: int) -> _Range:
    """The largest magnitude of each block."""
    sizes = values.magnitudes()
    return _Range(_block_max(sizes.low, size), _block_max(sizes.high, size))


def _block_max(x: torch.Tensor, size: int) -> torch.Tensor:
    missing = -x.numel() % size
    return torch.nn.functional.pad(x, (0, missing)).reshape(-1, size).amax(1)


def _codes(values: _Range, scales: _Range, form: BlockFormat, *, spare: int = 0) -> _Range:
    """The lowest and the highest code that the nearest one to ``value / scale`` can be.

    ``spare``: how many codes further the choice may be off on either side.
    """
    each = scales.spread(form.size, values.low.numel())
    inverse = _Range(1 / each.high, 1 / each.low)  # infinite where a scale may be zero
    ratio = values.times(inverse)
    size = torch.maximum(ratio.low.abs(), ratio.high.abs())
    ratio = ratio.widened(_STEPS * size.nan_to_num(1.0, 1.0) + unit(_SINGLE))
    middles = form.middles.to(values.low.device)
    low = torch.bucketize(ratio.low.nan_to_num(-1.0), middles) - spare
    high = torch.bucketize(ratio.high.nan_to_num(1.0), middles) + spare
    last, code = len(form.code) - 1, form.code.to(values.low.device)
    return _Range(code[low.clamp(0, last)], code[high.clamp(0, last)])


def _stored_scales(before: torch.Tensor, update: LowRankUpdate, form: BlockFormat) -> _Range:
    """What the scale of every block can be as it is read back."""
    parts = []
    for rows in _chunks(before, form):
        merged = _merged(before[rows], update, rows)
        parts.append(_largest(_of_ball(merged), form.size))
    scales = _Range(*(torch.cat([getattr(p, end) for p in parts]) for end in ("low", "high")))
    return scales if form.scales is None else _stored_twice(scales, form.scales)


def _stored_twice(scales: _Range, form: BlockFormat) -> _Range:
    """Scales less their mean, quantised in 8 bits, read back and added to the mean again.

    The 8-bit codes are dense, and how kernels break ties between them is not relied upon.
    """
    slack = gamma(scales.low.numel() + 1, _SINGLE) * scales.high.mean()
    offset = _Range(scales.low.mean() - slack, scales.high.mean() + slack)
    apart = _Range(scales.low - offset.high, scales.high - offset.low)
    apart = apart.widened(unit(_SINGLE) * apart.magnitudes().high)
    outer = _largest(apart, form.size)
    codes = _codes(apart, outer, form, spare=1)
    back = codes.times(outer.spread(form.size, codes.low.numel()))
    total = _Range(back.low + offset.low, back.high + offset.high)
    return total.widened(3 * unit(_SINGLE) * (back.magnitudes().high + total.magnitudes().high))


def _of_ball(ball: Ball) -> _Range:
    mid, radius = ball.mid.reshape(-1), ball.radius.reshape(-1)
    return _Range(mid - radius, mid + radius)


def _of_rows(scales: _Range, rows: slice, weight: torch.Tensor, form: BlockFormat) -> _Range:
    """The scales of some rows, which begin with a block of their own."""
    k = weight.shape[1]
    return scales[slice(rows.start * k // form.size, -(-rows.stop * k // form.size))]


def _requantised(merged: Ball, stored: _Range, form: BlockFormat) -> Ball:
    """What the merged weight can be once it was quantised and read back."""
    values = _of_ball(merged)
    codes = _codes(values, _largest(values, form.size), form)
    back = codes.times(stored.spread(form.size, values.low.numel()))
    size = back.magnitudes().high
    scale = stored.high.repeat_interleave(form.size)[: size.numel()]
    rounding = half_ulp(size, form.dtype) + 2 * unit(_SINGLE) * scale
    radius = (back.high - back.low) / 2 + rounding
    shape = merged.mid.shape
    return Ball(((back.high + back.low) / 2).reshape(shape), radius.reshape(shape))
