"""The HTML report: what is in it, and that nothing of an adapter becomes markup."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chrome import NEEDS_CHROMIUM, Browser, browser

from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.charts import Point, histogram, line_chart, plane
from pytest_lora.report.figures import figures
from pytest_lora.report.html import SIZE_LIMIT, html_report
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


def gates(adapter: str) -> list[CheckResult]:
    """What the checks on data leave, with the evidence that is drawn."""
    looks = [{"used": n, "estimate": 1 / n, "low": -9 / n, "high": 9 / n} for n in range(1, 25)]
    looks[0]["low"], looks[0]["high"] = None, None
    curve = {
        "categories": ["frozen", "forward"],
        "phases": [["forward", 3], ["backward", 2]],
        "columns": [[2**30, i * 2**28] for i in (1, 2, 3, 2, 1)],
    }
    worst = [{"document": EVIL, "drift": 0.3, "excerpt": EVIL}]
    details: dict[str, Any] = {
        "domains": {"wiki": {"path": looks, "worst": worst}},
        "distribution": {"least": 0.0, "median": 0.1, "most": 0.2, "counts": [4, 5]},
        "curve": curve,
    }
    drift = Measurement(0.1, "nats per token", 9, low=0.0, high=0.2, details=details)
    failing = {"failing": [{"id": 1, "prompt": EVIL, "answer": EVIL}]}
    score = Measurement(0.4, "accuracy", 9, low=0.3, high=0.5, details=failing)
    return [
        CheckResult(
            "perplexity_drift",
            adapter,
            Outcome.PASSED,
            measurement=drift,
            bound=Bound.at_most(0.3, EVIL),
            part="wiki",
        ),
        CheckResult(
            "task_accuracy",
            adapter,
            Outcome.FAILED,
            measurement=score,
            bound=Bound.at_least(0.6, EVIL),
            part=EVIL,
        ),
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


def test_evidence_of_passes_gives_way_where_the_page_would_be_too_large() -> None:
    results = [row for i in range(10) for row in rich(f"adapter-{i}")]
    whole = html_report(results[:2], ENVIRONMENT)
    assert "All numbers" in whole
    assert "checks that passed are in the JSON report" not in whole
    many = [replace(row, adapter=f"a{i}-{row.adapter}") for i in range(8) for row in results]
    page = html_report([*many, *rich("bad", Outcome.FAILED)], ENVIRONMENT)
    assert len(page.encode()) <= SIZE_LIMIT
    assert page.count("All numbers") == 1, "what failed keeps all of its evidence"
    assert "Pictures and numbers of checks that passed are in the JSON report." in page


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
                assert 0 <= float(attributes.get(key) or 0) <= 620, tag_
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(attributes.get(key) or 0) <= 400, tag_


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
    def row(check: str, value: float, bound: Bound, unit: str = "x") -> CheckResult:
        measured = Measurement(value, unit, 9, low=value - 0.1, high=value + 0.1)
        return CheckResult(check, "good", Outcome.PASSED, measurement=measured, bound=bound)

    forgot = row("perplexity_drift", 0.1, Bound.at_most(0.3, "mine"))
    learned = row("task_accuracy", 0.4, Bound.at_least(0.2, "mine"))
    page = html_report([forgot, learned], ENVIRONMENT)
    assert "Learned and forgotten" in page
    assert page.count('class="limit"') == 2
    assert page.count('class="whisker"') == 2
    assert page.count('class="allowed"') == 1
    assert "Learned and forgotten" not in html_report([forgot], ENVIRONMENT)
    gained = row(
        "task_accuracy", -0.1, Bound.at_least(-0.2, "mine"), "accuracy, adapter minus base"
    )
    both = html_report([forgot, learned, gained], ENVIRONMENT)
    assert both.count('class="allowed"') == 2, "accuracies and gains have axes of their own"


# ---------------------------------------------------------------------------------- real browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything that can be drawn, one adapter sound and one hostile."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    results = [*rich("good"), *gates("good"), *rich(EVIL, Outcome.FAILED), *gates(EVIL)]
    path.write_text(html_report(results, ENVIRONMENT), encoding="utf-8")
    return path


LOOKS: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {"dark": True},
    "narrow": {"width": 320, "height": 640},
    "print": {"media": "print", "width": 800},
    "dark-on-paper": {"media": "print", "width": 800, "dark": True},
}
EVERY_LOOK = pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
UNFOLD = "document.querySelectorAll('details').forEach(part => part.open = true)"


@NEEDS_CHROMIUM
def test_a_browser_has_nothing_to_complain_of_and_nothing_to_fetch(
    chromium: Browser, page: Path
) -> None:
    chromium.console.clear()
    chromium.requests.clear()
    chromium.open(page)
    assert chromium.console == []
    assert chromium.requests == []
    found = "[...new Set([...document.querySelectorAll('*')].map(part => part.localName))]"
    assert not set(chromium.evaluate(found)) & {"script", "img", "iframe", "object", "form"}
    assert chromium.evaluate("document.querySelectorAll('section').length") == 4


@NEEDS_CHROMIUM
def test_the_browser_would_have_told(chromium: Browser, tmp_path: Path) -> None:
    evil = tmp_path / "evil.html"
    evil.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png"><script>no()</script>')
    chromium.console.clear()
    chromium.requests.clear()
    chromium.open(evil)
    assert chromium.requests == ["http://127.0.0.1:9/x.png"]
    assert any("no is not defined" in line for line in chromium.console)


@NEEDS_CHROMIUM
def test_the_page_is_dark_for_who_wants_it_dark_and_light_on_paper(
    chromium: Browser, page: Path
) -> None:
    def paper(**look: Any) -> str:
        chromium.open(page, **look)
        return str(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert paper() == "rgb(246, 247, 249)"
    assert paper(dark=True) == "rgb(15, 18, 20)"
    assert paper(media="print") == paper(media="print", dark=True) == "rgb(255, 255, 255)"


@NEEDS_CHROMIUM
@EVERY_LOOK
def test_every_text_stands_out_from_what_is_behind_it(
    chromium: Browser, page: Path, look: dict[str, Any]
) -> None:
    """WCAG 2.2, 1.4.3 (AA): a contrast of 4.5 to 1, of larger text too."""
    chromium.open(page, **look)
    chromium.evaluate(UNFOLD)
    faint, looked_at = chromium.evaluate(CONTRAST)
    assert looked_at > 500
    assert faint == []


CONTRAST = """(() => {
  const parse = text => {
    const numbers = text.match(/[-.\\d]+(?:e[-+]?\\d+)?/g).map(Number);
    const scale = text.startsWith("color(") ? 1 : 255;
    return [...numbers.slice(0, 3).map(n => n / scale), numbers.length > 3 ? numbers[3] : 1];
  };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight *
    (c[i] <= 0.04045 ? c[i] / 12.92 : ((c[i] + 0.055) / 1.055) ** 2.4), 0);
  const behind = part => {
    const above = parse(getComputedStyle(part).backgroundColor);
    if (above[3] === 1) return above;
    return over(above, part.parentElement ? behind(part.parentElement) : [1, 1, 1, 1]);
  };
  const faint = [];
  let looked_at = 0;
  for (const part of document.querySelectorAll("body *")) {
    const own = [...part.childNodes].filter(node => node.nodeType === 3);
    const text = own.map(node => node.data).join("").trim();
    if (!text || part.closest("title, desc") || !part.checkVisibility()) continue;
    const style = getComputedStyle(part), back = behind(part);
    const front = over(parse(part.closest("svg") ? style.fill : style.color), back);
    const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
    looked_at++;
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) faint.push([text.slice(0, 40), part.className.toString(), contrast]);
  }
  return [faint, looked_at];
})()"""


@NEEDS_CHROMIUM
@EVERY_LOOK
def test_the_page_never_scrolls_sideways(
    chromium: Browser, page: Path, look: dict[str, Any]
) -> None:
    chromium.open(page, **look)
    if look.get("media") != "print":
        chromium.evaluate(UNFOLD)
    width = chromium.evaluate("document.documentElement.scrollWidth")
    assert width <= look.get("width", 1200)


@NEEDS_CHROMIUM
def test_headings_go_down_one_level_at_a_time(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    levels = chromium.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(head => +head.localName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


@NEEDS_CHROMIUM
def test_a_screen_reader_gets_a_name_for_all_that_needs_one(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    chromium.evaluate(UNFOLD)
    told = chromium.accessible()
    roles = {role for role, _ in told}
    assert {"main", "banner", "region", "image", "table", "columnheader", "rowheader"} <= roles
    named = {"link", "image", "region", "heading", "DisclosureTriangle", "RootWebArea"}
    assert [role for role, name in told if role in named and not name.strip()] == []
    assert any(name == "FAIL" for role, name in told if role == "link"), "signs have words"


@NEEDS_CHROMIUM
def test_everything_can_be_done_by_keyboard(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    at = "document.activeElement.textContent.slice(0, 40)"
    chromium.press("Tab")
    assert chromium.evaluate(at) == "Skip to the results"
    chromium.press("Enter")
    assert chromium.evaluate("location.hash") == "#results"
    seen = set()
    for _ in range(400):
        chromium.press("Tab")
        seen.add(chromium.evaluate("document.activeElement.localName"))
        if chromium.evaluate("document.activeElement.matches('details:not([open]) > summary')"):
            break
    assert {"a", "div", "summary"} <= seen
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert chromium.evaluate(outline) == "solid", "where the focus is can be seen"
    chromium.press("Enter")
    assert chromium.evaluate("document.activeElement.parentElement.open") is True


@NEEDS_CHROMIUM
def test_on_paper_all_evidence_is_open(chromium: Browser, page: Path, tmp_path: Path) -> None:
    closed = (
        "[...document.querySelectorAll('section > details:not([open]) > p')]"
        ".map(part => part.checkVisibility())"
    )
    chromium.open(page)
    assert set(chromium.evaluate(closed)) == {False}
    chromium.open(page, media="print", width=800)
    assert set(chromium.evaluate(closed)) == {True}
    chromium.paper(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
