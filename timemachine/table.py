"""The verdicts as a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timemachine.cases import Case
    from timemachine.verdicts import Verdict

__all__ = ["document"]

HEAD = """\
# Time machine

Faults that people met in released versions of PEFT and around it, run again under the releases that
had them and under releases that do not, in `timemachine/cases.py`. Each has to be caught by the
check meant for it, with evidence that names the fault, and nothing may be found where it is mended.
Made by `nox -s timemachine`, which installs the old releases. What the contract finds by itself in
the same releases, and the rate of all this: [catch-rate.md](catch-rate.md).

| fault | thread | check | affected | says there | sound | says there |
| --- | --- | --- | --- | --- | --- | --- |
"""


def document(cases: Sequence[Case], verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    """docs/timemachine.md."""
    rows = "".join(_row(case, verdicts[case.name]) for case in cases)
    return f"{HEAD}{rows}"


def _row(case: Case, sides: Mapping[str, Verdict]) -> str:
    sound = str(case.fixed) if case.fixed else f"no release; here: {case.control}"
    cells = [
        f"{case.name}: {case.fault}",
        _link(case.thread),
        f"`{case.check}`",
        str(case.affected),
        _said(sides["affected"]),
        sound,
        _said(sides["sound"]),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _link(thread: str) -> str:
    repository, _, number = thread.partition("#")
    owner = "" if "/" in repository else "huggingface/"
    return f"[{thread}](https://github.com/{owner}{repository}/issues/{number})"


def _said(verdict: Verdict) -> str:
    return f"**{verdict.outcome}**: {verdict.evidence}"
