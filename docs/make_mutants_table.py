"""Runs the suite over every mutant and writes docs/mutants.md.  Takes about a minute on a CPU.

python docs/make_mutants_table.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from mutants import MUTANTS, Mutant, Verdicts, run_suite  # noqa: E402  (needs the path above)

HEAD = """\
# Mutants

Faults that adapters are found with, made from the sound examples by `tests/mutants.py`, and what
the whole suite says of each. Made by `python docs/make_mutants_table.py`; `tests/test_mutants.py`
holds the suite to it.

| mutant | fault | caught by | other failures | evidence |
| --- | --- | --- | --- | --- |
"""


def row(mutant: Mutant, verdicts: Verdicts, folder: str) -> str:
    results = verdicts[mutant.name]
    failed = [check for check, result in results.items() if result["outcome"] == "failed"]
    caught = f"`{mutant.check}`" if mutant.check in failed else f"not by `{mutant.check}`"
    others = ", ".join(check for check in failed if check != mutant.check) or "none"
    measurement = results[mutant.check]["measurement"] or {}
    evidence = " ".join(str(measurement.get("where") or "").split()).replace("|", "\\|")
    evidence = evidence.replace(f"{folder}/", "").replace(f"{HERE.parent}/", "")
    told = "".join(f" (told: {key} = {value})" for key, value in mutant.settings.items())
    return f"| `{mutant.name}` | {mutant.fault}{told} | {caught} | {others} | {evidence} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        verdicts = run_suite(Path(folder))
    rows = [row(mutant, verdicts, folder) for mutant in MUTANTS]
    (HERE / "mutants.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
