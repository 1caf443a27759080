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

__all__ = [
    "Bins",
    "Look",
    "Point",
    "heat_table",
    "histogram",
    "interval_chart",
    "line_chart",
    "memory_chart",
    "plane",
]

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 14, 44
_LINE = 15
"""Pixels from one line of text to the next, and about two letters' width."""
_BINS = 24


@dataclass(frozen=True, slots=True)
class _Size:
    """Of a picture, in its own pixels; ``right`` is kept free beside the axes."""

    width: int = 560
    height: int = 260
    right: int = _RIGHT


_SMALL, _TALL, _WIDE = _Size(), _Size(620, 400), _Size(860, 320, 130)


@dataclass(frozen=True, slots=True)
class Point:
    """A point with its interval along each axis (low, value, high)."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """An estimate and its interval after so many items; an end that is not known is infinite."""

    used: int
    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bins:
    """Counts of what lies between one edge and the next, one edge more than counts."""

    edges: Sequence[float]
    counts: Sequence[int]

    @classmethod
    def of(cls, values: Sequence[float], low: float, high: float) -> Bins:
        """``values`` in bins of equal width between ``low`` and ``high``."""
        counts = [0] * _BINS
        for value in values:
            counts[min(int((value - low) / (high - low) * _BINS), _BINS - 1)] += 1
        return cls([low + (high - low) * i / _BINS for i in range(_BINS + 1)], counts)


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
    log: bool = False

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """At most seven round numbers (1, 2 or 5 times a power of ten apart)."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(powers) <= 3 else (1,)
            ticks = [10.0**power * factor for power in powers for factor in factors]
            return [value for value in ticks if self.low <= value <= self.high]
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


def _axes(
    xs: Sequence[float], ys: Sequence[float], size: _Size = _SMALL
) -> tuple[_Axis, _Axis] | None:
    across, up = _span(xs), _span(ys)
    if across is None or up is None:
        return None
    return _across(*across, size), _Axis(*up, size.height - _BOTTOM, _TOP)


def _across(low: float, high: float, size: _Size, *, log: bool = False) -> _Axis:
    return _Axis(low, high, _LEFT, size.width - size.right, log)


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
    under = y.start + _BOTTOM - 6
    parts.append(_text(x_label, (x.start + x.end) / 2, under, "middle", class_="label"))
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


def _svg(title: str, described: str, *parts: Child, size: _Size = _SMALL) -> Markup:
    """The picture with a name and, for those who do not see it, what it shows in words."""
    drawn = tag(
        "svg",
        tag("title", title),
        tag("desc", described),
        *parts,
        viewBox=f"0 0 {size.width} {size.height}",
        role="img",
        aria_label=f"{title}. {described}",
    )
    wide = "wide" if size is _WIDE else None
    return tag("figure", tag("figcaption", title), drawn, class_=wide)


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
    drawn += _level(x, y, limits)
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
    title: str,
    values: Sequence[float] | Bins,
    *,
    x_label: str,
    y_label: str = "count",
    limits: Mapping[str, float] | None = None,
) -> Markup | None:
    """How many of ``values`` (or how many were counted) lie where, vertical lines at the limits."""
    limits = {name: at for name, at in (limits or {}).items() if math.isfinite(at)}
    if isinstance(values, Bins):
        bins, words = values, _bins_in_words(values)
        across = _span([*bins.edges, *limits.values()])
    else:
        finite = sorted(value for value in values if math.isfinite(value))
        across = _span([*finite, *limits.values()]) if finite else None
        if across is None:
            return None
        bins = Bins.of(finite, *across)
        words = (
            f"{len(finite)} values, least {number(finite[0])}, "
            f"median {number(finite[len(finite) // 2])}, most {number(finite[-1])}"
        )
    if across is None or not any(bins.counts):
        return None
    x = _across(*across, _SMALL)
    y = _Axis(0, max(bins.counts) * 1.06, _SMALL.height - _BOTTOM, _TOP)
    bars = [
        _bar(x.at(left), x.at(right), y.at(count), y.start)
        for left, right, count in zip(bins.edges, bins.edges[1:], bins.counts, strict=False)
        if count
    ]
    return _svg(title, words, _frame(x, y, x_label, y_label), *bars, *_upright(x, y, limits))


def _bar(left: float, right: float, top: float, bottom: float) -> Markup:
    return tag(
        "rect",
        x=left,
        y=top,
        width=round(max(right - left - 1, 1), 1),
        height=round(bottom - top, 1),
        class_="bar",
    )


def _bins_in_words(bins: Bins) -> str:
    if not any(bins.counts):
        return ""
    fullest = max(range(len(bins.counts)), key=lambda i: bins.counts[i])
    return (
        f"{sum(bins.counts)} values from {number(bins.edges[0])} to {number(bins.edges[-1])}, "
        f"most of them, {bins.counts[fullest]}, between {number(bins.edges[fullest])} "
        f"and {number(bins.edges[fullest + 1])}"
    )


