"""What was measured before, in a file that is reviewed like code, and refused where it misfits.

A baseline holds one *reference* per measurement: the number, what it rests on, and the *facts* that
make another number comparable with it: digests of base weights and data, every rule by which the
number is defined, kind of device, dtype, versions.  None of them is the adapter's.  A number that
was made under other facts is never compared: whoever asks gets the name of the first fact that
differs, what it was and what it is.

Two measurements of the same items are compared item by item, so a reference keeps its items too:
the negative log-likelihood of each document, the score of each item of a task.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_lora.atomic import alone_in, write_whole
from pytest_lora.catalog import find_check
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.records import Bound, CheckResult, Json, Measurement, Outcome
from pytest_lora.report.text import clean, number
from pytest_lora.strict_json import JsonError, read_object

__all__ = [
    "FACTS",
    "ITEMS",
    "MOST_ITEMS",
    "Baseline",
    "Reference",
    "RelativeBound",
    "digest_of",
    "flat",
    "is_number",
    "is_recorded",
    "since_baseline",
    "with_facts",
    "with_remark",
]

SCHEMA_ID = "pytest-lora/baseline/1"
FACTS = "facts"
"""Key of a measurement's details under which a check says what its number depends on."""
ITEMS = "by_item"
"""Key of a measurement's details that holds one number per document or item."""
MOST_ITEMS = 2000
"""More are not listed: a report and a baseline are files to be read."""
_DIGESTS = ("base", "inputs", "prompts", "task", "texts", "windows")
_AGAIN = "record it again with --lora-update-baseline"

Facts = Mapping[str, Json]


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Json]:
    """Nested facts by dotted names, as messages name them: ``definition.window``."""
    found: dict[str, Json] = {}
    for key, value in facts.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return found


