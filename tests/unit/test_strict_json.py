from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pytest_lora.strict_json import JsonError, parse_object, read_object


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{}", {}),
        (
            ' {"a": [1, -2, 2.5, 1e3, null, true, "\\u00e9"]} \n',
            {"a": [1, -2, 2.5, 1e3, None, True, "é"]},
        ),
        ('{"a": -0.5, "b": "\\ud83d\\ude00"}', {"a": -0.5, "b": "😀"}),
    ],
)
def test_plain_objects_are_read(text: str, value: object) -> None:
    assert parse_object(text.encode()) == value


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON: Expecting value at line 1 column 1"),
        (b'{"a": 1,}', "not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b"[]", "a JSON array where an object was expected"),
        (b'"x"', "a JSON string"),
        (b"1", "a JSON number"),
        (b"true", "a JSON boolean"),
        (b"null", "a JSON null"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"a": Infinity}', "the constant Infinity"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "thousands of digits"),
        (b'{"a": -0}', "the number -0"),
        (b'{"a": "\\uD800"}', "half of a surrogate pair"),
    ],
)
def test_everything_else_is_one_error(raw: bytes, words: str) -> None:
    with pytest.raises(JsonError, match=words.replace("[", r"\[")):
        parse_object(raw)


def test_files_are_bounded_and_need_not_be_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    assert read_object(path) == {"a": "x" * 100}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_text(" \n")
    for place, limit, words in (
        (path, 99, "more than 99 bytes long"),
        (tmp_path, 99, "not a regular file"),
        (tmp_path / "pipe", 99, "not a regular file"),
        (tmp_path / "nothing", 99, "missing"),
        (tmp_path / "empty", 99, "empty"),
    ):
        with pytest.raises(JsonError, match=words):
            read_object(place, limit=limit)


def test_an_unreadable_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(JsonError, match=r"unreadable \(Permission denied\)"):
        read_object(path)


def test_every_outer_key_is_found_on_its_line() -> None:
    from pytest_lora.strict_json import key_lines

    text = '{\n "a": {"r": 1,\n  "b": ["c", {"d": 2}]},\n "e\\u0301": "x: {",\n\n "r": 8, "s": 1}'
    assert key_lines(text) == {"a": 2, "e\u0301": 4, "r": 6, "s": 6}
    assert key_lines("") == {}
    assert key_lines('{"a\\q": 1,\n"b"') == {"a\\q": 1}
