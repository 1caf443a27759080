from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from raw_safetensors import file_bytes, header_of, one, write

from pytest_lora.safetensors_header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    Header,
    HeaderError,
    TensorInfo,
    iter_bytes,
    read_header,
    read_sharded,
    sniff,
)


def complaint(path: Path) -> str:
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    return str(caught.value.problem)


def test_a_whole_file_is_read_with_absolute_offsets(tmp_path: Path) -> None:
    path = write(
        tmp_path / "w.safetensors",
        [("a", "F32", (2, 3), b"a" * 24), ("b", "BF16", (), b"bb"), ("c", "I8", (0, 9), b"")],
        format="pt",
    )
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a", "b", "c"]
    a, b, c = header.tensors.values()
    assert (a.dtype, a.shape, a.numel, a.nbytes, a.file) == ("F32", (2, 3), 6, 24, path)
    assert (b.numel, b.nbytes, c.numel, c.nbytes) == (1, 2, 0, 0)
    assert b"".join(iter_bytes(a)) == b"a" * 24
    assert b"".join(iter_bytes(b)) == b"bb"
    assert list(iter_bytes(c)) == []


def test_a_header_without_metadata_may_be_padded_with_blanks(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    text = json.dumps(header_of([one("a")])[0]) + "   "
    path.write_bytes(file_bytes(text, b"1234"))
    begin = 8 + len(text)
    tensor = TensorInfo("a", "F32", (1,), begin, begin + 4, path)
    assert read_header(path) == Header(path, {"a": tensor}, {})


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_its_size(tmp_path: Path, dtype: str) -> None:
    data = bytes(DTYPE_BITS[dtype])  # eight numbers
    path = write(tmp_path / "w.safetensors", [("a", dtype, (2, 4), data)])
    assert read_header(path).tensors["a"].nbytes == DTYPE_BITS[dtype]
    write(path, [("a", dtype, (2, 4), data + b"\0")])
    assert "bytes for" in complaint(path)


def test_dtypes_are_those_of_the_library() -> None:
    safetensors = pytest.importorskip("safetensors", minversion="0.7")
    for dtype, bits in DTYPE_BITS.items():
        raw = file_bytes(*header_of([("a", dtype, (8,), bytes(bits))]))
        assert len(safetensors.deserialize(raw)) == 1, dtype


def test_half_bytes_have_to_add_up(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", [("a", "F4", (3,), b"12")])
    assert "12 bits, which is no whole byte" in complaint(path)


GOOD = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        ("", b"", "header length of 0 bytes"),
        ("[]", b"", "begins with b'['"),
        (" {}", b"", "begins with b' '"),
        ("{x", b"", "not JSON"),
        (b'{"\xff":1}', b"", "not UTF-8 at byte 2"),
        ('{"a":1}', b"", "malformed entry"),
        ('{"a":{"dtype":"F32","shape":[1]}}', b"", "malformed entry"),
        ({"a": {**GOOD, "extra": 1}}, b"1234", "malformed entry"),
        ({"a": {**GOOD, "dtype": "F33"}}, b"1234", "unknown dtype 'F33'"),
        ({"a": {**GOOD, "dtype": 32}}, b"1234", "unknown dtype '32'"),
        ({"a": {**GOOD, "shape": [-1]}}, b"1234", "not a list of sizes"),
        ({"a": {**GOOD, "shape": [True]}}, b"1234", "not a list of sizes"),
        ({"a": {**GOOD, "shape": [1.0]}}, b"1234", "not a list of sizes"),
        ({"a": {**GOOD, "shape": ["1"]}}, b"1234", "not a list of sizes"),
        ({"a": {**GOOD, "shape": 1}}, b"1234", "not a list of sizes"),
        ({"a": {**GOOD, "shape": [2**63, 0]}}, b"", "not a list of sizes"),
        ({"a": {**GOOD, "shape": [2**62, 8]}}, b"1234", "4 bytes for F32"),
        ({"a": {**GOOD, "shape": [2**62] * 9999}}, b"1234", "4 bytes for F32"),
        ({"a": {**GOOD, "data_offsets": [4, 0]}}, b"1234", "data_offsets [4, 0]"),
        ({"a": {**GOOD, "data_offsets": [0]}}, b"1234", "data_offsets [0]"),
        ({"a": {**GOOD, "data_offsets": [-4, 0]}}, b"1234", "data_offsets [-4, 0]"),
        ({"a": {**GOOD, "data_offsets": [4, 8]}}, b"12345678", "leaves a hole"),
        ({"a" * 5000: GOOD}, b"1234", "a name of 5000 characters"),
        ({"a": GOOD, "b": GOOD}, b"1234", "overlaps the one before"),
        ({"a": GOOD}, b"123", "cut off: 72 of 73 bytes are there, 1 of 1 tensors"),
        ({"a": GOOD}, b"12345", "1 bytes after the last tensor"),
        ({"__metadata__": {"a": 1}}, b"", "not a map of text to text"),
        ({"__metadata__": ["a"]}, b"", "not a map of text to text"),
        ('{"a":{},"a":{}}', b"", "the key 'a' occurs twice"),
        ('{"a":NaN}', b"", "the constant NaN"),
        ('{"a":-0}', b"", "the number -0"),
        ('{"a\\ud800":-1}', b"", "half of a surrogate pair"),
        ('{"a":' + "9" * 5000 + "}", b"", "thousands of digits"),
        ('{"a":' + "[" * 100_000, b"", "nested too deeply"),
    ],
)
def test_hostile_headers_are_named(tmp_path: Path, header: Any, body: bytes, words: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(file_bytes(header, body))
    text = complaint(path)
    assert words in text
    assert "w.safetensors" in text


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_a_hostile_length_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    assert f"header length of {length} bytes" in complaint(path)


def test_a_length_beyond_the_file_is_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    assert "2 of 1000 header bytes" in complaint(path)


def test_a_file_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    whole = file_bytes(*header_of([one("a", shape=(3,)), one("b", "F16", (2,))], format="pt"))
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert complaint(path)
    path.write_bytes(whole)
    assert len(read_header(path).tensors) == 2


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"", "an empty file (0 bytes)"),
        (b"1234", "4 bytes long"),
        (b"PK\x03\x04" + bytes(40), "zip archive, as torch.save writes"),
        (b"\x80\x02}q\x00(X" + bytes(40), "a Python pickle"),
        (b"\x80\x04\x95" + bytes(40), "a Python pickle"),
        (b"GGUF" + bytes(40), "GGUF"),
        (b"\x89HDF\r\n" + bytes(40), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"<!DOCTYPE html><html>" + bytes(40), "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 77\n", "to 77 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\nsize many\n", "a Git LFS pointer ("),
    ],
)
def test_other_files_are_recognised(tmp_path: Path, start: bytes, words: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(start)
    assert words in complaint(path)


def test_a_header_length_that_looks_like_magic_is_none(tmp_path: Path) -> None:
    header, body = header_of([one("a")])
    path = tmp_path / "w.safetensors"
    path.write_bytes(file_bytes(json.dumps(header).ljust(640), body))  # 640 is 0x80 0x02
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read_header(path).tensors) == ["a"]
    assert sniff(path) == ("", "")


