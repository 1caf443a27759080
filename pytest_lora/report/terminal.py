"""The summary in the terminal: tables of verdicts, readable without colour and in a pipe."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from pytest_lora.records import CheckResult, Measurement, Outcome
from pytest_lora.report.modules import module_maps
from pytest_lora.report.text import allowed, clean, encodable, measured, number

__all__ = ["summary_lines"]

Lines = Iterator[tuple[str, str | None]]

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
_TO_MEND = (Outcome.ERROR, Outcome.FAILED, Outcome.INCONCLUSIVE)
_TO_LOOK_AT = (*_TO_MEND, Outcome.SKIPPED)
_FEW = 4
"""Adapters that each get a table of their own, whatever there is to say of them."""
_NARROWEST = 40
_WIDEST_NAME = 30
_LEAST_EVIDENCE = 30
"""Columns; where a table leaves less, evidence goes below the verdict."""
_BELOW = " " * 6
_MODULES = 5
"""Shown of each check with ``-v``; all are with ``-vv``."""


def summary_lines(
    results: Sequence[CheckResult],
    about: Mapping[str, str],
    *,
    width: int,
    detail: int = 0,
    encoding: str = "utf-8",
) -> Lines:
    """Lines of the summary with the colour each may be shown in, or None.

    Of many adapters only those that need attention have a table of their own, and one table of all
    of them comes last: the first to look at on top.

    Args:
        results: in the order they are to be shown; results of one adapter stand together.
        about: one line of description per adapter name.
        width: columns of the terminal; less than 40 are taken for 40.
        detail: 1 shows notes, the numbers of the worst modules and every adapter's own table too, 2
            those of all modules.
        encoding: of the terminal; what it lacks is shown in plain characters.
    """
    table = _Table(max(width, _NARROWEST), detail, encoding)
    adapters = [(name, list(rows)) for name, rows in groupby(results, key=lambda row: row.adapter)]
    many = len(adapters) > _FEW
    for adapter, rows in adapters:
        if not many or detail or _worst(rows) in _TO_MEND:
            yield from table.lines(adapter, about.get(adapter, ""), rows)
    if many:
        yield from table.overview(adapters)


@dataclass(frozen=True, slots=True)
class _Table:
    """How the tables of one summary are laid out."""

    width: int
    detail: int
    encoding: str

    def lines(self, adapter: str, about: str, rows: list[CheckResult]) -> Lines:
        rows = rows if self.detail else _gathered(rows)
        yield from self._wrapped(f"{self._said(adapter)}  {self._said(about)}", "")
        heads = self._heads(rows)
        below = len(heads[0]) + _LEAST_EVIDENCE > self.width
        if below:  # too narrow for three columns: the verdict first, for names are of any length
            heads = self._heads(rows, verdict_first=True)
        for row, head in zip(rows, heads, strict=True):
            yield from self._row(row, head, below)
        yield from self._advice(rows)
        yield "", None

    def overview(self, adapters: Sequence[tuple[str, Sequence[CheckResult]]]) -> Lines:
        """One row per adapter: what has to be mended first, then what was skipped, then others."""
        yield from self._wrapped(f"{len(adapters)} adapters, those that need attention first", "")
        ordered = sorted(adapters, key=lambda item: _attention(item[1]))
        names = [_end(self._said(adapter)) for adapter, _ in ordered]
        words = [_WORDS[_worst(rows)] for _, rows in ordered]
        left, right = max(map(len, names)), max(map(len, words))
        below = left + right + 6 + _LEAST_EVIDENCE > self.width
        for name, word, (_, rows) in zip(names, words, ordered, strict=True):
            head = f"  {word:<{right}}  {name}" if below else f"  {name:<{left}}  {word:<{right}}  "
            indent = _BELOW if below else " " * len(head)
            lines = self._wrap(self._said(_tally(rows)), self.width - len(indent))
            first = head[: self.width] if below else head + lines.pop(0)
            yield first, _COLOURS[_worst(rows)]
            for line in lines:
                yield indent + line, None
        yield "", None

    def _heads(self, rows: Sequence[CheckResult], verdict_first: bool = False) -> list[str]:
        """The names and verdicts of one table, in two columns."""
        names = [_short(self._said(row.label)) for row in rows]
        words = [_WORDS[row.outcome] for row in rows]
        left, right = max(map(len, names)), max(map(len, words))
        pairs = zip(names, words, strict=True)
        if verdict_first:
            return [f"  {word:<{right}}  {name}" for name, word in pairs]
        return [f"  {name:<{left}}  {word:<{right}}  " for name, word in pairs]

    def _row(self, row: CheckResult, head: str, below: bool) -> Lines:
        colour, text = _COLOURS[row.outcome], _evidence(row)
        indent = _BELOW if below else " " * len(head)
        lines = self._wrap(self._said(text), self.width - len(indent)) or [""]
        if below:
            yield head[: self.width], colour
        else:
            yield (head + lines.pop(0)).rstrip(), colour
        for line in lines:
            yield (indent + line).rstrip(), None
        if self.detail and row.measurement is not None:
            for text in (*_notes(row.measurement), *_modules(row.measurement, self.detail)):
                yield from self._wrapped(self._said(text), indent)

    def _advice(self, rows: Iterable[CheckResult]) -> Lines:
        for row in rows:
            if row.outcome in _TO_MEND and row.advice:
                yield from self._wrapped(self._said(f"{row.label}: {row.advice}"), "  -> ")

    # ------------------------------------------------------------------------------------- words

    def _said(self, text: str) -> str:
        return encodable(clean(text), self.encoding)

    def _wrapped(self, text: str, lead: str) -> Lines:
        after = " " * len(lead) or "    "
        for line in self._wrap(text, self.width, lead, after):
            yield line, None

    def _wrap(self, text: str, width: int, lead: str = "", after: str = "") -> list[str]:
        # An option or a path that is cut at a hyphen cannot be copied from the screen.
        lines = textwrap.wrap(
            text, width, initial_indent=lead, subsequent_indent=after, break_on_hyphens=False
        )
        return [_not_a_command(line) for line in lines]


def _attention(rows: Sequence[CheckResult]) -> tuple[int, ...]:
    """Sorting key: by how bad the worst verdict is, then by how many there are of each."""
    counts = [sum(row.outcome is outcome for row in rows) for outcome in _TO_LOOK_AT]
    return tuple(-int(count > 0) for count in counts) + tuple(-count for count in counts)


def _worst(rows: Sequence[CheckResult]) -> Outcome:
    """What to call an adapter: that some of its checks made no sense is no blemish."""
    outcomes = {row.outcome for row in rows}
    known = [outcome for outcome in _TO_MEND if outcome in outcomes]
    if known:
        return known[0]
    return Outcome.PASSED if Outcome.PASSED in outcomes else Outcome.SKIPPED


def _tally(rows: Sequence[CheckResult]) -> str:
    wrong = [row.label for row in rows if row.outcome in _TO_MEND]
    skipped = sum(row.outcome is Outcome.SKIPPED for row in rows)
    counted = "1 check" if len(rows) == 1 else f"{len(rows)} checks"
    text = f"{len(wrong)} of {counted}: {', '.join(wrong)}" if wrong else counted
    return f"{text}; {skipped} skipped" if skipped else text


def _end(name: str) -> str:
    """The end of a name, where adapters of one folder differ."""
    return name if len(name) <= _WIDEST_NAME else "..." + name[3 - _WIDEST_NAME :]


def _gathered(rows: Iterable[CheckResult]) -> list[CheckResult]:
    """The rows with those that were skipped for one and the same reason in a single one."""
    alike: dict[tuple[Outcome, str] | int, list[CheckResult]] = {}
    for place, row in enumerate(rows):
        skipped = row.outcome is Outcome.SKIPPED and row.measurement is None and row.reason
        alike.setdefault((row.outcome, row.reason) if skipped else place, []).append(row)
    return [group[0] if len(group) == 1 else _joined(group) for group in alike.values()]


def _joined(rows: Sequence[CheckResult]) -> CheckResult:
    names = ", ".join(row.label for row in rows)
    return replace(
        rows[0], check=f"{len(rows)} checks", part="", reason=f"{rows[0].reason} ({names})"
    )


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 3] + "..."


def _evidence(row: CheckResult) -> str:
    if row.measurement is None:
        return row.reason
    text = measured(row.measurement, row.bound)
    if row.bound is not None and not _is_plain_zero(row):
        text += f", {allowed(row.bound)}"
    if row.outcome is not Outcome.PASSED and row.measurement.where:
        text += f"; worst: {row.measurement.where}"
    if row.outcome is Outcome.PASSED and row.reason:
        text += f"; {row.reason}"
    return text


def _is_plain_zero(row: CheckResult) -> bool:
    """Nothing wrong where nothing may be: the bound would only repeat it."""
    return row.bound is not None and row.bound.high == 0 and row.outcome is Outcome.PASSED


def _notes(measurement: Measurement) -> Iterator[str]:
    for note in measurement.notes:
        yield f"note: {note}"


def _modules(measurement: Measurement, detail: int) -> Iterator[str]:
    """The numbers of each module on a line, those first whose first number is largest."""
    for key, value in measurement.details.items():
        maps = module_maps(value)
        if not maps:
            continue
        order = next(iter(maps.values()))
        # NaN compares with nothing and is the worst there is.
        modules = sorted(order, key=lambda name: (order[name] == order[name], -order[name]))
        shown = modules if detail > 1 else modules[:_MODULES]
        for module in shown:
            found = (f"{name} {number(numbers[module])}".strip() for name, numbers in maps.items())
            yield f"{key}: {module}: {', '.join(found)}"
        if len(shown) < len(modules):
            yield f"{key}: {len(modules) - len(shown)} more modules with -vv"
        return


def _not_a_command(line: str) -> str:
    """GitHub obeys lines that begin with ``::``, indented or not; text of an adapter may not."""
    return line.replace("::", ". ", 1) if line.lstrip().startswith("::") else line
