"""Running error analysis: what a chain of rounded operations can at most be off.

A :class:`Ball` is a float64 midpoint with a rigorous float64 radius, element by element.  Every
operation returns a ball that holds the rounded result for *every* value in the operands' balls.
No tolerance appears anywhere: a radius grows only by the unit roundoff ``u`` of the format in
which an operation is rounded, and by float64's own roundings in computing the midpoint.

* rounding to nearest in a format:  ``|fl(x) - x| <= ulp(|x|) / 2``, subnormals included;
* a dot product of length n, summed in any order, fused or not:
  ``|fl(a.b) - a.b| <= gamma_n |a|.|b|`` with ``gamma_n = n u / (1 - n u)``
  (N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), plus half
  the smallest subnormal per product for underflow;
* ``|a|.|b| <= ||a|| ||b||`` (Cauchy-Schwarz), so that no second product is needed.

Derivations: docs/numerics.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "Ball",
    "dtype_name",
    "gamma",
    "half_ulp",
    "holds_exactly",
    "is_floating_format",
    "precision",
    "smallest",
    "ulp",
    "unit",
]

_PRECISION_AND_EMIN = {
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}
"""Bits of the significand, the hidden one included, and the smallest normal exponent."""

_OWN = 2.0**-52
"""Relative allowance for the float64 operation that computes a midpoint (twice its u)."""


def is_floating_format(dtype: torch.dtype) -> bool:
    """Whether sums in ``dtype`` round to nearest in a format this module knows."""
    return dtype in _PRECISION_AND_EMIN


def precision(dtype: torch.dtype) -> int:
    """Bits of the significand, the hidden bit included: 8, 11, 24 or 53."""
    return _PRECISION_AND_EMIN[dtype][0]


def holds_exactly(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether ``dtype`` represents every number of ``other``, apart from overflow.

    float16 does not hold bfloat16's small numbers, for all its additional bits.
    """
    bits, emin = _PRECISION_AND_EMIN[dtype]
    others_bits, others_emin = _PRECISION_AND_EMIN[other]
    return bits >= others_bits and emin <= others_emin


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff ``u = 2^-p``: half the distance from 1 to the next larger number."""
    return float(2.0 ** -precision(dtype))


def smallest(dtype: torch.dtype) -> float:
    """The smallest subnormal number, which is the ulp of everything below the normal range."""
    bits, emin = _PRECISION_AND_EMIN[dtype]
    return float(2.0 ** (emin - bits + 1))


def gamma(n: int, dtype: torch.dtype) -> float:
    """``n u / (1 - n u)``; infinite where ``n u >= 1``."""
    share = n * unit(dtype)
    return share / (1 - share) if share < 1 else float("inf")


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of ``dtype`` at ``|x|``, as float64; ``x`` of any floating dtype.

    Below ``2^-969`` the spacing of float64 itself is given as ``2^-1022``, which is too large.
    """
    return _spacing(x, dtype, 0)


