"""Records by example; their laws are in tests/property/test_records_laws.py."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest

from pytest_lora.errors import CannotRun, CheckFailed, LoraError, NotApplicable, UsageError
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem, collecting, emit

PLAIN = Measurement(value=1.5, unit="ulps", count=3)
WEIGHTS = Problem("model.layers.0", "shape [2, 3]", "[3, 2]", "swap A and B")


def result(outcome: Outcome = Outcome.PASSED, **changes: object) -> CheckResult:
    return CheckResult("finite_weights", "adapters/a", outcome, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("a", "b"), "a: b"),
        (Problem("a", "b", "c"), "a: b (expected c)"),
        (Problem("a", "b", fix="do"), "a: b; do"),
        (WEIGHTS, "model.layers.0: shape [2, 3] (expected [3, 2]); swap A and B"),
    ],
)
def test_a_problem_reads_as_one_sentence_and_survives_a_dict(problem: Problem, text: str) -> None:
    assert str(problem) == text
    assert Problem.from_dict(problem.to_dict()) == problem


def test_a_problem_without_a_place_survives_too() -> None:
    assert Problem.from_dict(Problem("", "").to_dict()) == Problem("", "")


@pytest.mark.parametrize("count", [0, -1])
def test_a_measurement_of_nothing_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="no measurement"):
        Measurement(0.0, "problems", count)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(None, 1.0, "two ends"), (1.0, None, "two ends"), (2.0, 1.0, "holds nothing")],
)
def test_half_an_interval_is_refused(low: float | None, high: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Measurement(1.0, "nats", 1, low=low, high=high)


def test_details_are_plain_from_birth() -> None:
    details = {"shape": (2, 3), "worst": {"at": math.inf, 7: math.nan}, "none": None, "yes": True}
    measurement = Measurement(1.0, "ulps", 1, details=details)  # type: ignore[arg-type]
    assert measurement.details == {
        "shape": [2, 3],
        "worst": {"at": "inf", "7": "nan"},
        "none": None,
        "yes": True,
    }
    assert Measurement.from_dict(json.loads(json.dumps(measurement.to_dict()))) == measurement


@pytest.mark.parametrize("foreign", [object(), b"bytes", {1, 2}, 1j])
def test_details_that_are_not_plain_are_refused(foreign: object) -> None:
    with pytest.raises(TypeError, match=f"a {type(foreign).__name__} has no place in a result"):
        Measurement(1.0, "ulps", 1, details={"list": [foreign]})  # type: ignore[list-item]


def test_counted_problems_are_kept_with_the_first_as_the_worst() -> None:
    other = Problem("x", "y")
    measurement = Measurement.of_problems([WEIGHTS, other], count=9, notes=["n"], seen=4)
    assert (measurement.value, measurement.unit, measurement.count) == (2, "problems", 9)
    assert measurement.where == str(WEIGHTS)
    assert measurement.problems == (WEIGHTS, other)
    assert measurement.notes == ("n",)
    assert measurement.details["seen"] == 4
    assert Measurement.from_dict(measurement.to_dict()).problems == (WEIGHTS, other)


def test_no_problems_have_no_worst_place() -> None:
    measurement = Measurement.of_problems([], count=1, unit="tensors")
    assert (measurement.value, measurement.where, measurement.unit) == (0, None, "tensors")


@pytest.mark.parametrize("details", [{}, {"problems": "text", "notes": "text"}, {"problems": 3}])
def test_details_of_another_shape_hold_no_problems(details: dict[str, object]) -> None:
    measurement = Measurement(1.0, "ulps", 1, details=details)  # type: ignore[arg-type]
    assert measurement.problems == ()
    assert measurement.notes == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -2.5])
def test_every_number_survives_strict_json(value: float) -> None:
    measurement = Measurement(value, "nats", 2, low=min(value, 0.0), high=max(value, 1.0))
    text = json.dumps(measurement.to_dict(), allow_nan=False)
    assert str(Measurement.from_dict(json.loads(text))) == str(measurement)


def test_a_word_is_no_number() -> None:
    with pytest.raises(ValueError, match="'much' is no number"):
        Measurement.from_dict({**PLAIN.to_dict(), "value": "much"})


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (None, None, "lower or an upper"),
        (math.nan, None, "NaN bounds nothing"),
        (None, math.nan, "NaN bounds nothing"),
        (2.0, 1.0, "both at least 2.0 and at most 1.0"),
    ],
)
def test_a_bound_that_bounds_nothing_is_refused(
    low: float | None, high: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Bound(low, high, "argument")


@pytest.mark.parametrize(
    ("bound", "value", "admitted"),
    [
        (Bound.at_most(1, ""), 1.0, True),
        (Bound.at_most(1, ""), math.nextafter(1, 2), False),
        (Bound.at_least(1, ""), 1.0, True),
        (Bound.at_least(1, ""), math.nextafter(1, 0), False),
        (Bound(0, 1, ""), 0.5, True),
        (Bound.at_most(math.inf, ""), math.inf, False),
        (Bound.at_least(0, ""), math.inf, False),
        (Bound.at_most(1, ""), math.nan, False),
    ],
)
def test_limits_are_inclusive_and_never_admit_the_non_finite(
    bound: Bound, value: float, admitted: bool
) -> None:
    assert bound.admits(value) is admitted
    outcome = Outcome.PASSED if admitted else Outcome.FAILED
    assert bound.judge(Measurement(value, "", 1)) is outcome


@pytest.mark.parametrize(
    ("bound", "low", "high", "outcome"),
    [
        (Bound.at_most(1, ""), 0.2, 1.0, Outcome.PASSED),
        (Bound.at_most(1, ""), 0.2, 1.1, Outcome.INCONCLUSIVE),
        (Bound.at_most(1, ""), 1.1, 2.0, Outcome.FAILED),
        (Bound.at_least(1, ""), 0.2, 0.9, Outcome.FAILED),
        (Bound.at_least(1, ""), 0.9, 1.2, Outcome.INCONCLUSIVE),
        (Bound(0, 1, ""), -1.0, 2.0, Outcome.INCONCLUSIVE),
        (Bound.at_most(1, ""), math.nan, math.nan, Outcome.INCONCLUSIVE),
        (Bound.at_most(1, ""), 0.5, math.inf, Outcome.INCONCLUSIVE),
    ],
)
def test_an_estimate_is_judged_by_its_whole_interval(
    bound: Bound, low: float, high: float, outcome: Outcome
) -> None:
    assert bound.judge(Measurement(1.0, "nats", 5, low=low, high=high)) is outcome


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_interval_does_not_save_a_value_that_is_no_number(value: float) -> None:
    assert Bound.at_most(1, "").judge(Measurement(value, "", 1, low=0, high=1)) is Outcome.FAILED


@pytest.mark.parametrize(
    "record",
    [
        result(),
        result(Outcome.SKIPPED, reason="no base model"),
        result(
            Outcome.FAILED,
            advice="train longer",
            measurement=Measurement.of_problems([WEIGHTS], count=2),
            bound=Bound.at_most(0, "definition"),
            seconds=0.25,
        ),
    ],
)
def test_a_result_survives_a_dict(record: CheckResult) -> None:
    assert CheckResult.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_a_result_under_another_name_is_otherwise_the_same() -> None:
    renamed = result(seconds=3.0).with_adapter("b")
    assert renamed == CheckResult("finite_weights", "b", Outcome.PASSED, seconds=3.0)


def test_results_reach_only_the_innermost_collector() -> None:
    emit(result())  # nobody listens
    with collecting() as outer:
        emit(result(reason="1"))
        with collecting() as inner:
            emit(result(reason="2"))
        emit(result(reason="3"))
    emit(result())
    assert [item.reason for item in outer] == ["1", "3"]
    assert [item.reason for item in inner] == ["2"]


def test_a_collector_steps_aside_when_its_block_raises() -> None:
    with collecting() as outer:
        with pytest.raises(KeyError), collecting():
            raise KeyError
        emit(result())
    assert len(outer) == 1


@pytest.mark.parametrize(
    "error",
    [
        CannotRun("no GPU", missing=True),
        CannotRun("broken"),
        NotApplicable("prompt tuning"),
        UsageError("no"),
        CheckFailed("worse", result(Outcome.FAILED)),
    ],
)
def test_exceptions_survive_the_way_between_processes(error: LoraError) -> None:
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(copied) is type(error)
        assert str(copied) == str(error)
        assert vars(copied) == vars(error)


def test_a_failure_is_an_assertion_error_and_a_missing_thing_says_so() -> None:
    assert issubclass(CheckFailed, AssertionError)
    assert CannotRun("x", missing=True).missing
    assert not CannotRun("x").missing
