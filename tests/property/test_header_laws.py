"""Whatever the bytes are, reading a header ends in a header or in one HeaderError."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import safetensors
from hypothesis import example, given
from hypothesis import strategies as st
from raw_safetensors import Entry, file_bytes, header_of

from pytest_lora.safetensors_header import DTYPE_BITS, Header, HeaderError, iter_bytes, read_header

OLD_DTYPES = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("laws") / "w.safetensors"


def read(path: Path, raw: bytes) -> Header | None:
    """The header, or None for the one error that may be raised."""
    path.write_bytes(raw)
    try:
        return read_header(path)
    except HeaderError:
        return None


def library_accepts(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return False
    return True


@st.composite
def tensors(draw: st.DrawFn) -> list[Entry]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=5))
    found: list[Entry] = []
    for name in names:
        dtype = draw(st.sampled_from(OLD_DTYPES))
        shape = draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
        count = 1
        for size in shape:
            count *= size
        length = count * DTYPE_BITS[dtype] // 8
        found.append((name, dtype, shape, draw(st.binary(min_size=length, max_size=length))))
    return [entry for entry in found if entry[0] != "__metadata__"]


@given(tensors(), st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_what_was_written_is_read(
    path: Path, entries: list[Entry], metadata: dict[str, str]
) -> None:
    header, body = header_of(entries)
    if metadata:
        header["__metadata__"] = metadata
    found = read(path, file_bytes(header, body))
    assert found is not None
    assert found.metadata == metadata
    assert [
        (t.name, t.dtype, t.shape, b"".join(iter_bytes(t))) for t in found.tensors.values()
    ] == (entries)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_header_or_one_error(path: Path, raw: bytes) -> None:
    if read(path, raw) is not None:
        assert library_accepts(raw)


@given(st.binary(max_size=100), st.binary(max_size=20))
def test_any_header_text_ends_in_a_header_or_one_error(
    path: Path, text: bytes, body: bytes
) -> None:
    raw = file_bytes(b"{" + text, body)
    if read(path, raw) is not None:
        assert library_accepts(raw)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.text(max_size=3),
        values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*OLD_DTYPES, "F4", "X"]) | values,
                "shape": st.lists(st.integers(-1, 9), max_size=3) | values,
                "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | values,
            }
        ),
        max_size=3,
    ),
    st.integers(0, 40),
)
def test_what_we_accept_the_library_accepts(
    path: Path, header: dict[str, Any], length: int
) -> None:
    raw = file_bytes(json.dumps(header), bytes(length))
    if read(path, raw) is not None:
        assert library_accepts(raw)


@given(tensors(), st.data())
def test_a_changed_byte_never_crashes_and_both_agree(
    path: Path, entries: list[Entry], data: st.DataObject
) -> None:
    raw = bytearray(file_bytes(*header_of(entries)))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] = data.draw(st.integers(0, 255))
    if read(path, bytes(raw)) is not None:
        assert library_accepts(bytes(raw))


@given(st.text(alphabet='{}[]",:0123456789-.eE \\uduF32shapedtypedata_offsets', max_size=60))
@example('"a":{"dtype":"U8","shape":[0],"data_offsets":[0,-0]}}')
@example('"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}')
@example('"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}\n')
def test_odd_but_legal_json_is_read_as_the_library_reads_it(path: Path, text: str) -> None:
    raw = file_bytes("{" + text)
    if read(path, raw) is not None:
        assert library_accepts(raw)


@given(tensors(), st.data())
def test_a_cut_file_is_never_accepted(
    path: Path, entries: list[Entry], data: st.DataObject
) -> None:
    raw = file_bytes(*header_of(entries))
    assert read(path, raw[: data.draw(st.integers(0, len(raw) - 1))]) is None


@given(st.integers(0, 2**64 - 1), st.binary(max_size=64))
def test_memory_stays_within_the_file(path: Path, length: int, rest: bytes) -> None:
    path.write_bytes(length.to_bytes(8, "little") + rest)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000  # the interpreter's own bookkeeping; the lengths drawn reach 2**64
