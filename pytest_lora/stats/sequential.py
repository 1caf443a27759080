"""Is the mean of a finite set at most a limit?  Asked after every item, answered as soon as known.

The items are drawn without replacement in a random order (:func:`~pytest_lora.stats.order
.seeded_order`).  A verdict before the last item is wrong with probability at most ``alpha`` over
the orders, however often one looks; one on the whole set is certain.  The bets behind it are in
:mod:`pytest_lora.stats.wealth`; ``docs/statistics.md`` derives what is promised and what is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from pytest_lora.stats.distributions import most_marked
from pytest_lora.stats.wealth import Wealth, log_wealth

__all__ = ["SequentialMean", "Verdict", "milestones", "unseen_level"]

LARGEST = 1e100
"""Greater values are refused: nothing below can overflow."""
UNIT = 1074
"""Every float is a whole multiple of 2 to the minus this."""


class Verdict(StrEnum):
    """What is known of a mean (at most or above) or a share (at least or below)."""

    AT_MOST = "at most"
    ABOVE = "above"
    AT_LEAST = "at least"
    BELOW = "below"


class SequentialMean:
    """The mean of ``size`` items against ``limit``, item by item in a random order.

    Looks happen after every item, so that the verdict and the number of items it took do not
    depend on how they are batched.  Sums are exact, and so is the verdict on the whole set: AT_MOST
    if the mean, correctly rounded, is at most ``limit``.

    AT_MOST rests on a ``cap`` that no item exceeds, ABOVE on a ``floor`` that none falls below.
    Declared, the error rate is at most ``alpha``, whatever the set.  Not declared, they are
    screened from the items seen, and the promise is about the mean with each item cut at the
    screened cap or floor; :meth:`evidence` says how many items could lie beyond it unseen.  An item
    beyond a declared cap or floor refutes it: that verdict is then left to the whole set.

    Args:
        size: number of items in the set.
        limit: what the mean is compared with.
        alpha: probability of a wrong verdict before the last item, for each of the two.
        floor, cap: what no item is below, and none above.
        max_unseen: no evidence counts while a larger share of the set may lie unseen beyond the
            screened cap or floor that it rests on.

    Raises:
        ValueError: for numbers that cannot be meant, and for more than ``size`` items.
    """

    def __init__(
        self,
        size: int,
        limit: float,
        *,
        alpha: float,
        floor: float | None = None,
        cap: float | None = None,
        max_unseen: float = 1.0,
    ) -> None:
        if size < 1:
            raise ValueError(f"a set of {size} items has no mean")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a probability between 0 and 1, not {alpha}")
        for bound in (limit, floor, cap):
            if bound is not None:
                _units(bound)
        if not 0 <= max_unseen <= 1:
            raise ValueError(f"a share of the set is between 0 and 1, not {max_unseen}")
        if floor is not None and cap is not None and floor > cap:
            raise ValueError(f"nothing is both at least {floor} and at most {cap}")
        self.size, self.limit, self.alpha, self.max_unseen = size, float(limit), alpha, max_unseen
        self.floor = None if floor is None else float(floor)
        self.cap = None if cap is None else float(cap)
        self._values: list[float] = []
        self._sum = 0
        self._low = Wealth(size, self.cap)
        self._high = Wealth(size, None if self.floor is None else -self.floor)
        self._best = {self._low: 0.0, self._high: 0.0}
        self._early: Verdict | None = None
        self._known: Verdict | None = None
        self._settle()

    def add(self, value: float) -> None:
        """Take the next item."""
        value, units = float(value), _units(value)
        if self.used == self.size:
            raise ValueError(f"the set has {self.size} items, and all of them were seen")
        left = self.size - self.used
        expected = (self.size * _units(self.limit) - self._sum) / (left << UNIT)
        self._low.add(value, expected)
        self._high.add(-value, -expected)
        self._values.append(value)
        self._sum += units
        self._settle()

    def extend(self, values: Iterable[float]) -> None:
        """Take the next items, one after the other."""
        for value in values:
            self.add(value)

    def _settle(self) -> None:
        self._known = self._certainty()
        for wealth, best in self._best.items():
            if wealth.log > best and self._sees_enough(wealth):
                self._best[wealth] = wealth.log
        if self._early is None:
            if self.p_at_most <= self.alpha:
                self._early = Verdict.AT_MOST
            elif self.p_above <= self.alpha:
                self._early = Verdict.ABOVE

    def _sees_enough(self, wealth: Wealth) -> bool:
        return self.max_unseen >= 1 or self._unseen(wealth) <= self.max_unseen

    def _certainty(self) -> Verdict | None:
        """The verdict that no completion of the set could change."""
        low, high = self._range()
        if high <= self.limit:
            return Verdict.AT_MOST
        return Verdict.ABOVE if low > self.limit else None

    def _range(self) -> tuple[float, float]:
        """The least and the greatest mean that the set can still have."""
        left = self.size - self.used
        if not left:
            return (self._sum / (self.size << UNIT),) * 2
        low, high = -math.inf, math.inf
        if self.floor is not None and not self._high.above:
            low = (self._sum + left * _units(self.floor)) / (self.size << UNIT)
        if self.cap is not None and not self._low.above:
            high = (self._sum + left * _units(self.cap)) / (self.size << UNIT)
        return low, high

    @property
    def verdict(self) -> Verdict | None:
        """AT_MOST, ABOVE, or None while neither is known.

        Once given it stands, unless items are added until it is certain and was wrong.
        """
        return self._known or self._early

    @property
    def certain(self) -> bool:
        """Whether the verdict cannot be wrong: the set is exhausted, or the rest cannot matter."""
        return self._known is not None

    @property
    def used(self) -> int:
        """Number of items seen."""
        return len(self._values)

    @property
    def estimate(self) -> float:
        """Mean of the items seen, correctly rounded; NaN before the first."""
        return self._sum / (self.used << UNIT) if self.used else math.nan

    @property
    def p_at_most(self) -> float:
        """Anytime-valid p-value of "the mean is above the limit": small speaks for AT_MOST.

        Where it is above, this is ever at most x with probability at most x.  0 or 1 if certain.
        """
        return self._p(self._low, Verdict.AT_MOST)

    @property
    def p_above(self) -> float:
        """Anytime-valid p-value of "the mean is at most the limit": small speaks for ABOVE."""
        return self._p(self._high, Verdict.ABOVE)

    def _p(self, wealth: Wealth, verdict: Verdict) -> float:
        if self._known is not None:
            return float(self._known is not verdict)
        return math.exp(-self._best[wealth])

    def interval(self, confidence: float) -> tuple[float, float]:
        """An interval for the mean of the whole set, valid at every time at once.

        It holds the limits that were never rejected, each side at ``(1 - confidence) / 2``; with a
        screened cap or floor, that side bounds the mean with each item cut there.  Infinite where
        nothing can be said yet, a point once the set is exhausted.  Needs numpy.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"a confidence is between 0 and 1, not {confidence}")
        least, greatest = self._range()
        if least == greatest or not self.used:
            return least, greatest
        low, high = self._ends(self._values, (1 - confidence) / 2, 1e-9)
        low, high = sorted((max(low, least), min(high, greatest)))
        return low, high

    def path(self, confidence: float, points: int = 24) -> list[dict[str, float | int | None]]:
        """How estimate and interval came to be what they are: a row for each of some looks.

        ``used``, ``estimate``, ``low`` and ``high`` at no more than ``points`` numbers of items,
        each a constant factor above the one before, the last one now.  Ends are as those of
        :meth:`interval`, to a thousandth of the spread of the values and never too narrow; None
        where nothing could be said yet.  Needs numpy.
        """
        rows = []
        for used in milestones(self.used, points):
            seen = self._values[:used]
            if used == self.used:
                ends = self.interval(confidence)
            else:
                ends = self._ends(seen, (1 - confidence) / 2, 1e-3)
            low, high = (end if math.isfinite(end) else None for end in ends)
            estimate = math.fsum(seen) / used
            rows.append({"used": used, "estimate": estimate, "low": low, "high": high})
        return rows

    def _ends(self, values: list[float], level: float, tolerance: float) -> tuple[float, float]:
        """The interval after ``values``, the first of the items seen, each side at ``level``."""
        mirrored = None if self.floor is None else -self.floor
        high = _rejected_from(values, self.size, self.cap, level, tolerance)
        turned = [-value for value in values]
        return -_rejected_from(turned, self.size, mirrored, level, tolerance), high

    def evidence(self) -> dict[str, bool | float | int | str | None]:
        """What the verdict rests on, JSON-plain.

        ``cap_origin`` and ``floor_origin`` are "declared" or "screened"; a screened one is None
        until the first bet.  ``above_cap`` counts the items seen beyond it (of the screened ones,
        those after the screening), and ``unseen_above_cap`` is the largest share of the set that
        may lie beyond it unseen, at error ``alpha``; 0 where the cap is declared and holds.
        """
        verdict = self.verdict
        return {
            "used": self.used,
            "size": self.size,
            "limit": self.limit,
            "estimate": self.estimate if self.used else None,
            "alpha": self.alpha,
            "max_unseen": self.max_unseen,
            "verdict": None if verdict is None else str(verdict),
            "certain": self.certain,
            "p_at_most": self.p_at_most,
            "p_above": self.p_above,
            "cap": self._low.cap,
            "cap_origin": "declared" if self._low.declared else "screened",
            "above_cap": self._low.above,
            "unseen_above_cap": self._unseen(self._low),
            "floor": None if self._high.cap is None else -self._high.cap,
            "floor_origin": "declared" if self._high.declared else "screened",
            "below_floor": self._high.above,
            "unseen_below_floor": self._unseen(self._high),
        }

    def _unseen(self, wealth: Wealth) -> float:
        """Largest share of the set that may lie beyond the cap among the items not seen.

        The items after the screening are a random sample of those that were left then.
        """
        left = self.size - self.used
        if wealth.declared and not wealth.above:
            return 0.0
        if wealth.declared or wealth.cap is None:
            return left / self.size
        k = wealth.above
        spent = unseen_level(self.alpha, k)
        return (most_marked(k, left + wealth.since, wealth.since, spent) - k) / self.size


