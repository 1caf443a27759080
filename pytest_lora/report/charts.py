"""Pictures for the HTML report: heat maps as tables, everything else as inline SVG.

Each has its numbers in words too, for those who do not see it, and takes its colours from the
page, light or dark.  Numbers that are not finite have no place on an axis and are left out there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_lora.report.markup import Child, Markup, join, tag
from pytest_lora.report.text import number

__all__ = ["Point", "heat_table", "histogram", "line_chart", "plane"]

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 14, 44
_BINS = 24


@dataclass(frozen=True, slots=True)
class Point:
    """A point with its interval along each axis (low, value, high)."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def heat_table(
    caption: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]
) -> Markup:
    """Numbers as a table whose cells are shaded from the smallest (0 if none is below) up.

    A number that is not finite is marked as one; None leaves the cell empty.
    """
    finite = [x for cells in rows.values() for x in cells if x is not None and math.isfinite(x)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    head = tag("tr", tag("th", "layer", scope="col"), *(_head(name) for name in columns))
    body = [
        tag("tr", tag("th", name, scope="row"), *(_cell(x, low, high) for x in cells))
        for name, cells in rows.items()
    ]
    return tag(
        "div",
        tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body)),
        class_="scroll heat",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def _head(name: str) -> Markup:
    return tag("th", name, scope="col")


def _cell(value: float | None, low: float, high: float) -> Markup:
    if value is None:
        return tag("td")
    if not math.isfinite(value):
        return tag("td", number(value), class_="bad")
    share = (value - low) / (high - low) if high > low else 0.0
    return tag("td", number(value), style=f"--v:{share:.2f}")


