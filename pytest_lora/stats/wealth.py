"""Bets against a null hypothesis about the mean of a finite set, sampled without replacement.

Under "the mean is at least L", the values still to come have a mean of at least
``m = (N L - sum seen) / left``.  Who bets ``b`` that the next value ``y`` lies below ``m``
multiplies the wealth by ``1 - b (y - m)``, whose expectation is at most 1 there, and which is not
negative while ``y <= cap`` and ``b <= 1 / (cap - m)``.  So the wealth is a nonnegative
supermartingale, and ever reaches ``1 / alpha`` with probability at most alpha (Ville).  Any rule
may choose ``b`` that looks only at values already drawn.  (I. Waudby-Smith and A. Ramdas,
*Estimating means of bounded random variables by betting*, JRSS-B 2024, section 5, and *Confidence
sequences for sampling without replacement*, NeurIPS 2020.)

No cap is needed on the other side: a value far below ``m`` only makes the bettor rich, and the
expectation does not ask how far.  Evidence that the mean is high is the same for ``-y``.

Several bettors start with a part of the wealth each and stake multiples of one size
(:data:`BETTORS`); their sum grows like the best of them, less the logarithm of its part.

Where no cap is declared, one is screened: see :func:`screened_cap`.  A value above it then takes at
most what a bettor has, who stakes nothing again; small stakes survive it, for their own cap,
``m + 1/b``, is farther away.

:class:`Wealth` is the rule one value at a time, in plain floats and in a fixed order of operations;
:func:`log_wealth` is the same rule on arrays, for intervals and simulations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Number = TypeVar("Number", float, "NDArray[np.float64]")

__all__ = [
    "BETTORS",
    "DECLARED_START",
    "SCREENED",
    "Wealth",
    "log_wealth",
    "screened_cap",
    "screened_caps",
]

BETTORS = (
    (0.05, 0.04),  # survives what the others do not
    (0.3, 0.08),
    (0.8, 0.31),  # margins so small that half of the set or more is needed: there
    (1.6, 0.31),  # every bit of evidence counts, so most of the wealth is here
    (4.0, 0.14),
    (12.0, 0.08),
    (40.0, 0.04),  # clear cases of huge sets
)
"""The stake of each bettor in units of :func:`unit_stake`, and its part of the wealth.

