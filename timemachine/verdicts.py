"""What a check said of a case, and whether it said the right thing."""

from __future__ import annotations

import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.records import Measurement
from pytest_lora.report.text import clean, measured
from timemachine.cases import Case

__all__ = ["Verdict", "judge"]

CAUGHT, REMARKED, PASSED = "caught", "remarked", "passed"


@dataclass(frozen=True)
class Verdict:
    """Of one case with the releases at hand.

    Attributes:
        outcome: "caught", "remarked", "passed", "not applicable", or what happened instead.
        evidence: what the check said.
    """

    outcome: str
    evidence: str

    @property
    def silent(self) -> bool:
        """Whether nothing was found."""
        return self.outcome in (PASSED, "not applicable")

    def found(self, case: Case) -> bool:
        """Whether the fault was found, in the way in which this one is to be found."""
        return self.outcome == (REMARKED if case.remarked else CAUGHT)


def judge(case: Case, *, control: bool = False) -> Verdict:
    """Carry out ``case``, or its control, with the releases at hand."""
    with tempfile.TemporaryDirectory(prefix="timemachine-") as place:
        outcome, evidence = _outcome(case, [Path(place), True] if control else [Path(place)])
    return Verdict(outcome, clean(evidence.replace(place, "")))


def _outcome(case: Case, arguments: list[Any]) -> tuple[str, str]:
    try:
        measurement = case.run(*arguments)
    except CheckFailed as failure:
        return _caught(case, failure)
    except UsageError as refusal:  # what was declared is not there
        return (CAUGHT if case.shows in str(refusal) else "refused"), str(refusal)
    except NotApplicable as reason:
        return "not applicable", str(reason)
    except CannotRun as reason:
        return "cannot run", str(reason)
    except Exception as error:  # a fault of the case or of a check: to be shown, not to be hidden
        traceback.print_exc()
        return "error", f"{type(error).__name__}: {error}"
    return _passed(case, measurement)


def _passed(case: Case, measurement: Measurement) -> tuple[str, str]:
    """Some faults do not decide a verdict: a remark has to name them."""
    telling = [note for note in measurement.notes if case.remarked and case.shows in note]
    return (REMARKED, telling[0]) if telling else (PASSED, measured(measurement))


def _caught(case: Case, failure: CheckFailed) -> tuple[str, str]:
    """Caught only if it was by the check meant for it, which has to say the right thing."""
    result = failure.result
    said = _said(result.measurement)
    telling = [text for text in said if case.shows in text]
    if result.check != case.check or not telling:
        return f"caught by {result.check}, but not for this", "; ".join(said)
    return CAUGHT, telling[0]


def _said(measurement: Measurement | None) -> list[str]:
    if measurement is None:
        return []
    problems = [str(problem) for problem in measurement.problems]
    return problems or [f"{measured(measurement)}, worst {measurement.where}"]
