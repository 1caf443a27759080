"""The summary in the terminal: one table per adapter, readable without colour and in a pipe."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from pytest_lora.records import CheckResult, Outcome
from pytest_lora.report.text import allowed, clean, measured

__all__ = ["summary_lines"]

_WORDS = {
    Outcome.PASSED: "pass",
    Outcome.FAILED: "FAIL",
    Outcome.SKIPPED: "skip",
    Outcome.INCONCLUSIVE: "INCONCLUSIVE",
    Outcome.ERROR: "ERROR",
}
_COLOURS = {
    Outcome.PASSED: "green",
    Outcome.FAILED: "red",
    Outcome.SKIPPED: "yellow",
    Outcome.INCONCLUSIVE: "yellow",
    Outcome.ERROR: "red",
}
_NARROWEST = 60
_WIDEST_NAME = 30


def summary_lines(
    results: Sequence[CheckResult], about: Mapping[str, str], *, width: int, detail: bool = False
) -> Iterator[tuple[str, str | None]]:
    """Lines of the summary with the colour each may be shown in, or None.

    Args:
        results: in the order they are to be shown; results of one adapter stand together.
        about: one line of description per adapter name.
        width: columns of the terminal.
        detail: show notes too.
    """
    width = max(width, _NARROWEST)
    for adapter, group in groupby(results, key=lambda result: result.adapter):
        rows = list(group)
        rows = rows if detail else _gathered(rows)
        described = about.get(adapter, "")
        yield from _wrapped(f"{clean(adapter)}  {clean(described)}", "", width, None)
        heads = _heads(rows)
        for row, head in zip(rows, heads, strict=True):
            yield from _row(row, head, width, detail)
        yield from _advice(rows, width)
        yield "", None


def _gathered(rows: Iterable[CheckResult]) -> list[CheckResult]:
    """The rows with those that were skipped for one and the same reason in a single one."""
    alike: dict[tuple[Outcome, str] | int, list[CheckResult]] = {}
    for number, row in enumerate(rows):
        skipped = row.outcome is Outcome.SKIPPED and row.measurement is None and row.reason
        alike.setdefault((row.outcome, row.reason) if skipped else number, []).append(row)
    return [group[0] if len(group) == 1 else _joined(group) for group in alike.values()]


def _joined(rows: Sequence[CheckResult]) -> CheckResult:
    names = ", ".join(row.label for row in rows)
    return replace(rows[0], check=f"{len(rows)} checks", reason=f"{rows[0].reason} ({names})")


def _heads(rows: Sequence[CheckResult]) -> list[str]:
    """The names and verdicts of one table, in two columns."""
    names = [_short(clean(row.label)) for row in rows]
    words = [_WORDS[row.outcome] for row in rows]
    left, right = max(map(len, names)), max(map(len, words))
    return [f"  {name:<{left}}  {word:<{right}}  " for name, word in zip(names, words, strict=True)]


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 3] + "..."


def _row(row: CheckResult, head: str, width: int, detail: bool) -> Iterator[tuple[str, str | None]]:
    indent = " " * len(head)
    first, *rest = _wrap(_evidence(row), width - len(head)) or [""]
    yield (head + first).rstrip(), _COLOURS[row.outcome]
    for line in rest:
        yield indent + line, None
    if detail and row.measurement is not None:
        for note in row.measurement.notes:
            yield from _wrapped(f"note: {clean(note)}", indent, width, None)


def _evidence(row: CheckResult) -> str:
    if row.measurement is None:
        return clean(row.reason)
    text = measured(row.measurement, row.bound)
    if row.bound is not None and not _is_plain_zero(row):
        text += f", {allowed(row.bound)}"
    if row.outcome is not Outcome.PASSED and row.measurement.where:
        text += f"; worst: {clean(row.measurement.where)}"
    return text


def _is_plain_zero(row: CheckResult) -> bool:
    """Nothing wrong where nothing may be: the bound would only repeat it."""
    return row.bound is not None and row.bound.high == 0 and row.outcome is Outcome.PASSED


def _advice(rows: Iterable[CheckResult], width: int) -> Iterator[tuple[str, str | None]]:
    for row in rows:
        if row.outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE) and row.advice:
            yield from _wrapped(f"{clean(row.label)}: {clean(row.advice)}", "  -> ", width, None)


def _wrap(text: str, width: int, lead: str = "", after: str = "") -> list[str]:
    # An option or a path that is cut at a hyphen cannot be copied from the screen.
    lines = textwrap.wrap(
        text, width, initial_indent=lead, subsequent_indent=after, break_on_hyphens=False
    )
    return [_not_a_command(line) for line in lines]


def _not_a_command(line: str) -> str:
    """GitHub obeys lines that begin with ``::``, indented or not; text of an adapter may not."""
    return line.replace("::", ". ", 1) if line.lstrip().startswith("::") else line


def _wrapped(
    text: str, lead: str, width: int, colour: str | None
) -> Iterator[tuple[str, str | None]]:
    after = " " * len(lead) or "    "
    lines = _wrap(text, width, lead, after)
    for line in lines:
        yield line, colour
