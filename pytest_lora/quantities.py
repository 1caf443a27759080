"""Quantities as people write them: ``0.05 nats``, ``2%``, ``base - 1%``, ``baseline + 0.01``.

Each is read once, into a number with a stated unit; what cannot be meant is refused in words that
tell what can.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fractions import Fraction

__all__ = [
    "Floor",
    "Margin",
    "needs_baseline",
    "parse_drift",
    "parse_floor",
    "parse_limit",
    "parse_share",
]

_NUMBER = r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_DRIFT = re.compile(rf"{_NUMBER}\s*(?P<unit>nats?(?:\s*(?:/|per)\s*token)?|%)?", re.IGNORECASE)
_SHARE = re.compile(rf"{_NUMBER}\s*(?P<unit>%)?", re.IGNORECASE)
_RELATIVE = re.compile(
    r"(?P<what>base|baseline)(?:\s*(?P<sign>[+-])\s*(?P<rest>.+))?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Margin:
    """A limit that is the recorded measurement of an earlier run plus ``value``."""

    value: float

    def __str__(self) -> str:
        sign = "-" if self.value < 0 else "+"
        return f"baseline {sign} {abs(self.value)!r}"


def parse_drift(value: Any) -> float | Margin:
    """A bound on drift in nats per token: ``0.05``, ``"0.05 nats"``, ``"5%"``, or relative to a
    recorded baseline as in ``"baseline + 0.01"``.

    A percentage is the growth of the perplexity: ``5%`` allows a perplexity ratio of 1.05, which is
    ``log(1.05) = 0.0488`` nats per token; next to ``baseline`` it is the growth since.

    Raises:
        ValueError: anything else, with what is expected.
    """
    expected = (
        'nats per token as in 0.05 or "0.05 nats", growth of the perplexity as in "5%", or either '
        'on top of a recorded baseline as in "baseline + 0.01"'
    )
    return _margin(value, lambda text: _drift(text, expected), expected)


def _drift(value: Any, expected: str) -> float:
    number, unit = _number(value, _DRIFT, expected)
    if unit != "%":
        return number
    if number <= -100:
        raise ValueError(expected)
    return math.log1p(number / 100)


def parse_limit(value: Any) -> float | Margin:
    """A limit in the unit of its check: ``2``, or ``"baseline + 0.5"``.

    Raises:
        ValueError: anything else, with what is expected.
    """
    expected = 'a finite number, 0 or more, or one relative to a baseline as in "baseline + 0.5"'
    found = _margin(value, lambda text: _plain(text, expected), expected)
    if isinstance(found, float) and found < 0:
        raise ValueError(expected)
    return found


def _plain(value: Any, expected: str) -> float:
    number, unit = _number(value, _SHARE, expected)
    if unit:
        raise ValueError(expected)
    return number


def _margin(value: Any, parse: Callable[[Any], float], expected: str) -> float | Margin:
    """What ``parse`` makes of ``value``, or of what is added to a baseline."""
    relative = _RELATIVE.fullmatch(value.strip()) if isinstance(value, str) else None
    if relative is None:
        return parse(value)
    if relative["what"].lower() != "baseline":
        raise ValueError(expected)
    return Margin(parse(relative["sign"] + relative["rest"]) if relative["rest"] else 0.0)


def _exact(number: float) -> Fraction:
    """The shortest decimal that is read as this float."""
    from fractions import Fraction  # here, for runs that do not use us load this module as well

    return Fraction(repr(number))


def parse_share(value: Any) -> float:
    """A share between 0 and 1: ``0.85`` or ``"85%"``.

    Raises:
        ValueError: anything else, with what is expected.
    """
    expected = 'a share from 0 to 1, as in 0.85 or "85%"'
    number, unit = _number(value, _SHARE, expected)
    share = float(_exact(number) / 100) if unit == "%" else number  # rounded once
    if not 0 <= share <= 1:
        raise ValueError(expected)
    return share


@dataclass(frozen=True, slots=True)
class Floor:
    """The least accuracy that is allowed.

    Attributes:
        value: a share from 0 to 1; with ``to`` what is added, from -1 to 1.
        to: what the floor is relative to: "base", the base model's accuracy on the same items;
            "baseline", the recorded one of an earlier run; empty for neither.
    """

    value: float
    to: str = ""

    def __str__(self) -> str:
        sign = "-" if self.value < 0 else "+"
        return f"{self.to} {sign} {abs(self.value):g}" if self.to else f"{self.value:g}"

    @property
    def exact(self) -> Fraction:
        """The value as it was written: the shortest decimal that is read as this float."""
        return _exact(self.value)


def parse_floor(value: Any) -> Floor:
    """An accuracy floor: ``0.5``, ``"50%"``, ``"base + 10%"`` or ``"baseline - 0.02"``.

    Percentages are percentage points, also next to ``base`` and ``baseline``.

    Raises:
        ValueError: anything else, with what is expected.
    """
    relative = _RELATIVE.fullmatch(value.strip()) if isinstance(value, str) else None
    try:
        if relative is None:
            return Floor(parse_share(value))
        difference = parse_share(relative["rest"]) if relative["rest"] else 0.0
        sign = -1 if relative["sign"] == "-" else 1
        return Floor(sign * difference, to=relative["what"].lower())
    except ValueError:
        raise ValueError(
            'a share as in 0.5 or "50%", or one relative to the base model as in "base - 2%", or '
            'to a recorded baseline as in "baseline - 2%"'
        ) from None


def needs_baseline(limit: Any) -> bool:
    """Whether a limit, as one of the parsers gives it, is relative to a recorded measurement."""
    return isinstance(limit, Margin) or (isinstance(limit, Floor) and limit.to == "baseline")


def _number(value: Any, pattern: re.Pattern[str], expected: str) -> tuple[float, str]:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(expected)
    match = pattern.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(expected)
    number = float(match["number"])
    if not math.isfinite(number):
        raise ValueError(expected)
    return number, (match["unit"] or "").lower()
