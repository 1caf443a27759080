"""How far a merged, or a merged and unmerged, weight may be from the exact one.

The exact merged weight is ``W + s B A`` (DoRA: its rows scaled to length ``m``), for the numbers
as they are stored.  The bound is the radius of a running error analysis of the operations a merge
consists of, in the formats in which they are rounded: see :mod:`pytest_lora.numerics.rounding`
and docs/numerics.md.

Speed: each tile is first recomputed in the arithmetic PEFT uses, which in the common case gives
the very same bits.  An equal element is inside the bound by construction; only the unequal ones,
and one row of each tile as a sample, go through the float64 analysis.  Memory: a few tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pytest_lora.numerics.rounding import (
    Ball,
    half_ulp,
    holds_exactly,
    is_floating_format,
    ulp,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "LowRankUpdate",
    "WeightError",
    "evaluate",
    "judge_cycle",
    "judge_merge",
    "judge_sum",
    "judge_sum_cycle",
    "measure_drift",
]

_TILE_ON_CPU = (256, 1024)
"""1 MiB in float32: tiles stay in cache, and a tile's product has the bits of the whole one's."""

_TILE_ELSEWHERE = (2048, 2048)
_ROW_BLOCK = 1 << 18
"""Elements per block where whole rows are needed (DoRA)."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_MANY = 1 / 2
"""Share of unequal elements above which a tile is analysed as a whole rather than gathered."""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """What a LoRA adapter does to one weight, seen as a (d, k) matrix.

    Attributes:
        B, A: the factors, (d, r) and (r, k), in the dtype they are stored in.
        scaling: ``s``, a Python number.
        magnitude: DoRA's row lengths ``m`` of shape (d,), or ``None`` for plain LoRA.
        rounds_delta: whether PEFT rounds the delta to the weight's dtype before adding it (safe
            merges and embeddings).  Guides the recomputation; the bound allows either.
    """

    B: torch.Tensor
    A: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    rounds_delta: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.B.dtype

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype in which the product is summed: float32 for half precision factors."""
        return torch.promote_types(self.dtype, torch.float32)

    def delta(self, rows: slice, columns: slice) -> torch.Tensor:
        """A tile of ``s B A`` in PEFT's arithmetic, in the factors' dtype."""
        b, a = self.B[rows], self.A[:, columns]
        if b.device.type != "cpu":
            return (b @ a) * self.scaling
        # On CPU PEFT widens half precision factors and rounds the scaled product back.
        wide = self.accumulator
        return ((b.to(wide) @ a.to(wide)) * self.scaling).to(self.dtype)

    def delta_ball(
        self, rows: slice, columns: slice, at: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Ball:
        """The same tile, or the elements of it ``at`` these rows and columns: the exact values,
        with the error that computed ones may have.
        """
        product = Ball.product(self.B[rows], self.A[:, columns], self.accumulator, at)
        low = self.dtype != self.accumulator
        if low and self.B.device.type != "cpu":
            product = product.rounded(self.dtype)  # the GEMM kernel's own output
        scaled = product.scaled(self.scaling, self.accumulator)
        return scaled.rounded(self.dtype) if low else scaled


@dataclass(frozen=True, slots=True)
class WeightError:
    """The outcome of judging one weight, or several together.

    Attributes:
        worst: largest error in multiples of its bound; sound results are at most 1.
        ulps: largest error in units in the last place of the larger of the weights before and
            after (so that cancellation does not inflate it).
        index: where ``worst`` is, as (row, column) of the matrix judged.
        outside: number of elements beyond their bound.
        elements: number of elements compared with the recomputation.
        evaluated: how many of them went through the float64 analysis (all unequal ones).
        changed: number of elements that differ from before.
        noise, effect: sums of squares of the rounding error and of the exact change.
        along: sum of products of the change made with the exact change (not for DoRA).
    """

    worst: float = 0.0
    ulps: float = 0.0
    index: tuple[int, ...] | None = None
    outside: int = 0
    elements: int = 0
    evaluated: int = 0
    changed: int = 0
    noise: float = 0.0
    effect: float = 0.0
    along: float = 0.0

    def joined(self, other: WeightError) -> WeightError:
        """Both together; the place is that of the worse one."""
        worse = self if self.worst >= other.worst or other.index is None else other
        return WeightError(
            worst=max(self.worst, other.worst),
            ulps=max(self.ulps, other.ulps),
            index=worse.index,
            outside=self.outside + other.outside,
            elements=self.elements + other.elements,
            evaluated=self.evaluated + other.evaluated,
            changed=self.changed + other.changed,
            noise=self.noise + other.noise,
            effect=self.effect + other.effect,
            along=self.along + other.along,
        )

    def moved(self, *offsets: int) -> WeightError:
        """The same with ``offsets`` added to the leading numbers of the index."""
        if self.index is None:
            return self
        padded = (*offsets, *(0 for _ in self.index[len(offsets) :]))
        return replace(self, index=tuple(i + j for i, j in zip(self.index, padded, strict=True)))

    @property
    def noise_ratio(self) -> float:
        """Rounding noise relative to the adapter's effect, both as root mean squares."""
        if self.effect == 0:
            return float("inf") if self.noise else 0.0
        return float((self.noise / self.effect) ** 0.5)

    @property
    def applied(self) -> float:
        """How many times the exact change was made, by least squares; NaN where unknown."""
        return self.along / self.effect if self.effect and self.along else float("nan")


