"""What a safetensors file says it holds, read and proven before anything else touches the file.

The format (version 0.8 of the library): eight bytes little-endian header length ``n``, ``n`` bytes
of JSON, then the tensors' bytes back to back.  Everything is checked against the file's true size
before it is believed, so a hostile header cannot ask for memory: at most the header itself is read.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_lora.errors import LoraError
from pytest_lora.records import Problem
from pytest_lora.strict_json import JsonError, parse_object, read_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "Header",
    "HeaderError",
    "Sharded",
    "TensorInfo",
    "iter_bytes",
    "read_header",
    "read_sharded",
    "sniff",
]

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the header's length."""

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Every element type safetensors 0.8 can write, and the bits one element takes."""

_LIMIT = 2**63
_MAX_NAME = 4096
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_RELOAD = "fetch or save the file again"
_LFS = b"version https://git-lfs"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (a pickle)", "convert"),
    (b"\x80\x02", "a Python pickle", "convert"),
    (b"\x80\x03", "a Python pickle", "convert"),
    (b"\x80\x04", "a Python pickle", "convert"),
    (b"\x80\x05", "a Python pickle", "convert"),
    (b"GGUF", "a GGUF file", ""),
    (b"\x89HDF", "an HDF5 file", ""),
    (b"\x1f\x8b", "a gzip archive", ""),
    (b"<!DOCTYPE", "an HTML page (a download that was answered by a web page)", _RELOAD),
    (b"<html", "an HTML page (a download that was answered by a web page)", _RELOAD),
)
CONVERT = (
    "convert it where you trust it: load_peft_weights(folder) of peft.utils, then "
    "safetensors.torch.save_file(weights, 'adapter_model.safetensors')"
)
"""How to turn a pickle into safetensors."""


class HeaderError(LoraError):
    """The file is not a whole, plain safetensors file; :attr:`problem` says what it is instead."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its key in the file.
        dtype: element type in safetensors' spelling (``F32``, ``BF16``, ...).
        shape: sizes of its dimensions; ``()`` for a scalar.
        start, end: byte offsets within ``file``, counted from the beginning of the file.
        file: the file it lies in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """One safetensors file, proven whole: every byte belongs to exactly one tensor."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sharded:
    """The shards an index names, with everything wrong about them."""

    headers: tuple[Header, ...]
    problems: tuple[Problem, ...]


def read_header(path: Path) -> Header:
    """Read and prove the header of the safetensors file ``path``.

    Reads the first eight bytes and the header, nothing else.

    Raises:
        HeaderError: the file is anything but a whole, plain safetensors file.
    """
    try:
        with _open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = _header_bytes(stream, size, path.name)
    except OSError as error:
        raise _error(path.name, *_describe_os_error(error)) from error
    return _parse(path, raw, size)


def iter_bytes(info: TensorInfo, *, chunk: int = 1 << 20) -> Iterator[bytes]:
    """The raw little-endian bytes of a tensor, in blocks of ``chunk`` bytes (the last may be less).

    Raises:
        HeaderError: the file changed or broke since its header was read.
    """
    left = info.nbytes
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            while left:
                block = stream.read(min(chunk, left))
                if not block:
                    raise _error(info.file.name, "became shorter while it was read", "", _RELOAD)
                left -= len(block)
                yield block
    except OSError as error:
        raise _error(info.file.name, *_describe_os_error(error)) from error


def sniff(path: Path) -> tuple[str, str]:
    """What a file that ought to be safetensors is instead, and what to do; empty if not known."""
    try:
        with _open_regular(path) as stream:
            head = stream.read(512)
    except (HeaderError, OSError):
        return "", ""
    return _recognise(head)


def _open_regular(path: Path) -> BinaryIO:
    """Open ``path`` unless it is a folder, a pipe or a device, which would block or never end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise _error(path.name, "a directory", "a safetensors file")
    if not stat.S_ISREG(mode):
        raise _error(path.name, "not a regular file", "a safetensors file")
    return path.open("rb")


def _header_bytes(stream: BinaryIO, size: int, name: str) -> bytes:
    prefix = stream.read(8)
    if size == 0:
        raise _error(name, "an empty file (0 bytes)", "a safetensors file", _RELOAD)
    what, fix = _recognise(prefix + stream.read(504))
    if what:
        raise _error(name, what, "a safetensors file", fix)
    if len(prefix) < 8:
        raise _error(name, f"{size} bytes long", "at least 8 bytes of header length", _RELOAD)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise _error(
            name, f"a header length of {length} bytes", f"between 2 and {MAX_HEADER_BYTES}", _RELOAD
        )
    if length > size - 8:
        raise _error(
            name,
            f"cut off inside its header: {size - 8} of {length} header bytes are there",
            "",
            _RELOAD,
        )
    stream.seek(8)
    return stream.read(length)


def _recognise(head: bytes) -> tuple[str, str]:
    if head[8:9] == b"{":  # a header length may look like magic: 640 is 0x80 0x02
        return "", ""
    if head.startswith(_LFS):
        return _describe_lfs(head), "run `git lfs pull` in the repository it came from"
    for magic, what, fix in _MAGIC:
        if head.startswith(magic):
            return what, CONVERT if fix == "convert" else fix
    return "", ""


def _describe_lfs(head: bytes) -> str:
    fields = dict(
        line.split(" ", 1) for line in head.decode("ascii", "replace").splitlines() if " " in line
    )
    size = fields.get("size", "")
    promised = f" to {size} bytes that are not here" if size.isdecimal() else ""
    return f"a Git LFS pointer{promised}"


