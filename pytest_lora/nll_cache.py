"""What was computed once is kept on disk: sums per document, in files that only grow.

A *ledger* holds the results of one computation (one model, one collection of texts, one
definition), batch by batch.  Its name is the digest of everything the results depend on, which its
first line repeats in full; every other line is one batch:

    <16 hexadecimal digits of BLAKE2b of the rest> {"batch": 3, "values": [[12.5, 40], ...]}

A line is written whole under a lock, so runs at the same time share a ledger, and a run that is
killed leaves at most half a line, which counts as nothing.  A line that does not match its digest
is left out, said in one line, and removed.  Floating-point numbers are written so that reading
gives the same bits.

The folder is bounded: before a ledger is begun, those unused for longest are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_lora.atomic import replace_file
from pytest_lora.errors import UsageError

if TYPE_CHECKING:
    from pytest_lora.records import Json

__all__ = ["DEFAULT_LIMIT", "Ledger", "NllCache", "Scores", "default_folder"]

DEFAULT_LIMIT = 256 << 20
"""Bytes the folder may hold: some millions of documents."""

VARIABLE = "PYTEST_LORA_CACHE"
_SUFFIX = ".nll"
_LOCK = ".lock"
_PATIENCE = 60.0
"""Seconds to wait for a lock; others hold it for the time it takes to write a line."""
_DIGITS = 16


def default_folder() -> Path:
    r"""Where results are kept: ``$PYTEST_LORA_CACHE``, else the platform's place for caches.

    ``$XDG_CACHE_HOME/pytest-lora`` (or ``~/.cache/pytest-lora``), ``~/Library/Caches/pytest-lora``
    on macOS, ``%LOCALAPPDATA%\pytest-lora`` on Windows.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "pytest-lora"
    windows = sys.platform == "win32"
    place = os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")
    return Path(place or home / (".cache" if not windows else "AppData/Local")) / "pytest-lora"


class NllCache:
    """A folder of ledgers.

    Attributes:
        folder: where it is; None keeps everything in memory, for the length of a run.
        limit: bytes it may hold.
        notes: what was wrong with what was found there, one line each.
    """

    def __init__(self, folder: Path | str | None, *, limit: int = DEFAULT_LIMIT) -> None:
        if limit < 0:
            raise UsageError(f"a cache of {limit} bytes holds nothing; leave it out instead")
        self.folder, self.limit = None if folder is None else Path(folder), limit
        self.notes: list[str] = []
        if self.folder is not None:
            self._make(self.folder)

    @classmethod
    def default(cls) -> NllCache:
        """The one in :func:`default_folder`."""
        return cls(default_folder())

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            self.notes.append(f"no cache in {folder}: {error.strerror or error}")
            self.folder = None

    def ledger(self, key: Mapping[str, Json]) -> Ledger:
        """The results that ``key`` describes, which has to name all that they depend on."""
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        if self.folder is None:
            return Ledger(None, text, self.notes)
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest() + _SUFFIX
        path = self.folder / name
        if path.exists():
            with contextlib.suppress(OSError):
                os.utime(path)
        else:
            self._make_room()
        return Ledger(path, text, self.notes)

    def _make_room(self) -> None:
        """Remove the ledgers unused for longest until the folder is within its limit."""
        assert self.folder is not None
        known = []
        for path in self.folder.glob("*" + _SUFFIX):
            with contextlib.suppress(OSError):  # another run may remove it
                found = path.stat()
                known.append((found.st_mtime_ns, found.st_size, path))
        total = sum(size for _, size, _ in known)
        for _, size, path in sorted(known):
            if total <= self.limit:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


class Scores:
    """Scores by key in one ledger of a cache, for :class:`~pytest_lora.tasks.scoring.Store`.

    Keys are digests of all that a score depends on; so the ledger's own key need not be.
    """

    def __init__(self, cache: NllCache, name: str) -> None:
        self._ledger = cache.ledger({"scores": name})

    def get(self, key: str) -> float | None:
        """The score put under ``key``, or None."""
        rows = self._ledger.get(_number_of(key), 1)
        return rows[0][0] if rows else None

    def put(self, key: str, score: float) -> None:
        """Keep a score; on disk when this returns."""
        self._ledger.put(_number_of(key), [[score]])