def _upright(x: _Axis, y: _Axis, limits: Mapping[str, float]) -> list[Markup]:
    """Limits of the horizontal axis, named."""
    drawn = []
    for name, at in limits.items():
        place, near_end = x.at(at), x.at(at) > (x.start + x.end) / 2
        drawn.append(_line(place, y.start, place, y.end, "limit"))
        side = ("end", -5) if near_end else ("start", 5)
        drawn.append(_text(name, place + side[1], y.end + 12, side[0], class_="limit-label"))
    return drawn


def _level(x: _Axis, y: _Axis, limits: Mapping[str, float]) -> list[Markup]:
    """Limits of the vertical axis, named."""
    drawn = []
    for name, at in limits.items():
        drawn.append(_line(x.start, y.at(at), x.end, y.at(at), "limit"))
        drawn.append(_text(name, x.end - 4, y.at(at) - 4, "end", class_="limit-label"))
    return drawn


def interval_chart(
    title: str,
    looks: Sequence[Look],
    *,
    x_label: str,
    y_label: str,
    limits: Mapping[str, float] | None = None,
) -> Markup | None:
    """An estimate and its interval over the number of items, which is on a logarithmic axis."""
    limits = {name: at for name, at in (limits or {}).items() if math.isfinite(at)}
    seen = [look for look in looks if look.used > 0 and math.isfinite(look.estimate)]
    if len(seen) < 2 or seen[0].used == seen[-1].used:
        return None
    axes = _axes([0, 1], [*_telling(seen), *limits.values()])
    if axes is None:
        return None
    y = axes[1]
    x = _across(seen[0].used, seen[-1].used, _SMALL, log=True)
    upper = [(x.at(look.used), y.at(min(max(look.high, y.low), y.high))) for look in seen]
    lower = [(x.at(look.used), y.at(min(max(look.low, y.low), y.high))) for look in seen]
    band = tag("polygon", points=_points([*upper, *reversed(lower)]), class_="band")
    places = [(x.at(look.used), y.at(look.estimate)) for look in seen]
    line = tag("polyline", points=_points(places), class_="line s0")
    last = seen[-1]
    words = (
        f"after {last.used:,} items {number(last.estimate)}, "
        f"between {number(last.low)} and {number(last.high)}"
    )
    frame = _frame(x, y, x_label, y_label)
    return _svg(title, words, frame, band, line, *_level(x, y, limits))


def _telling(looks: Sequence[Look]) -> list[float]:
    """What the vertical axis has to show: early intervals may be so wide that they hide the end."""
    estimates = [look.estimate for look in looks]
    last = looks[-1]
    ends = [end for end in (last.low, last.high) if math.isfinite(end)]
    reach = max([0.0, *(abs(end - last.estimate) for end in ends)])
    return [*estimates, *ends, last.estimate - 2.5 * reach, last.estimate + 2.5 * reach]


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a},{b}" for a, b in places)


# ----------------------------------------------------------------------------------------- plane


def plane(
    title: str,
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    x_limits: Sequence[float] = (),
    y_limits: Sequence[float] = (),
) -> Markup | None:
    """Named points with their intervals as crosses; limits of each axis as lines.

    To the left is better, and above; where each axis has one limit, what both allow is shaded.
    """
    drawable = [p for p in points if math.isfinite(p.x[1]) and math.isfinite(p.y[1])]
    axes = _axes(
        [*(value for point in points for value in point.x), *x_limits],
        [*(value for point in points for value in point.y), *y_limits],
        _TALL,
    )
    if axes is None or not drawable:
        return None
    x, y = axes
    marks = _upright(x, y, {f"at most {number(at)}": at for at in x_limits})
    marks += _level(x, y, {f"at least {number(at)}": at for at in y_limits})
    if len(x_limits) == len(y_limits) == 1:
        marks.insert(0, _allowed(x, y, x_limits[0], y_limits[0]))
    words = "; ".join(
        f"{p.name}: {x_label} {number(p.x[1])}, {y_label} {number(p.y[1])}" for p in drawable
    )
    dots = [_dot(point, x, y) for point in drawable]
    names = _names(drawable, x, y)
    frame = _frame(x, y, x_label, y_label)
    return _svg(title, words, frame, *marks, *dots, *names, size=_TALL)


def _allowed(x: _Axis, y: _Axis, most: float, least: float) -> Markup:
    right, bottom = x.at(most), y.at(least)
    width, height = round(right - x.start, 1), round(bottom - y.end, 1)
    return tag("rect", x=x.start, y=y.end, width=width, height=height, class_="allowed")


