"""Words and numbers for people: one verdict in one line, or explained in a few."""

from __future__ import annotations

import math

from pytest_lora.catalog import CHECKS, find_check
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome

__all__ = [
    "allowed",
    "check_list",
    "clean",
    "encodable",
    "explain",
    "measured",
    "number",
    "spellings",
    "to_move",
]

_MOST_PROBLEMS = 10
_OF_A_SOURCE = "max_drift in "
"""How the origin begins of a limit that a source of the profile has for itself."""
# What stands for a sign where it cannot be shown.
_PLAIN = {
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}
_VERBS = {
    Outcome.PASSED: "passed",
    Outcome.FAILED: "FAILED",
    Outcome.SKIPPED: "skipped",
    Outcome.INCONCLUSIVE: "INCONCLUSIVE",
    Outcome.ERROR: "ERROR",
}


def clean(text: str) -> str:
    """``text`` on one line, with nothing in it that a terminal would obey.

    Names of tensors and folders are the adapter author's to choose, escape sequences included.
    """
    # GitHub obeys "##[" wherever a line has it.
    line = " ".join(text.split()).replace("##[", "# #[")
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def encodable(text: str, encoding: str) -> str:
    """``text`` in characters of ``encoding``: plain ones for signs, escapes for any other.

    What a Windows code page (cp437, cp1252) or the C locale cannot show must neither stop a report
    nor turn all of a line into escapes.
    """
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return "".join(_encodable(char, encoding) for char in text)
    except LookupError:  # an encoding of the terminal's own
        return encodable(text, "ascii")


def _encodable(char: str, encoding: str) -> str:
    try:
        char.encode(encoding)
        return char
    except UnicodeEncodeError:
        return _PLAIN.get(char) or ascii(char)[1:-1]


def number(value: float, *, apart_from: Bound | None = None) -> str:
    """``value`` in three digits, or in as many as tell it from the limits of a bound."""
    limits = [apart_from.low, apart_from.high] if apart_from is not None else []
    others = [limit for limit in limits if limit is not None and limit != value]
    telling = (
        _rounded(value, digits)
        for digits in range(3, 17)
        if _rounded(value, digits) not in [_rounded(limit, digits) for limit in others]
    )
    return next(telling, _rounded(value, 17))


def _rounded(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.{digits}g}"


def measured(measurement: Measurement, bound: Bound | None = None) -> str:
    """Value, unit, interval and what it rests on, in digits that show on which side it lies."""
    unit = clean(measurement.unit)
    if measurement.value == 1 and " " not in unit:
        unit = unit.removesuffix("s")
    text = f"{number(measurement.value, apart_from=bound)} {unit}"
    if measurement.low is not None and measurement.high is not None:
        text += f" [{number(measurement.low)}, {number(measurement.high)}]"
    return f"{text} (n={measurement.count:,})"


def allowed(bound: Bound) -> str:
    """The limits of a bound and who set them."""
    parts = []
    if bound.low is not None:
        # The smallest positive number stands for "anything but zero".
        parts.append("more than 0" if 0 < bound.low < 1e-300 else f"at least {number(bound.low)}")
    if bound.high is not None:
        parts.append(f"at most {number(bound.high)}")
    if math.inf in (bound.high, -(bound.low or 0.0)):
        parts = ["any finite value"]
    return f"{' and '.join(parts)} ({clean(bound.origin)})"


def explain(result: CheckResult) -> str:
    """The verdict in a fixed order: what, how much, the worst place, the bound, what to do."""
    lines = [_headline(result)]
    if result.measurement is not None:
        lines += _evidence(result.measurement)
    if result.bound is not None:
        lines.append(f"  allowed: {allowed(result.bound)}")
    if result.advice:
        lines.append(f"  what to do: {clean(result.advice)}")
    if place := to_move(result):
        lines.append(f"  to move the bound: {place}")
    return "\n".join(lines)


def _headline(result: CheckResult) -> str:
    text = f"{clean(result.label)} {_VERBS[result.outcome]} for {clean(result.adapter)}"
    if result.measurement is not None:
        text += f": {measured(result.measurement, result.bound)}"
    return f"{text}: {clean(result.reason)}" if result.reason else text


def _evidence(measurement: Measurement) -> list[str]:
    problems = measurement.problems
    lines = [f"  - {clean(str(problem))}" for problem in problems[:_MOST_PROBLEMS]]
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"  - ... and {len(problems) - _MOST_PROBLEMS} more")
    if not problems and measurement.where:
        lines.append(f"  worst: {clean(measurement.where)}")
    return lines + [f"  note: {clean(note)}" for note in measurement.notes]


def to_move(result: CheckResult) -> str:
    """Where a bound that was missed is moved; empty where nothing failed, or nobody may."""
    if result.outcome is not Outcome.FAILED or not _movable(result.check):
        return ""
    origin = clean(result.bound.origin) if result.bound is not None else ""
    if origin.startswith(_OF_A_SOURCE):
        return f"{origin.partition(': ')[0]}, which goes before any option"
    return spellings(result.check)


def _movable(check: str) -> bool:
    """Whether the check is ours and has a bound that the user may move."""
    try:
        return bool(find_check(check).limit)
    except KeyError:
        return False


def spellings(check: str) -> str:
    """The places a bound can be set in, as the user would write them."""
    option = "--lora-" + check.replace("_", "-")
    limit = "SIZE" if find_check(check).opt_in else "LIMIT"
    return f"{option}={limit}, ini lora_{check}, or @pytest.mark.lora_bounds({check}={limit})"


def check_list() -> str:
    """What ``--lora-list-checks`` prints: every check with its question, need, cost and bound."""
    width = max(len(spec.id) for spec in CHECKS)
    lines = []
    for spec in CHECKS:
        lines.append(f"{spec.id:<{width}}  {spec.question}")
        facts = f"needs {spec.need.label}; {spec.cost}"
        if spec.limit:
            facts += f"; bound to move: {spellings(spec.id)}"
        lines.append(f"{'':<{width}}  {facts}")
    return "\n".join(lines)