def _number_of(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "big")


class Ledger:
    """Results by batch number; each is a list of rows of numbers.

    Made by :meth:`NllCache.ledger`.
    """

    def __init__(self, path: Path | None, key: str, notes: list[str]) -> None:
        self._path, self._key, self._notes = path, key, notes
        self._batches: dict[int, list[list[float]]] = {}
        self._read_to, self._file = 0, 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._batches)

    def get(self, batch: int, rows: int) -> list[list[float]] | None:
        """The rows of a batch, if they are known and as many as expected."""
        found = self._batches.get(batch)
        return found if found is not None and len(found) == rows else None

    def put(self, batch: int, values: Sequence[Sequence[float]]) -> None:
        """Keep the rows of a batch; on disk when this returns, whatever happens to the process."""
        rows = [list(row) for row in values]
        self._batches[batch] = rows
        if self._path is None or not all(math.isfinite(x) for row in rows for x in row):
            return
        try:
            with self._locked(self._path), self._path.open("ab+") as stream:
                end = self._cut_off_half_a_line(stream)
                stream.write(("" if end else _line(self._key)).encode() + _batch_line(batch, rows))
        except OSError as error:
            self._notes.append(f"cannot write {self._path}: {error.strerror or error}")
            self._path = None

    @staticmethod
    def _cut_off_half_a_line(stream: IO[bytes]) -> int:
        """Where the file ends, once what a killed run left at its end is gone."""
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                end = stream.truncate(stream.read().rfind(b"\n") + 1)
        return end

    @staticmethod
    @contextlib.contextmanager
    def _locked(path: Path) -> Iterator[None]:
        import filelock

        try:
            with filelock.FileLock(str(path.parent / _LOCK), timeout=_PATIENCE):
                yield
        except filelock.Timeout as error:
            raise OSError(f"locked for {_PATIENCE:.0f} seconds") from error

    def refresh(self) -> None:
        """Read what other runs have added."""
        if self._path is None:
            return
        try:
            with self._path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_ino != self._file:
                    self._file, self._read_to = os.fstat(stream.fileno()).st_ino, 0
                stream.seek(self._read_to)
                raw = stream.read()
        except OSError:  # not begun yet, or removed to make room
            return
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = whole.splitlines()
        damaged = 0
        if self._read_to == 0 and lines and _body(lines.pop(0)) != self._key.encode():
            damaged, lines = 1 + len(lines), []  # whose results they are is not known
        self._read_to += len(whole)
        for line in lines:
            entry = _entry(line)
            damaged += entry is None
            if entry is not None:
                self._batches[entry[0]] = entry[1]
        if damaged:
            self._mend(damaged)

    def _mend(self, damaged: int) -> None:
        """Write the ledger anew without its damaged lines, as it is once nobody else writes."""
        assert self._path is not None
        self._notes.append(f"{self._path}: left out {damaged} damaged lines, to be computed again")
        key = _line(self._key).encode()
        with contextlib.suppress(OSError), self._locked(self._path):
            lines = self._path.read_bytes().splitlines(keepends=True)
            ours = lines[:1] == [key]
            sound = [line for line in lines[1:] if ours and _entry(line.rstrip(b"\n"))]
            replace_file(self._path, key + b"".join(line for line in sound if line.endswith(b"\n")))


def _batch_line(batch: int, rows: list[list[float]]) -> bytes:
    return _line(json.dumps({"batch": batch, "values": rows}, allow_nan=False)).encode()


def _line(body: str) -> str:
    return f"{_checksum(body.encode())} {body}\n"


def _checksum(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=_DIGITS // 2).hexdigest()


def _body(line: bytes) -> bytes | None:
    """What a line says, if it is whole."""
    given, _, body = line.partition(b" ")
    return body if given == _checksum(body).encode() else None


def _entry(line: bytes) -> tuple[int, list[list[float]]] | None:
    body = _body(line)
    if body is None:
        return None
    try:
        found = json.loads(body)
        rows = [[float(x) for x in row] for row in found["values"]]
        return int(found["batch"]), rows
    except (ValueError, TypeError, KeyError):  # whoever wrote it knew the checksum
        return None
