"""The console script: inspect, compare, and what it says to a wrong request."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_maker import write_adapter

from pytest_lora.cli import main
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome
from pytest_lora.report.json_report import build_report, write_report


def result(outcome: Outcome, value: float = 0.1, spread: float | None = 0.01) -> CheckResult:
    low, high = (None, None) if spread is None else (value - spread, value + spread)
    measured = Measurement(value, "nats per token", 9, low=low, high=high)
    return CheckResult(
        "perplexity_drift", "a", outcome, measurement=measured, bound=Bound.at_most(1, "mine")
    )


def report(path: Path, *results: CheckResult, **versions: str) -> str:
    environment: dict[str, Any] = {
        "versions": {"torch": "2", **versions},
        "platform": "x",
        "adapters": {},
        "exit_status": 0,
    }
    write_report(path, build_report(results, environment))
    return str(path)


def test_inspect_tells_what_the_files_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "adapter")
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().out
    assert "  type        LORA\n" in said
    assert "  rank        2\n" in said
    assert "  modules     4\n" in said
    assert " in 8 tensors, " in said


def test_inspect_of_nothing_is_a_wrong_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path)]) == 4
    assert capsys.readouterr().err.startswith("ERROR: no adapter in ")


@pytest.mark.parametrize(
    ("after", "status"),
    [
        (result(Outcome.PASSED), 0),
        (result(Outcome.PASSED, 0.11), 0),
        (result(Outcome.PASSED, 0.2), 1),
        (result(Outcome.PASSED, 0.01), 0),
        (result(Outcome.PASSED, 0.2, None), 0),
        (result(Outcome.FAILED, 2.0), 1),
        (result(Outcome.SKIPPED), 1),
        (result(Outcome.INCONCLUSIVE), 1),
        (CheckResult("another", "a", Outcome.PASSED), 1),
    ],
)
def test_compare_exits_1_where_something_got_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: CheckResult, status: int
) -> None:
    old = report(tmp_path / "a.json", result(Outcome.PASSED))
    new = report(tmp_path / "b.json", after)
    assert main(["compare", old, new]) == status
    assert ("WORSE a perplexity_drift" in capsys.readouterr().out) == bool(status)


def paired(check: str, scores: list[float], all_items: int = 0, facts: str = "same") -> CheckResult:
    """A pass that rests on one number per item: of a task, or of a source domain."""
    bound = Bound.at_least(0, "mine") if check == "task_accuracy" else Bound.at_most(99, "mine")
    size = all_items or len(scores)
    details: dict[str, Any] = {
        "by_item": {str(i): score for i, score in enumerate(scores)},
        "facts": {"texts": facts},
    }
    if check == "task_accuracy":
        details["items"] = size
    else:
        details["domains"] = {"wiki": {"documents": {"all": size}}}
    value = sum(scores) / len(scores)
    measured = Measurement(value, "of it", len(scores), details=details)
    outcome = Outcome.PASSED
    return CheckResult(check, "a", outcome, measurement=measured, bound=bound, part="wiki")


ACCURATE = [1.0] * 40 + [0.0] * 10
LOSSES = [100.0 + i for i in range(50)]


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        # 12 lost and none gained: 2**-12.
        (ACCURATE, [0.0] * 12 + ACCURATE[12:], 1),
        # 9 lost and none gained: 2**-9 is more than 0.001.
        (ACCURATE, [0.0] * 9 + ACCURATE[9:], 0),
        # As many gained as lost, and a gain.
        (ACCURATE, ACCURATE[::-1], 0),
        (ACCURATE, [1.0] * 50, 0),
    ],
)
def test_compare_decides_scores_by_pairs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: list[float],
    after: list[float],
    status: int,
) -> None:
    old = report(tmp_path / "a.json", paired("task_accuracy", before))
    new = report(tmp_path / "b.json", paired("task_accuracy", after))
    assert main(["compare", old, new]) == status
    said = capsys.readouterr().out
    assert ("WORSE" in said) == bool(status)
    assert before[::-1] == after or "; 50 pairs, p=" in said


@pytest.mark.parametrize(("by", "status"), [(0.05, 1), (-0.05, 0)])
def test_compare_decides_losses_by_pairs(tmp_path: Path, by: float, status: int) -> None:
    """Far less than documents differ by among themselves, and a little noise."""
    after = [value + by + 0.01 * (i % 3) for i, value in enumerate(LOSSES)]
    old = report(tmp_path / "a.json", paired("perplexity_drift", LOSSES))
    new = report(tmp_path / "b.json", paired("perplexity_drift", after))
    assert main(["compare", old, new]) == status


@pytest.mark.parametrize(
    "after",
    [
        paired("task_accuracy", [0.0] * 50, all_items=60),  # a verdict that came early
        paired("task_accuracy", [0.0] * 40),  # of other items
        paired("task_accuracy", [0.0] * 50, facts="others"),
    ],
)
def test_compare_pairs_only_what_is_alike(tmp_path: Path, after: CheckResult) -> None:
    old = report(tmp_path / "a.json", paired("task_accuracy", [1.0] * 50))
    assert main(["compare", old, report(tmp_path / "b.json", after)]) == 0


@pytest.mark.parametrize("most", [1e200, 10**400])
def test_compare_pairs_only_what_can_be_summed(tmp_path: Path, most: float) -> None:
    losses = [paired("perplexity_drift", [sign * most, -sign * most]) for sign in (1, -1)]
    files = [report(tmp_path / f"{i}.json", each) for i, each in enumerate(losses)]
    assert main(["compare", *files]) == 0


def test_pairs_of_a_comparison_share_its_error_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten lost are 2**-10, enough alone and not beside another task."""
    task, other = (paired("task_accuracy", scores) for scores in (ACCURATE, LOSSES))
    lost = paired("task_accuracy", [0.0] * 10 + ACCURATE[10:])
    alone = report(tmp_path / "a.json", task), report(tmp_path / "b.json", lost)
    both = report(tmp_path / "c.json", task, other), report(tmp_path / "d.json", lost, other)
    assert main(["compare", *alone]) == 1
    assert main(["compare", *both]) == 0
    assert main(["compare", *both, "--error-rate=0.01"]) == 1
    assert main(["compare", *alone, "--error-rate=0"]) == 4
    assert "--error-rate=0.0 is no probability" in capsys.readouterr().err


