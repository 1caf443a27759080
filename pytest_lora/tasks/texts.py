"""Collections of documents, read from disk one document at a time.

A file is walked through once, to find where its documents begin and end and to digest what they
say; after that any document is read by itself, in any order.  In memory there are 24 bytes per
document and the one in hand, so that a file of a gigabyte does not become a gigabyte of memory.
Columnar files (Parquet, Arrow) cannot be read one row at a time: their texts are written to a
temporary file once, and then read like any other.

What a document is:

* ``.txt``: what stands between blank lines (``documents="paragraphs"``, the default), every line
  that is not blank (``"lines"``), or the whole (``"file"``).  Line ends are those of Unix then.
* ``.jsonl``: one JSON object a line, the text under the key ``field``.  Blank lines are skipped.
* ``.parquet``, and folders written by ``datasets``' ``save_to_disk``: the column ``field``.
* a sequence of strings: each of them.
"""

from __future__ import annotations

import array
import hashlib
import importlib.util
import json
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeGuard

from pytest_lora.errors import UsageError
from pytest_lora.names import meant

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DOCUMENTS", "LARGEST_DOCUMENT", "Texts", "open_texts"]

DOCUMENTS = ("paragraphs", "lines", "file")
"""What may count as a document in a ``.txt`` file."""

LARGEST_DOCUMENT = 16 * 1024 * 1024
"""Bytes (UTF-8, or of a line of JSON) one document may have; a larger one would have to be held in
memory whole, tokens and all, and is refused."""

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_ROWS_AT_A_TIME = 256


class _Place(NamedTuple):
    """Bytes of a document in a file, and the line (or row) it begins in, counted from 1."""

    start: int
    stop: int
    line: int


class Texts(Sequence[str]):
    """Documents in a fixed order, each read when asked for.

    Made by :func:`open_texts`.

    Attributes:
        name: what messages call the collection.
        digest: of what all documents say, in order: 32 hexadecimal digits.
    """

    def __init__(self, name: str, reader: _Reader) -> None:
        self.name, self._reader = name, reader
        self._starts, self._stops = array.array("Q"), array.array("Q")
        self._lines = array.array("Q")
        digest = hashlib.blake2b(digest_size=16)
        for place, text in reader.documents():
            self._starts.append(place.start)
            self._stops.append(place.stop)
            self._lines.append(place.line)
            raw = text.encode("utf-8")
            digest.update(len(raw).to_bytes(8, "little") + raw)
        if not self._starts:
            raise UsageError(f"{name}: no document in it")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        place = _Place(self._starts[index], self._stops[index], self._lines[index])
        return self._reader.read(place)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def label(self, index: int) -> str:
        """Where a document stands, as one would look it up: ``source.jsonl:12``."""
        return self._reader.label(self.name, self._lines[index])


def open_texts(
    source: str | Path | Sequence[str],
    *,
    field: str = "text",
    documents: str = "paragraphs",
    split: str | None = None,
    name: str | None = None,
) -> Texts:
    """The documents of ``source``; each is looked at once.

    Args:
        source: a path (``.txt``, ``.jsonl``, ``.parquet``, a folder of ``save_to_disk``), strings,
            or a collection that is open already.
        field: key or column of the text, in formats that name it.
        documents: what a document is in a ``.txt`` file, one of :data:`DOCUMENTS`.
        split: which split, in a folder that has several.
        name: what to call it; the default is the path's last part.

    Raises:
        UsageError: with file and line: missing, empty, not UTF-8, not JSON, no such field, or a
            document beyond :data:`LARGEST_DOCUMENT`.
    """
    if isinstance(source, Texts):
        return source
    if not isinstance(source, str | Path):
        return Texts(name or "texts", _Strings(source))
    path = Path(source)
    if documents not in DOCUMENTS:
        raise UsageError(f"documents={documents!r} is none of {', '.join(DOCUMENTS)}")
    if path.is_dir():
        return Texts(name or path.name, _Spooled(_arrow_rows(path, split, field)))
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file{_beside(path)}")
    if path.suffix == ".jsonl":
        return Texts(name or path.name, _JsonLines(path, field))
    if path.suffix == ".parquet":
        return Texts(name or path.name, _Spooled(_parquet_rows(path, field)))
    if path.suffix == ".txt":
        return Texts(name or path.name, _PlainText(path, documents))
    raise UsageError(
        f"{path}: texts are read from {', '.join(_SUFFIXES)} and folders of save_to_disk,"
        f" not from {path.suffix or 'files without a suffix'}"
    )


