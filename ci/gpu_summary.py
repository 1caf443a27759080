"""What came of the tests on a GPU, in Markdown: python ci/gpu_summary.py FOLDER.

FOLDER holds ``gpu.xml``, a JUnit file, and maybe tables of measurements, ``*.md``.  Exits with 1 if
no test ran: a machine whose GPU is not seen skips all of them, which is no pass.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

WRONG = ("failure", "error")


def outcomes(report: Path) -> tuple[Counter[str], list[str]]:
    """How many tests passed, were skipped, failed; and the names of those that failed."""
    counts: Counter[str] = Counter()
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & set(WRONG):
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return counts, failed


def cards() -> list[str]:
    """Name and driver of every GPU, as ``nvidia-smi`` tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def summary(folder: Path) -> tuple[str, bool]:
    """The text, and whether any test ran."""
    lines = ["## Tests on a GPU", ""]
    lines += [f"- {card}" for card in cards()] or ["- nvidia-smi names no GPU"]
    report = folder / "gpu.xml"
    if not report.is_file():
        return "\n".join([*lines, "", "The tests did not come to an end.", ""]), False
    counts, failed = outcomes(report)
    ran = counts["passed"] + counts["failed"]
    lines += ["", f"{counts['passed']} passed, {counts['failed']} failed, "
              f"{counts['skipped']} skipped."]  # fmt: skip
    if not ran:
        lines += ["", "No test ran: there is no CUDA device that torch could use."]
    lines += ["", *(f"- `{name.replace('`', '')}`" for name in failed[:50])] if failed else []
    for table in sorted(folder.glob("*.md")):
        lines += ["", f"### {table.stem}", "", table.read_text(encoding="utf-8")]
    return "\n".join([*lines, ""]), ran > 0


def main() -> int:
    """Print the text; the exit status says whether any test ran."""
    text, ran = summary(Path(sys.argv[1]))
    print(text)
    return 0 if ran else 1


if __name__ == "__main__":
    raise SystemExit(main())
