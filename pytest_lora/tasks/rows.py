"""Records of JSON files, one at a time: JSON Lines, an array of objects, either gzipped.

Files are untrusted.  Memory is bounded by one record; what a gzipped file may grow to is limited.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pytest_lora.errors import UsageError
from pytest_lora.strict_json import JsonError, parse_object

__all__ = ["MAX_BYTES", "MAX_RECORD", "Row", "read_rows"]

MAX_RECORD = 4 * 1024 * 1024
"""Bytes of the longest record read: a long document with its question has some hundred thousand."""

MAX_BYTES = 1024 * 1024 * 1024
"""Bytes of a whole file, unpacked: the largest public test sets have some ten million."""

_CHUNK = 1 << 16
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_TOKEN = re.compile(rb'["\\{}\[\]\n]')
_BETWEEN = b" \t\r\n,"


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file and the line it begins on, from 1."""

    file: Path
    line: int
    fields: dict[str, Any]

    def fault(self, what: str) -> UsageError:
        """An error that names the file and the line."""
        return UsageError(f"{self.file}:{self.line}: {what}")


def read_rows(path: Path) -> Iterator[Row]:
    """The objects in a JSON Lines file or a JSON array; a gzipped one is known by its first bytes.

    Raises:
        UsageError: the file is missing or too large, or a record is no JSON object; file and line
            are named.
    """
    with _opened(path) as stream:
        first = stream.read(1)
        while first and first in b" \t\r\n":
            first = stream.read(1)
        if not first:
            raise UsageError(f"{path}: the file is empty")
        stream.seek(0)
        if stream.read(len(_BOM)) != _BOM:
            stream.seek(0)
        else:
            first = stream.read(1)
            stream.seek(len(_BOM))
        yield from (_elements if first == b"[" else _lines)(path, stream)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        if not path.is_file():
            found = "is no regular file" if path.exists() else "there is no such file"
            raise UsageError(f"{path}: {found}; a task needs a .jsonl, .json or .jsonl.gz file")
        with path.open("rb") as stream:
            packed = stream.read(2) == _GZIP
            stream.seek(0)
            if not packed:
                yield stream
                return
            with gzip.open(stream) as unpacked:
                yield unpacked  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None


def _lines(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    total = 0
    line = 0
    while raw := stream.readline(MAX_RECORD + 1):
        line += 1
        total += len(raw)
        _require_bounded(path, line, len(raw), total)
        if raw.strip():
            yield _row(path, line, raw)


def _elements(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    """The objects of an array: a scanner finds where each ends, the strict reader reads it."""
    scanner = _Scanner(path)
    while chunk := stream.read(_CHUNK):
        yield from scanner.feed(chunk)
    scanner.finish()


class _Scanner:
    """Cuts the elements out of a JSON array, chunk by chunk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._line = self._began = 1
        self._depth = 0
        self._in_string = self._escaped = False
        self._parts: list[bytes] = []
        self._held = self._total = 0

    def feed(self, chunk: bytes) -> Iterator[Row]:
        """Take in a chunk; the elements that end in it."""
        self._total += len(chunk)
        begin = 0  # of what belongs to the current element
        place = 0
        if self._escaped:
            self._escaped, place = False, 1
        while match := _TOKEN.search(chunk, place):
            place, token = match.end(), match[0]
            if token == b"\n":
                self._line += 1
            elif token == b"\\":
                if place == len(chunk):
                    self._escaped = True
                place += 1
            elif token == b'"':
                self._in_string = not self._in_string
            elif not self._in_string and token in b"{[":
                if self._depth == 1:
                    self._require_nothing(chunk[begin : match.start()])
                    begin, self._began = match.start(), self._line
                self._depth += 1
                if self._depth == 1:
                    begin = place
            elif not self._in_string:
                self._depth -= 1
                if self._depth == 1:
                    yield self._element(chunk[begin:place])
                    begin = place
                elif self._depth == 0:
                    self._require_nothing(chunk[begin : match.start()])
                    begin = place
        self._hold(chunk[begin:])

    def finish(self) -> None:
        """Nothing may be left open."""
        if self._depth or self._in_string:
            raise self._fault("the array ends in the middle; is the file whole?")
        self._require_nothing(b"")

    def _element(self, tail: bytes) -> Row:
        raw = b"".join([*self._parts, tail])
        self._parts, self._held = [], 0
        _require_bounded(self.path, self._began, len(raw), self._total)
        return _row(self.path, self._began, raw)

    def _hold(self, rest: bytes) -> None:
        self._parts.append(rest)
        self._held += len(rest)
        _require_bounded(self.path, self._began, self._held, self._total)

    def _require_nothing(self, text: bytes) -> None:
        """Between elements, and behind the array, only commas and white space may stand."""
        left = b"".join([*self._parts, text]).strip(_BETWEEN)
        self._parts, self._held = [], 0
        if left:
            shown = left[:40].decode("utf-8", "replace")
            raise self._fault(f"{shown!r} where an object was expected")

    def _fault(self, what: str) -> UsageError:
        return UsageError(f"{self.path}:{self._line}: {what}")


def _require_bounded(path: Path, line: int, record: int, total: int) -> None:
    if record > MAX_RECORD:
        raise UsageError(f"{path}:{line}: a record of more than {MAX_RECORD} bytes")
    if total > MAX_BYTES:
        raise UsageError(f"{path}: more than {MAX_BYTES} bytes of records")


def _row(path: Path, line: int, raw: bytes) -> Row:
    try:
        return Row(path, line, parse_object(raw))
    except JsonError as error:
        raise UsageError(f"{path}:{line}: {error}") from None
