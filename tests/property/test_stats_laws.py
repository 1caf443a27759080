"""Laws of the verdicts on data: exact at the end, blind to batches, equivariant, monotone."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pytest_lora.stats.familywise import SequentialHolm, holm
from pytest_lora.stats.order import seeded_order
from pytest_lora.stats.proportions import SequentialProportion, exact_interval, wilson_interval
from pytest_lora.stats.sequential import SequentialMean, Verdict

laws = settings(deadline=None, max_examples=80)
finite = st.floats(-1e6, 1e6)
quarters = st.integers(-40, 40).map(lambda x: x / 4)
sets = st.lists(finite, min_size=1, max_size=40)
p_lists = st.lists(st.floats(0, 1), min_size=1, max_size=7)


@st.composite
def bounded(draw: st.DrawFn) -> tuple[list[float], float]:
    """A set of quarters between -10 and 10, and a limit that is often close to its mean."""
    values = draw(st.lists(quarters, min_size=1, max_size=60))
    mean = sum(values) / len(values)
    return values, draw(st.sampled_from([mean, mean + 0.01, mean - 0.01, mean + 2, mean - 2]))


def gate(values: list[float], limit: float, **options: Any) -> SequentialMean:
    made = SequentialMean(len(values), limit, **{"alpha": 0.05, **options})
    made.extend(values)
    return made


@laws
@given(sets, finite)
def test_the_whole_set_decides_by_its_rounded_mean(values: list[float], limit: float) -> None:
    done = gate(values, limit)
    mean = float(sum(map(Fraction, values)) / len(values))
    assert done.certain
    assert done.estimate == mean
    assert (done.verdict is Verdict.AT_MOST) == (mean <= limit)
    assert done.estimate == gate(values[::-1], limit).estimate


@laws
@given(sets, finite, st.integers(0, 40), st.booleans())
def test_batches_leave_no_trace(
    values: list[float], limit: float, cut: int, declared: bool
) -> None:
    options = {"floor": -1e6, "cap": 1e6} if declared else {}
    whole = SequentialMean(len(values) + 1, limit, alpha=0.05, **options)
    parts = SequentialMean(len(values) + 1, limit, alpha=0.05, **options)
    whole.extend(values)
    parts.extend(values[:cut])
    for value in values[cut:]:
        parts.add(value)
    assert json.dumps(whole.evidence()) == json.dumps(parts.evidence())


@laws
@given(sets, finite, st.integers(-20, 20))
def test_the_unit_does_not_matter(values: list[float], limit: float, exponent: int) -> None:
    """Powers of two scale without rounding, so that the p-values are the same bit for bit."""
    assume(all(x == 0 or abs(x) > 1e-100 for x in [limit, *values]))
    scale = 2.0**exponent
    one = SequentialMean(len(values) + 1, limit, alpha=0.05)
    two = SequentialMean(len(values) + 1, limit * scale, alpha=0.05)
    one.extend(values)
    two.extend(value * scale for value in values)
    assert (one.p_at_most, one.p_above, one.verdict) == (two.p_at_most, two.p_above, two.verdict)


@laws
@given(bounded(), st.integers(-64, 64))
def test_the_origin_does_not_matter(drawn: tuple[list[float], float], shift: int) -> None:
    values, limit = drawn
    limit = round(limit * 64) / 64  # so that the shift is exact
    for options in ({}, {"floor": -10.0, "cap": 10.0}):
        moved = {name: bound + shift for name, bound in options.items()}
        one = SequentialMean(len(values) + 1, limit, alpha=0.05, **options)
        two = SequentialMean(len(values) + 1, limit + shift, alpha=0.05, **moved)
        one.extend(values)
        two.extend(value + shift for value in values)
        assert one.p_at_most == pytest.approx(two.p_at_most, rel=1e-6, abs=1e-12)
        assert one.p_above == pytest.approx(two.p_above, rel=1e-6, abs=1e-12)


@laws
@given(bounded())
def test_the_two_sides_mirror_each_other(drawn: tuple[list[float], float]) -> None:
    values, limit = drawn
    for options, mirrored in (({}, {}), ({"cap": 10.0}, {"floor": -10.0})):
        one = SequentialMean(len(values) + 1, limit, alpha=0.05, **options)
        two = SequentialMean(len(values) + 1, -limit, alpha=0.05, **mirrored)
        one.extend(values)
        two.extend(-value for value in values)
        assert (one._low.log, one._high.log) == (two._high.log, two._low.log)


@laws
@given(bounded(), st.floats(0, 3))
def test_a_higher_limit_is_kept_more_easily(drawn: tuple[list[float], float], step: float) -> None:
    """With a declared cap and floor: rounding apart, no value wins less against a higher limit."""
    values, limit = drawn
    options = {"alpha": 0.05, "floor": -10.0, "cap": 10.0}
    low = SequentialMean(len(values) + 1, limit, **options)
    high = SequentialMean(len(values) + 1, limit + step, **options)
    low.extend(values)
    high.extend(values)
    assert high.p_at_most <= low.p_at_most * (1 + 1e-9)
    assert high.p_above >= low.p_above * (1 - 1e-9)


@laws
@given(bounded())
def test_what_is_certain_early_is_true_at_the_end(drawn: tuple[list[float], float]) -> None:
    values, limit = drawn
    made = SequentialMean(len(values), limit, alpha=1e-12, floor=-10.0, cap=10.0)
    early = None
    for value in values:
        if made.certain and early is None:
            early = made.verdict
        made.add(value)
    assert early in (None, made.verdict)


@laws
@given(bounded(), st.none() | st.just(10.0))
def test_arrays_give_the_same_wealth(drawn: tuple[list[float], float], cap: float | None) -> None:
    np = pytest.importorskip("numpy")
    from pytest_lora.stats.wealth import Wealth, log_wealth

    values, limit = drawn
    size = len(values) + 3
    paths = log_wealth(np.array(values), np.array(limit), size, cap)
    scalar, total = Wealth(size, cap), 0.0
    for i, value in enumerate(values):
        scalar.add(value, (size * limit - total) / (size - i))
        total += value
        assert scalar.log == pytest.approx(float(paths[i]), rel=1e-6, abs=1e-6)


@laws
@given(st.lists(st.booleans(), min_size=1, max_size=50), st.floats(0, 1))
def test_curtailment_never_contradicts_the_set(items: list[bool], floor: float) -> None:
    made = SequentialProportion(len(items), floor, alpha=1e-12)
    early = None
    for item in items:
        if made.certain and early is None:
            early = made.verdict
        made.add(item)
    share = sum(items) / len(items)
    assert made.certain
    assert (made.verdict is Verdict.AT_LEAST) == (share >= floor)
    assert early in (None, made.verdict)


@laws
@given(st.integers(1, 300), st.data())
def test_intervals_of_a_share(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    size = n + data.draw(st.integers(0, 300))
    for interval in (wilson_interval, exact_interval):
        low, high = interval(successes, n, 0.95)
        assert 0 <= low <= successes / n <= high <= 1
        mirrored = interval(n - successes, n, 0.95)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
        wider = interval(successes, n, 0.99)
        assert wider[0] <= low <= high <= wider[1]
        inside = interval(successes, n, 0.95, size=size)
        assert inside[0] - 1e-12 <= successes / n + 1 / size
        assert inside[1] + 1 / size >= successes / n - 1e-12


@laws
@given(p_lists, st.permutations(range(7)))
def test_holm_lies_between_the_p_value_and_bonferroni(p: list[float], order: list[int]) -> None:
    adjusted = holm(p)
    for raw, ours in zip(p, adjusted, strict=True):
        assert raw <= ours <= min(1.0, len(p) * raw)
    kept = [i for i in order if i < len(p)]
    assert holm([p[i] for i in kept]) == [adjusted[i] for i in kept]
    ranked = sorted(range(len(p)), key=p.__getitem__)
    assert [adjusted[i] for i in ranked] == sorted(adjusted)


@laws
@given(p_lists, st.floats(0.001, 0.5))
def test_alpha_for_is_the_p_value_at_which_a_gate_is_decided(p: list[float], alpha: float) -> None:
    names = [str(i) for i in range(len(p) + 1)]
    for nudge, verdict in ((1 - 1e-9, True), (1 + 1e-9, None)):
        family = SequentialHolm(names, alpha)
        for name, value in zip(names[1:], p, strict=True):
            family.update(name, value, value)
        assert family.update("0", family.alpha_for("0") * nudge, 1.0) is verdict


@laws
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.floats(0, 1)), max_size=20))
def test_a_verdict_that_stands_keeps_standing(updates: list[tuple[int, float, float]]) -> None:
    family = SequentialHolm("0123", 0.3)
    stood: dict[str, set[bool]] = {}
    for i, passes, fails in updates:
        family.update(str(i), passes, fails)
        for name in "0123":
            assert name not in stood or family.verdict(name) is not None
            if (verdict := family.verdict(name)) is not None:
                stood.setdefault(name, set()).add(verdict)


@laws
@given(st.integers(0, 50), st.integers(), st.text(max_size=5))
def test_an_order_is_a_permutation(size: int, seed: int, name: str) -> None:
    order = seeded_order(size, seed, name)
    assert sorted(order) == list(range(size))
    assert order == seeded_order(size, seed, name)


@settings(deadline=None, max_examples=20)
@given(bounded(), st.floats(0.5, 0.99))
def test_an_interval_holds_more_at_a_higher_confidence(
    drawn: tuple[list[float], float], confidence: float
) -> None:
    pytest.importorskip("numpy")
    values, limit = drawn
    made = SequentialMean(len(values) + 2, limit, alpha=0.05, floor=-10.0, cap=10.0)
    made.extend(values)
    low, high = made.interval(confidence)
    wider = made.interval((1 + confidence) / 2)
    assert wider[0] - 1e-6 <= low <= high <= wider[1] + 1e-6
    assert math.isfinite(low)
    assert math.isfinite(high)