They decide how soon a verdict comes, never whether it is right.
"""
BOLDEST = 0.95
"""No stake is above this share of the largest that keeps the wealth from becoming negative."""
DECLARED_START = 4
"""Values whose spread is looked at before the first bet, where a cap is declared."""
SCREENED = 16
"""Values looked at before the first bet, where the cap is screened."""
RICHEST = 1e300
"""No single value wins more than this many times the bet, so that nothing overflows."""


def screened_cap(seen: int, mean: float, greatest: float, expected: float) -> float:
    """A cap for the next value from the values seen: their number, mean and the greatest of them.

    It lies :func:`reach_of` times as far above the mean as the greatest value, and at least as far
    above the expected value as the mean lies below it, so that no value near the mean more than
    doubles the wealth.
    """
    return max(mean + reach_of(seen) * (greatest - mean), 2 * expected - mean)


def reach_of(seen: Number) -> Number:
    """3, and more after few values, which know less of the tail: 5 after 16.

    Chosen by the simulation of ``benchmarks/sequential.py``: what a screened cap promises does not
    depend on it, how often the mean of the whole set is then judged wrongly does.
    """
    return 3 + 30 / seen


def unit_stake(size: int, left: Number) -> Number:
    """The unit of stakes for values with a standard deviation of 1.

    The best stake is the expected value's distance from the mean of the values to come, over their
    variance.  That distance is ``N / left`` times the margin between limit and mean, and a margin
    of ``sqrt(2 log(1/alpha) / N)``, for alpha 0.001 about ``4 / sqrt(N)``, takes half of the set.
    """
    return 4 / math.sqrt(size) * size / left


class Wealth:
    """Evidence that values lie below what the null hypothesis expects, one value at a time.

    Args:
        size: number of items in the set.
        cap: what no value is above; None screens one.

    Attributes:
        log: logarithm of the wealth, which starts at 1.
        cap: the declared cap, or the lowest one that a bet relied upon; None before the first.
        since: how many values were drawn since there is a cap.
        above: how many of these lay above :attr:`cap`.
    """

    def __init__(self, size: int, cap: float | None = None) -> None:
        self.size = size
        self.declared = cap is not None
        self.cap = cap
        self.log = 0.0
        self.since = self.above = 0
        self._cap = -math.inf if cap is None else cap
        self._logs = [math.log(part) for _, part in BETTORS]
        self._seen = 0
        self._first = 0.0  # sums are of differences to the first value, so that nothing cancels
        self._sum = self._squares = 0.0
        self._greatest = -math.inf

    def add(self, value: float, expected: float) -> None:
        """Take ``value``; the null hypothesis expects no less than ``expected`` on average."""
        if not self.declared and self._seen >= SCREENED:
            self._screen(expected)
        if self.cap is not None:
            self.since += 1
            self.above += value > self.cap
            self._bet(value, expected)
            self.log = self._log_total()
        if not self._seen:
            self._first = value
        self._seen += 1
        self._sum += value - self._first
        self._squares += (value - self._first) ** 2
        self._greatest = max(self._greatest, value)

    def _screen(self, expected: float) -> None:
        mean = self._first + self._sum / self._seen
        self._cap = max(self._cap, screened_cap(self._seen, mean, self._greatest, expected))
        if self.cap is None:
            self.cap = self._cap

    def _bet(self, value: float, expected: float) -> None:
        reach = self._cap - expected
        if self.declared and value > self._cap:
            self._logs = [-math.inf] * len(BETTORS)
        elif reach > 0 and self._seen >= DECLARED_START:
            unit, most = self._unit(), min(BOLDEST / reach, RICHEST)
            for j, (stake, _) in enumerate(BETTORS):
                won = min(min(stake * unit, most) * (expected - value), RICHEST)
                self._logs[j] += math.log1p(won) if won > -1 else -math.inf
        elif reach <= 0 and self.declared and value < expected:
            # The null hypothesis asks for more than the cap allows: it cannot be.
            self._logs = [log + math.log1p(RICHEST) for log in self._logs]

    def _unit(self) -> float:
        """:func:`unit_stake` for the standard deviation of the values seen."""
        variance = (self._squares - self._sum**2 / self._seen) / (self._seen - 1)
        if variance <= 0:
            return math.inf
        return unit_stake(self.size, self.size - self._seen) / math.sqrt(variance)

    def _log_total(self) -> float:
        top = max(self._logs)
        if top == -math.inf:
            return top
        return top + math.log(math.fsum(math.exp(log - top) for log in self._logs))


def log_wealth(
    values: NDArray[np.float64],
    limit: NDArray[np.float64],
    size: int,
    cap: NDArray[np.float64] | float | None = None,
) -> NDArray[np.float64]:
    """Logarithm of the wealth after each value, for many sets or many limits at once.

    Args:
        values: shape (..., n), the values in the order drawn.
        limit: shape (...), the limits under test; broadcast against the sets.
        size: number of items of each set, at least n.
        cap: declared cap, broadcast against (..., n); None screens one.

    Returns:
        float64, of the broadcast shape (..., n); not the running maximum.
    """
    import numpy as np

    seen = np.arange(values.shape[-1], dtype=np.float64)
    differences = values - values[..., :1]
    total = _before(np.cumsum(differences, -1))
    squares = _before(np.cumsum(differences**2, -1))
    expected = _expected(values, limit, size)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        caps = screened_caps(values, limit, size) if cap is None else cap
        reach = caps - expected
        variance = (squares - total**2 / seen) / (seen - 1)
        unit = unit_stake(size, size - seen) / np.sqrt(np.maximum(variance, 0))
        most = np.minimum(BOLDEST / reach, RICHEST)
        betting = (reach > 0) & (seen >= DECLARED_START)
        wealth = np.full(reach.shape, -np.inf)
        for stake, part in BETTORS:
            won = np.minimum(np.minimum(stake * unit, most) * (expected - values), RICHEST)
            won = np.where(betting, won, 0)
            if cap is not None:
                won = np.where((reach <= 0) & (values < expected), RICHEST, won)
                won = np.where(values > cap, -1, won)
            path = np.cumsum(np.log1p(np.maximum(won, -1)), -1)
            wealth = np.logaddexp(wealth, path + math.log(part))
    return wealth


def screened_caps(
    values: NDArray[np.float64], limit: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """The screened cap for each value, as in :class:`Wealth`; minus infinity before the first."""
    import numpy as np

    seen = np.maximum(np.arange(values.shape[-1], dtype=np.float64), 1)
    mean = values[..., :1] + _before(np.cumsum(values - values[..., :1], -1)) / seen
    greatest = _before(np.maximum.accumulate(values, -1))
    expected = _expected(values, limit, size)
    caps = np.maximum(mean + reach_of(seen) * (greatest - mean), 2 * expected - mean)
    caps[..., :SCREENED] = -np.inf
    return np.maximum.accumulate(caps, -1)


def _expected(
    values: NDArray[np.float64], limit: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """What a set with a mean of ``limit`` leads to expect of each value, given those before it."""
    import numpy as np

    first = values[..., :1]
    missing = size * (limit[..., None] - first) - _before(np.cumsum(values - first, -1))
    return np.asarray(first + missing / (size - np.arange(values.shape[-1])))


def _before(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running totals as they stood before each value; 0 before the first."""
    import numpy as np

    return np.concatenate([np.zeros_like(totals[..., :1]), totals[..., :-1]], -1)
