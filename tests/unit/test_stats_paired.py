"""Paired answers: McNemar against scipy, Tango's interval against its definition."""

from __future__ import annotations

import math
import random

import pytest

from pytest_lora.stats.paired import (
    changes,
    difference_interval,
    loss_p,
    mcnemar_exact,
    mcnemar_mid_p,
    mean_above_zero_p,
    mean_interval,
    non_inferiority_p,
)

TABLES = [(0, 0, 10), (3, 0, 10), (0, 3, 10), (5, 5, 40), (12, 30, 400), (10, 0, 10), (0, 10, 10)]


def test_changes_counts_where_the_two_differ() -> None:
    assert changes([1, 0, 0, 1, 1], [1, 1, 1, 0, 1]) == (2, 1)
    with pytest.raises(ValueError, match="same items"):
        changes([1], [1, 0])


@pytest.mark.parametrize(("gained", "lost", "n"), TABLES)
def test_mcnemar_is_a_binomial_test(gained: int, lost: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    exact = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar_exact(gained, lost) == pytest.approx(exact, rel=1e-9)
    seen = stats.binom.pmf(min(gained, lost), gained + lost, 0.5)
    tail = stats.binom.cdf(min(gained, lost), gained + lost, 0.5)
    expected = min(1.0, 2 * (tail - seen / 2))
    assert mcnemar_mid_p(gained, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("gained", "lost", "n"), TABLES)
def test_a_loss_is_tested_in_one_direction(gained: int, lost: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    total = gained + lost
    exact = stats.binomtest(lost, total, 0.5, alternative="greater").pvalue if total else 1.0
    assert loss_p(gained, lost) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.3, 4.0])
def test_a_mean_above_zero_is_students_test(shift: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    values = [draw.gauss(shift, 1) for _ in range(30)]
    exact = stats.ttest_1samp(values, 0, alternative="greater").pvalue
    assert mean_above_zero_p(values) == pytest.approx(exact, rel=1e-6)


def test_values_without_a_spread_have_a_sign() -> None:
    assert mean_above_zero_p([0.5] * 10) == 0.5**10
    assert mean_above_zero_p([0.0] * 10) == mean_above_zero_p([-0.5] * 10) == 1
    with pytest.raises(ValueError, match="no spread"):
        mean_above_zero_p([1.0])


def constrained(gained: int, lost: int, n: int, difference: float) -> float:
    """The share lost that makes the data likeliest under the difference, by search."""
    optimize = pytest.importorskip("scipy.optimize")
    low, high = max(0.0, -difference), (1 - difference) / 2

    def cost(share: float) -> float:
        p = [(gained, share + difference), (lost, share), (n - gained - lost, 0)]
        p[2] = (p[2][0], 1 - 2 * share - difference)
        return -sum(k * math.log(max(q, 1e-300)) for k, q in p if k)

    found = optimize.minimize_scalar(cost, bounds=(low, high), options={"xatol": 1e-12})
    return float(min((low, high, found.x), key=cost))


@pytest.mark.parametrize(("gained", "lost", "n"), TABLES)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_ends_are_where_the_score_test_rejects(
    gained: int, lost: int, n: int, confidence: float
) -> None:
    stats = pytest.importorskip("scipy.stats")
    z = stats.norm.ppf((1 + confidence) / 2)
    for end in difference_interval(gained, lost, n, confidence):
        if abs(end) == 1:
            assert abs(gained - lost) == n
            continue
        share = constrained(gained, lost, n, end)
        variance = n * (2 * share + end * (1 - end))
        surplus = gained - lost - n * end
        assert abs(surplus) == pytest.approx(z * math.sqrt(variance), rel=1e-4)


def test_the_interval_covers_about_as_often_as_it_says() -> None:
    """By enumeration of every table of 30 items; docs/statistics.md says what to expect."""
    n, coverage = 30, []
    ends = {
        (g, b): difference_interval(g, b, n, 0.95) for g in range(n + 1) for b in range(n + 1 - g)
    }
    for gain, loss in ((0.1, 0.1), (0.25, 0.1), (0.02, 0.2), (0.4, 0.3), (0.05, 0.02)):
        total = 0.0
        for (g, b), (low, high) in ends.items():
            if low <= gain - loss <= high:
                ways = math.comb(n, g) * math.comb(n - g, b)
                total += ways * gain**g * loss**b * (1 - gain - loss) ** (n - g - b)
        coverage.append(total)
    assert all(0.93 < share < 0.995 for share in coverage)


@pytest.mark.parametrize(("gained", "lost", "n"), TABLES)
def test_non_inferiority_and_the_interval_agree(gained: int, lost: int, n: int) -> None:
    low, _ = difference_interval(gained, lost, n, 0.9)
    for margin in (0.0, 0.02, 0.1, 0.4):
        inside = non_inferiority_p(gained, lost, n, margin) < 0.05
        assert inside == (low > -margin) or abs(low + margin) < 1e-9


def test_losing_more_than_the_margin_is_not_shown_harmless() -> None:
    assert non_inferiority_p(gained=5, lost=40, n=400, margin=0.02) > 0.9
    assert non_inferiority_p(gained=20, lost=20, n=2000, margin=0.02) < 1e-6


def test_the_mean_interval_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(4)
    values = [rng.gauss(3, 2) for _ in range(23)]
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.99)
    assert mean_interval(values, 0.99) == pytest.approx(tuple(theirs), rel=1e-9)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        difference_interval(3, 3, 5, 0.9)
    with pytest.raises(ValueError, match="confidence"):
        difference_interval(1, 1, 5, 1.0)
    with pytest.raises(ValueError, match="margin"):
        non_inferiority_p(1, 1, 5, -0.1)
    with pytest.raises(ValueError, match="spread"):
        mean_interval([1.0], 0.9)
    with pytest.raises(ValueError, match="confidence"):
        mean_interval([1.0, 2.0], 0.0)
