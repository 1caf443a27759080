"""The data every layer speaks: what was measured, what was allowed, what follows.

All records are frozen, slotted and JSON-plain from birth (tuples in details become lists there, and
non-finite numbers strings), and survive ``to_dict`` / ``from_dict`` unchanged.
Nothing here imports anything but the standard library, and nothing here computes a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeAlias

__all__ = [
    "TO_DECIDE",
    "Bound",
    "CheckResult",
    "Json",
    "Measurement",
    "Outcome",
    "Problem",
    "collecting",
    "emit",
]

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

TO_DECIDE = "items_to_decide"
"""Key of a measurement's details under which a check says how many items its verdict takes, about,
where these leave it open; None where no number does."""

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Outcome(StrEnum):
    """The verdict of one check.  ``ERROR`` means the check broke, not the adapter."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong (or, as a note, one thing worth knowing) at one place.

    Attributes:
        where: the file, configuration key, tensor or module, as the user would name it.
        found: what is there.
        expected: what would have been right; empty where the finding speaks for itself.
        fix: what to do about it; empty where that is plain.
    """

    where: str
    found: str
    expected: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}"
        if self.expected:
            text += f" (expected {self.expected})"
        return f"{text}; {self.fix}" if self.fix else text

    def to_dict(self) -> dict[str, Json]:
        """The problem as a JSON object, empty optional fields left out."""
        optional = {"expected": self.expected, "fix": self.fix}
        given = {key: value for key, value in optional.items() if value}
        return {"where": self.where, "found": self.found, **given}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Problem:
        """The inverse of :meth:`to_dict`; raises as :meth:`CheckResult.from_dict` does."""
        return cls(**{key: _typed(data, key, str) for key in data})


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number that knows its unit, how much it rests on and where it was worst.

    Attributes:
        value: the measured number; may be non-finite, which no bound accepts.
        unit: what the number counts ("problems", "tensors", "times the rounding bound", ...).
        count: how many things were measured; zero is refused, for it would be a vacuous pass.
        low, high: confidence interval, where the number is an estimate; both or neither.
        where: the worst place (tensor and index, module, document id).
        details: further evidence, JSON-plain.  Checks that count problems put them under
            ``"problems"``; remarks that do not decide go under ``"notes"``.
    """

    value: float
    unit: str
    count: int
    low: float | None = None
    high: float | None = None
    where: str | None = None
    details: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a measurement of {self.count} things is no measurement")
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has two ends")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"an interval from {self.low} up to {self.high} holds nothing")
        object.__setattr__(self, "details", _plain(self.details))

    @classmethod
    def of_problems(
        cls,
        problems: Sequence[Problem],
        *,
        count: int,
        unit: str = "problems",
        notes: Sequence[str] = (),
        **details: Json,
    ) -> Measurement:
        """Count ``problems`` found among ``count`` things looked at.  The first is the worst."""
        listed: list[Json] = [problem.to_dict() for problem in problems]
        return cls(
            value=len(problems),
            unit=unit,
            count=count,
            where=str(problems[0]) if problems else None,
            details={**details, "problems": listed, "notes": list(notes)},
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems recorded in :attr:`details`."""
        listed = self.details.get("problems", ())
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            return ()
        return tuple(Problem.from_dict(item) for item in listed if isinstance(item, Mapping))

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks recorded in :attr:`details` that did not decide the verdict."""
        listed = self.details.get("notes", ())
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            return ()
        return tuple(str(item) for item in listed)

    def to_dict(self) -> dict[str, Json]:
        """The measurement as a JSON object; non-finite numbers are the strings nan, inf, -inf."""
        return {
            "value": _plain(self.value),
            "unit": self.unit,
            "count": self.count,
            "low": _plain(self.low),
            "high": _plain(self.high),
            "where": self.where,
            "details": self.details,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of :meth:`to_dict`; raises as :meth:`CheckResult.from_dict` does."""
        low, high = (None if data[key] is None else _number(data, key) for key in ("low", "high"))
        where = None if data["where"] is None else _typed(data, "where", str)
        known = {
            "value": _number(data, "value"),
            "unit": _typed(data, "unit", str),
            "count": _typed(data, "count", int),
            "details": _typed(data, "details", Mapping),
        }
        measurement = cls(**{**data, **known, "low": low, "high": high, "where": where})
        _ = measurement.problems  # those that are none are found here, not where they are shown
        return measurement


@dataclass(frozen=True, slots=True)
class Bound:
    """What is allowed, inclusive at both ends, and who said so."""

    low: float | None
    high: float | None
    origin: str

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("a bound needs a lower or an upper limit")
        if any(limit is not None and math.isnan(limit) for limit in (self.low, self.high)):
            raise ValueError("NaN bounds nothing")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"nothing is both at least {self.low} and at most {self.high}")

    @classmethod
    def at_most(cls, limit: float, origin: str) -> Bound:
        """``value <= limit``."""
        return cls(None, limit, origin)

    @classmethod
    def at_least(cls, limit: float, origin: str) -> Bound:
        """``value >= limit``."""
        return cls(limit, None, origin)

    def admits(self, value: float) -> bool:
        """Whether ``value`` lies within; NaN and infinities never do."""
        if not math.isfinite(value):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def judge(self, measurement: Measurement) -> Outcome:
        """PASSED or FAILED for a measurement that is not an estimate; with an interval, the whole
        interval has to lie on one side, else INCONCLUSIVE.  A non-finite value FAILED.
        """
        if measurement.low is None or measurement.high is None:
            return Outcome.PASSED if self.admits(measurement.value) else Outcome.FAILED
        if not math.isfinite(measurement.value):
            return Outcome.FAILED
        low_in, high_in = self.admits(measurement.low), self.admits(measurement.high)
        if low_in and high_in:
            return Outcome.PASSED
        if self._apart(measurement.low, measurement.high):
            return Outcome.FAILED
        return Outcome.INCONCLUSIVE

    def _apart(self, low: float, high: float) -> bool:
        below = self.low is not None and high < self.low
        return below or (self.high is not None and low > self.high)

    def to_dict(self) -> dict[str, Json]:
        """The bound as a JSON object."""
        return {"low": _plain(self.low), "high": _plain(self.high), "origin": self.origin}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bound:
        """The inverse of :meth:`to_dict`; raises as :meth:`CheckResult.from_dict` does."""
        low, high = (None if data[key] is None else _number(data, key) for key in ("low", "high"))
        return cls(low, high, _typed(data, "origin", str))


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of one adapter: the verdict and the evidence behind it.

    Attributes:
        check: stable id of the check (see ``pytest --lora-list-checks``).
        adapter: the adapter's display name.
        outcome: the verdict.
        reason: one sentence that explains the verdict; empty for a plain pass.
        advice: what to do next; empty where nothing has to be done.
        measurement, bound: what was measured and what was allowed, where there was any.
        seconds: wall-clock time the measurement took.
        part: which source domain or task of the profile it is about; empty for checks that are made
            once per adapter.
    """

    check: str
    adapter: str
    outcome: Outcome
    reason: str = ""
    advice: str = ""
    measurement: Measurement | None = None
    bound: Bound | None = None
    seconds: float = 0.0
    part: str = ""

    @property
    def label(self) -> str:
        """The check, and the part it is about, as tables name them."""
        return f"{self.check}[{self.part}]" if self.part else self.check

    def with_adapter(self, name: str) -> CheckResult:
        """The same result under the name the run knows the adapter by."""
        return replace(self, adapter=name)

    def to_dict(self) -> dict[str, Json]:
        """The result as a JSON object (schema ``pytest-lora/report/1``, one element of results)."""
        return {
            "check": self.check,
            "adapter": self.adapter,
            "outcome": self.outcome.value,
            "reason": self.reason,
            "advice": self.advice,
            "measurement": self.measurement.to_dict() if self.measurement else None,
            "bound": self.bound.to_dict() if self.bound else None,
            "seconds": self.seconds,
            "part": self.part,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CheckResult:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError: something is missing.
            TypeError: something is of another type, or is not known.
            ValueError: a value that cannot be.
        """
        measured, allowed = data["measurement"], data["bound"]
        texts = {key: _typed(data, key, str) for key in ("check", "adapter", "reason", "advice")}
        return cls(
            **texts,
            outcome=Outcome(_typed(data, "outcome", str)),
            measurement=None if measured is None else Measurement.from_dict(measured),
            bound=None if allowed is None else Bound.from_dict(allowed),
            seconds=_number(data, "seconds"),
            # Reports of before there were parts have none.
            part=_typed(data, "part", str) if "part" in data else "",
        )


_sink: ContextVar[list[CheckResult] | None] = ContextVar("pytest_lora_results", default=None)


def emit(result: CheckResult) -> None:
    """Hand a result to whoever is collecting; a no-op outside :func:`collecting`.

    This is how assertions reach a report without knowing any test runner.
    """
    sink = _sink.get()
    if sink is not None:
        sink.append(result)


@contextmanager
def collecting() -> Iterator[list[CheckResult]]:
    """Collect every result emitted inside the block, in order."""
    results: list[CheckResult] = []
    token = _sink.set(results)
    try:
        yield results
    finally:
        _sink.reset(token)


def _plain(value: Any) -> Any:
    """``value`` with tuples as lists and non-finite floats as strings, so that JSON is strict."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no place in a result: {value!r}")


def _typed(data: Mapping[str, Any], key: str, *kinds: type[Any]) -> Any:
    value = data[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{key} is of type {type(value).__name__}, expected {expected}")
    return value


def _number(data: Mapping[str, Any], key: str) -> Any:
    """A number as it was, whole or not, that a float can hold."""
    value = data[key]
    if isinstance(value, str):
        if value not in _NON_FINITE:
            raise ValueError(f"{value!r} is no number")
        return _NON_FINITE[value]
    try:
        float(_typed(data, key, int, float))
    except OverflowError:
        raise ValueError(f"{key} is larger than any float") from None
    return value
