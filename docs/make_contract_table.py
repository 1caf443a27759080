"""Fills in the table of docs/contract.md: every law and method of the installed PEFT.

python docs/make_contract_table.py [EXAMPLES]

Takes about a minute per example on one core.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import peft
import torch
import transformers

from pytest_lora.contract.cells import Verdict, contract_cells, try_cell
from pytest_lora.contract.table import markdown

PAGE = Path(__file__).with_name("contract.md")
_PLACE = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)


def verdicts(examples: int) -> list[Verdict]:
    """One for each cell; LoRA itself gets eight times as many examples."""
    found = []
    for cell in contract_cells():
        with contextlib.redirect_stdout(io.StringIO()):  # Hypothesis prints what it found
            found.append(try_cell(cell, examples=examples * (8 if cell.is_main else 1)))
    return found


def filled(text: str, table: str) -> str:
    """``text`` with the table in its place."""
    return _PLACE.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", text)


def main() -> None:
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    versions = (
        f"peft {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__.partition('+')[0]}"
    )
    head = f"Made by `python docs/make_contract_table.py {examples}` with {versions}.\n\n"
    table = head + markdown(verdicts(examples))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
