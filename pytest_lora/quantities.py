"""Quantities as people write them in settings: ``0.05 nats``, ``2%``, ``base - 1%``.

Each is read once, into a number with a stated unit; what cannot be meant is refused in words that
tell what can.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["Floor", "parse_drift", "parse_floor", "parse_share"]

_NUMBER = r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_DRIFT = re.compile(rf"{_NUMBER}\s*(?P<unit>nats?(?:\s*(?:/|per)\s*token)?|%)?", re.IGNORECASE)
_SHARE = re.compile(rf"{_NUMBER}\s*(?P<unit>%)?", re.IGNORECASE)
_RELATIVE = re.compile(r"base(?:\s*(?P<sign>[+-])\s*(?P<rest>.+))?", re.IGNORECASE)


def parse_drift(value: Any) -> float:
    """A bound on drift in nats per token: ``0.05``, ``"0.05 nats"``, or ``"5%"``.

    A percentage is the growth of the perplexity: ``5%`` allows a perplexity ratio of 1.05, which is
    ``log(1.05) = 0.0488`` nats per token.

    Raises:
        ValueError: anything else, with what is expected.
    """
    expected = 'nats per token as in 0.05 or "0.05 nats", or growth of the perplexity as in "5%"'
    number, unit = _number(value, _DRIFT, expected)
    if unit != "%":
        return number
    if number <= -100:
        raise ValueError(expected)
    return math.log1p(number / 100)


def parse_share(value: Any) -> float:
    """A share between 0 and 1: ``0.85`` or ``"85%"``.

    Raises:
        ValueError: anything else, with what is expected.
    """
    expected = 'a share from 0 to 1, as in 0.85 or "85%"'
    number, unit = _number(value, _SHARE, expected)
    share = number / 100 if unit == "%" else number
    if not 0 <= share <= 1:
        raise ValueError(expected)
    return share


@dataclass(frozen=True, slots=True)
class Floor:
    """The least accuracy that is allowed.

    Attributes:
        value: a share from 0 to 1; with ``of_base`` what is added to the base model's accuracy on
            the same items, from -1 to 1.
        of_base: whether the floor is relative to the base model.
    """

    value: float
    of_base: bool = False

    def __str__(self) -> str:
        return f"base {self.value:+g}" if self.of_base else f"{self.value:g}"


def parse_floor(value: Any) -> Floor:
    """An accuracy floor: ``0.5``, ``"50%"``, ``"base"``, ``"base + 10%"`` or ``"base - 0.02"``.

    Percentages are percentage points, also next to ``base``.

    Raises:
        ValueError: anything else, with what is expected.
    """
    relative = _RELATIVE.fullmatch(value.strip()) if isinstance(value, str) else None
    try:
        if relative is None:
            return Floor(parse_share(value))
        difference = parse_share(relative["rest"]) if relative["rest"] else 0.0
    except ValueError:
        raise ValueError(
            'a share as in 0.5 or "50%", or one relative to the base model as in "base - 2%"'
        ) from None
    return Floor(-difference if relative["sign"] == "-" else difference, of_base=True)


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
