"""The HTML report: what is in it, and that nothing of an adapter becomes markup."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chrome import NEEDS_CHROMIUM, look_at, picture

from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.charts import Point, histogram, line_chart, plane
from pytest_lora.report.figures import figures
from pytest_lora.report.html import html_report
from pytest_lora.report.markup import Markup, tag

EVIL = "</title><script>alert(1)</script>\"'><img src=http://x.invalid/a onerror=b()>\x1b[2J\n&amp;"
LAYERS, KINDS = 32, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENVIRONMENT: dict[str, Any] = {
    "versions": {"pytest": "9.2.0", "torch": None},
    "platform": "somewhere",
    "adapters": {"good": "LORA, r=8", EVIL: EVIL},
    "exit_status": 1,
    "command": f"python -m pytest --lora-adapter={EVIL}",
    "settings": {"good": {"dtype": {"value": "bfloat16", "origin": EVIL}}, EVIL: {}},
    "digests": {"good": {"adapter_config.json": "sha256:00"}, EVIL: {EVIL: EVIL}},
}


class Reader(HTMLParser):
    """Gathers elements and text the way a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def module_names() -> list[str]:
    return [f"model.layers.{i}.self_attn.{kind}" for i in range(LAYERS) for kind in KINDS]


def rich(adapter: str, outcome: Outcome = Outcome.PASSED) -> list[CheckResult]:
    """Results like those of a whole run on a model of 32 layers."""
    details: dict[str, Any] = {
        "problems": [Problem(EVIL, EVIL, EVIL, EVIL).to_dict()] if outcome != "passed" else [],
        "notes": [EVIL],
        "ulps": {name: i * 0.37 for i, name in enumerate(module_names())},
        "total": [{"cycle": i, "rms": i * 1e-9, "largest": "inf"} for i in range(1, 5)],
        "layers": [{"module": m, "value": i, EVIL: EVIL} for i, m in enumerate(module_names())],
        EVIL: {EVIL: [EVIL]},
    }
    measured = Measurement(1.5, "times the rounding bound", 9, where=EVIL, details=details)
    return [
        CheckResult(
            "merge_equivalence", adapter, outcome, EVIL, EVIL, measured, Bound.at_most(1, EVIL), 1.5
        ),
        CheckResult(EVIL, adapter, Outcome.SKIPPED, reason=EVIL),
    ]


def page_of(*results: CheckResult) -> Reader:
    return Reader(html_report(results, ENVIRONMENT))


def test_the_verdict_is_the_first_thing_said() -> None:
    page = page_of(*rich("good"), *rich(EVIL, Outcome.FAILED))
    text = " ".join(page.text)
    assert not page.open, "every element is closed"
    assert text.count("LoRA: 1 of 2 adapters failed, 1 passed") == 2  # title and heading
    heads = [tag for tag, _ in page.elements if tag in ("h1", "h2", "table")]
    assert heads[0] == "h1"


def test_nothing_of_an_adapter_becomes_markup_or_reaches_the_network() -> None:
    page = page_of(*rich("good"), *rich(EVIL, Outcome.FAILED))
    names = {name for name, _ in page.elements}
    assert not names & {"script", "img", "link", "iframe", "object", "base", "form", "image", "use"}
    for name, attributes in page.elements:
        assert not [
            key for key in attributes if key.startswith("on") or key in ("src", "xlink:href")
        ]
        if "href" in attributes:
            assert str(attributes["href"]).startswith("#"), name
    assert "\x1b" not in "".join(page.text)
    assert any("<script>alert(1)</script>" in text for text in page.text), "shown as text"


def test_every_link_has_its_target_and_no_id_is_used_twice() -> None:
    page = page_of(*rich("good"), *rich(EVIL, Outcome.FAILED))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    targets = {str(a["href"])[1:] for _, a in page.elements if "href" in a}
    labels = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert len(ids) == len(set(ids))
    assert targets | labels <= set(ids)


