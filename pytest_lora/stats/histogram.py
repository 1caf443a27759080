"""Many numbers in few: what a picture of their distribution needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pytest_lora.records import Json

__all__ = ["BINS", "distribution"]

BINS = 24
"""More would be thinner than a page is wide; few documents leave most of them empty anyway."""


def distribution(values: Sequence[float], *, bins: int = BINS) -> dict[str, Json] | None:
    """Least, median and greatest of the finite ``values``, and how many lie where.

    Returns:
        ``counts`` of ``bins`` bins of one width from ``least`` to ``most``, each with its lower end
        and the last with both; one bin where all values are the same.  ``median`` is the upper one
        of two.  ``not_finite`` counts what has no place.  None where nothing is finite.
    """
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return None
    least, most = finite[0], finite[-1]
    width = most / bins - least / bins  # the difference of two large numbers may be infinite
    counts = [0] * (bins if width > 0 else 1)
    for value in finite:
        place = int((value - least) / width) if width > 0 and value < most else len(counts) - 1
        counts[min(place, len(counts) - 1)] += 1
    return {
        "least": least,
        "median": finite[len(finite) // 2],
        "most": most,
        "counts": counts,
        "not_finite": len(values) - len(finite),
    }