def judge_merge(before: torch.Tensor, after: torch.Tensor, update: LowRankUpdate) -> WeightError:
    """Judge a merged weight against ``W + s B A``, or DoRA's rescaled sum.

    ``before`` and ``after`` are (d, k), in bfloat16, float16, float32 or float64.

    Raises:
        ValueError: another dtype, or shapes that do not fit the update.
    """
    _check(before, after, update)
    judge = _judge_plain_tile if update.magnitude is None else _judge_dora_block
    total = WeightError()
    for tile in _tiles(before, after, update):
        total = total.joined(tile.placed(judge(tile)))
    return total


def judge_cycle(before: torch.Tensor, after: torch.Tensor, update: LowRankUpdate) -> WeightError:
    """Judge a weight that was merged and unmerged once against what it was before.

    The bound is what the roundings of one merge and one unmerge can cause, together.
    """
    _check(before, after, update)
    total = WeightError()
    for tile in _tiles(before, after, update):
        changed, part = _count_unequal(tile.new, tile.old), WeightError()
        if changed and update.magnitude is None:
            part = _judge_unequal(tile, _unequal(tile.new, tile.old), _returned)
        elif changed:
            dora = _Dora.of(tile)
            part = evaluate(_dora_returned(tile.old, dora), tile.new, dora.merged.mid)
        part = replace(part, elements=tile.old.numel(), changed=changed)
        total = total.joined(tile.placed(part))
    return total


def judge_sum(
    before: torch.Tensor, after: torch.Tensor, delta: Ball, dtype: torch.dtype
) -> WeightError:
    """Judge ``after`` against ``before + delta`` where ``delta`` came rounded to ``dtype``.

    For biases and for whole deltas; every element is evaluated.
    """
    error = evaluate(_sum(before, delta, dtype, after.dtype), after, before.double())
    noise = after.double() - before.double() - delta.mid
    return replace(
        error,
        changed=_count_unequal(after, before),
        noise=_square_sum(noise),
        effect=_square_sum(delta.mid),
    )


def judge_sum_cycle(
    before: torch.Tensor, after: torch.Tensor, delta: Ball, dtype: torch.dtype
) -> WeightError:
    """Judge ``after``, to which ``delta`` was added and subtracted again, against ``before``."""
    error = evaluate(
        _returned(before, delta, dtype, after.dtype), after, before.double() + delta.mid
    )
    return replace(error, changed=_count_unequal(after, before))


def measure_drift(start: torch.Tensor, now: torch.Tensor) -> tuple[int, float, float]:
    """How far a weight moved: elements changed, sum of squares, and the largest change.

    In float32, or float64 for float64, and in bounded memory; both tensors have one shape.
    """
    wide = torch.promote_types(start.dtype, torch.float32)
    changed, squares, largest = 0, 0.0, 0.0
    blocks = (torch.split(tensor.reshape(-1), _ROW_BLOCK) for tensor in (start, now))
    for old, new in zip(*blocks, strict=True):
        count = _count_unequal(new, old)
        if count:
            gap = new.to(wide) - old.to(wide)
            changed += count
            squares += _square_sum(gap)
            largest = max(largest, float(torch.linalg.vector_norm(gap, ord=math.inf)))
    return changed, squares, largest


def _check(before: torch.Tensor, after: torch.Tensor, update: LowRankUpdate) -> None:
    for tensor in (before, after, update.B, update.A):
        if not is_floating_format(tensor.dtype):
            raise ValueError(f"no rounding model for {tensor.dtype}")
    shape = (update.B.shape[0], update.A.shape[1])
    if tuple(before.shape) != shape or tuple(after.shape) != shape:
        raise ValueError(
            f"weights {tuple(before.shape)} and {tuple(after.shape)} do not fit a delta {shape}"
        )


