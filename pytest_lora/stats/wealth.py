"""Bets against a null hypothesis about the mean of a finite set, sampled without replacement.

Under "the mean is at least L", the values still to come have a mean of at least
``m = (N L - sum seen) / left``.  Who bets a share ``f`` of the wealth that the next value ``y``
lies below ``m`` multiplies it by ``1 - f (y - m) / (cap - m)``, whose expectation is at most 1
there, and which is not negative while ``y <= cap`` and ``f <= 1``.  So the wealth is a nonnegative
supermartingale, and reaches ``1 / alpha`` at any time with probability at most alpha (Ville).  The
wealth here is the mean over a grid of shares, each kept for the whole run: it grows like the best
of them, less ``log`` of their number.  (I. Waudby-Smith and A. Ramdas, *Estimating means of bounded
random variables by betting*, JRSS-B 2024, section 5; *Confidence sequences for sampling without
replacement*, NeurIPS 2020.)

No cap is needed on the other side: a value far below ``m`` only makes the bettor rich, and the
expectation above does not ask how far.  Evidence that the mean is high is the same for ``-y``.

Where no cap is declared, one is screened: see :func:`screened_cap`.  A value above the cap then
takes a bet of share ``f`` at most what it has (the wealth of a bet is never negative), so that the
small shares, for which the cap is ``1/f`` times as far away, survive it.

:class:`Wealth` is the rule one value at a time, in plain floats and in a fixed order of operations;
:func:`log_wealth` is the same rule on arrays, for intervals and simulations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["REACH", "SCREENED", "SHARES", "Wealth", "log_wealth", "screened_cap"]

SHARES = tuple(0.95 * 0.02 ** (j / 11) for j in range(12))
"""The shares of the wealth that are bet: from 0.95 down to 0.019, evenly in their logarithm."""
SCREENED = 16
"""Values looked at before the first bet, where no cap is declared."""
REACH = 3.0
"""How far a screened cap lies above the mean, in distances of the greatest value seen."""
RICHEST = 1e300
"""No single value wins more than this many times the bet, so that nothing overflows."""


def screened_cap(mean: float, greatest: float, expected: float) -> float:
    """A cap for the next value from the values seen: their mean and the greatest of them.

    It lies :data:`REACH` times as far above the mean as the greatest value, and at least as far
    above the expected value as the mean lies below it, so that no value near the mean more than
    doubles the wealth.
    """
    return max(mean + REACH * (greatest - mean), 2 * expected - mean)


class Wealth:
    """Evidence that values lie below what the null hypothesis expects, one value at a time.

    Attributes:
        log_best: logarithm of the greatest wealth so far, starting from a wealth of 1.
        cap: the lowest cap a bet relied upon; None before the first bet.
        bets: how many values were bet on.
        above: how many of those lay above :attr:`cap`.
    """

    def __init__(self, cap: float | None = None) -> None:
        self.declared = cap is not None
        self.cap = cap
        self.log_best = 0.0
        self.bets = 0
        self.above = 0
        self._cap = -math.inf if cap is None else cap
        self._logs = [0.0] * len(SHARES)
        self._greatest = -math.inf

    def bet(self, value: float, expected: float, *, seen: int, mean: float) -> None:
        """Take ``value``, which the null hypothesis expects to be at least ``expected`` on average.

        ``seen`` and ``mean`` describe the values before this one.
        """
        if self.declared or seen >= SCREENED:
            self._play(value, expected, mean)
        self._greatest = max(self._greatest, value)

    def _play(self, value: float, expected: float, mean: float) -> None:
        if not self.declared:
            self._cap = max(self._cap, screened_cap(mean, self._greatest, expected))
        if self.cap is None:
            self.cap = self._cap
        self.bets += 1
        self.above += value > self.cap
        reach = self._cap - expected
        if self.declared and value > self._cap:
            gain = -math.inf
        elif reach > 0:
            gain = min((expected - value) / reach, RICHEST)
        else:
            # Nothing is expected beyond a declared cap unless the null hypothesis is impossible.
            gain = RICHEST if self.declared and value < expected else 0.0
        for j, share in enumerate(SHARES):
            self._logs[j] += math.log1p(share * gain) if share * gain > -1 else -math.inf
        self.log_best = max(self.log_best, self._log_mean())

    def _log_mean(self) -> float:
        top = max(self._logs)
        if top == -math.inf:
            return top
        return top + math.log(math.fsum(math.exp(x - top) for x in self._logs) / len(SHARES))


def log_wealth(
    values: NDArray[np.float64],
    limit: NDArray[np.float64],
    size: int,
    cap: float | None = None,
) -> NDArray[np.float64]:
    """Logarithm of the wealth after each value, for many sets or many limits at once.

    Args:
        values: shape (..., n), the values in the order drawn.
        limit: shape (...), the limits under test; broadcast against the sets.
        size: number of items of each set, at least n.
        cap: declared cap; None screens one.

    Returns:
        float64, of the broadcast shape (..., n); not the running maximum.
    """
    import numpy as np

    count = np.arange(values.shape[-1])
    before = np.cumsum(values, -1)
    before = np.concatenate([np.zeros_like(before[..., :1]), before[..., :-1]], -1)
    expected = (size * limit[..., None] - before) / (size - count)
    with np.errstate(divide="ignore", invalid="ignore"):
        if cap is None:
            mean = np.where(count > 0, before / np.maximum(count, 1), 0)
            greatest = np.maximum.accumulate(values, -1)
            greatest = np.concatenate([greatest[..., :1], greatest[..., :-1]], -1)
            caps = np.maximum(mean + REACH * (greatest - mean), 2 * expected - mean)
            caps[..., :SCREENED] = -np.inf
            reach = np.maximum.accumulate(caps, -1) - expected
        else:
            reach = cap - expected
        odds = np.minimum((expected - values) / reach, RICHEST)
        gain = np.where(reach > 0, odds, 0.0)
        if cap is not None:
            gain = np.where((reach <= 0) & (values < expected), RICHEST, gain)
            gain = np.where(values > cap, -np.inf, gain)
        total = np.full(gain.shape, -np.inf)
        for share in SHARES:
            path = np.cumsum(np.log1p(np.maximum(share * gain, -1)), -1)
            total = np.logaddexp(total, path)
    total -= np.log(len(SHARES))
    return total