def half_ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest error of rounding a number of magnitude at most ``|x|`` to ``dtype``."""
    return _spacing(x, dtype, 1)


def _spacing(x: torch.Tensor, dtype: torch.dtype, halvings: int) -> torch.Tensor:
    """A power of two made from the exponent bits of ``x`` as float64: no logarithm, no table."""
    bits, emin = _PRECISION_AND_EMIN[dtype]
    exponent = (x.to(torch.float64).view(torch.int64) >> 52) & 0x7FF
    exponent = exponent.clamp_min_(emin + 1023).sub_(bits - 1 + halvings).clamp_min_(1)
    return (exponent << 52).view(torch.float64)


@dataclass(frozen=True, slots=True)
class Ball:
    """All numbers within ``radius`` of ``mid``, element by element; both float64."""

    mid: torch.Tensor
    radius: torch.Tensor

    @classmethod
    def exact(cls, value: torch.Tensor) -> Ball:
        """The numbers of a tensor themselves (every format here is exact in float64)."""
        mid = value.to(torch.float64)
        return cls(mid, torch.zeros_like(mid))

    @classmethod
    def product(
        cls,
        left: torch.Tensor,
        right: torch.Tensor,
        dtype: torch.dtype,
        at: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Ball:
        """``left @ right`` ((m, n) by (n, k)) accumulated in ``dtype``, in any order.

        With ``at``, row and column numbers, only those elements of it, as a vector.
        """
        a, b = left.to(torch.float64), right.to(torch.float64)
        mid, rows, columns = a @ b, a.norm(dim=1), b.norm(dim=0)
        if at is None:
            lengths = rows[:, None] * columns[None, :]
        else:
            mid, lengths = mid[at], rows[at[0]] * columns[at[1]]
        return cls(mid, _dot_error(a.shape[1], dtype, lengths))

    @property
    def reach(self) -> torch.Tensor:
        """The largest magnitude in the ball."""
        return self.mid.abs() + self.radius

    def rounded(self, dtype: torch.dtype) -> Ball:
        """After one rounding to ``dtype``."""
        return Ball(self.mid, self.radius + half_ulp(self.reach, dtype))

    def plus(self, other: Ball, dtype: torch.dtype) -> Ball:
        """The sum, rounded to ``dtype``."""
        mid = self.mid + other.mid
        own = _OWN * (self.mid.abs() + other.mid.abs())
        return Ball(mid, self.radius + other.radius + own).rounded(dtype)

    def minus(self, other: Ball, dtype: torch.dtype) -> Ball:
        """The difference, rounded to ``dtype``."""
        return self.plus(Ball(-other.mid, other.radius), dtype)

    def scaled(self, factor: float, dtype: torch.dtype) -> Ball:
        """Times a Python number, which is itself rounded to ``dtype`` before it multiplies."""
        mid, radius = self.mid * factor, self.radius * abs(factor)
        relative = _OWN if dtype == torch.float64 else unit(dtype) * (1 + unit(dtype))
        return Ball(mid, radius + relative * (mid.abs() + radius)).rounded(dtype)

    def times(self, other: Ball, dtype: torch.dtype) -> Ball:
        """The product, rounded to ``dtype``."""
        mid = self.mid * other.mid
        radius = self.mid.abs() * other.radius + self.radius * other.reach + _OWN * mid.abs()
        return Ball(mid, radius).rounded(dtype)

    def over(self, other: Ball, dtype: torch.dtype) -> Ball:
        """The quotient, rounded to ``dtype``; infinite where the divisor's ball holds zero."""
        mid = self.mid / other.mid
        least = (other.mid.abs() - other.radius).clamp_min(0)
        radius = (self.radius + mid.abs() * other.radius) / least + _OWN * mid.abs()
        return Ball(mid, radius).rounded(dtype)

    def row_norms(self, dtype: torch.dtype) -> Ball:
        """Euclidean norms of the rows, accumulated in any order in float32 or better.

        The sum of squares is off by ``gamma_k`` relatively, the root by half of that; squaring,
        the root and the rounding to ``dtype`` add one rounding each.
        """
        wide = torch.promote_types(dtype, torch.float32)
        mid = self.mid.norm(dim=1)
        k = self.mid.shape[1]
        relative = gamma(k, wide) / 2 + 2 * unit(wide) + k * _OWN
        underflow = (k * smallest(wide)) ** 0.5
        return Ball(mid, self.radius.norm(dim=1) + relative * mid + underflow).rounded(dtype)

    def excess(self, value: torch.Tensor) -> torch.Tensor:
        """``|value - mid| / radius``: at most 1 inside, infinite for NaN and infinities."""
        error = (value.to(torch.float64) - self.mid).abs()
        ratio = torch.where(error == 0, 0.0, error / self.radius)
        return ratio.nan_to_num(torch.inf, torch.inf)


def _dot_error(n: int, dtype: torch.dtype, lengths: torch.Tensor) -> torch.Tensor:
    own = gamma(n + 1, torch.float64)
    return (gamma(n, dtype) + own) * lengths + n * smallest(dtype) / 2