def _parse(path: Path, raw: bytes, size: int) -> Header:
    name = path.name
    if raw[:1] != b"{":
        raise _error(name, f"a header that begins with {raw[:1]!r}", "'{'", _RELOAD)
    try:
        entries = parse_object(raw)
    except JsonError as error:
        raise _error(name, f"a broken header: {error}", "", _RELOAD) from error
    metadata = _metadata(entries.pop("__metadata__", {}), name)
    base = 8 + len(raw)
    tensors = {key: _tensor(key, entry, path, base) for key, entry in entries.items()}
    _prove_contiguous(tensors, base, size, name)
    return Header(path, tensors, metadata)


def _metadata(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise _error(f"{name}: __metadata__", "not a map of text to text", "")


def _tensor(key: str, entry: Any, path: Path, base: int) -> TensorInfo:
    where = f"{path.name}: tensor {key[:200]!r}"
    if len(key) > _MAX_NAME:  # every message and every pattern would have to carry it
        raise _error(where, f"a name of {len(key)} characters", f"at most {_MAX_NAME}")
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise _error(where, "a malformed entry", "exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _error(where, f"the unknown dtype {str(dtype)[:40]!r}", "one safetensors defines")
    if not _are_sizes(shape):
        raise _error(where, "a shape that is not a list of sizes", "integers from 0 to 2**63 - 1")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _error(where, f"the data_offsets {str(offsets)[:60]}", "[begin, end], in order")
    info = TensorInfo(key, dtype, tuple(shape), base + offsets[0], base + offsets[1], path)
    bits = _count(info.shape) * DTYPE_BITS[dtype]
    if bits != 8 * info.nbytes:
        raise _error(
            where,
            f"{info.nbytes} bytes for {dtype} of shape {str(shape)[:80]}",
            f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, which is no whole byte",
        )
    return info


def _count(shape: tuple[int, ...]) -> int:
    """The product of ``shape``, or some number past every file's size.

    Multiplying a million large factors out would take minutes.
    """
    count = 1
    for size in () if 0 in shape else shape:
        count *= size
        if count >= _LIMIT:
            return count
    return 0 if 0 in shape else count


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _LIMIT for n in value)


def _prove_contiguous(tensors: Mapping[str, TensorInfo], base: int, size: int, name: str) -> None:
    end = base
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != end:
            what = "overlaps the one before" if info.start < end else "leaves a hole before it"
            raise _error(
                f"{name}: tensor {info.name[:200]!r}",
                f"{what}: begins at byte {info.start - base} of the data",
                f"byte {end - base}",
            )
        end = info.end
    if end > size:
        cut = sum(info.end > size for info in tensors.values())
        raise _error(
            name,
            f"cut off: {size} of {end} bytes are there, {cut} of {len(tensors)} tensors are hit",
            "",
            _RELOAD,
        )
    if end < size:
        raise _error(name, f"{size - end} bytes after the last tensor", "none", _RELOAD)


def read_sharded(index: Path) -> Sharded:
    """Read every shard that the ``*.safetensors.index.json`` file ``index`` names.

    Shards are looked for beside the index only; a name that would lead elsewhere is refused.
    """
    try:
        weight_map = read_object(index).get("weight_map")
    except JsonError as error:
        return Sharded((), (Problem(index.name, str(error), "", _RELOAD),))
    if not isinstance(weight_map, dict) or not weight_map:
        return Sharded((), (Problem(f"{index.name}: weight_map", "missing or empty", "a map"),))
    problems: list[Problem] = []
    headers: list[Header] = []
    for shard in sorted({str(value) for value in weight_map.values()}):
        try:
            headers.append(read_header(index.parent / _safe_name(shard, index.name)))
        except HeaderError as error:
            problems.append(error.problem)
    if not problems:
        problems = list(_compare_index(index.name, weight_map, headers))
    return Sharded(tuple(headers), tuple(problems))


def _safe_name(shard: str, index: str) -> str:
    plain = shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
    if not plain or shard.startswith(".."):
        raise _error(
            f"{index}: weight_map",
            f"the shard name {shard[:200]!r}",
            "a .safetensors file beside it",
        )
    return shard


def _compare_index(
    index: str, weight_map: Mapping[str, str], headers: list[Header]
) -> Iterator[Problem]:
    held: dict[str, str] = {}
    for header in headers:
        for key in header.tensors:
            if key in held:
                yield Problem(f"tensor {key!r}", f"in both {held[key]} and {header.path.name}")
            held[key] = header.path.name
    for key in sorted(weight_map.keys() | held.keys()):
        if weight_map.get(key) != held.get(key):
            yield Problem(
                f"{index}: {key!r}",
                f"promised in {weight_map.get(key, 'no shard')}",
                f"{held.get(key, 'no shard')}, which holds it",
                _RELOAD,
            )


def _describe_os_error(error: OSError) -> tuple[str, str, str]:
    if error.errno == errno.ENOENT:
        return "missing", "a safetensors file", _RELOAD
    if error.errno == errno.ELOOP:
        return "a symbolic link that leads back to itself", "a safetensors file", ""
    return f"unreadable ({error.strerror or error})", "a safetensors file", "check its permissions"


def _error(where: str, found: str, expected: str, fix: str = "") -> HeaderError:
    return HeaderError(Problem(where, found, expected, fix))