def test_compare_knows_domains_by_name_and_not_by_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wiki, code = (
        replace(result(Outcome.PASSED, v), part=n) for n, v in (("wiki", 0.1), ("code", 9))
    )
    before = report(tmp_path / "a.json", wiki)
    after = report(tmp_path / "b.json", code, wiki)
    assert main(["compare", before, after]) == 0
    assert "[code]: absent -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (
            Bound.at_least(0.5, "lora.toml:3"),
            Bound.at_least(-math.inf, "no bound set"),
            "loosened: at least 0.5 (lora.toml:3) -> any finite value (no bound set)",
        ),
        (Bound.at_least(0.1, "a"), None, "loosened: at least 0.1 (a) -> none"),
        (Bound.at_most(1, "a"), Bound.at_most(2, "b"), "loosened: at most 1 (a) -> at most 2 (b)"),
        (Bound.at_most(2, "a"), Bound.at_most(1, "a"), "tightened: at most 2 (a) -> at most 1 (a)"),
        (Bound.at_most(1, "a"), Bound.at_least(0, "a"), "moved: at most 1 (a) -> at least 0 (a)"),
        (Bound.at_most(1, "a"), Bound.at_most(1, "b"), ""),
    ],
)
@pytest.mark.parametrize("value", [0.9, 0.8])
def test_compare_names_bounds_that_are_not_those_of_before(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: Bound,
    after: Bound | None,
    says: str,
    value: float,
) -> None:
    """Which decides nothing: a bound is moved by people, and for reasons."""
    same = result(Outcome.PASSED, 0.5, None), result(Outcome.PASSED, 0.5, None)
    old, new = (replace(result(Outcome.PASSED, v, None), part="t") for v in (0.9, value))
    one = report(tmp_path / "a.json", same[0], replace(old, bound=before))
    two = report(tmp_path / "b.json", same[1], replace(new, bound=after))
    assert main(["compare", one, two]) == 0
    said = capsys.readouterr().out
    assert (f"; bound {says}\n" in said) == bool(says)
    assert ("0 got worse, 1 judged by another bound" in said) == bool(says)
    assert ("nothing changed" in said) == (not says and value == 0.9)


