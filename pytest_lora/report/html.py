"""The results as one HTML page: no script, no network, no build; the verdict first.

Works from ``file://``, light and dark, by keyboard and screen reader, and on paper.  Whatever comes
from an adapter enters as text (see :mod:`pytest_lora.report.markup`), and the page forbids itself
every request.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources

from pytest_lora.catalog import find_check
from pytest_lora.records import CheckResult, Json, Measurement, Outcome
from pytest_lora.report.charts import Point, plane
from pytest_lora.report.figures import figures
from pytest_lora.report.markup import Child, Markup, join, tag
from pytest_lora.report.text import allowed, clean, measured, movable, number, spellings
from pytest_lora.report.verdicts import WORDS, AdapterTable, adapter_tables, headline

__all__ = ["html_report"]

_SYMBOLS = {
    Outcome.PASSED: "✓",
    Outcome.FAILED: "✗",
    Outcome.SKIPPED: "\N{EN DASH}",
    Outcome.INCONCLUSIVE: "?",
    Outcome.ERROR: "!",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MOST_ROWS = 20
_LONGEST = 2000
_OWN_PLACE = frozenset({"problems", "notes"})


def html_report(results: Sequence[CheckResult], environment: Mapping[str, Json]) -> str:
    """The whole page.

    Args:
        results: in the order they are to be shown.
        environment: as :func:`pytest_lora.report.json_report.build_report` takes it.
    """
    tables = adapter_tables(results, _table_of(environment, "adapters"))
    tables.sort(key=lambda table: not table.troubles)
    numbers = {id(row): i for i, row in enumerate(row for table in tables for row in table.rows)}
    page = tag(
        "html",
        _head(headline(tables)),
        tag(
            "body",
            tag("a", "Skip to the results", href="#results", class_="skip"),
            tag("header", _verdict(tables)),
            tag(
                "main",
                _matrix(tables, numbers),
                _plane(tables),
                *(_section(i, table, numbers) for i, table in enumerate(tables)),
                _provenance(environment),
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


def _verdict(tables: Sequence[AdapterTable]) -> Markup:
    worst = next((table.outcome for table in tables), Outcome.SKIPPED)
    troubles = [
        tag(
            "p",
            _badge(row.outcome),
            f" {clean(row.check)} of {clean(table.adapter)}",
            f": {measured(row.measurement, row.bound)}" if row.measurement else None,
        )
        for table in tables
        for row in table.troubles[:1]
    ]
    return tag(
        "div",
        tag("h1", f"LoRA: {headline(tables)}"),
        *troubles,
        class_=f"verdict {worst.value}",
        role="status",
    )


def _badge(outcome: Outcome) -> Markup:
    return tag(
        "span",
        tag("span", _SYMBOLS[outcome], aria_hidden="true"),
        f" {WORDS[outcome]}",
        class_=f"badge {outcome.value}",
    )


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
    return tag(
        "div",
        tag(
            "table",
            tag("caption", "Every adapter and check"),
            tag("thead", head),
            tag("tbody", *body),
            class_="matrix",
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label="Every adapter and check",
    )


def _column(name: str) -> Markup:
    return tag("th", name, scope="col")


def _sign(row: CheckResult | None, numbers: Mapping[int, int]) -> Markup:
    if row is None:
        return tag("td")
    sign = tag("span", _SYMBOLS[row.outcome], aria_hidden="true")
    word = tag("span", WORDS[row.outcome], class_="sr")
    link = tag("a", sign, word, href=f"#r{numbers[id(row)]}")
    return tag("td", link, class_=row.outcome.value)


def _plane(tables: Sequence[AdapterTable]) -> Markup | None:
    """What each adapter forgot against what it learned, where both were measured."""
    points, x_limits, y_limits = [], set(), set()
    for table in tables:
        forgot, learned = _measured(table, "perplexity_drift"), _measured(table, "task_accuracy")
        if not forgot or not learned:
            continue
        # Of several domains and tasks the worst, as everywhere.
        worst = max(forgot, key=lambda row: _interval(row)[1])
        least = min(learned, key=lambda row: _interval(row)[1])
        points.append(Point(clean(table.adapter), _interval(worst), _interval(least)))
        x_limits |= _limits(worst)
        y_limits |= _limits(least)
    return plane(
        "Learned and forgotten: above and to the left is better",
        points,
        x_label="perplexity_drift, nats per token",
        y_label="task_accuracy",
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


def _section(index: int, table: AdapterTable, numbers: Mapping[int, int]) -> Markup:
    head = tag("tr", *map(_column, ("check", "verdict", "measured", "allowed", "seconds")))
    body = [_check_row(row) for row in table.rows]
    return tag(
        "section",
        tag("h2", clean(table.adapter), " ", _badge(table.outcome), id=f"a{index}"),
        tag("p", clean(table.about), class_="about") if table.about else None,
        tag(
            "div",
            tag("table", tag("thead", head), tag("tbody", *body), class_="wide"),
            class_="scroll",
        ),
        tag("h3", "Evidence"),
        *(_evidence(row, f"r{numbers[id(row)]}") for row in table.rows),
        aria_labelledby=f"a{index}",
    )


def _check_row(row: CheckResult) -> Markup:
    found = measured(row.measurement, row.bound) if row.measurement else clean(row.reason)
    return tag(
        "tr",
        tag("th", clean(row.check), _question(row.check), scope="row"),
        tag("td", _badge(row.outcome)),
        tag("td", found),
        tag("td", allowed(row.bound) if row.bound else ""),
        tag("td", f"{row.seconds:.2f}"),
    )


def _question(check: str) -> Markup | None:
    try:
        return tag("span", find_check(check).question, class_="question")
    except KeyError:  # a user's own
        return None


def _evidence(row: CheckResult, anchor: str) -> Markup:
    """All that is known about one verdict; opened where something needs attention."""
    trouble = row.outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)
    measurement = row.measurement
    parts: list[Child] = [tag("summary", clean(row.check), " ", _badge(row.outcome))]
    parts += [tag("p", text) for text in _sentences(row)]
    if row.advice:
        parts.append(tag("p", f"What to do: {clean(row.advice)}", class_="advice"))
    if measurement is not None:
        parts.append(_problems(measurement))
        if measurement.notes:
            parts.append(tag("ul", *(tag("li", clean(note)) for note in measurement.notes)))
        parts += figures(measurement)
        parts.append(_numbers(measurement))
    return tag("details", *parts, id=anchor, open=trouble)


def _sentences(row: CheckResult) -> Iterator[str]:
    if row.measurement is not None:
        text = measured(row.measurement, row.bound)
        yield f"Measured: {text}" + (f"; allowed: {allowed(row.bound)}." if row.bound else ".")
        if row.measurement.where and not row.measurement.problems:
            yield f"Worst: {clean(row.measurement.where)}"
    if row.reason:
        yield clean(row.reason)
    if row.outcome is Outcome.FAILED and movable(row.check):
        yield f"To move the bound: {spellings(row.check)}"


def _problems(measurement: Measurement) -> Markup | None:
    problems = measurement.problems
    if not problems:
        return None
    head = tag("tr", *map(_column, ("where", "found", "expected", "what to do")))
    rows = [
        tag("tr", *(tag("td", clean(t)) for t in (p.where, p.found, p.expected, p.fix)))
        for p in problems[:_MOST_ROWS]
    ]
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="wide")
    return tag("div", table, _left_out(len(problems)), class_="scroll")


def _left_out(total: int) -> Markup | None:
    more = total - _MOST_ROWS
    return tag("p", f"and {more} more, in the JSON report", class_="about") if more > 0 else None


# ----------------------------------------------------------------------------------- any details


def _numbers(measurement: Measurement) -> Markup | None:
    """Everything else in the details, as tables, whatever a check put there."""
    rest = {key: value for key, value in measurement.details.items() if key not in _OWN_PLACE}
    if not rest:
        return None
    return tag("details", tag("summary", "All numbers"), _value(rest, 0))


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
    return tag("div", table, _left_out(len(rows)), class_="scroll")


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
    return tag("div", tag("table", tag("caption", caption), tag("tbody", *rows)), class_="scroll")


def _settings(by_adapter: Mapping[str, Json]) -> Iterator[Markup | None]:
    head = tag("tr", *map(_column, ("setting", "value", "set by")))
    for adapter, settings in by_adapter.items():
        if not isinstance(settings, Mapping) or not settings:
            continue
        rows = [_setting(name, item) for name, item in settings.items()]
        caption = tag("caption", f"Settings of {clean(adapter)} that are not at their default")
        table = tag("table", caption, tag("thead", head), tag("tbody", *rows))
        yield tag("div", table, class_="scroll")


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