def unseen_level(alpha: float, k: int) -> float:
    """The error allowed to a bound on what is unseen, after ``k`` items seen beyond the cap.

    Such bounds then hold at every time at once.  To be wrong at any with ``k`` seen, a set must
    have shown at most ``k`` by the first size of sample at which the bound is below what it holds:
    one event for each ``k``, with a chance of ``alpha / ((k + 1)(k + 2))``, and these sum to alpha.
    """
    return alpha / ((k + 1) * (k + 2))


def _units(value: float) -> int:
    """``value`` in units of 2**-1074, exactly."""
    if not abs(value) <= LARGEST:  # NaN too
        raise ValueError(f"{value} is no number to take a mean of")
    numerator, denominator = float(value).as_integer_ratio()
    return numerator << (UNIT + 1 - denominator.bit_length())


def milestones(used: int, points: int) -> list[int]:
    """At most ``points`` numbers up to ``used``, as good as evenly spaced in their logarithm."""
    if not used:
        return []
    steps = max(1, points - 1)
    return sorted({max(1, round(used ** (i / steps))) for i in range(steps)} | {used})


def _rejected_from(
    values: list[float], size: int, cap: float | None, level: float, tolerance: float
) -> float:
    """The lowest limit found at which "the mean is at least that" was rejected at ``level``.

    By bisection, to ``tolerance`` times the spread of the values or the last bit, on the rejected
    side.
    """
    import numpy as np

    drawn = np.array(values)

    def rejected(limit: float) -> bool:
        paths = log_wealth(drawn, np.array(limit), size, cap)
        return bool(paths.max() >= -math.log(level))

    step = scale = float(np.ptp(drawn)) or abs(values[0]) or 1.0
    kept = float(drawn.mean())
    while rejected(kept):
        kept, step = kept - step, 2 * step
    gone, step = kept + scale, scale
    while not rejected(gone):
        if step > scale * 1e6:
            return math.inf
        kept, step = gone, 2 * step
        gone += step
    while gone - kept > tolerance * scale:
        middle = (kept + gone) / 2
        if not kept < middle < gone:
            break  # neighbours: the values hardly differ for their size
        kept, gone = (kept, middle) if rejected(middle) else (middle, gone)
    return gone
