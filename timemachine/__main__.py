"""Runs every case under the releases that have its fault and those that do not.

    python -m timemachine --folder=DIR [--table=docs/timemachine.md] [--case=WORDS]

DIR keeps the releases, to be used again.  Exits with 1 if a fault was not caught, or was caught
where there is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from timemachine import stacks, table
from timemachine.cases import CASES, Case
from timemachine.verdicts import Verdict, judge


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m timemachine", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the releases are installed")
    parser.add_argument("--table", type=Path, help="Markdown file to write the verdicts to")
    parser.add_argument("--case", default="", help="only cases with this in their name or thread")
    parser.add_argument("--here", nargs="+", help=argparse.SUPPRESS)  # for our own processes
    return parser.parse_args()


def main() -> int:
    """Run as told; the exit status."""
    arguments = _arguments()
    if arguments.here:
        print(json.dumps(_here(arguments.here)))
        return 0
    cases = [case for case in CASES if arguments.case in f"{case.name} {case.thread}"]
    if not cases or arguments.folder is None:
        raise SystemExit("nothing to do: give --folder=DIR, and a --case that exists")
    if arguments.case and arguments.table:
        raise SystemExit("a table of a few cases would not be one of all: leave out --case")
    verdicts = _everywhere(cases, arguments.folder)
    wrong = [case for case in cases if not _as_expected(case, verdicts[case.name])]
    if arguments.table is not None:
        arguments.table.write_text(table.document(cases, verdicts), encoding="utf-8")
    for case in wrong:
        print(f"not as it should be: {case.name} ({case.thread})", file=sys.stderr)
    return 1 if wrong else 0


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
