"""Laws of the records: nothing is lost on the way through JSON, and judging is consistent."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.records import Bound, CheckResult, Json, Measurement, Outcome, Problem

numbers = st.floats() | st.integers(-(2**60), 2**60)
finite = st.floats(allow_nan=False, allow_infinity=False)
plain: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
problems = st.builds(Problem, *[st.text()] * 4)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[float, float] | tuple[None, None]:
    if draw(st.booleans()):
        return None, None
    low, high = sorted(draw(st.tuples(finite, finite)))
    return low, high


@st.composite
def measurements(draw: st.DrawFn, values: st.SearchStrategy[float] = numbers) -> Measurement:
    low, high = draw(intervals())
    if draw(st.booleans()):
        return Measurement.of_problems(
            draw(st.lists(problems, max_size=3)),
            count=draw(st.integers(1)),
            notes=[draw(st.text())],
        )
    return Measurement(
        draw(values),
        draw(st.text()),
        draw(st.integers(1)),
        low,
        high,
        draw(st.none() | st.text()),
        draw(st.dictionaries(st.text(), plain, max_size=3)),
    )


@st.composite
def bounds(draw: st.DrawFn) -> Bound:
    low, high = sorted(draw(st.tuples(finite, finite)))
    ends = draw(st.sampled_from([(low, high), (None, high), (low, None)]))
    return Bound(*ends, draw(st.text()))


results = st.builds(
    CheckResult,
    check=st.text(),
    adapter=st.text(),
    outcome=st.sampled_from(Outcome),
    reason=st.text(),
    advice=st.text(),
    measurement=st.none() | measurements(),
    bound=st.none() | bounds(),
    seconds=st.floats(0, 1e9),
)


def same(one: object, other: object) -> bool:
    """Equality that takes NaN to be itself."""
    return repr(one) == repr(other)


@given(problems)
def test_problems_survive_json(problem: Problem) -> None:
    assert Problem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem


@given(measurements())
def test_measurements_survive_strict_json(measurement: Measurement) -> None:
    text = json.dumps(measurement.to_dict(), allow_nan=False)
    back = Measurement.from_dict(json.loads(text))
    assert same(back, measurement)
    assert back.problems == measurement.problems
    assert same(Measurement.from_dict(back.to_dict()), measurement)


@given(bounds())
def test_bounds_survive_strict_json(bound: Bound) -> None:
    assert Bound.from_dict(json.loads(json.dumps(bound.to_dict(), allow_nan=False))) == bound


@given(results)
def test_results_survive_strict_json(result: CheckResult) -> None:
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert same(CheckResult.from_dict(json.loads(text)), result)


@given(bounds(), measurements())
def test_only_a_finite_value_passes(bound: Bound, measurement: Measurement) -> None:
    if bound.judge(measurement) is Outcome.PASSED:
        assert math.isfinite(measurement.value)


@given(bounds(), finite)
def test_a_number_passes_exactly_when_it_is_admitted(bound: Bound, value: float) -> None:
    passed = bound.judge(Measurement(value, "", 1)) is Outcome.PASSED
    above = bound.low is None or value >= bound.low
    below = bound.high is None or value <= bound.high
    assert passed == bound.admits(value) == (above and below)


@given(bounds(), finite)
def test_an_interval_of_one_point_is_that_point(bound: Bound, value: float) -> None:
    estimate = Measurement(value, "", 1, low=value, high=value)
    assert bound.judge(estimate) is bound.judge(Measurement(value, "", 1))


@given(bounds(), st.lists(finite, min_size=4, max_size=4).map(sorted))
def test_a_narrower_interval_never_overturns_a_verdict(bound: Bound, ends: list[float]) -> None:
    low, lower, upper, high = ends
    before = bound.judge(Measurement(lower, "", 1, low=low, high=high))
    after = bound.judge(Measurement(lower, "", 1, low=lower, high=upper))
    assert before in (after, Outcome.INCONCLUSIVE)


@given(finite, finite, finite)
def test_a_looser_limit_admits_no_less(value: float, one: float, other: float) -> None:
    tight, loose = sorted((one, other))
    assert Bound.at_most(tight, "").admits(value) <= Bound.at_most(loose, "").admits(value)
    assert Bound.at_least(loose, "").admits(value) <= Bound.at_least(tight, "").admits(value)