def _beside(path: Path) -> str:
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    return meant(path.name, names)


# ------------------------------------------------------------------------------ readers


class _Reader:
    """How one format is walked through and read."""

    def documents(self) -> Iterator[tuple[_Place, str]]:
        """Every document with its place, from first to last."""
        raise NotImplementedError

    def read(self, place: _Place) -> str:
        """The document at a place that :meth:`documents` gave."""
        raise NotImplementedError

    def label(self, name: str, line: int) -> str:
        """Where a document is to be found, in words."""
        return f"{name}:{line}"


class _Strings(_Reader):
    """Documents in memory; a place's ``start`` is their number."""

    def __init__(self, texts: Sequence[Any]) -> None:
        self._texts = texts

    def documents(self) -> Iterator[tuple[_Place, str]]:
        for number, text in enumerate(self._texts):
            if not isinstance(text, str):
                found = type(text).__name__
                raise UsageError(f"texts[{number}] is of type {found}, where a string was expected")
            yield _Place(number, number, number), _valid(text, f"texts[{number}]")

    def read(self, place: _Place) -> str:
        text: str = self._texts[place.start]
        return text

    def label(self, name: str, line: int) -> str:
        return f"{name}[{line}]"


class _File(_Reader):
    """Documents that are byte ranges of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: IO[bytes] = path.open("rb")
        weakref.finalize(self, self._stream.close)

    def read(self, place: _Place) -> str:
        self._stream.seek(place.start)
        return self.decode(self._stream.read(place.stop - place.start), place.line)

    def decode(self, raw: bytes, line: int) -> str:
        """The document in ``raw``, which begins in ``line``."""
        raise NotImplementedError

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and bytes of every line."""
        offset = number = 0
        with self.path.open("rb") as stream:
            while raw := stream.readline(LARGEST_DOCUMENT + 1):
                number += 1
                self.limit(len(raw), number)
                yield number, offset, raw
                offset += len(raw)

    def limit(self, size: int, line: int) -> None:
        """Refuse a document that would fill the memory."""
        if size > LARGEST_DOCUMENT:
            raise UsageError(
                f"{self.path}:{line}: a document of more than {LARGEST_DOCUMENT >> 20} MiB; split"
                " it into several"
            )

    def utf8(self, raw: bytes, line: int) -> str:
        """Bytes as text, a byte-order mark at the very beginning left out."""
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line += raw.count(b"\n", 0, error.start)
            raise UsageError(
                f"{self.path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); convert the file"
            ) from None


class _PlainText(_File):
    def __init__(self, path: Path, documents: str) -> None:
        super().__init__(path)
        self._cut = documents

    def documents(self) -> Iterator[tuple[_Place, str]]:
        for place in self._places():
            text = self.read(place)
            if text.strip():
                yield place, text

    def _places(self) -> Iterator[_Place]:
        begun: _Place | None = None
        for number, offset, raw in self.lines():
            stop = offset + len(raw)
            if begun and self._cut != "file" and (self._cut == "lines" or not raw.strip()):
                yield begun
                begun = None
            if begun:
                begun = begun._replace(stop=stop)
                self.limit(begun.stop - begun.start, begun.line)
            elif raw.strip() or self._cut == "file":
                begun = _Place(offset, stop, number)
        if begun:
            yield begun

    def decode(self, raw: bytes, line: int) -> str:
        text = self.utf8(raw, line).replace("\r\n", "\n").replace("\r", "\n")
        return text if self._cut == "file" else text.rstrip("\n")


class _JsonLines(_File):
    def __init__(self, path: Path, field: str) -> None:
        super().__init__(path)
        self._field = field

    def documents(self) -> Iterator[tuple[_Place, str]]:
        for number, offset, raw in self.lines():
            if raw.strip():
                yield _Place(offset, offset + len(raw), number), self.decode(raw, number)

    def decode(self, raw: bytes, line: int) -> str:
        where = f"{self.path}:{line}"
        try:
            item = json.loads(self.utf8(raw, line))
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        except (RecursionError, ValueError):  # nested without end, or a number of 5,000 digits
            raise UsageError(f"{where}: JSON that cannot be read") from None
        if not isinstance(item, dict):
            found = type(item).__name__
            raise UsageError(f"{where}: a JSON {found} where an object was expected")
        if self._field not in item:
            raise UsageError(f"{where}: {_no_field(self._field, item)}")
        text = item[self._field]
        if not isinstance(text, str):
            found = type(text).__name__
            raise UsageError(f"{where}: {self._field!r} is of type {found}, not a string")
        return _valid(text, where)


