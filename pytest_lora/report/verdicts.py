"""Results gathered by adapter, and the one word that stands for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pytest_lora.records import CheckResult, Outcome

__all__ = ["WORDS", "AdapterTable", "adapter_tables", "headline"]

WORDS = {
    Outcome.PASSED: "pass",
    Outcome.FAILED: "FAIL",
    Outcome.SKIPPED: "skip",
    Outcome.INCONCLUSIVE: "INCONCLUSIVE",
    Outcome.ERROR: "ERROR",
}
# What decides first.  A skip does not undo a pass: the checks that ran have decided.
_RANK = (
    Outcome.FAILED,
    Outcome.ERROR,
    Outcome.INCONCLUSIVE,
    Outcome.PASSED,
    Outcome.SKIPPED,
)
_STATES = {
    Outcome.FAILED: "failed",
    Outcome.ERROR: "could not be judged",
    Outcome.INCONCLUSIVE: "inconclusive",
    Outcome.PASSED: "passed",
    Outcome.SKIPPED: "not judged: every check was skipped",
}


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """One adapter's results, in the order they are to be shown."""

    adapter: str
    about: str
    rows: tuple[CheckResult, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst verdict among the checks."""
        return min((row.outcome for row in self.rows), key=_RANK.index)

    @property
    def troubles(self) -> tuple[CheckResult, ...]:
        """The rows that need attention, worst first."""
        bad = (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)
        found = [row for row in self.rows if row.outcome in bad]
        return tuple(sorted(found, key=lambda row: _RANK.index(row.outcome)))

    def count(self, outcome: Outcome) -> int:
        """How many checks ended so."""
        return sum(row.outcome is outcome for row in self.rows)


def adapter_tables(
    results: Iterable[CheckResult], about: Mapping[str, object]
) -> list[AdapterTable]:
    """One table per adapter, adapters and rows in the order of ``results``."""
    rows: dict[str, list[CheckResult]] = {}
    for result in results:
        rows.setdefault(result.adapter, []).append(result)
    return [AdapterTable(name, str(about.get(name, "")), tuple(rows[name])) for name in rows]


def headline(tables: Iterable[AdapterTable]) -> str:
    """The verdict over all adapters in one phrase: ``2 of 5 adapters failed``."""
    counted = Counter(table.outcome for table in tables)
    total = counted.total()
    if not total:
        return "no results"
    noun = "adapter" if total == 1 else "adapters"
    if len(counted) == 1:
        [outcome] = counted
        return f"{total} {noun} {_STATES[outcome]}"
    first, *others = [outcome for outcome in _RANK if counted[outcome]]
    rest = ", ".join(f"{counted[outcome]} {_STATES[outcome]}" for outcome in others)
    return f"{counted[first]} of {total} {noun} {_STATES[first]}, {rest}"
