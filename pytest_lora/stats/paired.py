"""Base and adapter on the same items: what changed, and whether too much was lost.

Only items on which the two differ tell them apart: ``gained`` ones the adapter alone passes,
``lost`` ones the base alone passes.  What is said here is about the domain that the ``n`` items are
a sample of; a set that was evaluated whole has its difference, and nothing is left to infer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pytest_lora.stats.distributions import (
    binomial_cdf,
    binomial_pmf,
    normal_cdf,
    normal_quantile,
    root,
    t_cdf,
    t_quantile,
)

__all__ = [
    "changes",
    "difference_interval",
    "loss_p",
    "mcnemar_exact",
    "mcnemar_mid_p",
    "mean_above_zero_p",
    "mean_interval",
    "non_inferiority_p",
]


def changes(base: Sequence[bool | int], adapter: Sequence[bool | int]) -> tuple[int, int]:
    """``gained`` and ``lost`` of two sequences of 0/1 scores of the same items."""
    if len(base) != len(adapter):
        raise ValueError(f"{len(base)} and {len(adapter)} scores are not of the same items")
    gained = sum(1 for before, after in zip(base, adapter, strict=True) if after and not before)
    lost = sum(1 for before, after in zip(base, adapter, strict=True) if before and not after)
    return gained, lost


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact p-value of "as many are gained as lost" (Q. McNemar, 1947).

    Given their sum, the gains are binomial with chance 1/2.  Never too small.
    """
    _check(gained, lost, gained + lost)
    return min(1.0, 2 * binomial_cdf(min(gained, lost), gained + lost, 0.5))


def loss_p(gained: int, lost: int) -> float:
    """One-sided exact p-value of "no more are lost than gained": small where too many are lost.

    McNemar's test in one direction: the losses are binomial with chance 1/2 at most.
    """
    _check(gained, lost, gained + lost)
    return binomial_cdf(gained, gained + lost, 0.5)


def mcnemar_mid_p(gained: int, lost: int) -> float:
    """The same with half the chance of what was seen: nearly exact, and not as timid.

    (M. W. Fagerland, S. Lydersen, P. Laake, *The McNemar test for binary matched-pairs data*, BMC
    Medical Research Methodology 2013: its error rate exceeded the nominal one nowhere in their
    enumeration, which is evidence and no proof.)
    """
    _check(gained, lost, gained + lost)
    few, sum_ = min(gained, lost), gained + lost
    return min(1.0, 2 * binomial_cdf(few, sum_, 0.5) - binomial_pmf(few, sum_, 0.5))


def difference_interval(gained: int, lost: int, n: int, confidence: float) -> tuple[float, float]:
    """Score interval for the difference in accuracy, adapter minus base.

    (T. Tango, *Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design*, Statistics in Medicine 1998.)  Holds the differences that his score test
    does not reject, so that it always agrees with :func:`non_inferiority_p`.  Chosen over the exact
    unconditional interval, which is far costlier, and over Wald's, which fails where few items
    differ; its coverage is close to ``confidence``, not guaranteed: docs/statistics.md has it.
    """
    _check(gained, lost, n)
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence is between 0 and 1, not {confidence}")
    z = normal_quantile((1 + confidence) / 2)
    seen = (gained - lost) / n
    low = root(lambda d: _score(gained, lost, n, d) > z, -1.0, seen) if seen > -1 else -1.0
    high = root(lambda d: _score(gained, lost, n, d) > -z, seen, 1.0) if seen < 1 else 1.0
    return low, high


def non_inferiority_p(gained: int, lost: int, n: int, margin: float) -> float:
    """One-sided p-value of "the adapter is worse by ``margin`` or more": small speaks for it.

    Tango's score test.  ``margin`` is an accuracy, 0.02 for two points; 0 tests for superiority.
    """
    _check(gained, lost, n)
    if not 0 <= margin < 1:
        raise ValueError(f"a margin of accuracy is between 0 and 1, not {margin}")
    return normal_cdf(-_score(gained, lost, n, -margin))


def _score(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's score statistic: standard normal where ``difference`` is the true one.

    The share lost is estimated under that difference: the root of ``2 n q^2 + b q + c``.
    """
    surplus = gained - lost - n * difference
    b = (2 * n - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    lost_share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * lost_share + difference * (1 - difference))
    if variance <= 0:
        return math.copysign(math.inf, surplus) if surplus else 0.0
    return surplus / math.sqrt(variance)


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Student's interval for the mean of the domain that the values are a sample of.

    ``mean -/+ t s / sqrt(n)``: exact for normal values; for others right in the limit, too narrow
    for few values of a skewed domain, whose rare large ones are mostly missing.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values have no spread to tell an interval from")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence is between 0 and 1, not {confidence}")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    return mean - half, mean + half


def mean_above_zero_p(values: Sequence[float]) -> float:
    """One-sided p-value of "the mean of the domain is 0 or less": small where it is above.

    Student's: with the conditions of :func:`mean_interval`.  Values without any spread have no t;
    of them it is the sign that counts, with probability ``2**-n`` at most under the hypothesis that
    either sign is as likely.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values have no spread to tell a mean from")
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if not deviation:
        return 0.5**n if mean > 0 else 1.0
    return t_cdf(-mean * math.sqrt(n) / deviation, n - 1)


def _check(gained: int, lost: int, n: int) -> None:
    if gained < 0 or lost < 0 or n < max(gained + lost, 0):
        raise ValueError(f"{gained} gained and {lost} lost of {n} items cannot be")
