"""Sizes as people write them, parsed once: ``"14 GiB"``, ``"500 MB"``, ``4096``."""

from __future__ import annotations

import math
import re

from pytest_lora.errors import UsageError

__all__ = ["GIB", "format_bytes", "parse_bytes"]

GIB = 1 << 30

UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
"""Decimal and binary units are different things, as in IEC 80000-13: 1 GB is 0.93 GiB."""

_SIZE = re.compile(r"\s*(?P<number>\d+(?:_\d+)*(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*", re.ASCII)


def parse_bytes(size: str | int) -> int:
    """A positive number of bytes, from an integer or a text with a unit.

    A text needs its unit, B included: a bare ``"14"`` would be fourteen bytes, which nobody means.
    Fractions of a byte are dropped.

    Raises:
        UsageError: not such a size; the message says what was given and what is understood.
    """
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise UsageError(f"size {size!r} is neither a number of bytes nor a text like '14 GiB'")
    count = size if isinstance(size, int) else _parse(size)
    if count <= 0:
        raise UsageError(f"size {size!r} is not a positive number of bytes")
    return count


def _parse(text: str) -> int:
    match = _SIZE.fullmatch(text)
    factor = UNITS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"size {text!r} is not a number with a unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), "
            "as in '14 GiB' or '500 MB'"
        )
    whole, _, fraction = match["number"].replace("_", "").partition(".")
    scale: int = 10 ** len(fraction)
    return int(whole + fraction) * factor // scale


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest binary unit that leaves at least 1, to three digits or more.

    Meant for reading, not for parsing back: ``36.4 GiB``, ``812 B``, ``-1.5 MiB``.
    """
    size, unit = float(abs(count)), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" else max(0, 2 - int(math.log10(max(size, 1))))
    return f"{'-' if count < 0 else ''}{size:.{digits}f} {unit}"
