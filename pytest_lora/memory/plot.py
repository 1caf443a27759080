"""Memory over one training step, as an SVG: stacked bytes per category, operator by operator.

One picture for both colour schemes: its colours follow ``prefers-color-scheme``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from pytest_lora.errors import UsageError
from pytest_lora.memory.records import CATEGORIES, MemoryPeak, Moment
from pytest_lora.records import Json
from pytest_lora.sizes import format_bytes

__all__ = ["curve_of", "curve_svg", "memory_svg"]

_COLOURS = {
    "frozen": "#7f8c9b",
    "trainable": "#0072b2",
    "gradients": "#cc79a7",
    "optimizer": "#e69f00",
    "batch": "#999933",
    "logits": "#d55e00",
    "forward": "#56b4e9",
    "backward": "#009e73",
    "workspace": "#f0e442",
}
"""Told apart with colour vision deficiencies too (M. Okabe, K. Ito, "Color Universal Design")."""
WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 190, 48, 44
COLUMNS, CURVE_COLUMNS = 240, 120
"""Operators are drawn in at most so many columns, each by its fullest moment."""
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}"
    ".faint{fill:#59636e}.line{stroke:#59636e;stroke-width:1;fill:none}"
    ".grid{stroke:#59636e;stroke-opacity:.2}.peak{stroke:#1f2328;stroke-dasharray:3 3;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.faint{fill:#9198a1}"
    ".line{stroke:#9198a1}.grid{stroke:#9198a1}.peak{stroke:#e6edf3}}"
)


def memory_svg(peak: MemoryPeak, *, title: str = "Memory over one training step") -> str:
    """The picture of a measurement or a prediction that kept its timeline.

    Raises:
        UsageError: there is no timeline.
    """
    return _svg(_columns(_timeline(peak), COLUMNS), title)


def curve_of(peak: MemoryPeak) -> dict[str, Json]:
    """The timeline as a small JSON object, for reports; :func:`curve_svg` draws it.

    ``columns`` holds at most 120 lists of bytes in the order of ``categories``, each the fullest
    moment of its stretch of the ``operators``; ``phases`` says how many columns each phase has,
    in order; ``op`` is the operator at the peak.

    Raises:
        UsageError: there is no timeline.
    """
    moments = _columns(_timeline(peak), CURVE_COLUMNS)
    phases = groupby(moments, lambda moment: moment.phase)
    return {
        "categories": list(CATEGORIES),
        "phases": [[phase, len(list(columns))] for phase, columns in phases],
        "columns": [list(moment.columns) for moment in moments],
        "operators": len(peak.timeline),
        "op": max(moments, key=_total).op,
    }


def curve_svg(curve: Mapping[str, Any], *, title: str = "Memory") -> str:
    """The picture of what :func:`curve_of` made."""
    phases = [phase for phase, count in curve["phases"] for _ in range(count)]
    place = [curve["categories"].index(name) for name in CATEGORIES]
    moments = [
        Moment(phase, curve["op"], tuple(columns[index] for index in place))
        for phase, columns in zip(phases, curve["columns"], strict=True)
    ]
    return _svg(moments, title)


def _timeline(peak: MemoryPeak) -> Sequence[Moment]:
    if not peak.timeline:
        raise UsageError("no timeline was kept: predict or measure with timeline=True")
    return peak.timeline


def _svg(moments: Sequence[Moment], title: str) -> str:
    most = max(map(_total, moments))
    scale = _Scale(len(moments), most)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}, peak {format_bytes(most)}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
        *_grid(scale),
        *_areas(moments, scale),
        *_phases(moments, scale),
        *_mark(moments, scale),
        *_legend(moments),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Scale:
    """From columns and bytes to the picture's coordinates; the axis ends on a round number."""

    def __init__(self, columns: int, most: int) -> None:
        self.columns = columns
        self.step = _round_step(most / 4)
        self.top = max(1, math.ceil(most / self.step)) * self.step

    def x(self, column: float) -> float:
        return LEFT + column / self.columns * (WIDTH - LEFT - RIGHT)

    def y(self, count: float) -> float:
        return HEIGHT - BOTTOM - count / self.top * (HEIGHT - TOP - BOTTOM)


