"""The results in Markdown, for job summaries, pull requests and files: short, and escaped.

Names and messages of an adapter are its author's to choose.  None of them can start a tag, a link,
a mention, a table cell or a heading here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pytest_lora.records import CheckResult, Json, Outcome
from pytest_lora.report.text import allowed, clean, measured
from pytest_lora.report.verdicts import WORDS, AdapterTable, adapter_tables, headline

__all__ = ["COMMENT_LIMIT", "SUMMARY_LIMIT", "escape", "markdown_report"]

SUMMARY_LIMIT = 1024 * 1024
"""Bytes GitHub takes for the summary of one step (its documentation: 1 MiB)."""
COMMENT_LIMIT = 65_536
"""Characters GitHub takes for one comment."""

_JOINER = "\N{WORD JOINER}"
"""Invisible; keeps ``@name``, ``#1`` and addresses from becoming mentions and links."""
_ESCAPES = {
    **{mark: "\\" + mark for mark in "\\`*_{}[]()|~$!"},
    **{mark: mark + _JOINER for mark in "@#"},
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
}
_TABLE = str.maketrans(_ESCAPES)
_LINKS = re.compile(r"(:)(?=//)|(\bwww)(?=\.)", re.IGNORECASE)
_MOST_PROBLEMS = 10
_CUT = "\n\n*Cut here: {left} of {total} adapters do not fit; the other reports hold them.*\n"


def markdown_report(
    results: Sequence[CheckResult], environment: Mapping[str, Json], *, limit: int | None = None
) -> str:
    """The report as GitHub-flavoured Markdown: verdict, a table of adapters, what is wrong, all.

    Args:
        results: in the order they are to be shown.
        environment: as :func:`pytest_lora.report.json_report.build_report` takes it.
        limit: most bytes of UTF-8 it may have; whole adapters are left out until it fits, and the
            text says how many.
    """
    tables = adapter_tables(results, _table_of(environment, "adapters"))
    # What needs attention must not be what is cut.
    ordered = sorted(tables, key=lambda table: not table.troubles)
    head = f"### LoRA: {headline(tables)}\n\n{_overview(tables)}\n"
    foot = _foot(environment)
    sections = [_section(table) for table in ordered]
    text = head + "".join(sections) + foot
    while limit is not None and len(text.encode("utf-8", "replace")) > limit and sections:
        sections.pop()
        cut = _CUT.format(left=len(ordered) - len(sections), total=len(ordered))
        text = head + "".join(sections) + cut + foot
    if limit is not None and len(text.encode("utf-8", "replace")) > limit:
        return f"### LoRA: {headline(tables)}\n"[:limit]
    return text


def escape(text: str) -> str:
    """``text`` on one line, meaning nothing but itself in Markdown and in a table's cell."""
    return _LINKS.sub(lambda found: found[0] + _JOINER, clean(text).translate(_TABLE))


def _overview(tables: Iterable[AdapterTable]) -> str:
    lines = [
        "| adapter | verdict | failed | errors | inconclusive | skipped | passed |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    order = (
        Outcome.FAILED,
        Outcome.ERROR,
        Outcome.INCONCLUSIVE,
        Outcome.SKIPPED,
        Outcome.PASSED,
    )
    for table in tables:
        counts = " | ".join(str(table.count(outcome)) for outcome in order)
        word = WORDS[table.outcome]
        lines.append(f"| {escape(table.adapter)} | **{word}** | {counts} |")
    return "\n".join(lines) + "\n"


def _section(table: AdapterTable) -> str:
    about = f": {escape(table.about)}" if table.about else ""
    lines = [f"\n#### {escape(table.adapter)}{about}\n"]
    for row in table.troubles:
        lines += _trouble(row)
    lines += [
        f"<details><summary>{len(table.rows)} checks</summary>\n",
        "| check | verdict | measured | allowed |",
        "| --- | --- | --- | --- |",
        *map(_row, table.rows),
        "\n</details>\n",
    ]
    return "\n".join(lines)


def _row(row: CheckResult) -> str:
    evidence = measured(row.measurement, row.bound) if row.measurement else row.reason
    limits = allowed(row.bound) if row.bound else ""
    return f"| {escape(row.label)} | {WORDS[row.outcome]} | {escape(evidence)} | {escape(limits)} |"


def _trouble(row: CheckResult) -> Iterator[str]:
    evidence = f": {escape(measured(row.measurement, row.bound))}" if row.measurement else ""
    limits = f"; allowed: {escape(allowed(row.bound))}" if row.bound else ""
    yield f"**{escape(row.label)}** {WORDS[row.outcome]}{evidence}{limits}\n"
    yield from (f"- {line}" for line in _evidence(row))
    yield ""


def _evidence(row: CheckResult) -> Iterator[str]:
    if row.reason:
        yield escape(row.reason)
    problems = row.measurement.problems if row.measurement else ()
    yield from (escape(str(problem)) for problem in problems[:_MOST_PROBLEMS])
    if len(problems) > _MOST_PROBLEMS:
        yield f"and {len(problems) - _MOST_PROBLEMS} more"
    if row.measurement and row.measurement.where and not problems:
        yield f"worst: {escape(row.measurement.where)}"
    if row.advice:
        yield f"what to do: {escape(row.advice)}"


def _foot(environment: Mapping[str, Json]) -> str:
    versions = _table_of(environment, "versions")
    found = ", ".join(f"{escape(name)} {escape(str(v))}" for name, v in versions.items() if v)
    text = f"\n{found}\n" if found else ""
    command = environment.get("command")
    return text + (f"\nAgain: {_code(str(command))}\n" if command else "")


def _code(text: str) -> str:
    """``text`` as code: nothing in it is markup, whatever backquotes it holds."""
    line, fence = clean(text), "`"
    while fence in line:
        fence += "`"
    return f"{fence} {line} {fence}"


def _table_of(environment: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    value = environment.get(key)
    return value if isinstance(value, Mapping) else {}
