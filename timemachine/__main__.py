"""Runs every case under the releases that have its fault and those that do not.

    python -m timemachine --folder=DIR [--table=docs/timemachine.md] [--rate=docs/catch-rate.md]
                          [--case=WORDS]

DIR keeps the releases and what the contract said under each of them, to be used again.  Exits with
1 if a fault was not caught, or was caught where there is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import timemachine.servers
import timemachine.toys
import timemachine.trainers  # noqa: F401  (likewise)
from timemachine import catchrate, stacks, sweep, table
from timemachine.bugs import BUGS
from timemachine.cases import CASES, Case
from timemachine.verdicts import Verdict, judge


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m timemachine", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the releases are installed")
    parser.add_argument("--table", type=Path, help="Markdown file to write the verdicts to")
    parser.add_argument("--rate", type=Path, help="Markdown file for the catch rate, and a sweep")
    parser.add_argument("--case", default="", help="only cases with this in their name or thread")
    parser.add_argument("--here", nargs="+", help=argparse.SUPPRESS)  # for our own processes
    parser.add_argument("--contract", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run as told; the exit status."""
    arguments = _arguments()
    if arguments.contract is not None:
        sweep.print_all(set(arguments.contract))
        return 0
    if arguments.here:
        print(json.dumps(_here(arguments.here)))
        return 0
    cases = [case for case in CASES if arguments.case in f"{case.name} {case.thread}"]
    if not cases or arguments.folder is None:
        raise SystemExit("nothing to do: give --folder=DIR, and a --case that exists")
    if arguments.case and (arguments.table or arguments.rate):
        raise SystemExit("a table of a few cases would not be one of all: leave out --case")
    verdicts = _everywhere(cases, arguments.folder)
    wrong = [case for case in cases if not _as_expected(case, verdicts[case.name])]
    if arguments.table is not None:
        arguments.table.write_text(table.document(cases, verdicts), encoding="utf-8")
    missed = _rate(arguments.rate, arguments.folder, verdicts) if arguments.rate else []
    for line in missed:
        print(f"not as it should be: {line}", file=sys.stderr)
    for case in wrong:
        print(f"not as it should be: {case.name} ({case.thread})", file=sys.stderr)
    return 1 if wrong or missed else 0


def _rate(page: Path, folder: Path, verdicts: Mapping[str, Mapping[str, Verdict]]) -> Sequence[str]:
    """Sweep every release, keep what was found, and write the page; what is not as it should be."""
    releases = {stack for bug in BUGS for stack in (bug.affected, bug.fixed) if stack}
    stacks.install(releases, folder)
    results = folder / "sweeps"
    results.mkdir(exist_ok=True)
    sweeps = {}
    for stack in sorted(releases, key=lambda stack: stacks.version_key(stack.peft)):
        print(f"the contract under {stack}", flush=True)
        sweeps[stack.name] = sweep.sweep(stack, folder, results)
    cases = {case.name: _entry(case, verdicts[case.name]) for case in CASES}
    recorded = catchrate.record(sweeps, cases)
    text = json.dumps(recorded, indent=1, sort_keys=True) + "\n"
    catchrate.RECORD.write_text(text, encoding="utf-8")
    page.write_text(catchrate.document(recorded), encoding="utf-8")
    return catchrate.wrong(recorded)


def _entry(case: Case, sides: Mapping[str, Verdict]) -> dict[str, object]:
    elsewhere = str(case.fixed) if case.fixed else f"no release; here: {case.control}"
    return {
        "thread": case.thread,
        "check": case.check,
        "stacks": [str(case.affected), elsewhere],
        **{side: dataclasses.asdict(verdict) for side, verdict in sides.items()},
    }


def _everywhere(cases: Sequence[Case], folder: Path) -> Mapping[str, Mapping[str, Verdict]]:
    """Verdicts by case and side; one process per stack."""
    jobs: dict[stacks.Stack, list[str]] = defaultdict(list)
    for case in cases:
        jobs[case.affected].append(f"affected:{case.name}")
        jobs[case.fixed or case.affected].append(f"sound:{case.name}")
    stacks.install(jobs, folder)
    verdicts: dict[str, dict[str, Verdict]] = {case.name: {} for case in cases}
    for stack in sorted(jobs, key=lambda stack: stacks.version_key(stack.peft)):
        print(f"{stack}:", flush=True)
        said = json.loads(stacks.run(stack, folder, "--here", *jobs[stack]))
        for job, data in said.items():
            side, _, name = job.partition(":")
            verdicts[name][side] = Verdict(**data)
            print(f"  {job}: {data['outcome']}: {data['evidence'][:200]}", flush=True)
    return verdicts


def _here(jobs: Sequence[str]) -> dict[str, dict[str, str]]:
    """The verdicts of this process, in which one stack is at hand."""
    by_name = {case.name: case for case in CASES}
    found = {}
    for job in jobs:
        side, _, name = job.partition(":")
        case = by_name[name]
        control = side == "sound" and case.fixed is None
        found[job] = dataclasses.asdict(judge(case, control=control))
    return found


def _as_expected(case: Case, sides: Mapping[str, Verdict]) -> bool:
    return sides["affected"].found(case) and sides["sound"].silent


if __name__ == "__main__":
    sys.exit(main())