# ------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True, slots=True)
class _Axis:
    """From numbers to pixels between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """At most seven round numbers (1, 2 or 5 times a power of ten apart)."""
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough)


def _span(values: Sequence[float]) -> tuple[float, float] | None:
    """Limits around ``values`` with some room; None where there is nothing to draw."""
    finite = [value for value in values if math.isfinite(value) and abs(value) < 1e300]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    # Below this the ticks of an axis would be one and the same number.
    room = max(room, 1e-12 * max(abs(low), abs(high)))
    return low - room, high + room


def _axes(xs: Sequence[float], ys: Sequence[float]) -> tuple[_Axis, _Axis] | None:
    across, up = _span(xs), _span(ys)
    if across is None or up is None:
        return None
    return (
        _Axis(*across, _LEFT, _WIDTH - _RIGHT),
        _Axis(*up, _HEIGHT - _BOTTOM, _TOP),
    )


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> Markup:
    parts: list[Child] = []
    for value in x.ticks():
        at = x.at(value)
        parts.append(_line(at, y.start, at, y.end, "grid"))
        parts.append(_text(number(_tidy(value)), at, y.start + 16, "middle"))
    for value in y.ticks():
        at = y.at(value)
        parts.append(_line(x.start, at, x.end, at, "grid"))
        parts.append(_text(number(_tidy(value)), x.start - 6, at + 4, "end"))
    middle = (y.start + y.end) / 2
    parts.append(_text(x_label, (x.start + x.end) / 2, _HEIGHT - 6, "middle", class_="label"))
    parts.append(
        _text(
            y_label, 14, middle, "middle", class_="label", transform=f"rotate(-90 14 {middle:.0f})"
        )
    )
    return join(*parts)


def _tidy(value: float) -> float:
    """A tick without the dust of ``3 * 0.1``."""
    return float(f"{value:.6g}")


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _text(text: str, x: float, y: float, anchor: str, **more: str) -> Markup:
    return tag("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor, **more)


def _svg(title: str, described: str, *parts: Child) -> Markup:
    """The picture with a name and, for those who do not see it, what it shows in words."""
    drawn = tag(
        "svg",
        tag("title", title),
        tag("desc", described),
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title}. {described}",
    )
    return tag("figure", drawn, tag("figcaption", title))


# ----------------------------------------------------------------------------------------- charts


def line_chart(
    title: str,
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    limits: Mapping[str, float] | None = None,
) -> Markup | None:
    """Lines over ``xs``, each named at its end, with horizontal lines where the limits are."""
    limits = {name: at for name, at in (limits or {}).items() if math.isfinite(at)}
    values = [value for line in series.values() for value in line]
    axes = _axes(xs, [*values, *limits.values()])
    if axes is None:
        return None
    x, y = axes
    drawn = [
        _path(x, y, xs, line, name, f"line s{i % 4}")
        for i, (name, line) in enumerate(series.items())
    ]
    for name, at in limits.items():
        drawn.append(_line(x.start, y.at(at), x.end, y.at(at), "limit"))
        drawn.append(_text(name, x.end - 4, y.at(at) - 4, "end", class_="limit-label"))
    return _svg(title, _in_words(series), _frame(x, y, x_label, y_label), *drawn)


def _path(
    x: _Axis, y: _Axis, xs: Sequence[float], ys: Sequence[float], name: str, class_: str
) -> Markup:
    seen = [
        (x.at(a), y.at(b))
        for a, b in zip(xs, ys, strict=False)
        if math.isfinite(a) and math.isfinite(b)
    ]
    points = " ".join(f"{a},{b}" for a, b in seen)
    line = tag("polyline", points=points, class_=class_)
    if not seen:
        return line
    end, height = seen[-1]
    return join(line, _text(name, end - 4, height - 6, "end", class_="name"))


def _in_words(series: Mapping[str, Sequence[float]]) -> str:
    parts = []
    for name, line in series.items():
        finite = [value for value in line if math.isfinite(value)]
        if finite:
            parts.append(
                f"{name}: from {number(finite[0])} to {number(finite[-1])}, "
                f"least {number(min(finite))}, most {number(max(finite))}"
            )
    return "; ".join(parts)


def histogram(
    title: str, values: Sequence[float], *, x_label: str, limits: Mapping[str, float] | None = None
) -> Markup | None:
    """How many of ``values`` lie where, with vertical lines at the limits."""
    finite = [value for value in values if math.isfinite(value)]
    limits = {name: at for name, at in (limits or {}).items() if math.isfinite(at)}
    across = _span([*finite, *limits.values()])
    if not finite or across is None:
        return None
    low, high = across
    counts = [0] * _BINS
    for value in finite:
        counts[min(int((value - low) / (high - low) * _BINS), _BINS - 1)] += 1
    axes = _axes([low, high], [0, max(counts)])
    if axes is None:
        return None
    x = _Axis(low, high, axes[0].start, axes[0].end)
    y = _Axis(0, max(counts) * 1.06, axes[1].start, axes[1].end)
    width = (x.end - x.start) / _BINS
    bars = [
        tag(
            "rect",
            x=round(x.start + i * width, 1),
            y=y.at(count),
            width=round(width - 1, 1),
            height=round(y.start - y.at(count), 1),
            class_="bar",
        )
        for i, count in enumerate(counts)
        if count
    ]
    marks = [_line(x.at(at), y.start, x.at(at), y.end, "limit") for at in limits.values()]
    ordered = sorted(finite)
    words = (
        f"{len(finite)} values, least {number(ordered[0])}, "
        f"median {number(ordered[len(ordered) // 2])}, most {number(ordered[-1])}"
    )
    return _svg(title, words, _frame(x, y, x_label, "count"), *bars, *marks)


def plane(
    title: str,
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    x_limits: Sequence[float] = (),
    y_limits: Sequence[float] = (),
) -> Markup | None:
    """Named points with their intervals as crosses; limits of each axis as lines."""
    axes = _axes(
        [*(value for point in points for value in point.x), *x_limits],
        [*(value for point in points for value in point.y), *y_limits],
    )
    drawable = [p for p in points if math.isfinite(p.x[1]) and math.isfinite(p.y[1])]
    if axes is None or not drawable:
        return None
    x, y = axes
    marks = [_line(x.at(at), y.start, x.at(at), y.end, "limit") for at in x_limits]
    marks += [_line(x.start, y.at(at), x.end, y.at(at), "limit") for at in y_limits]
    words = "; ".join(
        f"{p.name}: {x_label} {number(p.x[1])}, {y_label} {number(p.y[1])}" for p in drawable
    )
    dots = [_dot(point, x, y) for point in drawable]
    return _svg(title, words, _frame(x, y, x_label, y_label), *marks, *dots)


def _dot(point: Point, x: _Axis, y: _Axis) -> Markup:
    left, across, right = (x.at(value) if math.isfinite(value) else None for value in point.x)
    under, up, over = (y.at(value) if math.isfinite(value) else None for value in point.y)
    assert across is not None
    assert up is not None
    parts: list[Child] = [tag("circle", cx=across, cy=up, r=4, class_="dot")]
    if left is not None and right is not None:
        parts.append(_line(left, up, right, up, "whisker"))
    if under is not None and over is not None:
        parts.append(_line(across, under, across, over, "whisker"))
    near_end = across > (x.start + x.end) / 2
    parts.append(
        _text(
            point.name,
            across + (-8 if near_end else 8),
            up - 6,
            "end" if near_end else "start",
            class_="name",
        )
    )
    return join(*parts)