def test_what_is_no_file_is_refused_without_blocking(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    assert "a directory" in complaint(tmp_path / "folder.safetensors")
    assert "not a regular file" in complaint(tmp_path / "pipe.safetensors")
    assert "leads back to itself" in complaint(tmp_path / "loop.safetensors")
    assert "missing" in complaint(tmp_path / "nothing.safetensors")
    assert sniff(tmp_path / "nothing.safetensors") == ("", "")
    assert sniff(tmp_path / "pipe.safetensors") == ("", "")


def test_an_unreadable_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "w.safetensors", [one("a")])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "unreadable (Permission denied)" in complaint(path)
    with pytest.raises(HeaderError, match="unreadable"):
        list(iter_bytes(TensorInfo("a", "F32", (1,), 0, 4, path)))


def test_blocks_are_bounded_and_a_shrinking_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", [one("a", shape=(10,), fill=7)])
    info = read_header(path).tensors["a"]
    assert [len(block) for block in iter_bytes(info, chunk=16)] == [16, 16, 8]
    os.truncate(path, info.end - 8)
    with pytest.raises(HeaderError, match="became shorter"):
        list(iter_bytes(info, chunk=16))


def test_a_hundred_thousand_tensors_are_fine(tmp_path: Path) -> None:
    header = {
        f"t{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(100_000)
    }
    path = tmp_path / "w.safetensors"
    path.write_bytes(file_bytes(header, bytes(100_000)))
    assert len(read_header(path).tensors) == 100_000


# -------------------------------------------------------------------------------------- shards


def shards(folder: Path, **weight_map: Any) -> Path:
    write(folder / "one.safetensors", [one("a")])
    write(folder / "two.safetensors", [one("b")])
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    return index


def test_shards_are_read_together(tmp_path: Path) -> None:
    found = read_sharded(shards(tmp_path, a="one.safetensors", b="two.safetensors"))
    assert found.problems == ()
    assert [list(header.tensors) for header in found.headers] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "one.safetensors"}, []),
        ({"a": "three.safetensors"}, ["three.safetensors: missing"]),
        ({"a": "../one.safetensors"}, ["the shard name '../one.safetensors'"]),
        ({"a": "/etc/passwd.safetensors"}, ["the shard name '/etc/passwd.safetensors'"]),
        ({"a": "C:one.safetensors"}, ["the shard name"]),
        ({"a": "one.bin"}, ["the shard name 'one.bin'"]),
        ({"a": 1}, ["the shard name '1'"]),
        ({"a": "one.safetensors", "c": "one.safetensors"}, ["'c': promised in one.safetensors"]),
        ({"b": "one.safetensors"}, ["'a': promised in no shard", "'b': promised in one"]),
        ({}, ["weight_map: missing or empty"]),
    ],
)
def test_an_index_has_to_fit_its_shards(
    tmp_path: Path, weight_map: dict[str, Any], words: list[str]
) -> None:
    found = [str(problem) for problem in read_sharded(shards(tmp_path, **weight_map)).problems]
    assert len(found) == len(words)
    for text, word in zip(found, words, strict=True):
        assert word in text


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path, a="one.safetensors", b="two.safetensors")
    write(tmp_path / "two.safetensors", [one("b"), one("a")])
    found = "; ".join(str(problem) for problem in read_sharded(index).problems)
    assert re.search(r"tensor 'a': in both one.safetensors and two.safetensors", found)


def test_a_broken_index_is_one_problem(tmp_path: Path) -> None:
    index = tmp_path / "x.safetensors.index.json"
    index.write_text("[]")
    [problem] = read_sharded(index).problems
    assert "a JSON array where an object was expected" in str(problem)
