"""Laws of the reports: no line is too wide, no order is invented, every report fits its schema."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("jsonschema")
import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.errors import UsageError
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.github import comment_text
from pytest_lora.report.html import html_report
from pytest_lora.report.json_report import (
    build_report,
    load_report,
    read_report,
    report_schema,
    write_report,
)
from pytest_lora.report.markdown import escape, markdown_report
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


@given(st.lists(results, max_size=7), st.integers(40, 200), st.integers(0, 2), texts)
def test_no_line_is_wider_than_the_terminal(
    rows: list[CheckResult], width: int, detail: int, about: str
) -> None:
    described = {row.adapter: about for row in rows}
    for line, _ in summary_lines(rows, described, width=width, detail=detail):
        assert len(line) <= width
        assert line.isprintable()


@given(st.lists(results, max_size=2), st.sampled_from(["ascii", "cp437", "cp1252", "utf-8", "no"]))
def test_every_line_can_be_shown_by_the_terminal(rows: list[CheckResult], encoding: str) -> None:
    for line, _ in summary_lines(rows, {}, width=50, encoding=encoding):
        line.encode("ascii" if encoding == "no" else encoding)
        assert len(line) <= 50


@given(st.lists(results, max_size=7), st.integers(-10, 39))
def test_a_narrow_terminal_is_taken_for_one_of_forty_columns(
    rows: list[CheckResult], width: int
) -> None:
    narrow = list(summary_lines(rows, {}, width=width))
    assert narrow == list(summary_lines(rows, {}, width=40))


@given(results)
def test_an_explanation_has_one_printable_line_per_thing(result: CheckResult) -> None:
    lines = explain(result).split("\n")
    assert all(line.isprintable() for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])


@given(texts)
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    assert clean(clean(text)) == clean(text)


@given(st.lists(results, max_size=7))
def test_every_report_fits_the_schema_and_keeps_its_order(rows: list[CheckResult]) -> None:
    report = build_report(rows, ENVIRONMENT)
    VALIDATOR.validate(json.loads(json.dumps(report, allow_nan=False)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "report.json"
        write_report(path, report)
        back = read_report(path)
        assert [repr(row) for row in back] == [repr(row) for row in rows]
        assert os.listdir(path.parent) == ["report.json"]


# What the report itself is made of.  Anything else in a page came from data.
OURS = frozenset(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "a",
        "header",
        "div",
        "h1",
        "h2",
        "h3",
        "p",
        "span",
        "main",
        "section",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "strong",
        "pre",
        "code",
        "figure",
        "figcaption",
        "svg",
        "desc",
        "line",
        "text",
        "polyline",
        "polygon",
        "path",
        "rect",
        "circle",
    ]
)
hostile = st.sampled_from(
    [
        "</title><b>",
        "<script>",
        "</style><i>",
        "'\"><img src=//x>",
        "--><x>",
        "&lt;",
        "]]>",
        "\x00<u>",
    ]
)
bits = hostile | st.text(max_size=12)
numbers = st.floats() | st.sampled_from(["nan", "inf", 3])
modules = st.builds("m.{}.{}".format, st.integers(0, 99), bits)
looks = st.fixed_dictionaries(
    {"used": numbers, "estimate": numbers, "low": numbers, "high": st.none() | numbers}
)
curves = st.fixed_dictionaries(
    {
        "categories": st.lists(bits, min_size=1, max_size=2),
        "columns": st.lists(st.lists(numbers, min_size=1, max_size=2), max_size=4),
        "phases": st.lists(st.tuples(bits, numbers), max_size=3),
    }
)
details = st.dictionaries(
    bits,
    st.dictionaries(modules, numbers | bits, max_size=4)
    | st.lists(st.fixed_dictionaries({"step": numbers, "rms": numbers}), max_size=4)
    | st.lists(looks, max_size=4)
    | st.fixed_dictionaries({"least": numbers, "most": numbers, "counts": st.lists(numbers)})
    | curves
    | st.lists(st.dictionaries(bits, bits, max_size=2), max_size=2)
    | bits,
    max_size=3,
)
detailed = st.builds(Measurement, value=st.floats(), unit=bits, count=st.just(1), details=details)
rich = st.builds(
    CheckResult,
    check=bits,
    adapter=bits,
    outcome=st.sampled_from(Outcome),
    reason=bits,
    advice=bits,
    measurement=st.none() | detailed,
)


class Balanced(HTMLParser):
    """Fails for an element that is not ours, or is not closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.feed(page)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in OURS
        assert not [key for key, _ in attrs if key.startswith("on") or key == "src"]
        if tag != "meta":
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment out of nowhere: {data}")


@given(st.lists(rich, max_size=2), bits)
def test_no_data_is_markup_in_html(rows: list[CheckResult], text: str) -> None:
    environment = {**ENVIRONMENT, "command": text, "settings": {text: {text: {"value": text}}}}
    environment["digests"] = {text: {text: text}}
    page = html_report(rows, environment)
    page.encode("utf-8")
    assert not [char for char in page if not char.isprintable() and char != "\n"]
    Balanced(page)


@given(st.text() | hostile | texts)
def test_no_data_is_markup_in_markdown(text: str) -> None:
    shown = escape(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(\\\\)*[`*_{}\[\]()|~$!<>]", shown)
    assert not re.search(r"&(?!amp;|lt;|gt;)", shown)
    assert not re.search(r"[@#]\w|://", shown)


@given(st.lists(rich, max_size=4), st.integers(0, 3000))
def test_markdown_is_never_longer_than_allowed(rows: list[CheckResult], limit: int) -> None:
    assert len(markdown_report(rows, ENVIRONMENT, limit=limit).encode()) <= limit


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | bits,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(bits, inner, max_size=2),
    max_leaves=3,
)


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@given(st.data(), results | rich, junk)
def test_a_report_with_anything_in_any_place_is_shown_or_refused(
    data: st.DataObject, row: CheckResult, wrong: object
) -> None:
    """A file from a fork may be one: that is one message, and no traceback."""
    report = json.loads(json.dumps(build_report([row], ENVIRONMENT)))
    *way, last = data.draw(st.sampled_from(places(report)[1:]))
    within = report
    for key in way:
        within = within[key]
    within[last] = wrong
    with TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        path.write_text(json.dumps(report), encoding="utf-8")
        try:
            environment, rows = load_report(path)
        except UsageError:
            return
    assert comment_text(rows, environment)
