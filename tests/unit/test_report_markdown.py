"""The report in Markdown: short, escaped, and cut where GitHub would refuse it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.markdown import escape, markdown_report

ENVIRONMENT: dict[str, Any] = {
    "versions": {"pytest": "9.2.0", "torch": None},
    "platform": "x",
    "adapters": {"good": "LORA, r=8", "bad": "LORA, r=2"},
    "exit_status": 1,
    "command": "python -m pytest -m lora --lora-adapter=bad",
}


def failed(adapter: str = "bad", problems: int = 1) -> CheckResult:
    return CheckResult(
        "finite_weights",
        adapter,
        Outcome.FAILED,
        advice="train again",
        measurement=Measurement.of_problems(
            [Problem(f"tensor {i}", "nan") for i in range(problems)], count=96
        ),
        bound=Bound.at_most(0, "definition of the check"),
    )


def passed(adapter: str = "good") -> CheckResult:
    measurement = Measurement.of_problems([], count=96)
    return CheckResult("finite_weights", adapter, Outcome.PASSED, measurement=measurement)


def test_the_verdict_comes_first_and_what_failed_before_what_passed() -> None:
    text = markdown_report([passed(), failed()], ENVIRONMENT)
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "### LoRA: 1 of 2 adapters failed, 1 passed"
    assert "| bad | **FAIL** | 1 | 0 | 0 | 0 | 0 |" in lines
    assert "| good | **pass** | 0 | 0 | 0 | 0 | 1 |" in lines
    assert text.index("#### bad") < text.index("#### good")
    assert "- tensor 0: nan" in lines
    assert "- what to do: train again" in lines
    assert "pytest 9.2.0" in lines
    assert lines[-1] == "Again: ` python -m pytest -m lora --lora-adapter=bad `"


def test_checks_of_two_sources_are_told_apart() -> None:
    rows = [
        CheckResult("perplexity_drift", "a", outcome, reason="x", part=part)
        for part, outcome in (("wiki", Outcome.FAILED), ("code", Outcome.PASSED))
    ]
    text = markdown_report(rows, ENVIRONMENT)
    assert r"| perplexity\_drift\[wiki\] | FAIL |" in text
    assert r"| perplexity\_drift\[code\] | pass |" in text
    assert r"**perplexity\_drift\[wiki\]** FAIL" in text


def test_many_problems_are_counted_not_listed() -> None:
    text = markdown_report([failed(problems=200)], ENVIRONMENT)
    assert "- tensor 9: nan" in text
    assert "- tensor 10: nan" not in text
    assert "- and 190 more" in text


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("*a*_b_`c`", r"\*a\*\_b\_\`c\`"),
        ("[x](y)", r"\[x\]\(y\)"),
        ("line\nbreak\x1b[2J", r"line break\\x1b\[2J"),
        ("model.layers.0", "model.layers.0"),
    ],
)
def test_text_means_only_itself(raw: str, shown: str) -> None:
    assert escape(raw) == shown


@pytest.mark.parametrize(
    "raw", ["@someone", "org/repo#12", "http://a.b", "WWW.a.b", "https://x", "see #1"]
)
def test_nothing_mentions_or_links(raw: str) -> None:
    """Of these GitHub makes links and notices; an invisible joiner in the middle prevents it."""
    text = escape(raw)
    assert text.replace("\u2060", "") == raw
    assert not re.search(r"@\w|#\w|://|www\.", text, re.IGNORECASE)


def test_a_limit_takes_whole_adapters_away_the_good_ones_first() -> None:
    rows = [row for i in range(40) for row in (passed(f"good-{i}"), failed(f"bad-{i}"))]
    whole = markdown_report(rows, ENVIRONMENT)
    for limit in (len(whole) - 1, 20_000, 8_000):
        text = markdown_report(rows, ENVIRONMENT, limit=limit)
        assert len(text.encode()) <= limit
        assert "adapters do not fit" in text
        assert "#### bad-0" in text
        assert text.startswith("### LoRA: 40 of 80 adapters failed, 40 passed")
        assert text.count("<details>") == text.count("</details>")
    assert markdown_report(rows, ENVIRONMENT, limit=len(whole.encode())) == whole


def test_a_limit_that_holds_nothing_but_the_verdict() -> None:
    text = markdown_report([failed()], ENVIRONMENT, limit=60)
    assert text == "### LoRA: 1 adapter failed\n"


def test_no_results() -> None:
    text = markdown_report([], {"versions": {}, "adapters": {}})
    assert text.startswith("### LoRA: no results")


def test_a_command_with_backquotes_stays_code() -> None:
    text = markdown_report([passed()], {"command": "pytest `` ` <b>"})
    assert "Again: ``` pytest `` ` <b> ```" in text
