"""Distribution functions from the standard library alone."""

from __future__ import annotations

import math

__all__ = ["hypergeometric_cdf", "most_marked"]


def _log_comb(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def hypergeometric_cdf(k: int, size: int, marked: int, drawn: int) -> float:
    """Chance of at most ``k`` marked items among ``drawn`` of ``size``, ``marked`` being marked."""
    lowest, highest = max(0, drawn - (size - marked)), min(drawn, marked)
    if k < lowest:
        return 0.0
    if k >= highest:
        return 1.0
    logs = [
        _log_comb(marked, i) + _log_comb(size - marked, drawn - i) for i in range(lowest, k + 1)
    ]
    top = max(logs)
    total = math.fsum(math.exp(x - top) for x in logs)
    return min(1.0, math.exp(top - _log_comb(size, drawn)) * total)


def most_marked(k: int, size: int, drawn: int, alpha: float) -> int:
    """The most marked items a set can hold of which ``k`` among ``drawn`` were marked.

    Exact: a set that holds more would have shown at most ``k`` with a chance of at most ``alpha``.
    """
    low, high = k, size - (drawn - k)  # low is plausible; what is above high is impossible
    while low < high:
        middle = (low + high + 1) // 2
        if hypergeometric_cdf(k, size, middle, drawn) > alpha:
            low = middle
        else:
            high = middle - 1
    return low