def test_what_needs_attention_is_open_and_comes_first() -> None:
    page = page_of(*rich("good"), *rich("bad", Outcome.FAILED))
    opened = [a for tag, a in page.elements if tag == "details" and "open" in a]
    assert [a["id"] for a in opened] == ["r0"]


def test_tables_tell_screen_readers_what_their_cells_belong_to() -> None:
    page = page_of(*rich("good"))
    heads = [attributes for tag, attributes in page.elements if tag == "th"]
    assert heads
    assert all(a.get("scope") in ("row", "col") for a in heads)
    images = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert images
    assert all(a["role"] == "img" and a["aria-label"] for a in images)


def test_ten_adapters_stay_below_a_megabyte() -> None:
    results = [row for i in range(10) for row in rich(f"adapter-{i}", Outcome.FAILED)]
    assert len(html_report(results, ENVIRONMENT).encode()) < 1_000_000


@pytest.mark.parametrize("outcome", Outcome)
def test_one_check_alone(outcome: Outcome) -> None:
    page = page_of(CheckResult("mine", "good", outcome))
    assert not page.open


def test_no_results() -> None:
    page = Reader(html_report([], {}))
    assert "LoRA: no results" in page.text


# ---------------------------------------------------------------------------------------- figures


def drawn(**details: Any) -> list[Markup]:
    return list(figures(Measurement(1.0, "x", 1, details=details)))


def cells(heat: Markup) -> list[str]:
    page = Reader(heat)
    return [a.get("style") or "" for tag, a in page.elements if tag == "td"]


def test_numbers_per_module_are_a_heat_map_of_layers_and_kinds() -> None:
    [heat] = drawn(
        ulps={"m.layers.0.q": 0.0, "m.layers.0.k": 1.0, "m.layers.1.q": 4.0, "head": 2.0}
    )
    assert Reader(heat).text[:5] == ["ulps", "layer", "head", "k", "q"]
    assert "--v:1.00" in cells(heat)
    assert len(cells(heat)) == 3 * 3


def test_a_list_of_modules_is_one_map_per_number_that_varies() -> None:
    rows = [
        {"module": f"l.{i}.q", "rank": 8, "value": float(i), "kind": "linear", "elements": i}
        for i in range(4)
    ]
    [heat] = drawn(layers=rows)
    assert "layers: value" in heat


def test_a_number_that_is_not_finite_is_marked_in_the_map() -> None:
    [heat] = drawn(ulps={"l.0.q": "nan", "l.1.q": 1.0, "l.2.q": "inf"})
    assert heat.count('class="bad"') == 2


def test_many_layers_share_rows() -> None:
    [heat] = drawn(ulps={f"l.{i}.q": float(i) for i in range(100)})
    assert "the largest of 4 layers in each row" in heat
    assert len(cells(heat)) == 25
    assert ">96 to 99<" in heat


@pytest.mark.parametrize(
    "details",
    [
        {},
        {"roles": {"factor": 56}},
        {"scaling": {"2.0": 36, "4.0": 2}},
        {"modules": [{"module": "l.0.q", "rank": 8}]},
        {"total": [{"cycle": 1, "rms": 0.0}]},
        {"total": [{"cycle": 1, "rms": "nan"}, {"cycle": 2, "rms": "nan"}]},
        {"words": ["a", "b"]},
    ],
)
def test_what_has_no_shape_is_not_drawn(details: dict[str, Any]) -> None:
    assert drawn(**details) == []


