"""Shares: intervals against scipy, counts of items, and a sequential verdict that stays right."""

from __future__ import annotations

import json
import random
from itertools import product

import pytest

from pytest_lora.stats.distributions import hypergeometric_cdf, normal_quantile
from pytest_lora.stats.proportions import (
    SequentialProportion,
    exact_interval,
    minimum_detectable_effect,
    needed_items,
    wilson_interval,
)
from pytest_lora.stats.sequential import Verdict


def shuffled(passing: int, size: int, seed: int) -> list[int]:
    items = [1] * passing + [0] * (size - passing)
    random.Random(seed).shuffle(items)
    return items


def run(items: list[int], floor: float, alpha: float = 0.001) -> SequentialProportion:
    gate = SequentialProportion(len(items), floor, alpha=alpha)
    for item in items:
        gate.add(item)
        if gate.verdict:
            break
    return gate


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 20), (10, 10), (1001, 1319), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.999])
def test_intervals_are_scipys(successes: int, n: int, confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    test = stats.binomtest(successes, n)
    for ours, method in ((exact_interval, "exact"), (wilson_interval, "wilson")):
        theirs = test.proportion_ci(confidence, method)
        assert ours(successes, n, confidence) == pytest.approx(tuple(theirs), rel=1e-9, abs=1e-15)


def test_the_exact_interval_of_a_set_is_the_inverted_test() -> None:
    size, n, s, tail = 40, 12, 5, 0.025
    kept = [
        marked
        for marked in range(s, size - (n - s) + 1)
        if hypergeometric_cdf(s, size, marked, n) > tail
        and 1 - hypergeometric_cdf(s - 1, size, marked, n) > tail
    ]
    assert exact_interval(s, n, 0.95, size=size) == (kept[0] / size, kept[-1] / size)


@pytest.mark.parametrize("interval", [exact_interval, wilson_interval])
def test_a_set_seen_whole_leaves_nothing_open(interval: object) -> None:
    assert callable(interval)
    assert interval(5, 8, 0.95, size=8) == (0.625, 0.625)
    low, high = interval(5, 8, 0.95, size=10)
    wide = interval(5, 8, 0.95)
    assert wide[0] < low <= 0.625 <= high < wide[1]


@pytest.mark.parametrize("arguments", [(3, 2, 0.9), (0, 0, 0.9), (1, 2, 1.0), (-1, 2, 0.5)])
def test_impossible_counts_are_refused(arguments: tuple[int, int, float]) -> None:
    for interval in (exact_interval, wilson_interval):
        with pytest.raises(ValueError):
            interval(*arguments)
    with pytest.raises(ValueError, match="set of 3"):
        exact_interval(2, 4, 0.9, size=3)


def test_the_half_width_that_needed_items_gives() -> None:
    n = needed_items(0.03, 0.5, alpha=0.025, power=0.5)
    assert n == 1068  # the textbook's poll: 3 points at 95%
    assert normal_quantile(0.975) * 0.5 / n**0.5 <= 0.03


@pytest.mark.parametrize("size", [None, 900])
def test_needed_items_and_detectable_effect_are_inverse(size: int | None) -> None:
    n = needed_items(0.05, 0.4, size=size)
    assert n is not None
    assert minimum_detectable_effect(n, 0.4, size=size) <= 0.05 + 1e-12
    assert minimum_detectable_effect(n - 1, 0.4, size=size) > 0.05
    assert size is None or n < (needed_items(0.05, 0.4) or 0)


def test_no_margin_takes_everything() -> None:
    assert needed_items(0, 1.0) is None
    assert needed_items(0, 1.0, size=70) == 70
    assert needed_items(0, 0.0) == 1
    assert minimum_detectable_effect(70, 1.0, size=70) == 0


def test_the_detectable_effect_is_detected_as_often_as_said() -> None:
    stats = pytest.importorskip("scipy.stats")
    n, alpha, power = 400, 0.05, 0.8
    effect = minimum_detectable_effect(n, 1.0, alpha=alpha, power=power)
    z = effect * n**0.5
    assert stats.norm.sf(stats.norm.isf(alpha) - z) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize("arguments", [(-1, 1.0), (0.1, -1.0)])
def test_needed_items_refuses_negative_numbers(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError):
        needed_items(*arguments)
    with pytest.raises(ValueError):
        minimum_detectable_effect(0, 1.0)
    with pytest.raises(ValueError, match="power"):
        minimum_detectable_effect(5, 1.0, power=1.0)


# ---------------------------------------------------------------------------------- sequential


@pytest.mark.parametrize(("passing", "verdict"), [(800, Verdict.AT_LEAST), (400, Verdict.BELOW)])
def test_a_clear_case_is_decided_early(passing: int, verdict: Verdict) -> None:
    gate = run(shuffled(passing, 1000, 1), 0.6)
    assert gate.verdict is verdict
    assert gate.used < 200
    assert not gate.certain


def test_curtailment_never_contradicts_the_set() -> None:
    """Every set of 7 items in every order, with an alpha that no martingale reaches."""
    for items in product((0, 1), repeat=7):
        for floor in (0, 0.3, 3 / 7, 0.5, 1):
            gate = run(list(items), floor, alpha=1e-9)
            assert gate.certain
            assert (gate.verdict is Verdict.AT_LEAST) == (sum(items) / 7 >= floor)
            assert (gate.p_at_least, gate.p_below) in ((0, 1), (1, 0))


def test_the_floor_is_met_as_floats_divide() -> None:
    for size in range(1, 60):
        for k in range(size + 1):
            assert SequentialProportion(size, k / size, alpha=0.1).needed == k


@pytest.mark.parametrize(("passing", "wrong"), [(29, Verdict.AT_LEAST), (30, Verdict.BELOW)])
def test_the_error_rate_is_kept_at_the_floor(passing: int, wrong: Verdict) -> None:
    """Exactly: the chance of a wrong verdict over all orders, by counting paths."""
    size, floor, alpha = 60, 0.5, 0.05
    paths = {(0, 0): 1.0}
    mistaken = 0.0
    while paths:
        ahead: dict[tuple[int, int], float] = {}
        for (used, successes), chance in paths.items():
            left, passing_left = size - used, passing - successes
            for item, share in ((1, passing_left / left), (0, 1 - passing_left / left)):
                if share > 0:
                    key = (used + 1, successes + item)
                    ahead[key] = ahead.get(key, 0) + chance * share
        paths = {}
        for (used, successes), chance in ahead.items():
            gate = SequentialProportion(size, floor, alpha=alpha)
            gate.used, gate.successes = used - 1, successes
            gate.add(0)
            if gate.verdict is wrong:
                mistaken += chance
            elif gate.verdict is None:
                paths[used, successes] = chance
    assert 0 < mistaken <= alpha


def test_the_interval_holds_the_share_at_every_time() -> None:
    missed = 0
    for seed in range(300):
        gate = SequentialProportion(80, 0.5, alpha=0.05)
        ends = []
        for item in shuffled(30, 80, seed):
            gate.add(item)
            ends.append(gate.interval(0.9))
        missed += any(not low <= 30 / 80 <= high for low, high in ends)
        assert ends[-1] == (30 / 80, 30 / 80)
    assert missed <= 30


def test_the_evidence_is_plain() -> None:
    gate = run(shuffled(800, 1000, 2), 0.6)
    evidence = gate.evidence()
    assert json.loads(json.dumps(evidence)) == evidence
    assert evidence["verdict"] == "at least"
    assert SequentialProportion(4, 0.5, alpha=0.1).evidence()["estimate"] is None
    assert SequentialProportion(4, 0.5, alpha=0.1).interval(0.9) == (0, 1)


def test_what_cannot_be_meant_is_refused() -> None:
    for size, floor, alpha in ((0, 0.5, 0.1), (3, 1.5, 0.1), (3, 0.5, 0.0)):
        with pytest.raises(ValueError):
            SequentialProportion(size, floor, alpha=alpha)
    gate = SequentialProportion(1, 0.5, alpha=0.1)
    with pytest.raises(ValueError, match="neither"):
        gate.add(2)
    with pytest.raises(ValueError, match="confidence"):
        gate.interval(1.0)
    gate.extend([1])
    with pytest.raises(ValueError, match="all of them"):
        gate.add(1)
