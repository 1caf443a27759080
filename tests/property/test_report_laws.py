"""Laws of the reports: no line is too wide, no order is invented, every report fits its schema."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("jsonschema")
import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.json_report import build_report, read_report, report_schema, write_report
from pytest_lora.report.terminal import summary_lines
from pytest_lora.report.text import clean, explain

VALIDATOR = jsonschema.Draft202012Validator(report_schema())
texts = st.text(st.characters()) | st.text("ab \t\n\x1b\x85\u2028\u202e\ud800-", max_size=90)
problems = st.builds(Problem, texts, texts, texts, texts)
counted = st.builds(
    Measurement.of_problems,
    st.lists(problems, max_size=12),
    count=st.integers(1),
    unit=texts,
    notes=st.lists(texts, max_size=2),
)
estimated = st.builds(
    Measurement, value=st.floats(), unit=texts, count=st.integers(1), where=st.none() | texts
)
results = st.builds(
    CheckResult,
    check=texts,
    adapter=texts,
    outcome=st.sampled_from(Outcome),
    reason=texts,
    advice=texts,
    measurement=st.none() | counted | estimated,
    bound=st.none() | st.builds(Bound.at_most, st.floats(allow_nan=False), texts),
    seconds=st.floats(0, 1e9),
)
ENVIRONMENT = {"versions": {"torch": None}, "platform": "x", "adapters": {}, "exit_status": 0}


@given(st.lists(results, max_size=4), st.integers(60, 200), st.booleans(), texts)
def test_no_line_is_wider_than_the_terminal(
    rows: list[CheckResult], width: int, detail: bool, about: str
) -> None:
    described = {row.adapter: about for row in rows}
    for line, _ in summary_lines(rows, described, width=width, detail=detail):
        assert len(line) <= width
        assert line.isprintable()


@given(st.lists(results, max_size=4), st.integers(-10, 59))
def test_a_narrow_terminal_is_taken_for_one_of_sixty_columns(
    rows: list[CheckResult], width: int
) -> None:
    narrow = list(summary_lines(rows, {}, width=width))
    assert narrow == list(summary_lines(rows, {}, width=60))


@given(results)
def test_an_explanation_has_one_printable_line_per_thing(result: CheckResult) -> None:
    lines = explain(result).split("\n")
    assert all(line.isprintable() for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])


@given(texts)
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    assert clean(clean(text)) == clean(text)


@given(st.lists(results, max_size=4))
def test_every_report_fits_the_schema_and_keeps_its_order(rows: list[CheckResult]) -> None:
    report = build_report(rows, ENVIRONMENT)
    VALIDATOR.validate(json.loads(json.dumps(report, allow_nan=False)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "report.json"
        write_report(path, report)
        back = read_report(path)
        assert [repr(row) for row in back] == [repr(row) for row in rows]
        assert os.listdir(path.parent) == ["report.json"]
