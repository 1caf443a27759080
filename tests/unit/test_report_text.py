"""One verdict in words: numbers that tell apart, a fixed order, nothing a terminal would obey."""

from __future__ import annotations

import math

import pytest

from pytest_lora.catalog import CHECKS
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.text import allowed, check_list, clean, explain, measured, number

ONE = Bound.at_most(1, "default")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3"),
        (-0.0, "0"),
        (0.98123, "0.981"),
        (1.2e-7, "1.2e-07"),
        (999_999, "999999"),
        (1e6, "1e+06"),
        (1234567.0, "1.23e+06"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "bound", "text"),
    [
        (1.0004, ONE, "1.0004"),
        (0.99999, ONE, "0.99999"),
        (math.nextafter(1, 2), ONE, "1.0000000000000002"),
        (1.0, ONE, "1"),
        (7.5, ONE, "7.5"),
        (2.0001, Bound(1.0, 2.0, ""), "2.0001"),
        (math.inf, ONE, "inf"),
    ],
)
def test_a_number_beside_a_limit_shows_on_which_side_it_lies(
    value: float, bound: Bound, text: str
) -> None:
    assert number(value, apart_from=bound) == text


def test_a_measurement_shows_its_interval_and_what_it_rests_on() -> None:
    assert measured(Measurement(2, "problems", 1)) == "2 problems (n=1)"
    assert measured(Measurement(1, "problems", 1)) == "1 problem (n=1)"
    assert measured(Measurement(1, "times the bias", 1)) == "1 times the bias (n=1)"
    estimate = Measurement(0.05, "nats per\ntoken", 12345, low=0.01, high=0.0912)
    assert measured(estimate) == "0.05 nats per token [0.01, 0.0912] (n=12,345)"
    assert measured(Measurement(1.0004, "ulps", 1), ONE) == "1.0004 ulps (n=1)"


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        (ONE, "at most 1 (default)"),
        (Bound.at_least(0.5, "ini lora_x"), "at least 0.5 (ini lora_x)"),
        (Bound(0.5, 2, "argument"), "at least 0.5 and at most 2 (argument)"),
        (Bound.at_least(5e-324, "default"), "more than 0 (default)"),
        (Bound.at_least(0, "default"), "at least 0 (default)"),
    ],
)
def test_a_bound_names_who_set_it(bound: Bound, text: str) -> None:
    assert allowed(bound) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("two\nlines \t and  gaps", "two lines and gaps"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("right\u202eleft", "right\\u202eleft"),
        ("lone \udc80", "lone \\udc80"),
        ("Größe \u4e2d", "Größe \u4e2d"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_is_spelled_out(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_a_failure_is_told_in_a_fixed_order() -> None:
    measurement = Measurement(
        1.5, "times the rounding bound", 14, where="q_proj at [0, 3]", details={"notes": ["slow"]}
    )
    result = CheckResult(
        "merge_equivalence",
        "adapters/a",
        Outcome.FAILED,
        advice="use safe_merge",
        measurement=measurement,
        bound=ONE,
    )
    assert explain(result).splitlines() == [
        "merge_equivalence FAILED for adapters/a: 1.5 times the rounding bound (n=14)",
        "  worst: q_proj at [0, 3]",
        "  note: slow",
        "  allowed: at most 1 (default)",
        "  what to do: use safe_merge",
        "  to move the bound: --lora-merge-equivalence=LIMIT, ini lora_merge_equivalence, or "
        "@pytest.mark.lora_bounds(merge_equivalence=LIMIT)",
    ]


def test_problems_are_listed_up_to_ten() -> None:
    problems = [Problem(f"tensor {n}", "NaN\nat 3") for n in range(12)]
    result = CheckResult(
        "finite_weights",
        "a",
        Outcome.FAILED,
        measurement=Measurement.of_problems(problems, count=20),
        bound=Bound.at_most(0, "definition of the check"),
    )
    lines = explain(result).splitlines()
    assert lines[0] == "finite_weights FAILED for a: 12 problems (n=20)"
    assert lines[1] == "  - tensor 0: NaN at 3"
    assert lines[10] == "  - tensor 9: NaN at 3"
    assert lines[11:] == [
        "  - ... and 2 more",
        "  allowed: at most 0 (definition of the check)",
    ]


@pytest.mark.parametrize("outcome", Outcome)
def test_a_reason_stands_for_a_measurement(outcome: Outcome) -> None:
    text = explain(CheckResult("my_own_check", "a", outcome, reason="no base\nmodel"))
    [line] = text.splitlines()
    assert line.startswith("my_own_check ")
    assert line.endswith(" for a: no base model")


@pytest.mark.parametrize("margin", ["", ": baseline + 0.1"])
def test_the_bound_that_a_source_has_for_itself_is_moved_where_it_stands(margin: str) -> None:
    """No option goes before it: naming one would send people round in a circle."""
    bound = Bound.at_most(0.1, f"max_drift in lora.toml:3{margin}")
    drift = Measurement(0.2, "nats per token", 5)
    failed = CheckResult("perplexity_drift", "a", Outcome.FAILED, measurement=drift, bound=bound)
    last = explain(failed).splitlines()[-1]
    assert last == "  to move the bound: max_drift in lora.toml:3, which goes before any option"


def test_a_passed_check_has_no_bound_to_move() -> None:
    result = CheckResult(
        "merge_equivalence", "a", Outcome.PASSED, measurement=Measurement(0, "x", 1), bound=ONE
    )
    assert "to move the bound" not in explain(result)


def test_the_list_of_checks_has_every_check_and_how_to_move_its_bound() -> None:
    text = check_list()
    for spec in CHECKS:
        assert spec.question in text
        assert (f"ini lora_{spec.id}," in text) == bool(spec.limit)
    assert len(text.splitlines()) == 2 * len(CHECKS)
