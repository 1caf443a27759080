"""Two reports side by side: what changed, and whether anything got worse.

A verdict that was a pass and is none any more is a regression.  Of two passes it is decided

- by pairs, where both reports hold one number for each of the same items, made under the same
  facts: the domain that the items are a sample of got worse, with a stated error rate over all
  pairs of the comparison together;
- else by intervals: the whole new one lies on the worse side of the whole old one.

The worse side is the one that the bound limits.  Numbers with neither that moved within their bound
are shown and decide nothing.  So are bounds that are not the ones of before: what passes a loosened
one need not have passed the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_lora.baseline import FACTS, ITEMS, is_number
from pytest_lora.errors import UsageError
from pytest_lora.names import meant
from pytest_lora.records import CheckResult, Measurement, Outcome
from pytest_lora.report.json_report import load_report
from pytest_lora.report.text import allowed, clean, measured
from pytest_lora.report.verdicts import WORDS
from pytest_lora.stats.familywise import holm
from pytest_lora.stats.paired import loss_p, mean_above_zero_p
from pytest_lora.stats.sequential import LARGEST

__all__ = ["ERROR_RATE", "Change", "Pairs", "compare_reports", "table_of"]

ERROR_RATE = 0.001
"""Chance that a comparison by pairs calls anything worse that is not."""

# Where these differ, numbers differ for reasons that are not the adapter's.
_VERSIONS = ("torch", "transformers", "peft")
_SETTINGS = ("base_model", "device", "dtype")
_FIELDS = (
    *(f"versions.{name}" for name in _VERSIONS),
    *(f"settings.{name}" for name in _SETTINGS),
)
Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The same items before and after.

    Attributes:
        items: how many.
        p: p-value of "the domain did not get worse"; adjusted by Holm for all pairs of a comparison
            once they are known.
        error_rate: at which ``p`` it counts as worse.
    """

    items: int
    p: float
    error_rate: float

    @property
    def worse(self) -> bool:
        """Whether the domain got worse, wrong with probability ``error_rate`` at most."""
        return self.p <= self.error_rate


@dataclass(frozen=True, slots=True)
class Change:
    """One check of one adapter before and after; None where a report lacks it."""

    adapter: str
    check: str
    before: CheckResult | None
    after: CheckResult | None
    pairs: Pairs | None = None

    @property
    def regression(self) -> bool:
        """Whether it got worse, by the definition of this module."""
        if self.before is None or self.before.outcome is not Outcome.PASSED:
            return False
        if self.after is None or self.after.outcome is not Outcome.PASSED:
            return True
        return self.pairs.worse if self.pairs else _apart(self.before, self.after)

    @property
    def changed(self) -> bool:
        """Whether the verdict or the number differs."""
        if self.before is None or self.after is None:
            return True
        return (self.before.outcome, _value(self.before)) != (
            self.after.outcome,
            _value(self.after),
        )

    @property
    def moved(self) -> str:
        """How the bound's limits differ: loosened, tightened, or moved; empty where they do not."""
        if self.before is None or self.after is None:
            return ""
        if self.before.measurement is None or self.after.measurement is None:
            return ""  # skipped, or broken: the verdict says so
        old, new = _limits(self.before), _limits(self.after)
        looser = new[0] < old[0] or new[1] > old[1]
        tighter = new[0] > old[0] or new[1] < old[1]
        if looser and tighter:
            return "moved"
        return "loosened" if looser else "tightened" if tighter else ""


def compare_reports(
    before: Path, after: Path, *, across: Sequence[str] = (), error_rate: float = ERROR_RATE
) -> list[Change]:
    """Every check of either report, in the order of the first.

    Adapters are matched by name, or as they are where each report has exactly one.

    Args:
        before: the older JSON report.
        after: the newer one.
        across: fields that may differ, as a refusal names them.
        error_rate: chance that pairs call anything worse that is not, for all of them together.

    Raises:
        UsageError: a file is no report, the two differ in what makes numbers comparable, or the
            error rate is none.
    """
    if not 0 < error_rate < 1:
        raise UsageError(f"--error-rate={error_rate} is no probability between 0 and 1")
    for field in across:
        if field not in _FIELDS:
            known = meant(field, _FIELDS, f"there are {', '.join(_FIELDS)}")
            raise UsageError(f"--across={field}: no field of that name is compared{known}")
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
    return _adjusted([_with_pairs(change, error_rate) for change in _matched(old, new)])


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


