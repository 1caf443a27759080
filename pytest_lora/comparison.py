"""Two reports side by side: what changed, and whether anything got worse.

A verdict that was a pass and is none any more is a regression.  So is a measurement whose whole
interval lies on the worse side of the old one's whole interval; the side is the one its bound
limits.  Numbers without an interval that moved within their bound are shown and decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_lora.errors import UsageError
from pytest_lora.records import CheckResult, Measurement, Outcome
from pytest_lora.report.json_report import load_report
from pytest_lora.report.text import clean, measured
from pytest_lora.report.verdicts import WORDS

__all__ = ["Change", "compare_reports", "table_of"]

# Where these differ, numbers differ for reasons that are not the adapter's.
_VERSIONS = ("torch", "transformers", "peft")
_SETTINGS = ("base_model", "device", "dtype")
Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Change:
    """One check of one adapter before and after; None where a report lacks it."""

    adapter: str
    check: str
    before: CheckResult | None
    after: CheckResult | None

    @property
    def regression(self) -> bool:
        """Whether it got worse, by the definition of this module."""
        if self.before is None or self.before.outcome is not Outcome.PASSED:
            return False
        if self.after is None or self.after.outcome is not Outcome.PASSED:
            return True
        return _apart(self.before, self.after)

    @property
    def changed(self) -> bool:
        """Whether the verdict or the number differs."""
        if self.before is None or self.after is None:
            return True
        return (self.before.outcome, _value(self.before)) != (
            self.after.outcome,
            _value(self.after),
        )


def compare_reports(before: Path, after: Path, *, across: Sequence[str] = ()) -> list[Change]:
    """Every check of either report, in the order of the first.

    Adapters are matched by name, or as they are where each report has exactly one.

    Args:
        before: the older JSON report.
        after: the newer one.
        across: fields that may differ, as a refusal names them.

    Raises:
        UsageError: a file is no report, or the two differ in what makes numbers comparable.
    """
    old_environment, old = load_report(before)
    new_environment, new = load_report(after)
    old_names, new_names = _names(old), _names(new)
    alone = len(old_names) == len(new_names) == 1
    renamed = dict(zip(new_names, old_names, strict=True)) if alone else {}
    new = [result.with_adapter(renamed.get(result.adapter, result.adapter)) for result in new]
    if not set(old_names) & set(_names(new)):
        raise UsageError(f"{after}: none of its adapters is in {before}")
    differences = _differences(old_environment, new_environment, renamed)
    for field, was, now in differences:
        if field not in across:
            raise UsageError(
                f"not comparable: {field} was {was!r} and is {now!r}; make both reports alike, or "
                f"compare nevertheless with --across={field}"
            )
    return list(_paired(old, new))


def _names(results: Sequence[CheckResult]) -> list[str]:
    return list(dict.fromkeys(result.adapter for result in results))


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], renamed: Mapping[str, str]
) -> Iterator[tuple[str, Any, Any]]:
    for name in _VERSIONS:
        was, now = (_get(environment, "versions", name) for environment in (old, new))
        if was != now:
            yield f"versions.{name}", was, now
    before, after = (_get(environment, "settings") or {} for environment in (old, new))
    for adapter in after:
        for name in _SETTINGS:
            was = _get(before, renamed.get(adapter, adapter), name, "value")
            now = _get(after, adapter, name, "value")
            if was != now:
                yield f"settings.{name}", was, now


def _get(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _paired(old: Sequence[CheckResult], new: Sequence[CheckResult]) -> Iterator[Change]:
    before, after = _keyed(old), _keyed(new)
    for key in dict.fromkeys([*before, *after]):
        adapter, check, _ = key
        yield Change(adapter, check, before.get(key), after.get(key))


def _keyed(results: Sequence[CheckResult]) -> dict[Key, CheckResult]:
    """A check that was made several times, for tasks or domains, is told apart by its order."""
    found: dict[Key, CheckResult] = {}
    for result in results:
        number = 0
        while (result.adapter, result.check, number) in found:
            number += 1
        found[result.adapter, result.check, number] = result
    return found


def _apart(before: CheckResult, after: CheckResult) -> bool:
    old, new, bound = before.measurement, after.measurement, after.bound
    if old is None or new is None or bound is None or old.unit != new.unit:
        return False
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return False
    higher = bound.high is not None and new.low > old.high
    lower = bound.low is not None and new.high < old.low
    return higher or lower


def _value(result: CheckResult) -> Any:
    return repr(result.measurement.value) if result.measurement else None


def table_of(changes: Sequence[Change]) -> str:
    """The changes as lines of text, regressions first; one line where nothing changed."""
    shown = sorted((c for c in changes if c.changed), key=lambda change: not change.regression)
    if not shown:
        return f"{len(changes)} checks, nothing changed"
    bad = sum(change.regression for change in shown)
    head = f"{len(changes)} checks, {len(shown)} changed, {bad} got worse"
    return "\n".join([head, *map(_line, shown)])


def _line(change: Change) -> str:
    mark = "WORSE" if change.regression else "     "
    where = f"{clean(change.adapter)} {clean(change.check)}"
    return f"{mark} {where}: {_said(change.before)} -> {_said(change.after)}"


def _said(result: CheckResult | None) -> str:
    if result is None:
        return "absent"
    found: Measurement | None = result.measurement
    return WORDS[result.outcome] + (f", {measured(found, result.bound)}" if found else "")