def test_numbers_by_step_are_a_line() -> None:
    [line] = drawn(total=[{"step": i, "rms": i * i} for i in range(5)])
    assert "from 0 to 16" in line
    assert line.count("<polyline") == 1


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-300, 1e299, -3.5])
def test_charts_keep_within_their_frame(scale: float) -> None:
    values = [scale * i for i in range(5)]
    charts = [
        line_chart("t", range(5), {"a": values}, x_label="x", y_label="y", limits={"l": scale}),
        histogram("t", values, x_label="x", limits={"l": scale, "no": math.inf}),
        plane(
            "t",
            [Point("p", (scale, scale, scale), (0, 1, 2))],
            x_label="x",
            y_label="y",
            x_limits=[scale],
        ),
    ]
    for chart in charts:
        assert chart is not None
        for tag_, attributes in Reader(chart).elements:
            for key in ("x", "x1", "x2", "cx"):
                assert 0 <= float(attributes.get(key) or 0) <= 560, tag_
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(attributes.get(key) or 0) <= 260, tag_


def test_nothing_finite_is_no_chart() -> None:
    nan = math.nan
    assert line_chart("t", [nan], {"a": [nan]}, x_label="", y_label="") is None
    assert histogram("t", [nan, math.inf], x_label="") is None
    assert plane("t", [Point("p", (nan,) * 3, (nan,) * 3)], x_label="", y_label="") is None


def test_text_is_escaped_where_it_enters_and_markup_passes_once() -> None:
    inner = tag("b", "<i>", title='"<')
    assert inner == '<b title="&quot;&lt;">&lt;i&gt;</b>'
    assert tag("p", inner, None, "&") == f"<p>{inner}&amp;</p>"
    assert tag("p", "a\u202eb\x00", open=True, id=None) == "<p open>a\\u202eb\\x00</p>"


def test_of_a_check_made_twice_the_matrix_shows_the_worst() -> None:
    outcomes = (Outcome.PASSED, Outcome.FAILED, Outcome.PASSED)
    rows = [CheckResult("perplexity_drift", "bad", outcome) for outcome in outcomes]
    page = page_of(*rows, CheckResult("perplexity_drift", "good", Outcome.PASSED))
    cells = [a.get("class") for name, a in page.elements if name == "td" and "class" in a]
    assert cells == ["failed", "passed"]


def test_what_was_learned_stands_against_what_was_forgotten() -> None:
    def row(check: str, value: float, bound: Bound) -> CheckResult:
        measured = Measurement(value, "x", 9, low=value - 0.1, high=value + 0.1)
        return CheckResult(check, "good", Outcome.PASSED, measurement=measured, bound=bound)

    forgot = row("perplexity_drift", 0.1, Bound.at_most(0.3, "mine"))
    learned = row("task_accuracy", 0.4, Bound.at_least(0.2, "mine"))
    page = html_report([forgot, learned], ENVIRONMENT)
    assert "Learned and forgotten" in page
    assert page.count('class="limit"') == 2
    assert page.count('class="whisker"') == 2
    assert "Learned and forgotten" not in html_report([forgot], ENVIRONMENT)


# ---------------------------------------------------------------------------------- real browser


@NEEDS_CHROMIUM
def test_a_browser_has_nothing_to_complain_of_and_nothing_to_fetch(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    results = [*rich("good"), *rich(EVIL, Outcome.FAILED)]
    page.write_text(html_report(results, ENVIRONMENT), encoding="utf-8")
    seen = look_at(page, tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert seen.dom.count("<section") == 3
    assert "<script" not in seen.dom
    assert "<img" not in seen.dom


@NEEDS_CHROMIUM
def test_the_browser_would_have_told(tmp_path: Path) -> None:
    page = tmp_path / "evil.html"
    page.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png"><script>no()</script>')
    seen = look_at(page, tmp_path)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert any("no is not defined" in line for line in seen.console)


@NEEDS_CHROMIUM
def test_the_page_is_dark_for_who_wants_it_dark(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html_report(rich("good"), ENVIRONMENT), encoding="utf-8")
    for dark in (False, True):
        picture(page, tmp_path / f"{dark}.png", tmp_path, dark=dark)
    light, dark_ = ((tmp_path / f"{dark}.png").read_bytes() for dark in (False, True))
    assert light.startswith(b"\x89PNG")
    assert light != dark_
