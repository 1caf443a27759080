"""The cases are well formed, hold with what is installed, and are those of the documentation."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))
pytest.importorskip("torch")
pytest.importorskip("peft")

import pytest_lora
import timemachine.servers
import timemachine.toys
import timemachine.trainers  # noqa: F401  (likewise)
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from timemachine import catchrate, stacks, sweep, table
from timemachine.bugs import BUGS, Bug, find
from timemachine.cases import CASES, Case
from timemachine.stacks import NEWEST, Stack, version_key
from timemachine.verdicts import Verdict, judge

INSTALLED = version_key(importlib.metadata.version("peft"))
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "timemachine.md"


def has_fault(case: Case) -> bool | None:
    """Whether the installed PEFT has it; None where that is not known."""
    if case.affected.other:
        return None  # that depends on transformers
    if case.fixed is None or version_key(case.affected.peft) == INSTALLED:
        return True
    begins, ends = version_key(case.affected.peft), version_key(case.fixed.peft)
    if ends < begins:  # a regression that is still there
        return begins <= INSTALLED
    return False if ends <= INSTALLED else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_well_formed(case: Case) -> None:
    elsewhere = ("memory_unchanged", "memory_left")
    assert hasattr(pytest_lora, f"assert_{case.check}") or case.check in elsewhere
    assert re.fullmatch(r"([\w.-]+/)?[\w.-]+#\d+", case.thread)
    assert re.search(r'[\w)"]$', case.fault)  # the table goes on after it
    assert case.shows
    assert (case.fixed is None) == bool(case.control)
    assert case.fixed != case.affected


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.takes_processes], ids=lambda case: case.name
)
def test_with_what_is_installed(case: Case) -> None:
    expected = has_fault(case)
    if expected is None:
        pytest.skip(f"PEFT {INSTALLED} may have the fault and may not")
    verdict = judge(case)
    assert verdict.found(case) if expected else verdict.silent, verdict


@pytest.mark.parametrize("case", [case for case in CASES if case.control], ids=lambda c: c.name)
def test_the_control_shows_nothing(case: Case) -> None:
    verdict = judge(case, control=True)
    assert verdict.silent, verdict


def test_the_page_is_of_these_cases() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(CASES)
    for case, row in zip(CASES, rows, strict=True):
        assert row.startswith("| " + f"{case.name}: {case.fault}".replace("|", "\\|"))
        assert ("**remarked**" if case.remarked else "**caught**") in row
        assert "**passed**" in row or "**not applicable**" in row


# ------------------------------------------------------------------------------ the machine itself


class _Fault(Exception):
    pass


def _case(outcome: Any, **changes: Any) -> Case:
    def run(place: Path, sound: bool = False) -> Measurement:
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, Measurement)
        return outcome

    return replace(CASES[0], check="merge_equivalence", shows="head", run=run, **changes)


def _failure(check: str, where: str) -> CheckFailed:
    measurement = Measurement.of_problems([Problem(where, "is off")], count=1)
    bound = Bound.at_most(0, "test")
    return CheckFailed("no", CheckResult(check, "x", Outcome.FAILED, "", "", measurement, bound))


def test_caught_is_only_what_the_check_says_of_the_fault() -> None:
    by_it = _case(_failure("merge_equivalence", "lm_head.weight"))
    assert judge(by_it) == Verdict("caught", "lm_head.weight: is off")
    assert judge(by_it).found(by_it)
    for other in (_failure("merge_equivalence", "q_proj"), _failure("save_reload", "lm_head")):
        verdict = judge(_case(other))
        assert verdict.outcome.endswith("but not for this")
        assert not verdict.found(by_it)
        assert not verdict.silent


def test_a_check_that_says_nothing_has_not_found_anything() -> None:
    sound = Measurement.of_problems([], count=3, notes=["the head is as it was"])
    assert judge(_case(sound)) == Verdict("passed", "0 problems (n=3)")
    assert judge(_case(sound)).silent
    assert judge(_case(NotApplicable("no"))).silent


def test_a_remark_counts_where_the_fault_does_not_decide_the_verdict() -> None:
    case = _case(Measurement.of_problems([], count=3, notes=["the head grows"]), remarked=True)
    assert judge(case) == Verdict("remarked", "the head grows")
    assert judge(case).found(case)
    assert not judge(case).silent
    caught = _case(_failure("merge_equivalence", "lm_head"), remarked=True)
    assert not judge(caught).found(caught)


@pytest.mark.parametrize("error", [CannotRun("no"), _Fault("no")], ids=["cannot run", "error"])
def test_a_check_that_breaks_is_neither(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = judge(_case(error))
    assert not verdict.silent
    assert not verdict.found(CASES[0])
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, _Fault)


def test_evidence_does_not_name_the_machine() -> None:
    def run(place: Path) -> Measurement:
        raise NotApplicable(f"{place}/adapter is not there")

    assert judge(replace(CASES[0], run=run)).evidence == "/adapter is not there"


def test_each_release_goes_with_one_of_its_time() -> None:
    assert Stack("0.16.0").transformers == "4.49.0"
    assert Stack("0.17.0").transformers == Stack("0.21.0").transformers == "4.57.6"
    assert str(Stack(NEWEST)) == f"peft {NEWEST}, transformers {stacks.NEWEST_TRANSFORMERS}"
    assert list(Stack(NEWEST).folders()) == []


def test_the_newest_releases_are_those_of_the_constraints() -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"peft=={NEWEST}" in pinned
    assert f"transformers=={stacks.NEWEST_TRANSFORMERS}" in pinned


def test_what_is_there_is_not_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def pretend(command: list[str], **options: Any) -> None:
        calls.append(command)
        Path(command[command.index("--target") + 1]).mkdir()

    monkeypatch.setattr(stacks.subprocess, "run", pretend)
    (tmp_path / "peft-0.20.0").mkdir()
    stacks.install([Stack("0.20.0"), Stack("0.21.0"), Stack(NEWEST)], tmp_path)
    assert [call[-1].partition("==")[0] for call in calls if "peft==0.21.0" in call] == ["peft"]
    assert len(calls) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "peft-0.20.0", "peft-0.21.0", "transformers-4.57.6"]  # fmt: skip


def test_the_table_shows_both_sides() -> None:
    case = replace(CASES[1], thread="someone/else#5")
    sides = {"affected": Verdict("caught", "a | b"), "sound": Verdict("passed", "0 problems")}
    page = table.document([case], {case.name: sides})
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {case.name}")]
    assert "[someone/else#5](https://github.com/someone/else/issues/5)" in row
    assert (
        f"| {case.affected} | **caught**: a \\| b | {case.fixed} | **passed**: 0 problems |" in row
    )


# ------------------------------------------------------------------------------ the catch rate


def test_the_page_of_the_catch_rate_is_of_what_was_recorded() -> None:
    recorded = catchrate.read_record()
    assert (ROOT / "docs" / "catch-rate.md").read_text() == catchrate.document(recorded)
    assert [entry["thread"] for entry in recorded["contract"]] == [bug.thread for bug in BUGS]
    assert set(recorded["cases"]) == {case.name for case in CASES}


def test_every_report_was_caught_and_no_sound_side_accused() -> None:
    assert catchrate.wrong(catchrate.read_record()) == []


def _cell(law: str, method: str, result: str, reason: str = "", **more: Any) -> dict[str, Any]:
    return {"law": law, "method": method, "result": result, "reason": reason,
            "known": (), "examples": 2, **more}  # fmt: skip


def test_a_sweep_catches_what_it_says_and_nothing_else() -> None:
    bug = Bug("a#1", "", "isolation", "LORA*", "moves", Stack("0.20.0"), Stack("0.21.0"))
    cells = [_cell("isolation", "LORA", "fail", "it moves"), _cell("isolation", "LORA+x", "pass"),
             _cell("isolation", "IA3", "fail", "it moves"),
             _cell("forward", "LORA", "fail", "it moves")]  # fmt: skip
    found = find(bug, {str(number): cell for number, cell in enumerate(cells)})
    assert (found.cells, found.examples, found.known, found.tried) == (("LORA",), 2, False, 2)
    assert find(bug, {"1": _cell("isolation", "LORA", "fail", "it raises")}).cells == ()
    known = find(bug, {"1": _cell("isolation", "LORA", "known", known=("it moves",))})
    assert known.known
    assert known.cells == ("LORA",)


def test_what_was_missed_or_accused_is_told() -> None:
    recorded = catchrate.read_record()
    first = recorded["contract"][0]
    first["affected"]["cells"], first["fixed"]["cells"] = [], ["LORA"]
    name, case = next(iter(recorded["cases"].items()))
    case["affected"]["outcome"], case["sound"]["outcome"] = "passed", "caught"
    assert len(catchrate.wrong(recorded)) == 4
    assert f"{name}: passed" in catchrate.document(recorded)


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps(_cell("forward", method, "pass")) + "\n" for method in ("LORA", "IA3")]
    given: list[tuple[str, ...]] = []

    def stream(stack: Stack, folder: Path, *arguments: str) -> list[str]:
        given.append(arguments)
        return lines[len(given) - 1 :][:1]

    monkeypatch.setattr(stacks, "stream", stream)
    stack = Stack("0.20.0")
    sweep.sweep(stack, tmp_path, tmp_path)
    with (tmp_path / f"{stack.name}.jsonl").open("a") as file:
        file.write('{"law": "cut off\n')
    found = sweep.sweep(stack, tmp_path, tmp_path)
    assert set(found) == {"forward[LORA]", "forward[IA3]"}
    assert given == [("--contract",), ("--contract", "forward[LORA]")]
