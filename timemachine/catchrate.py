"""The catch rate: every report, what found it, and what its sound side says, as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from timemachine.bugs import BUGS, Bug, find
from timemachine.sweep import Sweep

__all__ = ["RECORD", "document", "record", "wrong"]

RECORD = Path(__file__).with_name("recorded.json")
"""What the last run found; the page is made of it."""

HEAD = """\
# Catch rate

Each report of a fault, what of this project finds it, and what it says where the fault is not.
Made by `nox -s timemachine`, which installs the old releases; the numbers are those of
`timemachine/recorded.json`.

* **contract**: every law of [the contract](contract.md) was tried on every method of each release,
  with few examples each, knowing of no report (`timemachine/sweep.py`). A report is caught if a law
  says what it says under the affected releases, silent if none says so under the fixed ones.
* **suite, training, serving, metric, memory**: the report's situation on a tiny model, handed to
  one assertion (`timemachine/cases.py`). Faults that no release has (of trainers, servers, exports)
  are made anew, with a sound twin (`timemachine/toys.py`, `trainers.py`, `servers.py`).

"examples" is how many were tried until the law failed, before any shrinking; a case is one example,
and a known deviation of the installed release is reported whenever it shows.

"""
COLUMNS = (
    "report", "fault", "found by", "law or assertion", "affected", "says there", "fixed",
    "says there", "examples",
)  # fmt: skip

_PARTS = {
    "serving_parity": "serving",
    "export_parity": "serving",
    "metric_sound": "metric",
    "memory_unchanged": "memory",
    "memory_left": "memory",
    **dict.fromkeys(
        ("gradient_coverage", "trains_only_adapter", "reference_policy", "optimizer_holds",
         "resume_equivalent", "seeded_initialisation", "accumulation_equivalent"), "training"),
}  # fmt: skip


def record(sweeps: Mapping[str, Sweep], cases: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept: findings by report, verdicts by case, and the size of each sweep.

    Args:
        sweeps: by the stack's name.
        cases: for each case, its thread, check, stacks and verdicts.
    """
    contract = []
    for bug in BUGS:
        there = find(bug, sweeps[bug.affected.name])
        elsewhere = None if bug.fixed is None else find(bug, sweeps[bug.fixed.name])
        contract.append({
            "thread": bug.thread,
            "law": bug.law,
            "affected": there.to_dict(),
            "fixed": elsewhere and elsewhere.to_dict(),
        })  # fmt: skip
    stacks = {
        name: {"laws": len({cell["law"] for cell in sweep.values()}), "cells": len(sweep), **{
            result: sum(cell["result"] == result for cell in sweep.values())
            for result in ("pass", "fail", "known", "n/a")
        }}
        for name, sweep in sorted(sweeps.items())
    }  # fmt: skip
    return {"contract": contract, "cases": dict(cases), "sweeps": stacks}


def wrong(recorded: Mapping[str, Any]) -> list[str]:
    """Reports that no way caught, or that a sound side was accused of."""
    found = []
    for entry in recorded["contract"]:
        if not entry["affected"]["cells"]:
            found.append(f"{entry['thread']}: {entry['law']} does not say so")
        if entry["fixed"] and entry["fixed"]["cells"]:
            found.append(f"{entry['thread']}: {entry['law']} says so on the fixed side")
    for name, entry in recorded["cases"].items():
        if entry["affected"]["outcome"] not in ("caught", "remarked"):
            found.append(f"{entry['thread']}: {name}: {entry['affected']['outcome']}")
        if entry["sound"]["outcome"] not in ("passed", "not applicable"):
            found.append(f"{entry['thread']}: {name}, sound: {entry['sound']['outcome']}")
    return found


def document(recorded: Mapping[str, Any]) -> str:
    """docs/catch-rate.md."""
    rows = sorted((*_contract_rows(recorded), *_case_rows(recorded)))
    threads = list(dict.fromkeys(row[0] for row in rows))
    faults = wrong(recorded)
    lines = [
        f"{len(threads)} reports are caught in one form or another, in {len(rows)} ways, with "
        f"{len(faults)} faults missed or sound sides accused.",
        "",
        *(f"- {fault}" for fault in faults),
        *([""] if faults else []),
        f"| {' | '.join(COLUMNS)} |",
        "|" + " --- |" * len(COLUMNS),
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
        "",
        *_sweeps(recorded["sweeps"]),
    ]
    return HEAD + "\n".join(lines) + "\n"


def _contract_rows(recorded: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for bug, entry in zip(BUGS, recorded["contract"], strict=True):
        there, elsewhere = entry["affected"], entry["fixed"]
        known = ", a known deviation" if there["known"] else ""
        more = len(there["cells"]) - 1
        said = (
            f"{there['cells'][0]}{f' and {more} more' if more > 0 else ''}: " if more >= 0 else ""
        )
        yield (
            bug.thread,
            bug.fault,
            f"contract{known}",
            f"`{bug.law}`",
            str(bug.affected),
            f"{said}{_short(there['evidence'])}" if said else "nothing",
            _releases(bug),
            _elsewhere(elsewhere),
            str(there["examples"] or ""),
        )


def _releases(bug: Bug) -> str:
    return "no release" if bug.fixed is None else str(bug.fixed)


def _elsewhere(finding: Mapping[str, Any] | None) -> str:
    if finding is None:
        return ""
    if finding["cells"]:
        return f"**{finding['cells'][0]}: {_short(finding['evidence'])}**"
    return f"nothing of the kind ({finding['tried']} methods)"


def _case_rows(recorded: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, entry in recorded["cases"].items():
        affected, sound = entry["affected"], entry["sound"]
        yield (
            entry["thread"],
            name,
            _PARTS.get(entry["check"], "suite"),
            f"`{entry['check']}`",
            entry["stacks"][0],
            f"{affected['outcome']}: {_short(affected['evidence'])}",
            entry["stacks"][1],
            sound["outcome"],
            "1",
        )


def _short(text: str) -> str:
    """Enough of the evidence to tell what was seen."""
    text = " ".join(text.split()).replace("<", "\\<")
    return text if len(text) <= 120 else f"{text[:120]}..."


def _sweeps(stacks: Mapping[str, Mapping[str, int]]) -> Sequence[str]:
    """What else the contract said: faults of those releases that nobody listed here."""
    lines = [
        "## All the contract said",
        "",
        "Laws and methods tried in each release. n/a is what a method does not have, or refuses in "
        "PEFT's own words; anything else that is raised is a failure, or known. Old releases break "
        "more laws than are reported above; the two newest break none that is not listed as known.",
        "",
        "| releases | laws | cells | pass | fail | known | n/a |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, counts in stacks.items():
        keys = ("laws", "cells", "pass", "fail", "known", "n/a")
        numbers = " | ".join(str(counts[key]) for key in keys)
        lines.append(f"| {name} | {numbers} |")
    return lines


def read_record() -> dict[str, Any]:
    """The file :data:`RECORD`."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found
