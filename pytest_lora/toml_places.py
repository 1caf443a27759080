"""Where in a TOML file a key stands: the standard library's reader does not tell.

Only used for messages, so a place that cannot be told for certain is left out, never guessed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

__all__ = ["find_lines"]

Keys = tuple[str, ...]


def find_lines(text: str) -> dict[Keys, int]:
    """The line (from 1) of every table header and every key of a valid TOML document.

    Keys are full paths, ``("adapters", "math-*", "cycles")``.  Lines inside multi-line strings that
    look like keys can be taken for one; a key that is really there has the first line that fits.
    """
    lines: dict[Keys, int] = {}
    table: Keys = ()
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("["):
            header = _path(_without_comment(stripped))
            if header is not None:
                table = header
                lines.setdefault(table, number)
        elif "=" in stripped and not stripped.startswith("#"):
            key = _path(f"{stripped.partition('=')[0]} = 0")
            if key is not None:
                lines.setdefault((*table, *key), number)
    return lines


def _path(line: str) -> Keys | None:
    """The keys that a header, or an assignment of 0, leads through."""
    try:
        data: Any = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return None
    keys: list[str] = []
    while isinstance(data, Mapping) and len(data) == 1:
        [(key, data)] = data.items()
        keys.append(key)
    return tuple(keys) or None


def _without_comment(header: str) -> str:
    """The header alone; a ``#`` in a quoted key is no comment."""
    end = header.rfind("]")
    return header[: end + 1]