def _matched(old: Sequence[CheckResult], new: Sequence[CheckResult]) -> Iterator[Change]:
    before, after = _keyed(old), _keyed(new)
    for key in dict.fromkeys([*before, *after]):
        adapter, check, _ = key
        yield Change(adapter, check, before.get(key), after.get(key))


def _keyed(results: Sequence[CheckResult]) -> dict[Key, CheckResult]:
    """Checks by adapter and label; what has the same one, in tests of one's own, by its order."""
    found: dict[Key, CheckResult] = {}
    for result in results:
        number = 0
        while (result.adapter, result.label, number) in found:
            number += 1
        found[result.adapter, result.label, number] = result
    return found


def _with_pairs(change: Change, error_rate: float) -> Change:
    """The change with its items, where they can decide: both passed, and every item was taken.

    A verdict that came early chose how many items it took by what they were, which the p-values
    know nothing of.
    """
    before, after = change.before, change.after
    if before is None or after is None:
        return change
    if not before.outcome is after.outcome is Outcome.PASSED:
        return change
    old, new, bound = _whole(before), _whole(after), after.bound
    if bound is None or len(new) < 2 or old.keys() != new.keys() or _facts(before) != _facts(after):
        return change
    sign = 1 if bound.high is not None else -1
    losses = [sign * (value - old[name]) for name, value in new.items()]
    if {*old.values(), *new.values()} <= {0, 1}:
        p = loss_p(gained=losses.count(-1), lost=losses.count(1))
    else:
        p = mean_above_zero_p(losses)
    return replace(change, pairs=Pairs(len(losses), p, error_rate))


def _whole(result: CheckResult) -> Mapping[str, float]:
    """One number per item, if that is all items there are and sums can hold them; else nothing."""
    details: Mapping[str, Any] = result.measurement.details if result.measurement else {}
    items = details.get(ITEMS)
    if not isinstance(items, Mapping):
        return {}
    if not all(is_number(item) and abs(item) <= LARGEST for item in items.values()):
        return {}
    all_of_domain = _get(details, "domains", result.part, "documents", "all")
    return items if len(items) in (details.get("items"), all_of_domain) else {}


def _facts(result: CheckResult) -> Any:
    return result.measurement.details.get(FACTS) if result.measurement else None


def _adjusted(changes: Sequence[Change]) -> list[Change]:
    """The changes with the p-values of their pairs adjusted for each other."""
    adjusted = iter(holm([change.pairs.p for change in changes if change.pairs]))
    return [
        replace(change, pairs=replace(change.pairs, p=next(adjusted))) if change.pairs else change
        for change in changes
    ]


def _apart(before: CheckResult, after: CheckResult) -> bool:
    old, new, bound = before.measurement, after.measurement, after.bound
    if old is None or new is None or bound is None or old.unit != new.unit:
        return False
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return False
    higher = bound.high is not None and new.low > old.high
    lower = bound.low is not None and new.high < old.low
    return higher or lower


def _limits(result: CheckResult) -> tuple[float, float]:
    low, high = (result.bound.low, result.bound.high) if result.bound else (None, None)
    return -math.inf if low is None else low, math.inf if high is None else high


def _value(result: CheckResult) -> Any:
    return repr(result.measurement.value) if result.measurement else None


def table_of(changes: Sequence[Change]) -> str:
    """The changes as lines of text, regressions first; one line where nothing changed."""
    shown = sorted(
        (change for change in changes if change.changed or change.moved),
        key=lambda change: (not change.regression, not change.moved),
    )
    if not shown:
        return f"{len(changes)} checks, nothing changed"
    changed, bad = sum(c.changed for c in shown), sum(c.regression for c in shown)
    head = f"{len(changes)} checks, {changed} changed, {bad} got worse"
    if other := sum(bool(change.moved) for change in shown):
        head += f", {other} judged by another bound"
    return "\n".join([head, *map(_line, shown)])


def _line(change: Change) -> str:
    mark = "WORSE" if change.regression else "     "
    where = f"{clean(change.adapter)} {clean(change.check)}"
    line = f"{mark} {where}: {_said(change.before)} -> {_said(change.after)}"
    if change.pairs:
        line += f"; {change.pairs.items} pairs, p={change.pairs.p:.2g}"
    if change.moved:
        line += f"; bound {change.moved}: {_bound(change.before)} -> {_bound(change.after)}"
    return line


def _bound(result: CheckResult | None) -> str:
    return allowed(result.bound) if result and result.bound else "none"


def _said(result: CheckResult | None) -> str:
    if result is None:
        return "absent"
    found: Measurement | None = result.measurement
    return WORDS[result.outcome] + (f", {measured(found, result.bound)}" if found else "")
