"""The whole contract under one pair of releases, cell by cell, kept as it goes.

Nothing here knows of any fault: every law is tried on every method that the release has, and what
fails is compared between two releases afterwards (:mod:`timemachine.bugs`).
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from timemachine import stacks
from timemachine.stacks import Stack

__all__ = ["EXAMPLES", "Sweep", "read", "sweep", "try_all"]

EXAMPLES = (24, 3)
"""Examples of LoRA itself, which is tried on up to eleven networks, and of every other method."""

SLOW = {"save_reload": (5, 1), "merged_reload": (5, 1), "memory_given_back": (5, 1)}
"""Those of the laws that start processes, or look through all that Python holds."""

Sweep = Mapping[str, Mapping[str, Any]]
"""Verdicts by ``law[method]``, as ``Verdict.to_dict`` has them."""


def sweep(stack: Stack, folder: Path, results: Path) -> Sweep:
    """The verdicts under ``stack``; what ``results`` has already is not tried again."""
    file = results / f"{stack.name}.jsonl"
    done = set(read(file))
    with file.open("a", encoding="utf-8") as lines:
        for line in stacks.stream(stack, folder, "--contract", *sorted(done)):
            lines.write(line)
            lines.flush()
    return read(file)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The verdicts in ``file``, without a line that was cut off."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            verdict = json.loads(line)
            found[f"{verdict['law']}[{verdict['method']}]"] = verdict
    return found


def try_all(done: set[str]) -> Iterator[str]:
    """One line of JSON for each cell that is not ``done``, under the releases at hand."""
    from pytest_lora.contract.cells import contract_cells, try_cell

    gc.collect()
    gc.freeze()  # what was imported need not be looked through again and again
    for cell in contract_cells():
        if f"{cell.law}[{cell.method}]" in done:
            continue
        with contextlib.redirect_stdout(io.StringIO()):  # Hypothesis prints what it found
            examples = SLOW.get(cell.law, EXAMPLES)[0 if cell.is_main else 1]
            verdict = try_cell(cell, examples=examples, shrink=False)
        yield json.dumps(verdict.to_dict()) + "\n"


def print_all(done: set[str]) -> None:
    """Print what :func:`try_all` finds, at once."""
    for line in try_all(done):
        sys.stdout.write(line)
        sys.stdout.flush()
