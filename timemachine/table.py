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
Made by `nox -s timemachine`, which installs the old releases.

| fault | thread | check | affected | says there | sound | says there |
| --- | --- | --- | --- | --- | --- | --- |
"""

ELSEWHERE = {
    "peft#1884": "AdaLoRA starts off the identity: initialisation, before there is an "
    "adapter to judge",
    "peft#3180": "TinyLoRA's initial weights depend on the string hash: initialisation",
    "peft#3004": "a combination with weight -1 adds: combining adapters",
    "peft#3761": "a combination of one adapter is not that adapter: combining adapters",
    "peft#3482": "two HiRA adapters merged in turn are not both of them: needs two "
    "adapters, a run judges one",
    "transformers#26221": "checkpointing starves the adapter of gradients: training",
    "transformers#36473": "pipeline() leaves the adapter out: the code that loads it, "
    "not the adapter, is at fault",
}


def document(cases: Sequence[Case], verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    """docs/timemachine.md."""
    rows = "".join(_row(case, verdicts[case.name]) for case in cases)
    others = "".join(f"- {_link(thread)}: {why}.\n" for thread, why in ELSEWHERE.items())
    return f"{HEAD}{rows}\n## Not covered by a check so far\n\n{others}"


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
