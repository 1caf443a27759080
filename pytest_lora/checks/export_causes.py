"""What is in a weight instead of the delta that belongs there, from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pytest_lora.numerics.rounding import unit

__all__ = ["Change", "Known", "cause_of", "rows_of_others"]

_SEED = 20231
_PROBED = 64.0
"""How much what the probes miss may exceed rounding: they see a range through its own noise."""

_TOLD = 4.0
"""How many times what rounding may make of it something has to be, for its cause to be told."""

_MOST_ROWS = 1 << 13
"""Rows or columns that are looked for one among the other: their distances are a square matrix."""


@dataclass(frozen=True, slots=True)
class Change:
    """A delta: ``scaling * B @ A``, or a matrix as it is."""

    B: torch.Tensor
    A: torch.Tensor | None
    scaling: float

    @classmethod
    def dense(cls, delta: torch.Tensor) -> Change:
        """One that is not low rank."""
        return cls(delta, None, 1.0)

    @property
    def matrix(self) -> torch.Tensor:
        """The whole delta."""
        wide = self.B.double()
        return self.scaling * (wide if self.A is None else wide @ self.A.double())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.B.shape[0], (self.B if self.A is None else self.A).shape[-1]

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """The delta's product with a vector, without forming it."""
        inner = vector if self.A is None else self.A.double() @ vector
        return self.scaling * (self.B.double() @ inner)