def _dot(point: Point, x: _Axis, y: _Axis) -> Markup:
    left, across, right = (x.at(value) if math.isfinite(value) else None for value in point.x)
    under, up, over = (y.at(value) if math.isfinite(value) else None for value in point.y)
    assert across is not None
    assert up is not None
    bad = " failed" if point.bad else ""
    parts: list[Child] = [tag("circle", cx=across, cy=up, r=5, class_=f"dot{bad}")]
    if left is not None and right is not None:
        parts.append(_line(left, up, right, up, f"whisker{bad}"))
    if under is not None and over is not None:
        parts.append(_line(across, under, across, over, f"whisker{bad}"))
    return join(*parts)


def _names(points: Sequence[Point], x: _Axis, y: _Axis) -> list[Markup]:
    """The names beside their points, moved down where they would lie on each other."""
    drawn: list[Markup] = []
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: y.at(p.y[1])):
        across, height = x.at(point.x[1]), y.at(point.y[1]) - 8
        near_end = across > (x.start + x.end) / 2
        width = len(point.name) * _LINE / 2
        left = across - 9 - width if near_end else across + 9
        while any(
            abs(height - other) < _LINE and left < end and start < left + width
            for start, end, other in taken
        ):
            height += 2
        height = min(height, y.start - 4)
        taken.append((left, left + width, height))
        side = ("end", across - 9) if near_end else ("start", across + 9)
        drawn.append(_text(point.name, side[1], height, side[0], class_="name"))
    return drawn


# ---------------------------------------------------------------------------------------- memory


def memory_chart(
    title: str,
    categories: Sequence[str],
    columns: Sequence[Sequence[float]],
    phases: Sequence[tuple[str, int]],
) -> Markup | None:
    """What is alive over a step, stacked: each column the bytes of every category, in phases."""
    totals = [sum(column) for column in columns]
    most = max(totals, default=0)
    if len(columns) < 2 or most <= 0:
        return None
    power = min(max(int(math.log(most, 1024)), 0), 4)
    unit = 1024.0**power
    x = _across(0, len(columns), _WIDE)
    y = _Axis(0, most / unit * 1.08, _WIDE.height - _BOTTOM, _TOP)
    shown = [i for i in range(len(categories)) if any(column[i] for column in columns)]
    # Each lies on what comes before it, so the highest is drawn first and down to the ground.
    areas = [
        _area(x, y, [sum(column[: i + 1]) / unit for column in columns], f"m{i}")
        for i in reversed(shown)
    ]
    peak = totals.index(most)
    words = f"the peak, {_bytes(most, power)}, is in {_phase_at(phases, peak)}; at the peak " + (
        ", ".join(f"{categories[i]} {_bytes(columns[peak][i], power)}" for i in shown)
    )
    frame = _frame_of_bytes(x, y, power)
    key = _legend([(categories[i], f"m{i}") for i in reversed(shown)], x.end + 12)
    return _svg(title, words, frame, *areas, *_phases(phases, x, y), *key, size=_WIDE)


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def _bytes(count: float, power: int) -> str:
    return f"{number(count / 1024.0**power)} {_UNITS[power]}"


def _phase_at(phases: Sequence[tuple[str, int]], column: int) -> str:
    for name, count in phases:
        if column < count:
            return name
        column -= count
    return "the step"


def _frame_of_bytes(x: _Axis, y: _Axis, power: int) -> Markup:
    parts: list[Child] = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(_line(x.start, at, x.end, at, "grid"))
        parts.append(_text(number(_tidy(value)), x.start - 6, at + 4, "end"))
    middle = (y.start + y.end) / 2
    turned = f"rotate(-90 14 {middle:.0f})"
    parts.append(_text(_UNITS[power], 14, middle, "middle", class_="label", transform=turned))
    return join(*parts)


def _area(x: _Axis, y: _Axis, heights: Sequence[float], class_: str) -> Markup:
    """From the ground up to ``heights``, in steps: a column holds until the next."""
    steps, before = [f"M{x.start} {y.start}"], math.nan
    for i, height in enumerate(map(y.at, heights)):
        if height != before:
            steps.append(f"H{x.at(i)}V{height}")
        before = height
    return tag("path", d=f"{''.join(steps)}H{x.end}V{y.start}Z", class_=class_)


def _phases(phases: Sequence[tuple[str, int]], x: _Axis, y: _Axis) -> list[Markup]:
    drawn, start, free = [], 0, x.start
    for name, count in phases:
        at = x.at(start)
        if start:
            drawn.append(_line(at, y.start, at, y.end, "phase"))
        middle = x.at(start + count / 2)
        width = len(name) * _LINE / 2
        if middle - width / 2 >= free:
            drawn.append(_text(name, middle, y.start + 16, "middle", class_="label"))
            free = middle + width / 2
        start += count
    return drawn


def _legend(entries: Sequence[tuple[str, str]], left: float) -> list[Markup]:
    drawn = []
    for i, (name, class_) in enumerate(entries):
        top = _TOP + i * (_LINE + 3)
        drawn.append(tag("rect", x=left, y=top, width=11, height=11, class_=class_))
        drawn.append(_text(name, left + 17, top + 10, "start", class_="label"))
    return drawn