def _round_step(count: float) -> float:
    """The least of 1, 2, 5, 10, ... of a binary unit that is at least ``count``."""
    unit = 1024.0 ** max(0, int(math.log(max(count, 1), 1024)))
    power: float = 10.0 ** math.floor(math.log10(max(count / unit, 1)))
    return next(power * unit * digit for digit in (1, 2, 5, 10) if power * unit * digit >= count)


def _total(moment: Moment) -> int:
    return sum(moment.columns)


def _columns(timeline: Sequence[Moment], most: int) -> list[Moment]:
    """The timeline thinned out: of each stretch the fullest moment, so that peaks stay."""
    size = max(1, math.ceil(len(timeline) / most))
    stretches = [timeline[start : start + size] for start in range(0, len(timeline), size)]
    return [max(stretch, key=_total) for stretch in stretches]


def _areas(moments: Sequence[Moment], scale: _Scale) -> list[str]:
    below = [0] * len(moments)
    parts = []
    for place, name in enumerate(CATEGORIES):
        above = [low + moment.columns[place] for low, moment in zip(below, moments, strict=True)]
        if above != below:
            path = " ".join([*_edge(above, scale, 1), *_edge(below, scale, -1)])
            parts.append(
                f'<polygon fill="{_COLOURS[name]}" fill-opacity=".88" points="{path}">'
                f"<title>{CATEGORIES[name]}</title></polygon>"
            )
        below = above
    return parts


def _edge(values: Sequence[int], scale: _Scale, direction: int) -> list[str]:
    """A staircase along ``values``, from left to right or back."""
    points: list[tuple[float, float]] = []
    for column, value in enumerate(values):
        if points and values[column - 1] == value:
            points.pop()  # the step goes on
        else:
            points.append((scale.x(column), scale.y(value)))
        points.append((scale.x(column + 1), scale.y(value)))
    return [f"{x:.1f},{y:.1f}" for x, y in points[::direction]]


def _grid(scale: _Scale) -> list[str]:
    parts = []
    for number in range(round(scale.top / scale.step) + 1):
        y = scale.y(number * scale.step)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        label = format_bytes(round(number * scale.step)) if number else "0"
        parts.append(
            f'<text class="faint" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{label}</text>'
        )
    return parts


def _phases(moments: Sequence[Moment], scale: _Scale) -> list[str]:
    """The phases beneath the axis, with a line where one ends; slivers go without a name."""
    parts, start = [], 0
    for column in range(1, len(moments) + 1):
        if column < len(moments) and moments[column].phase == moments[start].phase:
            continue
        left, right = scale.x(start), scale.x(column)
        if right - left > 24:
            name = escape(moments[start].phase)
            middle = (left + right) / 2
            parts.append(
                f'<line class="line" x1="{right:.1f}" x2="{right:.1f}" y1="{HEIGHT - BOTTOM}" '
                f'y2="{HEIGHT - BOTTOM + 8}"/><text text-anchor="middle" x="{middle:.1f}" '
                f'y="{HEIGHT - BOTTOM + 22}">{name}</text>'
            )
        start = column
    return parts


def _mark(moments: Sequence[Moment], scale: _Scale) -> list[str]:
    highest = max(range(len(moments)), key=lambda column: _total(moments[column]))
    total = _total(moments[highest])
    x, y = scale.x(highest + 0.5), scale.y(total)
    end = "end" if highest > len(moments) / 2 else "start"
    return [
        f'<line class="peak" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text text-anchor="{end}" x="{x:.1f}" y="{y - 6:.1f}">peak {format_bytes(total)}, '
        f"{escape(moments[highest].op)}</text>",
    ]


def _legend(moments: Sequence[Moment]) -> list[str]:
    parts, y = [], TOP + 8
    for place, name in reversed(list(enumerate(CATEGORIES))):
        most = max(moment.columns[place] for moment in moments)
        if most:
            x = WIDTH - RIGHT + 16
            parts.append(
                f'<rect x="{x}" y="{y - 9}" width="11" height="11" fill="{_COLOURS[name]}"/>'
                f'<text x="{x + 17}" y="{y}">{CATEGORIES[name]} '
                f'<tspan class="faint">{format_bytes(most)}</tspan></text>'
            )
            y += 20
    return parts