@dataclass(frozen=True, slots=True)
class Known:
    """What a weight is made of.

    Attributes:
        weight: the base's.
        change: the delta that belongs to it.
        transposed: whether the delta is that of the transposed weight.
        without: the delta without DoRA's magnitudes, where there are any.
        whole: whether the adapter holds the weight itself rather than a delta.
    """

    weight: torch.Tensor
    change: Change
    transposed: bool = False
    without: Change | None = None
    whole: bool = False

    def matrix(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as the matrix that the delta is given for."""
        return x.T if self.transposed else x.reshape(len(x), -1)


Cause = tuple[str, str]


def cause_of(
    found: torch.Tensor,
    known: Known,
    bound: torch.Tensor,
    changes: Mapping[str, Change],
    beside: Mapping[str, Change],
    own: str,
) -> Cause:
    """What is there, and what to do.

    Args:
        found: the exported weight.
        known: what it should be made of.
        bound: by how much it may be off.
        changes: the deltas of all weights, by name.
        beside: those of the weights of its block, by the names of their modules.
        own: the name of the weight's module.
    """
    base, room = known.matrix(known.weight).double(), known.matrix(bound)
    change, delta = known.matrix(found).double() - base, known.change.matrix
    if _within(change, torch.zeros_like(change), room):
        return "the base's own weight", _NOT_SAVED if known.whole else _NOT_ADDED
    if known.without is not None and _within(change, known.without.matrix, room):
        return "the delta without DoRA's magnitudes", "they were dropped on the way"
    # Another delta D' is rounded as it is large: u (|W| + 2 |D'| + |W + D'|) at most.
    coarse = max(unit(tensor.dtype) for tensor in (found, known.weight))
    loose = 2 * room + 3 * coarse * change.abs()
    return (
        _scaled(change, delta, room)
        or _in_other_order(change, delta, room)
        or _other_ones(change, known.change, loose, changes)
        or rows_of_others(change, loose, own, beside)
        or _in_blocks(((change - delta).abs() <= room).all(1))
        or _whole_in_other_order(base + change, base + delta, room)
        or _in_numbers(change, known, room, loose)
    )


_NOT_ADDED = "its name was not matched, the adapter was disabled, or an old shard was kept"
_NOT_SAVED = "what the adapter holds whole (saved modules, token rows) has to be exported as well"
_SCALED = "alpha, rank or rslora were read otherwise, or it was merged more than once"
_ORDER = "the two formats order them differently: permute the factor with the weight"


def _within(found: torch.Tensor, wanted: torch.Tensor, room: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= room).all())


def _scaled(change: torch.Tensor, delta: torch.Tensor, room: torch.Tensor) -> Cause | None:
    share = float((change * delta).sum()) / (float(delta.square().sum()) or math.nan)
    unsure = _TOLD * float(room.norm()) / (float(delta.norm()) or math.nan)
    if abs(share - 1) <= unsure or not math.isfinite(share):
        return None  # rounding alone could make it that
    if _within(change, share * delta, (1 + abs(share)) * room):
        # No more digits than rounding leaves.
        known = round(math.log10(_TOLD * max(abs(share), unsure) / unsure))
        return f"{share:.{min(max(known, 2), 6)}g} times the delta", _SCALED
    return None


def _in_blocks(right: torch.Tensor) -> Cause | None:
    """The rows that are right, where some are."""
    if not right.any() or right.all():
        return None
    flags = [False, *right.tolist(), False]
    edges = [row for row in range(len(flags) - 1) if flags[row] != flags[row + 1]]
    said = f"{int(right.sum())} of {len(right)} rows are right"
    if len(edges) <= 4:
        blocks = zip(edges[::2], edges[1::2], strict=True)
        said = (
            f"only rows {', '.join(f'{a} to {b - 1}' for a, b in blocks)} of {len(right)} are right"
        )
    return said, "part of it was lost, or taken from another place: gather all shards"


def _in_other_order(change: torch.Tensor, delta: torch.Tensor, room: torch.Tensor) -> Cause | None:
    if _square(delta) and _within(change, delta.T, torch.maximum(room, room.T)):
        return "the transposed delta", "A and B were read in the other's layout"
    for what, turned in (("row", False), ("column", True)):
        x, y, r = (m.T if turned else m for m in (change, delta, room))
        order = _order(x, y, r)
        if order is not None:
            return f"the delta with its {what}s in other places: {_said(order, what)}", _ORDER
    return None


def _whole_in_other_order(
    there: torch.Tensor, merged: torch.Tensor, room: torch.Tensor
) -> Cause | None:
    order = _order(there, merged, room)
    if order is None:
        return None
    return f"the merged weight with its rows in other places: {_said(order, 'row')}", _ORDER


def _square(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] == matrix.shape[1]


def _order(found: torch.Tensor, wanted: torch.Tensor, room: torch.Tensor) -> torch.Tensor | None:
    """For every row of ``found`` the row of ``wanted`` that it is; None unless each is one."""
    if len(found) > _MOST_ROWS or len(found) != len(wanted):
        return None
    order = torch.cdist(found, wanted, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    in_place = ((found - wanted).abs() <= room).all(1)
    order = torch.where(in_place, torch.arange(len(order), device=order.device), order)
    return order if _within(found, wanted[order], torch.maximum(room, room[order])) else None


def _said(order: torch.Tensor, what: str) -> str:
    """The first place that holds another one's, and how many do."""
    moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
    place = int(moved[0])
    return f"{what} {place} holds {what} {int(order[place])}, {len(moved)} of {len(order)} moved"


def _other_ones(
    change: torch.Tensor, own: Change, room: torch.Tensor, changes: Mapping[str, Change]
) -> Cause | None:
    """Another weight's delta, told by its product with one vector, then element by element."""
    generator = torch.Generator().manual_seed(_SEED)
    vector = torch.randn(change.shape[1], generator=generator, dtype=torch.float64)
    vector = vector.to(change.device)
    seen, slack = change @ vector, room @ vector.abs()
    for name, other in changes.items():
        if other.B is own.B or other.shape != tuple(change.shape):
            continue
        near = bool(((other.times(vector) - seen).abs() <= slack).all())
        if near and _within(change, other.matrix, room):
            return f"the delta of {name}", "it was stored under this name, or loaded in its slot"
    return None


def rows_of_others(
    change: torch.Tensor, room: torch.Tensor, own: str, beside: Mapping[str, Change]
) -> Cause | None:
    """Whether every row is one of a delta beside it, or empty, and which is the first that is not
    of its own.
    """
    rows, where = _rows_beside(beside, change.shape[1])
    if not {name for name, _ in where} - {own} or len(change) > _MOST_ROWS:
        return None
    # Another one's products are summed otherwise than the weight's own.
    slack = room + _PROBED * unit(torch.float32) * change.abs().amax(1, keepdim=True)
    fine = (change.abs() <= slack).all(1)
    if own in beside:
        fine |= ((change - beside[own].matrix).abs() <= slack).all(1)
    nearest = _nearest(change, rows)
    same = ((change - rows[nearest]).abs() <= slack).all(1)
    same &= change.norm(dim=1) >= _TOLD * slack.norm(dim=1)  # else any small row would do
    if not bool((fine | same).all()):
        return None
    foreign = [
        (row, *where[place])
        for row, place in enumerate(nearest.tolist())
        if not fine[row] and where[place][0] != own
    ]
    if not foreign:
        return None
    row, name, place = foreign[0]
    return (
        f"rows of other deltas: row {row} holds row {place} of {name}'s,"
        f" {len(foreign)} of {len(change)} rows are such",
        "a fused weight was filled or cut at other rows: the two formats lay it out differently",
    )


def _rows_beside(
    beside: Mapping[str, Change], width: int
) -> tuple[torch.Tensor, list[tuple[str, int]]]:
    """All rows of the deltas of this width, and whose they are."""
    of_width = {
        name: other.matrix
        for name, other in beside.items()
        if other.shape[1] == width and other.shape[0] <= _MOST_ROWS
    }
    where = [(name, row) for name, delta in of_width.items() for row in range(len(delta))]
    return torch.cat(list(of_width.values())) if where else torch.empty(0, width), where


def _nearest(found: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """For each row that of ``rows`` whose products with a few random vectors are nearest."""
    generator = torch.Generator().manual_seed(_SEED)
    probes = torch.randn(found.shape[1], 32, generator=generator, dtype=torch.float64)
    probes = probes.to(found.device)
    return torch.cdist(found @ probes, rows.to(found.device) @ probes).argmin(1)


def _in_numbers(
    change: torch.Tensor, known: Known, room: torch.Tensor, loose: torch.Tensor
) -> Cause:
    delta, factor = known.change.matrix, known.change.A
    size, off = float(delta.norm()), float((change - delta).norm())
    said = f"off by {off / size:.2g} of the delta" if size else f"off by {off:.2g}"
    if factor is None:
        return said, "factors in another order, or quantised weights"
    within = _of_the_factors(change, known.change, factor, loose)
    if within is not None:
        return within
    if off <= _TOLD * _PROBED * float(room.norm()):  # too little to see what it is
        return said, "a coarser format on the way, quantised weights, or another base model"
    if _of_rank(change, factor.shape[0], room):
        return (
            f"a change of rank {factor.shape[0]} or less as the adapter's is, but another one",
            "factors in another layout, padded to another rank, or of another adapter",
        )
    return (
        f"{said}, and the difference from the base is no change of rank {factor.shape[0]}",
        "another base model, quantised weights, or something else merged as well",
    )


def _of_the_factors(
    change: torch.Tensor, own: Change, a: torch.Tensor, room: torch.Tensor
) -> Cause | None:
    """Whether it is ``B M A`` with a diagonal ``M``, or one that pairs the ranks otherwise."""
    b, a = own.scaling * own.B.double(), a.double()
    left, right = torch.linalg.pinv(b), torch.linalg.pinv(a)
    core = left @ change @ right
    shares = core.diagonal().clone()
    # Rounding moves a share by no more than the norms of what it is multiplied with.
    moved = left.norm(dim=1) * room.norm() * right.norm(dim=0)
    if float(moved.max()) > 1 / _TOLD:
        return None  # one rank cannot be told from none
    for exact in (0.0, 1.0):
        shares[(shares - exact).abs() < moved.clamp(min=_SNAP)] = exact
    if bool((shares != 1).any()) and _within(change, (b * shares) @ a, room):
        return _said_of_ranks(shares.tolist())
    paired = core.abs().argmax(1)
    in_place = torch.arange(len(paired), device=paired.device)
    if bool((paired != in_place).any()) and _within(change, b @ a[paired], room):
        return "the factors' ranks in another order in A than in B", _ORDER
    return None


_SNAP = 1e-3
"""A share this near to all or nothing is tried as that; the elements decide."""


def _said_of_ranks(shares: list[float]) -> Cause:
    absent = [str(rank) for rank, share in enumerate(shares) if share == 0]
    if absent and all(share in (0, 1) for share in shares):
        return (
            f"{len(shares) - len(absent)} of the factors' {len(shares)} ranks: without"
            f" {', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}",
            "factors were cut or split along the rank, or padded between shards",
        )
    first = next(rank for rank, share in enumerate(shares) if share != 1)
    return (
        f"the delta with its ranks at scalings of their own: rank {first} at"
        f" {shares[first]:.3g} times",
        "a scaling by rank or by magnitude was left out, or put in twice",
    )


def _of_rank(matrix: torch.Tensor, rank: int, room: torch.Tensor) -> bool:
    """Whether the matrix is one of that rank, up to rounding: its range is that of its product with
    a few more random vectors than that (N. Halko, P. G. Martinsson, J. A. Tropp, 2011).
    """
    if rank >= min(matrix.shape):
        return False
    generator = torch.Generator().manual_seed(_SEED)
    probes = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ probes.to(matrix.device))[0]
    rest = matrix - basis @ (basis.T @ matrix)
    return float(rest.norm()) <= _PROBED * float(room.norm())
