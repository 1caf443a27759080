"""The table in the terminal: what is in it, and that it stays within its width."""

from __future__ import annotations

import pytest

from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.terminal import summary_lines

ZERO = Bound.at_most(0, "definition of the check")


def lines(results: list[CheckResult], *, width: int = 80, detail: bool = False) -> list[str]:
    about = {"adapters/a": "LORA, r=8, on org/base"}
    return [line for line, _ in summary_lines(results, about, width=width, detail=detail)]


def passed(check: str = "finite_weights", adapter: str = "adapters/a") -> CheckResult:
    return CheckResult(
        check,
        adapter,
        Outcome.PASSED,
        measurement=Measurement.of_problems([], count=96, notes=["all float32"]),
        bound=ZERO,
    )


def failed(check: str = "adapter_files", adapter: str = "adapters/a") -> CheckResult:
    return CheckResult(
        check,
        adapter,
        Outcome.FAILED,
        advice="save again with save_pretrained of a current PEFT, and copy the whole folder",
        measurement=Measurement.of_problems([Problem("x.bin", "a pickle")], count=3),
        bound=ZERO,
    )


def test_a_table_in_full() -> None:
    skipped = CheckResult("merge_equivalence", "adapters/a", Outcome.SKIPPED, reason="no base")
    assert lines([failed(), passed(), skipped]) == [
        "adapters/a  LORA, r=8, on org/base",
        "  adapter_files      FAIL  1 problem (n=3), at most 0 (definition of the check);",
        "                           worst: x.bin: a pickle",
        "  finite_weights     pass  0 problems (n=96)",
        "  merge_equivalence  skip  no base",
        "  -> adapter_files: save again with save_pretrained of a current PEFT, and copy",
        "     the whole folder",
        "",
    ]


def test_one_table_per_adapter_in_the_order_given() -> None:
    text = lines([passed(adapter="b"), passed(), passed("adapter_files")])
    heads = [line for line in text if line and not line.startswith(" ")]
    assert heads == ["b", "adapters/a  LORA, r=8, on org/base"]
    assert text.count("") == 2


@pytest.mark.parametrize("outcome", Outcome)
def test_the_longest_verdict_keeps_its_distance(outcome: Outcome) -> None:
    row = CheckResult("a_check", "a", outcome, reason="because")
    assert any(line.endswith("  because") for line in lines([row, passed(adapter="a")]))


def test_colours_follow_the_verdict() -> None:
    rows = [CheckResult("c", "a", outcome, reason="r") for outcome in Outcome]
    shown = dict(summary_lines(rows, {}, width=80))
    colours = [colour for line, colour in shown.items() if line.startswith("  c")]
    assert colours == ["green", "red", "yellow", "yellow", "red"]


def test_notes_only_in_detail() -> None:
    assert not any("note" in line for line in lines([passed()]))
    assert any(line.strip() == "note: all float32" for line in lines([passed()], detail=True))
    skipped = CheckResult("c", "a", Outcome.SKIPPED)
    assert lines([skipped], detail=True) == ["a", "  c  skip", ""]


def test_checks_skipped_for_one_reason_share_a_row_unless_in_detail() -> None:
    names = ("base_compatibility", "adapter_effect", "save_reload")
    skipped = [CheckResult(name, "a", Outcome.SKIPPED, reason="no base") for name in names]
    alone = CheckResult("merge_equivalence", "a", Outcome.SKIPPED, reason="prompt tuning")
    assert lines([passed(adapter="a"), *skipped, alone]) == [
        "a",
        "  finite_weights     pass  0 problems (n=96)",
        "  3 checks           skip  no base (base_compatibility, adapter_effect,",
        "                           save_reload)",
        "  merge_equivalence  skip  prompt tuning",
        "",
    ]
    assert len([line for line in lines(skipped, detail=True) if "no base" in line]) == 3


def test_what_moves_the_bound_is_shown_with_the_value() -> None:
    row = CheckResult(
        "merge_equivalence",
        "a",
        Outcome.PASSED,
        measurement=Measurement(0.5, "times the rounding bound", 14, where="q_proj"),
        bound=Bound.at_most(1, "--lora-merge-equivalence"),
    )
    text = " ".join(" ".join(lines([row])).split())
    assert "0.5 times the rounding bound (n=14), at most 1 (--lora-merge-equivalence)" in text
    assert "worst" not in text


def test_a_hostile_name_cannot_move_the_cursor_or_widen_the_table() -> None:
    name = "a\x1b[2J\n" + "x" * 200
    row = CheckResult(name, name, Outcome.FAILED, reason=name, advice=name)
    for line in lines([row], width=60):
        assert line.isprintable()
        assert len(line) <= 60


def test_no_results_no_lines() -> None:
    assert lines([]) == []


def test_no_line_is_a_command_to_githubs_runner() -> None:
    """It obeys lines that begin with ``::``, indented or not, and ``##[`` anywhere."""
    words = " ".join(["::add-mask::x", "##[error]y"] * 40)
    row = CheckResult("c", "a", Outcome.FAILED, reason=words, advice=words)
    text = lines([row], detail=True)
    assert len(text) > 20
    assert not [line for line in text if line.lstrip().startswith("::") or "##[" in line]