def digest_of(data: Any) -> str:
    """Of JSON-plain data that a number depends on, tuples as lists."""
    return hashlib.blake2b(json.dumps(data).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Reference:
    """A measurement of an earlier run.

    Attributes:
        value: the number.
        unit: of the number.
        count: how many things it rests on.
        facts: what another number has to agree in, by dotted name.
        items: one number per document or item; empty where there are none, or too many.
        where: the entry, for messages.
    """

    value: float
    unit: str
    count: int
    facts: Facts
    items: Mapping[str, float] = field(default_factory=dict)
    where: str = "the baseline"

    def require(self, facts: Mapping[str, Any], unit: str | None = None) -> None:
        """Refuse a comparison with what was made under other ``facts``, or is another quantity.

        Args:
            facts: of the number to be compared, nested or flat.
            unit: of that number; None where its check has one quantity only.

        Raises:
            CannotRun: one of them differs; the message names it.
        """
        found = self.differing(flat(facts), self.unit if unit is None else unit)
        if found:
            text = f"{self.where}: not comparable: {found}; {_AGAIN} if that is meant"
            raise CannotRun(clean(text))

    def require_shared(self, facts: Mapping[str, Any]) -> None:
        """As :meth:`require`, as far as ``facts`` go: before anything is measured.

        Raises:
            CannotRun: one of them differs; the message names it.
        """
        known = flat(facts)
        shared = {name: fact for name, fact in self.facts.items() if name in known}
        replace(self, facts=shared).require(known)

    def differing(self, facts: Facts, unit: str) -> str:
        """What keeps a number of that unit from being compared, in words; empty for nothing."""
        return _differing({"unit": self.unit, **self.facts}, {"unit": unit, **facts})

    def to_dict(self) -> dict[str, Json]:
        """The reference as a JSON object."""
        items: dict[str, Json] = {ITEMS: dict(self.items)} if self.items else {}
        return {
            "value": self.value,
            "unit": self.unit,
            "count": self.count,
            FACTS: dict(self.facts),
            **items,
        }


@dataclass(frozen=True, slots=True)
class RelativeBound(Bound):
    """A bound that moves with a reference, and judges only what is comparable with it.

    Attributes:
        reference: what it is relative to.
        facts: of the base model; those that a check states itself come with its measurement.
    """

    reference: Reference = field(compare=False)
    facts: Mapping[str, Any] = field(compare=False)

    def judge(self, measurement: Measurement) -> Outcome:
        """As for any bound.

        Raises:
            CannotRun: the measurement was made under other facts, or is another quantity.
        """
        facts = {**flat(self.facts), **_stated(measurement)}
        self.reference.require(facts, measurement.unit)
        # No super(): the class that slots=True makes is not the one that would be named here.
        return Bound.judge(self, measurement)


# --------------------------------------------------------------------------------------- the file


@dataclass(frozen=True, slots=True)
class Baseline:
    """A baseline file.

    Attributes:
        name: the file as the user named it.
        adapters: references by adapter, then by check and part, as in ``perplexity_drift[wiki]``.
    """

    name: str
    adapters: Mapping[str, Mapping[str, Reference]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, shown: str) -> Baseline:
        """The baseline in a file, which messages call ``shown``.

        Raises:
            UsageError: it is not there, or is no baseline.
        """
        if not path.exists():
            raise UsageError(
                f"{shown}: there is no baseline yet: record it with --lora-update-baseline"
            )
        try:
            data = read_object(path)
            if data.get("schema") != SCHEMA_ID:
                raise JsonError(f"schema {data.get('schema')!r}, expected {SCHEMA_ID!r}")
            return cls(shown, dict(_adapters(data.get("adapters"), shown)))
        except JsonError as error:
            raise UsageError(clean(f"{shown}: not a baseline: {error}")) from None

    def reference(self, adapter: str, label: str, *, alone: bool = False) -> Reference:
        """What was recorded of an adapter's measurement.

        Args:
            adapter: its name in this run.
            label: check and part.
            alone: it is the only one of the run; where the baseline has only one as well, that is
                the one it is compared with, whatever either is called.

        Raises:
            CannotRun: nothing was.
        """
        known = self.adapters.get(_text(adapter))
        if known is None and alone and len(self.adapters) == 1:
            known = next(iter(self.adapters.values()))
        if known is None:
            names = ", ".join(self.adapters) or "none"
            text = f"{self.name}: nothing recorded of {adapter}, only of {names}; {_AGAIN}"
            raise CannotRun(clean(text))
        if label not in known:
            raise CannotRun(clean(f"{self.name}: no {label} recorded of {adapter}; {_AGAIN}"))
        return known[label]

    def updated(self, results: Iterable[CheckResult]) -> Baseline:
        """This baseline with what ``results`` measured in the place of what it had of them.

        Only what passed becomes a reference: of what did not, the old one stays.
        """
        adapters = {name: dict(references) for name, references in self.adapters.items()}
        for result in results:
            if is_recorded(result) and result.outcome is Outcome.PASSED:
                adapters.setdefault(_text(result.adapter), {})[result.label] = _reference(result)
        return replace(self, adapters=adapters)

    def told(self, results: Iterable[CheckResult]) -> str:
        """What :meth:`updated` takes of ``results``, in one line."""
        found = [result for result in results if is_recorded(result)]
        passed = [result for result in found if result.outcome is Outcome.PASSED]
        text = f"{self.name}: {len(passed)} measurements recorded"
        others = [f"{r.adapter} {r.label}" for r in found if r.outcome is not Outcome.PASSED]
        return clean(f"{text}; not what did not pass: {', '.join(others)}" if others else text)

    def text(self) -> str:
        """The file: sorted, one line of facts and one of items each, so that diffs are small."""
        lines = ["{", f'  "schema": {_dump(SCHEMA_ID)},', '  "adapters": {']
        lines += _separated(
            [f"    {_dump(name)}: {{", *_separated(_entries(references)), "    }"]
            for name, references in sorted(self.adapters.items())
        )
        return "\n".join([*lines, "  }", "}"]) + "\n"

    def record(self, path: Path, results: Iterable[CheckResult]) -> None:
        """Update the file ``path`` by ``results`` in one step, and lose nothing that another run
        recorded since this one was read.

        Raises:
            UsageError: the file cannot be written, or is no baseline any more.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with alone_in(path.parent):
                now = self.read(path, shown=self.name) if path.exists() else self
                write_whole(path, now.updated(results).text(), "baseline")
        except OSError as error:
            raise UsageError(
                f"{path}: cannot write the baseline: {error.strerror or error}"
            ) from None


def is_recorded(result: CheckResult) -> bool:
    """Whether the measurement is a quantity, with a bound to move, and not a count of faults."""
    try:
        spec = find_check(result.check)
    except KeyError:
        return False
    measured, bound = result.measurement, result.bound
    if measured is None or bound is None or not math.isfinite(measured.value):
        return False
    return bool(spec.limit) or (bool(spec.per) and (bound.low, bound.high) != (None, 0))


def _reference(result: CheckResult) -> Reference:
    measured = result.measurement
    assert measured is not None
    items: Any = measured.details.get(ITEMS, {})
    return Reference(
        value=float(measured.value),
        unit=measured.unit,
        count=measured.count,
        facts=_facts(result),
        items=items,
    )


def _entries(references: Mapping[str, Reference]) -> Iterator[list[str]]:
    for label, reference in sorted(references.items()):
        fields = [
            f"        {_dump(key)}: {_dump(value)}" for key, value in reference.to_dict().items()
        ]
        yield [f"      {_dump(label)}: {{", *_separated([line] for line in fields), "      }"]


def _separated(blocks: Iterable[Sequence[str]]) -> list[str]:
    """The lines of all blocks, a comma after each block but the last."""
    listed = [list(block) for block in blocks]
    for block in listed[:-1]:
        block[-1] += ","
    return [line for block in listed for line in block]


def _text(name: str) -> str:
    """A name that is no Unicode (an undecodable path) as JSON can hold it."""
    return name.encode("utf-8", errors="backslashreplace").decode()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)


def _adapters(data: Any, shown: str) -> Iterator[tuple[str, dict[str, Reference]]]:
    if not isinstance(data, Mapping):
        raise JsonError("no 'adapters'")
    for adapter, entries in data.items():
        if not isinstance(entries, Mapping):
            raise JsonError(f"{adapter!r} holds no measurements")
        yield (
            adapter,
            {
                label: _read(entry, f"{shown}: {adapter} {label}")
                for label, entry in entries.items()
            },
        )


def _read(entry: Any, where: str) -> Reference:
    parts = entry if isinstance(entry, Mapping) else {}
    facts, items = parts.get(FACTS, {}), parts.get(ITEMS, {})
    whole = (
        is_number(parts.get("value"))
        and isinstance(parts.get("unit"), str)
        and isinstance(parts.get("count"), int)
        and is_number(parts["count"])
        and parts["count"] > 0
        and isinstance(facts, Mapping)
        and isinstance(items, Mapping)
        and all(map(is_number, items.values()))
    )
    if not whole:
        raise JsonError(f"{where!r} is no measurement with value, unit, count and facts")
    return Reference(float(parts["value"]), parts["unit"], parts["count"], facts, items, where)


def since_baseline(unit: str) -> str:
    """The unit of a measurement that is itself the change of a recorded one in ``unit``."""
    return f"{unit}, since the baseline"


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _facts(result: CheckResult) -> dict[str, Json]:
    return _stated(result.measurement) if result.measurement is not None else {}


def _stated(measurement: Measurement) -> dict[str, Json]:
    """What a check says that its number depends on."""
    own: Any = measurement.details.get(FACTS, {})
    return flat(own)


# ------------------------------------------------------------------------------- results placed


def with_facts(result: CheckResult, facts: Mapping[str, Any]) -> CheckResult:
    """The result with what it depends on, beside what its check has said of that itself."""
    return _with_details(result, {FACTS: {**flat(facts), **_facts(result)}})


def with_remark(result: CheckResult, reference: Reference) -> CheckResult:
    """The result with a note on how it compares with what was recorded, which judges nothing."""
    measured = result.measurement
    assert measured is not None
    # What was measured item by item against the reference is the change already.
    is_change = measured.unit == since_baseline(reference.unit)
    found = reference.differing(_facts(result), reference.unit if is_change else measured.unit)
    if found:
        note = f"not comparable with the baseline: {found}"
    else:
        change = measured.value - (0 if is_change else reference.value)
        moved = f"{change:+.3g} since" if change else "unchanged"
        note = f"baseline: {number(reference.value)} (n={reference.count:,}), {moved}"
    return _with_details(result, {"notes": [*measured.notes, note]})


def _with_details(result: CheckResult, details: Mapping[str, Json]) -> CheckResult:
    measured = result.measurement
    assert measured is not None
    return replace(result, measurement=replace(measured, details={**measured.details, **details}))


def _differing(was: Facts, now: Facts) -> str:
    """What is not the same on both sides, in words; empty where everything is.

    Digests come last: another dtype is another digest of the weights, and says more.
    """
    names = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    names.sort(key=lambda name: (name in _DIGESTS, name.startswith("definition.")))
    if not names:
        return ""
    first, *more = names
    text = f"{first} was {_shown(was.get(first))} and is {_shown(now.get(first))}"
    return f"{text} (and {', '.join(more)})" if more else text


def _shown(value: Json) -> str:
    return "absent" if value is None else repr(value)
