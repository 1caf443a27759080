"""Writes safetensors files byte by byte, right ones and wrong ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Entry = tuple[str, str, tuple[int, ...], bytes]
"""Name, dtype, shape, bytes."""


def header_of(entries: Iterable[Entry], **metadata: str) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    body = b""
    for name, dtype, shape, data in entries:
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        body += data
    return header, body


def file_bytes(header: dict[str, Any] | str | bytes, body: bytes = b"") -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + body


def write(path: Path, entries: Iterable[Entry], **metadata: str) -> Path:
    path.write_bytes(file_bytes(*header_of(entries, **metadata)))
    return path


def one(name: str, dtype: str = "F32", shape: tuple[int, ...] = (1,), fill: int = 0) -> Entry:
    """A tensor whose bytes are all ``fill``; of a type with whole bytes."""
    sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    count = 1
    for size in shape:
        count *= size
    return name, dtype, shape, bytes([fill]) * (count * sizes[dtype])
