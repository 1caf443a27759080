"""Shares of items that pass: intervals, how many items an answer takes, and a sequential verdict.

Two questions that are easily mixed up.  About *this set*: an evaluated set has its accuracy, and a
part of it tells about the rest (``size`` given).  About *what the set stands for*, the tasks of
which it is a sample: every set is small (``size`` left out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from pytest_lora.stats.distributions import (
    beta_quantile,
    log_beta,
    log_comb,
    most_marked,
    normal_quantile,
)
from pytest_lora.stats.sequential import Verdict, milestones

__all__ = [
    "SequentialProportion",
    "exact_interval",
    "minimum_detectable_effect",
    "needed_items",
    "wilson_interval",
]


def wilson_interval(
    successes: int, n: int, confidence: float, *, size: int | None = None
) -> tuple[float, float]:
    """Score interval of a proportion (E. B. Wilson, JASA 1927): right on average, never empty.

    With ``size``, of the whole set: the variance shrinks by ``(size - n) / (size - 1)``, as if
    ``n (size - 1) / (size - n)`` items had been seen; a point once the set is exhausted.
    """
    _check(successes, n, confidence, size)
    share = successes / n
    if size == n:
        return share, share
    seen = n if size is None else n * (size - 1) / (size - n)
    z = normal_quantile((1 + confidence) / 2)
    centre = (share + z * z / (2 * seen)) / (1 + z * z / seen)
    half = z * math.sqrt(share * (1 - share) / seen + (z / (2 * seen)) ** 2) / (1 + z * z / seen)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def exact_interval(
    successes: int, n: int, confidence: float, *, size: int | None = None
) -> tuple[float, float]:
    """Clopper-Pearson interval of a proportion: its coverage is at least ``confidence``, always.

    With ``size``, of the whole set, by inverting the hypergeometric test: the ends are shares that
    a set of ``size`` items can have.
    """
    _check(successes, n, confidence, size)
    tail = (1 - confidence) / 2
    failures = n - successes
    if size is not None:
        high = most_marked(successes, size, n, tail)
        low = size - most_marked(failures, size, n, tail)
        return low / size, high / size
    low_end = beta_quantile(tail, successes, failures + 1) if successes else 0.0
    high_end = beta_quantile(1 - tail, successes + 1, failures) if failures else 1.0
    return low_end, high_end


def _check(successes: int, n: int, confidence: float, size: int | None) -> None:
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} items is no proportion")
    if size is not None and size < n:
        raise ValueError(f"{n} items cannot have come from a set of {size}")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence is between 0 and 1, not {confidence}")


def minimum_detectable_effect(
    n: int,
    deviation: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    size: int | None = None,
) -> float:
    """The smallest true margin to a limit that ``n`` items tell apart from it, one-sided.

    ``(z(1 - alpha) + z(power)) * deviation / sqrt(n)``, by the normal approximation; ``deviation``
    is the standard deviation of an item, ``sqrt(p (1 - p))`` for 0/1 scores.  With ``size``, in a
    set of so many: ``sqrt((size - n) / (size - 1))`` times that.
    """
    if n < 1 or deviation < 0:
        raise ValueError(f"{n} items with a standard deviation of {deviation} tell nothing")
    factor = 1.0 if size is None else (size - n) / max(size - 1, 1)
    return _distance(alpha, power) * deviation * math.sqrt(max(factor, 0.0) / n)


def needed_items(
    margin: float,
    deviation: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    size: int | None = None,
) -> int | None:
    """How many items it takes to tell a true margin from a limit: the inverse of the above.

    None where it takes an unlimited number, which only a margin of 0 does without ``size``.  For
    an interval of half width ``h`` at confidence ``c`` ask for ``margin=h, alpha=(1 - c) / 2,
    power=0.5``.
    """
    if deviation < 0 or margin < 0:
        raise ValueError(f"a margin of {margin} and a deviation of {deviation} have no sign")
    if margin == 0:
        return size if deviation else 1
    n = (_distance(alpha, power) * deviation / margin) ** 2
    if size is not None:
        n = n * size / (n + size - 1) if n + size > 1 else 1
    return max(1, math.ceil(n - 1e-9))


def _distance(alpha: float, power: float) -> float:
    if not (0 < alpha < 1 and 0 < power < 1):
        raise ValueError(f"alpha {alpha} and power {power} are probabilities between 0 and 1")
    return max(0.0, normal_quantile(1 - alpha) + normal_quantile(power))


class SequentialProportion:
    """Is the share of passing items in a set of ``size`` at least ``floor``?  Item by item.

    The items come in a random order, without replacement.  AT_LEAST and BELOW are given as soon as

    * the rest of the set cannot change it (certain, with no error), or
    * a martingale against the other answer has reached ``1 / alpha``.  Under "K items of the set
      pass", any probability of the sequence so far, divided by the true one, is a martingale.  The
      true one is ``C(N - n, K - s) / C(N, K)`` for ``s`` passes among ``n``; the other is that of a
      beta-binomial K, ``B(s + a, n - s + b) / B(a, b)``.  Against "fewer than the floor asks for"
      the least of these ratios counts.  (I. Waudby-Smith and A. Ramdas, *Confidence sequences for
      sampling without replacement*, NeurIPS 2020: the prior-posterior ratio.)

    Both are functions of the counts alone and exact for every set: nothing is assumed.  The prior
    decides how soon a verdict comes, not whether it is right; it lies around the floor, as wide as
    the margins that take about half of the set.

    Args:
        size: number of items in the set.
        floor: the share asked for; met by ``k`` items if ``k / size >= floor``.
        alpha: probability of a wrong verdict before it is certain, for each of the two.
    """

    def __init__(self, size: int, floor: float, *, alpha: float) -> None:
        if size < 1:
            raise ValueError(f"a set of {size} items has no share")
        if not 0 <= floor <= 1:
            raise ValueError(f"a share is between 0 and 1, not {floor}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a probability between 0 and 1, not {alpha}")
        self.size, self.floor, self.alpha = size, float(floor), alpha
        self.needed = _needed(size, floor)
        self.used = self.successes = 0
        self._passed = bytearray()
        self._prior = (size * floor / 30 + 0.5, size * (1 - floor) / 30 + 0.5)
        self._log_at_least = self._log_below = 0.0
        self._early: Verdict | None = None

    def add(self, passed: bool | int) -> None:
        """Take the next item: whether it passed."""
        if passed not in (0, 1):
            raise ValueError(f"{passed!r} is neither 0 nor 1")
        if self.used == self.size:
            raise ValueError(f"the set has {self.size} items, and all of them were seen")
        self.used += 1
        self.successes += int(passed)
        self._passed.append(int(passed))
        self._log_at_least = max(self._log_at_least, self._log_ratio(at_most=self.needed - 1))
        self._log_below = max(self._log_below, self._log_ratio(at_least=self.needed))
        if self._early is None:
            if math.exp(-self._log_at_least) <= self.alpha:
                self._early = Verdict.AT_LEAST
            elif math.exp(-self._log_below) <= self.alpha:
                self._early = Verdict.BELOW

    def extend(self, passed: Iterable[bool | int]) -> None:
        """Take the next items, one after the other."""
        for item in passed:
            self.add(item)

    def _log_ratio(self, *, at_least: int = 0, at_most: int | None = None) -> float:
        """Least log ratio over the sets that hold at least, or at most, so many passing items."""
        n, s = self.used, self.successes
        # The likeliest set behind s of n, moved into the hypothesis: the likelihood has one peak.
        likeliest = min(s * (self.size + 1) // n, self.size)
        passing = max(likeliest, at_least)
        passing = passing if at_most is None else min(passing, at_most)
        if not s <= passing <= self.size - (n - s):
            return math.inf  # the items seen refute every such set
        log_true = log_comb(self.size - n, passing - s) - log_comb(self.size, passing)
        a, b = self._prior
        return log_beta(s + a, n - s + b) - log_beta(a, b) - log_true

    @property
    def _known(self) -> Verdict | None:
        if self.successes >= self.needed:
            return Verdict.AT_LEAST
        short = self.used - self.successes > self.size - self.needed
        return Verdict.BELOW if short else None

    @property
    def verdict(self) -> Verdict | None:
        """AT_LEAST, BELOW, or None while neither is known."""
        return self._known or self._early

    @property
    def certain(self) -> bool:
        """Whether the rest of the set cannot change the verdict."""
        return self._known is not None

    @property
    def estimate(self) -> float:
        """Share of the items seen that passed; NaN before the first."""
        return self.successes / self.used if self.used else math.nan

    @property
    def p_at_least(self) -> float:
        """Anytime-valid p-value of "below the floor": small speaks for AT_LEAST."""
        if self._known is not None:
            return float(self._known is not Verdict.AT_LEAST)
        return math.exp(-self._log_at_least)

    @property
    def p_below(self) -> float:
        """Anytime-valid p-value of "at least the floor": small speaks for BELOW."""
        if self._known is not None:
            return float(self._known is not Verdict.BELOW)
        return math.exp(-self._log_below)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Interval for the share of the whole set, valid at every time at once.

        Holds each share whose ratio is now below ``1 / (1 - confidence)``.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"a confidence is between 0 and 1, not {confidence}")
        if not self.used:
            return 0.0, 1.0
        level = -math.log1p(-confidence)

        def kept(passing: int) -> bool:
            return self._log_ratio(at_least=passing, at_most=passing) < level

        least, most = self.successes, self.size - (self.used - self.successes)
        peak = min(max(self.successes * (self.size + 1) // self.used, least), most)
        low = _last(kept, peak, least)
        high = _last(kept, peak, most)
        return low / self.size, high / self.size

    def path(self, confidence: float, points: int = 24) -> list[dict[str, float | int]]:
        """How share and interval came to be what they are: a row for each of some looks.

        ``used``, ``estimate``, ``low`` and ``high`` at no more than ``points`` numbers of items,
        each a constant factor above the one before, the last one now.
        """
        rows: list[dict[str, float | int]] = []
        then = SequentialProportion(self.size, self.floor, alpha=self.alpha)
        for used in milestones(self.used, points):
            then.used, then.successes = used, sum(self._passed[:used])
            low, high = then.interval(confidence)
            rows.append({"used": used, "estimate": then.estimate, "low": low, "high": high})
        return rows

    def evidence(self) -> dict[str, bool | float | int | str | None]:
        """What the verdict rests on, JSON-plain."""
        verdict = self.verdict
        return {
            "used": self.used,
            "size": self.size,
            "floor": self.floor,
            "needed": self.needed,
            "successes": self.successes,
            "estimate": self.estimate if self.used else None,
            "alpha": self.alpha,
            "verdict": None if verdict is None else str(verdict),
            "certain": self.certain,
            "p_at_least": self.p_at_least,
            "p_below": self.p_below,
        }


def _needed(size: int, floor: float) -> int:
    """The least ``k`` with ``k / size >= floor``, as floats divide."""
    k = min(size, math.ceil(floor * size))
    while k > 0 and (k - 1) / size >= floor:
        k -= 1
    while k / size < floor:
        k += 1
    return k


def _last(kept: Callable[[int], bool], inside: int, end: int) -> int:
    """The last number kept on the way from ``inside`` to ``end``, where keeping ends once."""
    if kept(end):
        return end
    while abs(end - inside) > 1:
        middle = (inside + end) // 2
        inside, end = (middle, end) if kept(middle) else (inside, middle)
    return inside