def test_what_failed_before_is_no_regression(tmp_path: Path) -> None:
    old = report(tmp_path / "a.json", result(Outcome.FAILED))
    assert main(["compare", old, old]) == 0


def test_unlike_reports_are_refused_by_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = report(tmp_path / "a.json", result(Outcome.PASSED), torch="2.4")
    new = report(tmp_path / "b.json", result(Outcome.PASSED), torch="2.13")
    assert main(["compare", old, new]) == 4
    said = capsys.readouterr().err
    assert "versions.torch was '2.4' and is '2.13'" in said
    assert main(["compare", old, new, "--across=versions.torch"]) == 0
    capsys.readouterr()
    assert main(["compare", old, new, "--across=versions.torhc"]) == 4
    assert "did you mean 'versions.torch'?" in capsys.readouterr().err


def test_a_file_that_is_no_report_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({}))
    assert main(["compare", str(path), str(path)]) == 4
    assert "not a pytest-lora/report/1 report" in capsys.readouterr().err


def test_check_hands_over_to_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def record(words: list[str]) -> int:
        seen.append(words)
        return 1

    monkeypatch.setattr(pytest, "main", record)
    assert main(["check", "out/a", "out/b", "--lora-checks=files", "-q"]) == 1
    words = ["-m", "lora", "--lora-adapter=out/a", "--lora-adapter=out/b"]
    assert seen == [[*words, "--lora-checks=files", "-q"]]


# ------------------------------------------------------------------------------ predict-memory

BASE = str(Path(__file__).parents[2] / "fixtures" / "base")
ADAPTER = str(Path(BASE).parent / "adapters" / "attention-lora")
STEP = ["--batch", "1", "2", "--sequence", "64"]


def predicted(*words: str) -> int:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    return main(["predict-memory", BASE, *words])


def test_memory_that_fits_is_a_table_and_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert predicted("--adapter", ADAPTER, *STEP, "--card", "24gb") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"train step of {BASE} on l4-24gb, against 21.4 GiB, what the l4-24gb")
    rows = [line for line in said.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == 2
    assert all(row.endswith("| fits |") for row in rows)
    assert "assumed kernels" in said
    assert "what helps" not in said


def test_memory_that_does_not_fit_is_status_1_and_says_what_helps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predicted("--rank", "8", *STEP, "--max-memory", "1 MiB") == 1
    said = capsys.readouterr().out
    assert said.count("| does not fit |") == 2
    assert "the ceiling given" in said
    assert "what helps: " in said


def test_memory_too_close_to_call_is_status_3(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from pytest_lora.memory.predict import predict_memory

    found = predict_memory(BASE, ADAPTER, job="merge")
    words = ["--adapter", ADAPTER, "--job", "merge", "--max-memory"]
    assert predicted(*words, f"{found.predicted} B") == 3
    assert "| too close to call |" in capsys.readouterr().out
    assert predicted(*words, f"{found.at_most} B") == 0
    assert predicted(*words, f"{found.predicted - 1} B") == 1


def test_full_training_and_other_jobs_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert predicted("--sequence", "16", "--optimizer", "sgd") == 0
    assert "adapter 1" in capsys.readouterr().out, "everything is trained"
    words = ["--job", "inference", "--new-tokens", "2", "--sequence", "8"]
    assert predicted("--rank", "4", "--targets", "q_proj, v_proj", "--dora", *words) == 0
    assert capsys.readouterr().out.startswith("inference of")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-memory", "14"], "size '14' is not a number with a unit"),
        (["--card", "h100"], "GPU profile 'h100'"),
        (["--targets", "q_proj"], "give --rank"),
        (["--rank", "0"], "--rank 0"),
        (["--rank", "4", "--targets", "no_such"], "no module 'no_such'"),
        (["--rank", "4", "--targets", "q_proj,v_porj"], "(did you mean 'v_proj'?)"),
        (["--rank", "4", "--new-tokens", "8"], "new_tokens belongs to job='inference'"),
        (["--rank", "4", "--attention", "flex_attention"], "cannot be traced without a device"),
        (["--optimizer", "lion"], "optimizer 'lion'"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--job", "merge"], "cannot be merged"),
    ],
)
def test_predictions_that_cannot_be_made_are_status_4(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predicted(*words) == 4
    said = capsys.readouterr().err
    assert said.startswith("ERROR: ")
    assert message in said
