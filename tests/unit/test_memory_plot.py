from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pytest_lora.errors import UsageError
from pytest_lora.memory.plot import COLUMNS, HEIGHT, WIDTH, memory_svg
from pytest_lora.memory.records import CATEGORIES, MemoryPeak, Moment

SVG = "{http://www.w3.org/2000/svg}"


def peak(moments: list[Moment]) -> MemoryPeak:
    highest = max(moments, key=lambda moment: sum(moment.columns))
    columns = dict(zip(CATEGORIES, highest.columns, strict=True))
    live = sum(highest.columns)
    return MemoryPeak(live, columns, highest.op, "", highest.phase, {}, (), tuple(moments))


def moment(phase: str, op: str, **held: int) -> Moment:
    return Moment(phase, op, tuple(held.get(name, 0) for name in CATEGORIES))


STEP = [
    *(moment("forward", f"f{i}", frozen=1000 << 20, forward=i << 20) for i in range(900)),
    moment("backward", "the<peak>", frozen=1000 << 20, forward=900 << 20, logits=3000 << 20),
    *(moment("backward", f"b{i}", frozen=1000 << 20, forward=i << 20) for i in range(900, 0, -1)),
    *(moment("optimizer", "step", frozen=1000 << 20, optimizer=50 << 20) for _ in range(300)),
]


def test_the_picture_is_well_formed_and_keeps_the_peak_of_a_single_moment() -> None:
    root = ET.fromstring(memory_svg(peak(STEP), title="a < b"))
    texts = ["".join(item.itertext()) for item in root.iter(f"{SVG}text")]
    assert "a < b" in texts
    assert "peak 4.79 GiB, the<peak>" in texts
    assert {"forward", "backward", "optimizer"} <= set(texts)
    legend = {text for text in texts if text.startswith(("frozen base", "logits", "optimizer "))}
    assert legend == {"frozen base 1000 MiB", "logits 2.93 GiB", "optimizer 50.0 MiB"}
    areas = [item.findtext(f"{SVG}title") for item in root.iter(f"{SVG}polygon")]
    assert areas == ["frozen base", "optimizer", "logits", "forward"], "only what was there"


def test_everything_lies_within_the_picture_and_long_steps_are_thinned_out() -> None:
    root = ET.fromstring(memory_svg(peak(STEP)))
    for area in root.iter(f"{SVG}polygon"):
        points = [tuple(map(float, pair.split(","))) for pair in area.attrib["points"].split()]
        assert len(points) <= 4 * COLUMNS
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_both_colour_schemes_are_in_it() -> None:
    assert "prefers-color-scheme:dark" in memory_svg(peak(STEP))


def test_the_picture_of_the_documentation_is_one_of_these() -> None:
    """Made by docs/make_pictures.py --memory, of the first cell of the table beside it."""
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "memory.md").read_text("utf-8")
    assert "](memory-step.svg)" in page
    svg = (docs / "memory-step.svg").read_text("utf-8")
    assert "prefers-color-scheme:dark" in svg
    texts = ["".join(item.itertext()) for item in ET.fromstring(svg).iter(f"{SVG}text")]
    [peak] = [text for text in texts if text.startswith("peak ")]
    # Beyond the tensors drawn there are 64 MiB of cuBLAS workspaces in the table.
    assert "| plain | 26.4 GiB" in page
    assert 26.2 < float(peak.split()[1]) < 26.45


def test_without_a_timeline_there_is_nothing_to_draw() -> None:
    with pytest.raises(UsageError, match="timeline=True"):
        memory_svg(MemoryPeak(1, {}, "", "", "", {}))
