"""The console script: inspect, compare, and what it says to a wrong request."""

from __future__ import annotations

import json
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
