"""What can go wrong, in three kinds that are never mixed.

* :class:`UsageError` -- the user asked for something that cannot be meant.
* :class:`CheckFailed` -- the adapter is at fault; this is the verdict people install us for.
* :class:`NotApplicable` and :class:`CannotRun` -- no verdict: the question makes no sense for this
  adapter, or something outside it is missing.  Never a pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_lora.records import CheckResult

__all__ = ["CannotRun", "CheckFailed", "LoraError", "NotApplicable", "UsageError"]


class LoraError(Exception):
    """Base of every exception this package raises on purpose."""


class UsageError(LoraError):
    """An option, setting, marker or argument that cannot be meant as written."""


class NotApplicable(LoraError):
    """The check has no meaning for this adapter (reported as skipped, with this reason)."""


class CannotRun(LoraError):
    """The check has a meaning but could not be carried out.

    That is an error, lest a gate open because its base model could not be had.  With ``missing`` it
    is a skip with its reason: this one check lacks what only some models and machines need (inputs
    of another kind than text, room on the disk).
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing

    def __reduce__(self) -> tuple[object, ...]:
        # Parallel test runners send exceptions between processes.
        return type(self), self.args, {"missing": self.missing}


class CheckFailed(LoraError, AssertionError):
    """The adapter failed a check.  Carries the whole :class:`~pytest_lora.records.CheckResult`."""

    def __init__(self, message: str, result: CheckResult) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (*self.args, self.result)
