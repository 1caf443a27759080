"""The results as one HTML page: no script, no network, no build; the verdict first.

Works from ``file://``, light and dark, by keyboard and screen reader, and on paper.  Whatever comes
from an adapter enters as text (see :mod:`pytest_lora.report.markup`), and the page forbids itself
every request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from importlib import resources

from pytest_lora.catalog import find_check
from pytest_lora.records import CheckResult, Json, Measurement, Outcome
from pytest_lora.report.charts import Point, plane
from pytest_lora.report.figures import figures, readings
from pytest_lora.report.markup import Child, Markup, join, tag
from pytest_lora.report.text import allowed, clean, measured, number, to_move
from pytest_lora.report.verdicts import WORDS, AdapterTable, adapter_tables, headline

__all__ = ["SIZE_LIMIT", "html_report"]

SIZE_LIMIT = 1_000_000
"""Bytes of a page, unless the verdicts alone take more: it has to open at once, and be mailed."""


class _Extent(Enum):
    """How much of the evidence of checks that passed is told; of the others all is."""

    ALL = "all"
    PICTURES = "pictures"
    WORDS = "words"


_LEFT_OUT = {
    _Extent.ALL: None,
    _Extent.PICTURES: "The numbers of checks that passed are in the JSON report.",
    _Extent.WORDS: "Pictures and numbers of checks that passed are in the JSON report.",
}

_SYMBOLS = {
    Outcome.PASSED: "✓",
    Outcome.FAILED: "✗",
    Outcome.SKIPPED: "\N{EN DASH}",
    Outcome.INCONCLUSIVE: "?",
    Outcome.ERROR: "!",
}
_STATES = {
    Outcome.FAILED: "failed",
    Outcome.ERROR: "broke",
    Outcome.INCONCLUSIVE: "inconclusive",
    Outcome.PASSED: "passed",
    Outcome.SKIPPED: "skipped",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MOST_ROWS = 20
_LONGEST = 2000
_OWN_PLACE = frozenset({"problems", "notes"})


def html_report(results: Sequence[CheckResult], environment: Mapping[str, Json]) -> str:
    """The whole page, with as much evidence as :data:`SIZE_LIMIT` has room for.

    Args:
        results: in the order they are to be shown.
        environment: as :func:`pytest_lora.report.json_report.build_report` takes it.
    """
    pages = (_page(results, environment, extent) for extent in _Extent)
    # The last has the least; a page larger than the limit is better than none.
    for page in pages:
        if len(page.encode()) <= SIZE_LIMIT:
            break
    return page


def _page(results: Sequence[CheckResult], environment: Mapping[str, Json], extent: _Extent) -> str:
    tables = adapter_tables(results, _table_of(environment, "adapters"))
    tables.sort(key=lambda table: list(_STATES).index(table.outcome))
    numbers = {id(row): i for i, row in enumerate(row for table in tables for row in table.rows)}
    page = tag(
        "html",
        _head(headline(tables)),
        tag(
            "body",
            tag("a", "Skip to the results", href="#results", class_="skip"),
            tag("header", _verdict(tables, numbers)),
            tag(
                "main",
                _overview(tables, numbers),
                *(_section(i, table, numbers, extent) for i, table in enumerate(tables)),
                _provenance(environment),
                tag("p", _LEFT_OUT[extent], class_="about") if tables else None,
                id="results",
            ),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _head(title: str) -> Markup:
    css = (resources.files("pytest_lora.report") / "page.css").read_text("utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"LoRA: {title}"),
        tag("style", Markup(css)),
    )


# ---------------------------------------------------------------------------------- the first look


def _verdict(tables: Sequence[AdapterTable], numbers: Mapping[int, int]) -> Markup:
    worst = next((table.outcome for table in tables), Outcome.SKIPPED)
    troubles = [
        tag(
            "li",
            _badge(row.outcome),
            " ",
            tag("a", clean(row.label), href=f"#r{numbers[id(row)]}"),
            f" of {clean(table.adapter)}",
            f": {measured(row.measurement, row.bound)}" if row.measurement else None,
            tag("span", f", and {more} more of its checks", class_="about") if more else None,
        )
        for table in tables
        for row in table.troubles[:1]
        for more in [len(table.troubles) - 1]
    ]
    return tag(
        "div",
        tag("h1", f"LoRA: {headline(tables)}"),
        tag("ul", *troubles) if troubles else None,
        _counts(tables),
        class_=f"verdict {worst.value}",
    )


def _counts(tables: Sequence[AdapterTable]) -> Markup | None:
    """How many checks ended how, and what they took."""
    if not tables:
        return None
    rows = [row for table in tables for row in table.rows]
    counted = [(_STATES[o], str(sum(row.outcome is o for row in rows)), o) for o in _STATES]
    seconds = f"{sum(row.seconds for row in rows):,.1f} s"
    shown = [
        ("adapters", str(len(tables)), None),
        ("checks", str(len(rows)), None),
        *(entry for entry in counted if entry[1] != "0"),
        ("measuring took", seconds, None),
    ]
    tiles = (
        tag("div", tag("dt", name), tag("dd", count, class_=outcome.value if outcome else None))
        for name, count, outcome in shown
    )
    return tag("dl", *tiles, class_="counts")


def _badge(outcome: Outcome) -> Markup:
    return tag(
        "span",
        tag("span", _SYMBOLS[outcome], aria_hidden="true"),
        f" {WORDS[outcome]}",
        class_=f"badge {outcome.value}",
    )


def _overview(tables: Sequence[AdapterTable], numbers: Mapping[int, int]) -> Markup | None:
    """All adapters at once; what there is to compare."""
    matrix, planes = _matrix(tables, numbers), [drawn for drawn in _planes(tables) if drawn]
    if matrix is None and not planes:
        return None
    drawn = tag("div", *planes, class_="figures") if planes else None
    head = tag("h2", "Overview", id="overview")
    return tag("section", head, matrix, drawn, aria_labelledby="overview")


def _matrix(tables: Sequence[AdapterTable], numbers: Mapping[int, int]) -> Markup | None:
    """Every adapter against every check, one sign each; with one adapter its own table does."""
    if len(tables) < 2:
        return None
    checks = list(dict.fromkeys(row.check for table in tables for row in table.rows))
    head = tag("tr", tag("th", "adapter", scope="col"), *(_column(clean(c)) for c in checks))
    body = []
    for i, table in enumerate(tables):
        # A check may be made several times, for tasks or domains; the sign is that of the worst.
        rows = {row.check: row for row in (*reversed(table.rows), *reversed(table.troubles))}
        name = tag("a", clean(table.adapter), href=f"#a{i}")
        cells = [_sign(rows.get(check), numbers) for check in checks]
        body.append(tag("tr", tag("th", name, scope="row"), *cells))
    caption = "Every adapter and check"
    parts = (tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return _scrolled(caption, tag("table", *parts, class_="matrix"))


def _scrolled(label: str, *children: Child) -> Markup:
    """What may be wider than the window, to be scrolled by keyboard too."""
    return tag("div", *children, class_="scroll", tabindex="0", role="region", aria_label=label)


def _column(name: str) -> Markup:
    return tag("th", name, scope="col")


def _sign(row: CheckResult | None, numbers: Mapping[int, int]) -> Markup:
    if row is None:
        return tag("td")
    sign = tag("span", _SYMBOLS[row.outcome], aria_hidden="true")
    word = tag("span", WORDS[row.outcome], class_="sr")
    link = tag("a", sign, word, href=f"#r{numbers[id(row)]}")
    return tag("td", link, class_=row.outcome.value)


def _planes(tables: Sequence[AdapterTable]) -> Iterator[Markup | None]:
    """What each adapter forgot against what it learned; accuracies and gains do not share axes."""
    learned = [row for table in tables for row in _measured(table, "task_accuracy")]
    units = dict.fromkeys(row.measurement.unit for row in learned if row.measurement)
    for unit in units:
        yield _plane(tables, unit)


def _plane(tables: Sequence[AdapterTable], unit: str) -> Markup | None:
    points, x_limits, y_limits = [], set(), set()
    for table in tables:
        forgot = _measured(table, "perplexity_drift")
        learned = [
            row
            for row in _measured(table, "task_accuracy")
            if row.measurement is not None and row.measurement.unit == unit
        ]
        if not forgot or not learned:
            continue
        # Of several domains and tasks the worst, as everywhere.
        worst = max(forgot, key=lambda row: _interval(row)[1])
        least = min(learned, key=lambda row: _interval(row)[1])
        bad = not worst.outcome == least.outcome == Outcome.PASSED
        name = clean(table.adapter).rpartition("/")[2]
        points.append(Point(name, _interval(worst), _interval(least), bad))
        x_limits |= _limits(worst)
        y_limits |= _limits(least)
    return plane(
        f"Learned and forgotten, {clean(unit)}: better is above and to the left",
        points,
        x_label="forgotten: perplexity_drift, nats per token",
        y_label="learned: task_accuracy",
        x_limits=sorted(x_limits),
        y_limits=sorted(y_limits),
    )


def _measured(table: AdapterTable, check: str) -> list[CheckResult]:
    return [row for row in table.rows if row.check == check and row.measurement is not None]


def _interval(row: CheckResult) -> tuple[float, float, float]:
    measurement = row.measurement
    assert measurement is not None
    low, high = measurement.low, measurement.high
    value = measurement.value
    return (value if low is None else low, value, value if high is None else high)


def _limits(row: CheckResult) -> set[float]:
    limits = (row.bound.low, row.bound.high) if row.bound else ()
    return {limit for limit in limits if limit is not None}


# ------------------------------------------------------------------------------------- one adapter


def _section(
    index: int, table: AdapterTable, numbers: Mapping[int, int], extent: _Extent
) -> Markup:
    names = ("check", "verdict", "measured", "allowed", "seconds")
    head = tag("tr", *map(_column, names))
    body = [_check_row(row, numbers[id(row)]) for row in table.rows]
    return tag(
        "section",
        tag(
            "div",
            tag("h2", clean(table.adapter), id=f"a{index}"),
            _badge(table.outcome),
            tag("span", clean(table.about), class_="about") if table.about else None,
            class_="head",
        ),
        tag("table", tag("thead", head), tag("tbody", *body), class_="wide checks"),
        tag("h3", "Evidence"),
        *(_evidence(row, f"r{numbers[id(row)]}", extent) for row in table.rows),
        aria_labelledby=f"a{index}",
    )


def _check_row(row: CheckResult, place: int) -> Markup:
    found = measured(row.measurement, row.bound) if row.measurement else clean(row.reason)
    return tag(
        "tr",
        tag(
            "th",
            tag("a", clean(row.label), href=f"#r{place}"),
            _question(row.check),
            scope="row",
        ),
        tag("td", _badge(row.outcome)),
        tag("td", found, _meter(row)),
        tag("td", allowed(row.bound) if row.bound else ""),
        tag("td", f"{row.seconds:.2f}"),
    )


def _meter(row: CheckResult) -> Markup | None:
    """How much of an upper bound is used, as a bar; the numbers beside it say the same."""
    most = row.bound.high if row.bound else None
    value = row.measurement.value if row.measurement else -1.0
    if most is None or not 0 < most < math.inf or not 0 <= value < math.inf:
        return None
    share = min(value / most, 1.0)
    bar = tag("span", style=f"--v:{100 * share:.0f}")
    return tag("span", bar, class_=f"meter {row.outcome.value}", aria_hidden="true")


def _question(check: str) -> Markup | None:
    try:
        return tag("span", find_check(check).question, class_="question")
    except KeyError:  # a user's own
        return None


def _evidence(row: CheckResult, anchor: str, extent: _Extent) -> Markup:
    """All that is known about one verdict; opened where something needs attention."""
    trouble = row.outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)
    measurement = row.measurement
    parts: list[Child] = [tag("summary", clean(row.label), " ", _badge(row.outcome))]
    parts += [tag("p", text) for text in _sentences(row)]
    if row.advice:
        parts.append(tag("p", f"What to do: {clean(row.advice)}", class_="advice"))
    if measurement is not None:
        parts.append(_problems(measurement))
        if measurement.notes:
            parts.append(tag("ul", *(tag("li", clean(note)) for note in measurement.notes)))
        if trouble or extent is not _Extent.WORDS:
            parts += _pictures(row)
        if trouble or extent is _Extent.ALL:
            parts.append(_numbers(measurement))
    return tag("details", *parts, id=anchor, open=trouble)


def _pictures(row: CheckResult) -> Iterator[Markup]:
    """What is drawn and what can be read."""
    assert row.measurement is not None
    drawn = list(figures(row.measurement, row.bound))
    if drawn:
        yield tag("div", *drawn, class_="figures")
    for name, rows in readings(row.measurement):
        yield _reading(name, rows)


def _sentences(row: CheckResult) -> Iterator[str]:
    if row.measurement is not None:
        text = measured(row.measurement, row.bound)
        yield f"Measured: {text}" + (f"; allowed: {allowed(row.bound)}." if row.bound else ".")
        if row.measurement.where and not row.measurement.problems:
            yield f"Worst: {clean(row.measurement.where)}"
    if row.reason:
        yield clean(row.reason)
    if place := to_move(row):
        yield f"To move the bound: {place}"


def _problems(measurement: Measurement) -> Markup | None:
    problems = measurement.problems
    if not problems:
        return None
    head = tag("tr", *map(_column, ("where", "found", "expected", "what to do")))
    rows = [
        tag("tr", *(tag("td", clean(t)) for t in (p.where, p.found, p.expected, p.fix)))
        for p in problems[:_MOST_ROWS]
    ]
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="wide problems")
    return join(_scrolled("Problems", table), _left_out(len(problems)))


def _reading(name: str, rows: Sequence[Mapping[str, Json]]) -> Markup:
    """Documents or answers to read, the worst first."""
    return join(tag("p", tag("strong", f"To read: {name}")), _scrolled(name, _records(rows)))


def _left_out(total: int) -> Markup | None:
    more = total - _MOST_ROWS
    return tag("p", f"and {more} more, in the JSON report", class_="about") if more > 0 else None


# ----------------------------------------------------------------------------------- any details


def _numbers(measurement: Measurement) -> Markup | None:
    """Everything else in the details, as tables, whatever a check put there."""
    rest = {key: value for key, value in measurement.details.items() if key not in _OWN_PLACE}
    if not rest:
        return None
    return tag("details", tag("summary", "All numbers"), _scrolled("Numbers", _value(rest, 0)))


def _value(value: Json, depth: int) -> Markup:
    if isinstance(value, Mapping) and _is_table(list(value.values())):
        # The names go first, as one more column.
        return _records([{"": name, **item} for name, item in value.items()])  # type: ignore[dict-item]
    if isinstance(value, Mapping) and value and depth < 3:
        shown = list(value.items())[:_MOST_ROWS]
        rows = [
            tag("tr", tag("th", clean(key), scope="row"), tag("td", _value(item, depth + 1)))
            for key, item in shown
        ]
        return join(tag("table", tag("tbody", *rows)), _left_out(len(value)))
    if _is_table(value):
        return _records(value)  # type: ignore[arg-type]
    return join(_plain(value))


def _is_table(value: Json) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return listed and all(isinstance(item, Mapping) for item in value)  # type: ignore[union-attr]


def _records(rows: Sequence[Mapping[str, Json]]) -> Markup:
    columns = list(dict.fromkeys(key for row in rows[:_MOST_ROWS] for key in row))[:_MOST_ROWS]
    head = tag("tr", *(_column(clean(name)) for name in columns))
    body = [
        tag("tr", *(tag("td", _plain(row[c]) if c in row else "") for c in columns))
        for row in rows[:_MOST_ROWS]
    ]
    table = tag("table", tag("thead", head), tag("tbody", *body))
    return join(table, _left_out(len(rows)))


def _plain(value: Json) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "\N{EN DASH}"}[value]
    if isinstance(value, float):
        return number(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


# ------------------------------------------------------------------------------- how it was made


def _provenance(environment: Mapping[str, Json]) -> Markup:
    versions = {k: v for k, v in _table_of(environment, "versions").items() if v}
    command = environment.get("command")
    return tag(
        "section",
        tag("h2", "How this was made", id="made"),
        join(tag("p", "Again:"), tag("pre", tag("code", clean(str(command))), tabindex="0"))
        if command
        else None,
        _pairs("Versions", versions),
        tag("p", f"Platform: {clean(str(environment.get('platform', '')))}"),
        *_settings(_table_of(environment, "settings")),
        *_digests(_table_of(environment, "digests")),
        aria_labelledby="made",
    )


def _pairs(caption: str, pairs: Mapping[str, Json]) -> Markup | None:
    if not pairs:
        return None
    rows = [
        tag("tr", tag("th", clean(key), scope="row"), tag("td", tag("code", _plain(value))))
        for key, value in pairs.items()
    ]
    return _scrolled(caption, tag("table", tag("caption", caption), tag("tbody", *rows)))


def _settings(by_adapter: Mapping[str, Json]) -> Iterator[Markup | None]:
    """What is not at its default: one table for all adapters that have it alike."""
    alike: dict[str, list[str]] = {}
    for adapter, settings in by_adapter.items():
        if isinstance(settings, Mapping) and settings:
            alike.setdefault(json.dumps(settings), []).append(clean(adapter))
    head = tag("tr", *map(_column, ("setting", "value", "set by")))
    for text, names in alike.items():
        rows = [_setting(name, item) for name, item in json.loads(text).items()]
        whose = "all adapters" if len(names) == len(by_adapter) > 1 else ", ".join(names)
        caption = f"Settings of {whose} that are not at their default"
        parts = (tag("caption", caption), tag("thead", head), tag("tbody", *rows))
        yield _scrolled(caption, tag("table", *parts))


def _setting(name: str, item: Json) -> Markup:
    value, origin = (
        (item.get("value"), item.get("origin")) if isinstance(item, Mapping) else (item, "")
    )
    return tag(
        "tr",
        tag("th", clean(name), scope="row"),
        tag("td", _plain(value)),
        tag("td", clean(str(origin))),
    )


def _digests(by_adapter: Mapping[str, Json]) -> Iterable[Markup | None]:
    for adapter, digests in by_adapter.items():
        if isinstance(digests, Mapping):
            yield _pairs(f"Files of {clean(adapter)}", digests)


def _table_of(environment: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    value = environment.get(key)
    return value if isinstance(value, Mapping) else {}
