"""The singular values of a low-rank update from its factors, never from the dense product.

With thin QR decompositions ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the update is
``s B A = Q_B (s R_B R_A^T) Q_A^T``.  Columns of ``Q_B`` and ``Q_A`` are orthonormal, so the small
matrix in the middle, (r, r) at most, has the update's singular values (all others are zero): O((d +
k) r^2) operations and O((d + k) r) memory instead of O(d k min(d, k)) and O(d k).

Everything is float64, in which products of stored factors are exact but for their sums: the small
matrix is off by a few ``r u ||s B|| ||A||``, and by Weyl's theorem so is each singular value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Spectrum", "intruders", "low_rank_spectrum", "relative_norm"]

_U = 2.0**-53


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one update.

    Attributes:
        values: in descending order, min(d, k, r) of them.
        error: what any of them may be off by, from the computation.
    """

    values: tuple[float, ...]
    error: float

    @property
    def finite(self) -> bool:
        """Whether all are numbers."""
        return all(math.isfinite(value) for value in self.values)

    @property
    def spectral(self) -> float:
        """The largest: the most by which the update lengthens a vector."""
        return self.values[0] if self.values else 0.0

    @property
    def frobenius(self) -> float:
        """The root of the sum of squares, that is of the squares of the matrix's elements."""
        return math.hypot(*self.values)

    @property
    def rank(self) -> int:
        """How many are larger than their error."""
        return sum(value > self.error for value in self.values)

    @property
    def effective_rank(self) -> float:
        """``exp`` of the entropy of the values as shares of their sum, 1 to r; 0 for no update.

        O. Roy, M. Vetterli, "The effective rank: a measure of effective dimensionality", 2007.
        """
        total = math.fsum(self.values)
        if not total:
            return 0.0
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-math.fsum(share * math.log(share) for share in shares))

    @property
    def stable_rank(self) -> float:
        """``(frobenius / spectral)^2``, 1 to r; 0 for no update.

        M. Rudelson, R. Vershynin, "Sampling from large matrices", 2007.
        """
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0


def low_rank_spectrum(B: torch.Tensor, A: torch.Tensor, scaling: float) -> Spectrum:
    """The singular values of ``scaling * B @ A``.

    Args:
        B: (d, r), of any floating dtype, on any device.
        A: (r, k), likewise.
        scaling: the factor before the product.

    Returns:
        Values that are NaN where a factor is not finite.
    """
    b, a = B.detach().double(), A.detach().double()
    count = min(*b.shape, *a.shape)
    if not (bool(b.isfinite().all()) and bool(a.isfinite().all()) and math.isfinite(scaling)):
        return Spectrum((math.nan,) * count, math.nan)
    left = torch.linalg.qr(b, mode="r")[1]
    right = torch.linalg.qr(a.mT, mode="r")[1]
    values = torch.linalg.svdvals(abs(scaling) * (left @ right.mT))[:count]
    size = abs(scaling) * float(left.norm()) * float(right.norm())
    # QR, product and singular values are each backward stable, with a constant of the order of
    # the dimensions (Higham, section 19.3); that of the QR, max(d, k), is the usual allowance.
    return Spectrum(tuple(values.tolist()), max(b.shape[0], a.shape[1]) * 2 * _U * size)


def relative_norm(spectrum: Spectrum, weight: float) -> float:
    """The update's Frobenius norm over that of the weight it is added to; infinite over zero."""
    if not spectrum.frobenius:
        return 0.0
    return spectrum.frobenius / weight if weight else math.inf


def intruders(
    weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, scaling: float,
    *, top: int = 10, similarity: float = 0.5,
) -> int:  # fmt: skip
    """How many leading directions of the updated weight resemble none of the weight's own.

    A left singular vector of ``W + s B A``, among the ``top`` first, is an intruder if its cosine
    with every left singular vector of ``W`` is below ``similarity`` (R. Shuttleworth and others,
    "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024).

    Args:
        weight: W, (d, k), rows being outputs; two dense decompositions of this size are made.
        B: (d, r).
        A: (r, k).
        scaling: s.
        top: leading singular vectors looked at.
        similarity: the cosine.
    """
    before = weight.detach().double()
    after = before + scaling * (B.detach().double() @ A.detach().double())
    own = torch.linalg.svd(before, full_matrices=False)[0]
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :top]
    return int(((own.mT @ new).abs().amax(0) < similarity).sum())
