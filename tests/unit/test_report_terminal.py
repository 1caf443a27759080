"""The table in the terminal: what is in it, and that it stays within its width."""

from __future__ import annotations

import pytest

from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.terminal import summary_lines

ZERO = Bound.at_most(0, "definition of the check")


def lines(
    results: list[CheckResult], *, width: int = 80, detail: int = 0, encoding: str = "utf-8"
) -> list[str]:
    about = {"adapters/a": "LORA, r=8, on org/base"}
    return [
        line
        for line, _ in summary_lines(results, about, width=width, detail=detail, encoding=encoding)
    ]


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
    assert any(line.strip() == "note: all float32" for line in lines([passed()], detail=1))
    skipped = CheckResult("c", "a", Outcome.SKIPPED)
    assert lines([skipped], detail=1) == ["a", "  c  skip", ""]


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
    assert len([line for line in lines(skipped, detail=1) if "no base" in line]) == 3


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
    text = lines([row], detail=1)
    assert len(text) > 20
    assert not [line for line in text if line.lstrip().startswith("::") or "##[" in line]


# ------------------------------------------------------------------- terminals of all sorts, exact


def merged() -> CheckResult:
    """A check with numbers of every module."""
    ulps = {f"model.layers.{i}.self_attn.q_proj": 0.25 * i for i in range(7)}
    return CheckResult(
        "merge_equivalence",
        "adapters/a",
        Outcome.PASSED,
        measurement=Measurement(
            0.5, "times the rounding bound", 7, details={"ulps": ulps, "notes": ["in float32"]}
        ),
        bound=Bound.at_most(1, "default"),
    )


def test_a_narrow_terminal_has_the_evidence_below_the_verdict() -> None:
    assert lines([failed(), merged()], width=40) == [
        "adapters/a  LORA, r=8, on org/base",
        "  FAIL  adapter_files",
        "      1 problem (n=3), at most 0",
        "      (definition of the check); worst:",
        "      x.bin: a pickle",
        "  pass  merge_equivalence",
        "      0.5 times the rounding bound",
        "      (n=7), at most 1 (default)",
        "  -> adapter_files: save again with",
        "     save_pretrained of a current PEFT,",
        "     and copy the whole folder",
        "",
    ]


def test_a_terminal_of_sixty_columns_has_room_for_three() -> None:
    assert lines([failed(), merged()], width=60)[1:4] == [
        "  adapter_files      FAIL  1 problem (n=3), at most 0",
        "                           (definition of the check); worst:",
        "                           x.bin: a pickle",
    ]


def test_a_wide_terminal_has_a_line_for_each_check() -> None:
    assert lines([failed(), merged()], width=200) == [
        "adapters/a  LORA, r=8, on org/base",
        "  adapter_files      FAIL  1 problem (n=3), at most 0 (definition of the check); worst: "
        "x.bin: a pickle",
        "  merge_equivalence  pass  0.5 times the rounding bound (n=7), at most 1 (default)",
        "  -> adapter_files: save again with save_pretrained of a current PEFT, and copy the whole "
        "folder",
        "",
    ]


def test_detail_has_the_worst_modules_and_more_detail_all() -> None:
    indent = " " * 27
    some = [
        "adapters/a  LORA, r=8, on org/base",
        "  merge_equivalence  pass  0.5 times the rounding bound (n=7), at most 1 (default)",
        f"{indent}note: in float32",
        f"{indent}ulps: model.layers.6.self_attn.q_proj: 1.5",
        f"{indent}ulps: model.layers.5.self_attn.q_proj: 1.25",
        f"{indent}ulps: model.layers.4.self_attn.q_proj: 1",
        f"{indent}ulps: model.layers.3.self_attn.q_proj: 0.75",
        f"{indent}ulps: model.layers.2.self_attn.q_proj: 0.5",
    ]
    assert lines([merged()], width=90, detail=1) == [
        *some,
        f"{indent}ulps: 2 more modules with -vv",
        "",
    ]
    assert lines([merged()], width=90, detail=2) == [
        *some,
        f"{indent}ulps: model.layers.1.self_attn.q_proj: 0.25",
        f"{indent}ulps: model.layers.0.self_attn.q_proj: 0",
        "",
    ]


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "caf\u00e9 \u2192 \u201ca\u2026\u201d \u2264 \u6f22"),
        ("cp1252", "caf\u00e9 -> \u201ca\u2026\u201d <= \\u6f22"),
        ("cp437", 'caf\u00e9 -> "a..." \u2264 \\u6f22'),
        ("ascii", 'caf\\xe9 -> "a..." <= \\u6f22'),
        ("unheard-of", 'caf\\xe9 -> "a..." <= \\u6f22'),
    ],
)
def test_what_a_code_page_lacks_is_shown_in_plain_characters(encoding: str, shown: str) -> None:
    row = CheckResult(
        "c", "a", Outcome.SKIPPED, reason="caf\u00e9 \u2192 \u201ca\u2026\u201d \u2264 \u6f22"
    )
    assert lines([row], encoding=encoding) == ["a", f"  c  skip  {shown}", ""]


# ------------------------------------------------------------------------------ many adapters


def test_of_many_adapters_one_table_shows_what_needs_attention_first() -> None:
    skipped = CheckResult("merge_equivalence", "skips", Outcome.SKIPPED, reason="quantised")
    broken = CheckResult("save_reload", "breaks", Outcome.ERROR, reason="no base model")
    results = [
        passed(adapter="sound"),
        passed(adapter="skips"),
        skipped,
        failed(adapter="fails"),
        passed(adapter="fails"),
        failed(adapter="fails twice"),
        failed("finite_weights", adapter="fails twice"),
        broken,
        passed(adapter="adapters/" + "x" * 30 + "/sound too"),
    ]
    text = lines(results)
    table = text.index("6 adapters, those that need attention first")
    assert text[table + 1 :] == [
        "  breaks                          ERROR  1 of 1 check: save_reload",
        "  fails twice                     FAIL   2 of 2 checks: adapter_files,",
        "                                         finite_weights",
        "  fails                           FAIL   1 of 2 checks: adapter_files",
        "  skips                           pass   2 checks; 1 skipped",
        "  sound                           pass   1 check",
        "  ...xxxxxxxxxxxxxxxxx/sound too  pass   1 check",
        "",
    ]
    own = [line for line in text[:table] if line and not line.startswith(" ")]
    assert own == ["fails", "fails twice", "breaks"]
    assert "sound" in lines(results, detail=True)
    assert not any("those that need" in line for line in lines(results[:5]))


def test_an_adapter_of_which_nothing_was_decided_is_not_called_sound() -> None:
    results = [CheckResult("c", f"a{n}", Outcome.SKIPPED, reason="not run") for n in range(5)]
    assert lines(results)[1:] == [f"  a{n}  skip  1 check; 1 skipped" for n in range(5)] + [""]


def test_on_a_narrow_terminal_the_table_of_all_has_its_evidence_below() -> None:
    results = [passed(adapter=f"a{number}") for number in range(4)] + [failed(adapter="b" * 40)]
    assert (
        lines(results, width=40)[-11:]
        == [
            "5 adapters, those that need attention",
            "    first",
            f"  FAIL  ...{'b' * 27}",
            "      1 of 1 check: adapter_files",
            *(line for number in range(4) for line in (f"  pass  a{number}", "      1 check")),
            "",
        ][-11:]
    )