@dataclass(frozen=True, slots=True)
class _Tile:
    """Part of a weight before and after, and where it is in the whole."""

    old: torch.Tensor
    new: torch.Tensor
    update: LowRankUpdate
    rows: slice
    columns: slice

    def placed(self, part: WeightError) -> WeightError:
        return part.moved(self.rows.start, self.columns.start)


def _tiles(before: torch.Tensor, after: torch.Tensor, update: LowRankUpdate) -> Iterator[_Tile]:
    height, width = _TILE_ON_CPU if before.device.type == "cpu" else _TILE_ELSEWHERE
    d, k = before.shape
    if update.magnitude is not None:
        height, width = max(1, _ROW_BLOCK // max(k, 1)), max(k, 1)
    for top in range(0, d, height):
        for left in range(0, k, width):
            rows, columns = slice(top, min(top + height, d)), slice(left, min(left + width, k))
            yield _Tile(before[rows, columns], after[rows, columns], update, rows, columns)


def _unequal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Where two tensors differ; by their bits, so that a NaN equals itself and 0 is not -0."""
    if x.dtype != y.dtype:
        return x != y
    integer = _INTEGERS[x.element_size()]
    return x.view(integer) != y.view(integer)


def _count_unequal(x: torch.Tensor, y: torch.Tensor) -> int:
    if x.dtype != y.dtype:
        return int((x != y).sum())
    integer = _INTEGERS[x.element_size()]
    return int(torch.count_nonzero(x.view(integer) ^ y.view(integer)))


def _square_sum(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2


def _tally(tile: _Tile, delta: torch.Tensor) -> WeightError:
    """Counts and sums that do not decide; float32 is enough for them."""
    wide = torch.promote_types(tile.old.dtype, torch.float32)
    change = delta.to(wide)
    made = tile.new.to(wide) - tile.old.to(wide)
    along = float(torch.dot(made.view(-1), change.view(-1)))
    return WeightError(
        elements=tile.old.numel(),
        changed=_count_unequal(tile.new, tile.old),
        noise=_square_sum(made.sub_(change)),
        effect=_square_sum(change),
        along=along,
    )


def _judge_plain_tile(tile: _Tile) -> WeightError:
    update = tile.update
    delta = update.delta(tile.rows, tile.columns)
    added = delta.to(tile.old.dtype) if update.rounds_delta else delta
    same = (tile.old + added).to(tile.old.dtype)  # rounded as PEFT's addition in place is
    tally = _tally(tile, delta)
    # One row as a sample, so that the worst error is a real number also where all bits agree.
    sample = update.delta_ball(slice(tile.rows.start, tile.rows.start + 1), tile.columns)
    ball = _sum(tile.old[:1], sample, update.dtype, tile.new.dtype)
    part = evaluate(ball, tile.new[:1], tile.old[:1].double())
    # What is outside there differs as well, and is counted as such.
    total = tally.joined(replace(part, outside=0, elements=0))
    infinite = not math.isfinite(tally.noise)  # shared by the recomputation, perhaps
    if infinite or _count_unequal(tile.new, same):
        unequal = _unequal(tile.new, same)
        if infinite:
            unequal |= ~tile.new.isfinite()
        part = _judge_unequal(tile, unequal, _sum)
        total = total.joined(replace(part, elements=0))
    return total


def _judge_unequal(
    tile: _Tile,
    unequal: torch.Tensor,
    bound: Callable[[torch.Tensor, Ball, torch.dtype, torch.dtype], Ball],
) -> WeightError:
    """Analyse the unequal elements of a tile: gathered if few, the whole tile if many."""
    old, new, update = tile.old, tile.new, tile.update
    if int(unequal.sum()) > _MANY * unequal.numel():
        delta = update.delta_ball(tile.rows, tile.columns)
        ball = bound(old, delta, update.dtype, new.dtype)
        return evaluate(ball, new, old.double() + delta.mid)
    i, j = unequal.nonzero(as_tuple=True)
    delta = update.delta_ball(tile.rows, tile.columns, at=(i, j))
    old, new = old[i, j], new[i, j]
    ball = bound(old, delta, update.dtype, new.dtype)
    part = evaluate(ball, new, old.double() + delta.mid)
    if part.index is None:
        return part
    return replace(part, index=(int(i[part.index[0]]), int(j[part.index[0]])))


def evaluate(ball: Ball, value: torch.Tensor, beside: torch.Tensor) -> WeightError:
    """Compare ``value`` with every element of ``ball``.

    The ulps are those of the ball's centre or of ``beside``, whichever is larger.
    """
    if not value.numel():
        return WeightError()
    ratio = ball.excess(value)
    place = int(ratio.argmax())
    size = torch.maximum(ball.mid.abs(), beside.abs())
    ulps = (value.double() - ball.mid).abs() / ulp(size, value.dtype)
    return WeightError(
        worst=float(ratio.reshape(-1)[place]),
        ulps=float(ulps.nan_to_num(torch.inf, torch.inf).max()),
        index=_unravel(place, ratio.shape),
        outside=int((ratio > 1).sum()),
        elements=value.numel(),
        evaluated=value.numel(),
    )


def _unravel(place: int, shape: torch.Size) -> tuple[int, ...]:
    index = torch.unravel_index(torch.tensor(place), shape)
    return tuple(int(i) for i in index)


def _into_weight(delta: Ball, factors: torch.dtype, weight: torch.dtype) -> Ball:
    """The delta, which PEFT may round to the weight's dtype before it adds or subtracts."""
    return delta if holds_exactly(weight, factors) else delta.rounded(weight)


def _to(ball: Ball, done: torch.dtype, dtype: torch.dtype) -> Ball:
    """A ball already rounded to ``done``, now stored as ``dtype``."""
    return ball if dtype == done else ball.rounded(dtype)


def _sum(old: torch.Tensor, delta: Ball, factors: torch.dtype, out: torch.dtype) -> Ball:
    """``W + delta`` as any order of rounding that PEFT uses would give it."""
    wide = torch.promote_types(old.dtype, factors)
    added = Ball.exact(old).plus(_into_weight(delta, factors, old.dtype), wide)
    return _to(added, wide, out)


def _returned(old: torch.Tensor, delta: Ball, factors: torch.dtype, out: torch.dtype) -> Ball:
    """``(W + delta) - delta``: centred on ``W``, with the roundings of both directions.

    The delta is rounded to the weight's dtype in one direction at most, or in both alike.
    """
    wide = torch.promote_types(old.dtype, factors)
    merged = _to(Ball.exact(old).plus(delta, wide), wide, old.dtype)
    back = merged.minus(_into_weight(delta, factors, old.dtype), wide)
    return Ball(old.double(), _to(back, wide, out).radius)


@dataclass(frozen=True, slots=True)
class _Dora:
    """The intermediate balls of a DoRA merge of some whole rows."""

    delta: Ball
    total: Ball
    factor: Ball
    wide: torch.dtype
    widest: torch.dtype

    @classmethod
    def of(cls, tile: _Tile) -> _Dora:
        old, update, rows = tile.old, tile.update, tile.rows
        if update.magnitude is None:
            raise ValueError("not a DoRA update")
        magnitude = update.magnitude[rows]
        wide = torch.promote_types(old.dtype, update.dtype)
        widest = torch.promote_types(magnitude.dtype, wide)
        delta = update.delta_ball(rows, slice(None))
        total = Ball.exact(old).plus(delta, wide)
        factor = Ball.exact(magnitude).over(total.row_norms(wide), widest)
        column = Ball(factor.mid[:, None], factor.radius[:, None])
        return cls(delta, total, column, wide, widest)

    @property
    def merged(self) -> Ball:
        return self.factor.times(self.total, self.widest)


def _judge_dora_block(tile: _Tile) -> WeightError:
    dora = _Dora.of(tile)
    old = tile.old.double()
    exact = dora.factor.mid * dora.total.mid
    return replace(
        evaluate(_to(dora.merged, dora.widest, tile.new.dtype), tile.new, old),
        changed=_count_unequal(tile.new, tile.old),
        noise=_square_sum(tile.new.double() - exact),
        effect=_square_sum(exact - old),
    )


def _dora_returned(old: torch.Tensor, dora: _Dora) -> Ball:
    """One DoRA cycle, ``X1 = f (W + d)`` and then ``X1 / f - d`` with the same ``f``.

    PEFT keeps the norm of the merge for the unmerge, so an error in ``f`` cancels; what remains
    are the roundings on the way, those of the merged weight enlarged by ``1 / f``.
    """
    reach = dora.merged.reach
    least = (dora.factor.mid.abs() - dora.factor.radius).clamp_min(0)
    lost = (half_ulp(reach, old.dtype) + half_ulp(reach, dora.widest)) / least
    divided = Ball(dora.total.mid, dora.total.radius + lost).rounded(dora.widest)
    last = dora.widest
    back = divided.minus(dora.delta, last)
    return Ball(old.double(), _to(back, last, old.dtype).radius)