def _no_field(field: str, known: Iterable[str]) -> str:
    names = sorted(str(name) for name in known)
    listed = ", ".join(names[:12]) or "none"
    return f"no field {field!r} (there: {listed}){meant(field, names)}"


def _valid(text: str, where: str) -> str:
    """Half of a surrogate pair is no text: no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{where}: half of a surrogate pair, which is no text") from None
    return text


# ------------------------------------------------------------------------------ columnar files


class _Spooled(_Reader):
    """Rows of a columnar file, copied once into a temporary file; a place's line is the row."""

    def __init__(self, rows: Iterator[tuple[str, Any]]) -> None:
        self._rows = rows
        self._stream: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- closed below
        weakref.finalize(self, self._stream.close)

    def documents(self) -> Iterator[tuple[_Place, str]]:
        offset = 0
        for number, (where, text) in enumerate(self._rows, 1):
            if not isinstance(text, str):
                found = "null" if text is None else type(text).__name__
                raise UsageError(f"{where}: {found} where a string was expected")
            raw = _valid(text, where).encode("utf-8")
            if len(raw) > LARGEST_DOCUMENT:
                raise UsageError(f"{where}: more than {LARGEST_DOCUMENT >> 20} MiB; split it")
            self._stream.write(raw)
            yield _Place(offset, offset + len(raw), number), text
            offset += len(raw)

    def read(self, place: _Place) -> str:
        self._stream.seek(place.start)
        return self._stream.read(place.stop - place.start).decode("utf-8")

    def label(self, name: str, line: int) -> str:
        return f"{name}, row {line}"


def _require_pyarrow(path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError(
            f"{path}: reading it takes pyarrow; install it, or give the texts as .jsonl"
        )


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    _require_pyarrow(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require_column(path, field, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=[field])
            yield from _rows(path, batches, field, 0)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: no readable Parquet file: {_brief(error)}") from None


def _arrow_rows(folder: Path, split: str | None, field: str) -> Iterator[tuple[str, Any]]:
    """Rows of a dataset on disk, which is memory-mapped, not read."""
    home = _split_folder(folder, split)
    _require_pyarrow(home)
    import pyarrow as pa

    number = 0
    for path in _data_files(home):
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                _require_column(path, field, reader.schema.names)
                for where, text in _rows(home, reader, field, number):
                    yield where, text
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{path}: no readable Arrow file: {_brief(error)}") from None


def _rows(path: Path, batches: Any, field: str, first: int) -> Iterator[tuple[str, Any]]:
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(field))
        for start in range(0, len(column), _ROWS_AT_A_TIME):
            for text in column.slice(start, _ROWS_AT_A_TIME).to_pylist():
                first += 1
                yield f"{path}, row {first}", text


def _require_column(path: Path, field: str, names: Sequence[str]) -> None:
    if field not in names:
        raise UsageError(f"{path}: {_no_field(field, names)}")


def _brief(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _split_folder(folder: Path, split: str | None) -> Path:
    listed = folder / "dataset_dict.json"
    if not listed.is_file():
        if not (folder / "state.json").is_file():
            raise UsageError(
                f"{folder}: a folder of texts is one written by save_to_disk, with a state.json"
            )
        return folder
    splits = _json(listed).get("splits")
    names = [name for name in splits if _plain(name)] if isinstance(splits, list) else []
    if split is None and len(names) == 1:
        return folder / str(names[0])
    if split is None or split not in names:
        asked = f"there is no split {split!r}" if split else "say which split"
        raise UsageError(
            f"{folder}: {asked} (there: {', '.join(names)}){meant(split or '', names)}"
        )
    return folder / split


def _data_files(folder: Path) -> list[Path]:
    """The files ``state.json`` names, which may not lie elsewhere."""
    files = _json(folder / "state.json").get("_data_files")
    names = [item.get("filename") for item in files or () if isinstance(item, dict)]
    for name in names:
        if not _plain(name) or not (folder / name).is_file():
            raise UsageError(f"{folder / 'state.json'}: the data file {name!r} is not beside it")
    return [folder / name for name in names if _plain(name)]


def _plain(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and Path(name).name == name and name not in (".", "..")


def _json(path: Path) -> dict[str, Any]:
    from pytest_lora.strict_json import JsonError, read_object

    try:
        return read_object(path)
    except JsonError as error:
        raise UsageError(f"{path}: {error}") from None
