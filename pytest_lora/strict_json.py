"""JSON from files nobody vouches for: bounded, without duplicate keys, without ``NaN``.

Python's own reader keeps the last of two equal keys and accepts ``NaN``; both hide faults, and a
deeply nested document raises ``RecursionError``.  Here all of them are :class:`JsonError`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MAX_JSON_BYTES", "JsonError", "key_lines", "parse_object", "read_object"]

MAX_JSON_BYTES = 16 * 1024 * 1024
"""Largest JSON file read: the biggest adapter configurations known are some hundred kilobytes."""


class JsonError(ValueError):
    """What is wrong with a JSON document, as one phrase that follows the file's name."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw`` (UTF-8, without a byte-order mark).

    Raises:
        JsonError: whatever is wrong; no other exception.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_integer if b"-0" in raw else None,
        )
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise JsonError("half of a surrogate pair, which is no text") from error
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise JsonError(
            f"not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except RecursionError as error:
        raise JsonError("nested too deeply to be read") from error
    except JsonError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise JsonError("a number with thousands of digits") from error
    if not isinstance(value, dict):
        raise JsonError(f"a JSON {_kind(value)} where an object was expected")
    return value


def read_object(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the file ``path``, of at most ``limit`` bytes.

    Raises:
        JsonError: unreadable, too large, or not a JSON object.
    """
    try:
        if not path.is_file():
            raise JsonError("not a regular file" if path.exists() else "missing")
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise JsonError(f"unreadable ({error.strerror or error})") from error
    if len(raw) > limit:
        raise JsonError(f"more than {limit} bytes long")
    if not raw.strip():
        raise JsonError("empty")
    return parse_object(raw)


_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]|\n', re.DOTALL)


def key_lines(text: str) -> dict[str, int]:
    """The line, counted from 1, of each key of the outermost object in a JSON document.

    For pointing at a key; text that is no JSON gives whatever lines can be told.
    """
    found: dict[str, int] = {}
    line, depth, last = 1, 0, ("", 1)
    for match in _TOKENS.finditer(text):
        token = match[0]
        if token == "\n":
            line += 1
        elif token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
        elif token == ":":
            if depth == 1:
                found.setdefault(*last)
        else:
            last = (_text(token), line)
            line += token.count("\n")
    return found


def _text(token: str) -> str:
    try:
        return str(json.loads(token, strict=False))
    except ValueError:
        return token[1:-1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise JsonError(f"the key {twice[:200]!r} occurs twice")
    return found


def _integer(text: str) -> int:
    if text == "-0":  # Rust reads it as a float, Python as the integer 0
        raise JsonError("the number -0")
    return int(text)


def _refuse_constant(text: str) -> Any:
    raise JsonError(f"the constant {text}, which is not JSON")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names[type(value)]
