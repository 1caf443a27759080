"""Profiles: the data they declare, for whom, and how what is wrong in them is told."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import pytest_lora
from pytest_lora.errors import UsageError
from pytest_lora.profile import FORMS, Profile
from pytest_lora.quantities import Floor
from pytest_lora.toml_places import find_lines

TEXT = """\
[sources.wiki]
path = "data/wiki.jsonl"
max_drift = "0.05 nats"

[sources.code]
path = "code.txt"

[tasks.gsm8k]
path = "gsm8k.jsonl"  # the official file
min_accuracy = "50%"

[adapters."math-*"]
cycles = 4
sources.wiki.max_drift = 0.2

[adapters."math-*".tasks.gsm8k]
min_accuracy = "base + 10%"

[adapters."*-code".sources.stories]
path = "stories.txt"
"""


def profile(tmp_path: Path, text: str) -> Profile:
    path = tmp_path / "lora.toml"
    path.write_text(text, encoding="utf-8")
    return Profile.read(path)


def test_entries_hold_for_all_adapters_and_sections_for_those_that_match(tmp_path: Path) -> None:
    found = profile(tmp_path, TEXT)
    wiki, code = found.entries("sources", "prose")
    assert (wiki.name, wiki.values) == (
        "wiki",
        {"path": tmp_path / "data/wiki.jsonl", "max_drift": 0.05},
    )
    assert code.get("max_drift") is None
    [task] = found.entries("tasks", "prose")
    assert task.get("min_accuracy") == Floor(0.5)
    names = [entry.name for entry in found.entries("sources", "some-code")]
    assert names == ["wiki", "code", "stories"]


def test_what_a_section_says_of_an_entry_wins_and_is_named(tmp_path: Path) -> None:
    found = profile(tmp_path, TEXT)
    wiki, _ = found.entries("sources", "math-v3")
    assert wiki.get("max_drift") == 0.2
    assert wiki.origins == {
        "path": f"path in {tmp_path / 'lora.toml'}:2",
        "max_drift": f"max_drift in {tmp_path / 'lora.toml'}:14",
    }
    [task] = found.entries("tasks", "math-v3")
    assert task.get("min_accuracy") == Floor(0.1, to="base")
    assert task.origins["min_accuracy"].endswith(":17")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sources.wiki]\npath = 'a'\nmax_drfit = 1", r":3: .* .did you mean 'max_drift'\?"),
        (
            "[defaults]\n\n[sources.wiki]\nmax_drift = 1",
            r"lora.toml:3: \[sources.wiki\] has no 'path': the texts",
        ),
        ("tasks.t.shots = 1", r"lora.toml:1: \[tasks.t\] has no 'path' and no 'lm_eval'"),
        ("[sorces.wiki]\npath = 'a'", r"unknown table \[sorces\] \(did you mean 'sources'\?\)"),
        ("[tasks.t]\npath = 'a'\nformat = 'gsm9k'", r":3: got 'gsm9k', .*did you mean 'gsm8k'"),
        ("[defaults]\ndtype = 'bfloat6'", r"dtype in .*:2: .*did you mean 'bfloat16'"),
        ("[tasks.t]\npath = 'a'\ngrader = 'regexp'", r":3: got .*did you mean 'regex'"),
        ("[tasks.t]\npath = 'a'\ngrader = 'regex'", r"grader in .*:3: .*go together"),
        ("[tasks.t]\npath = 'a'\npattern = 'x'", r"pattern in .*:3: .*go together"),
        ("[tasks.t]\npath = 'a'\nmax_unstopped = 2", r":3: got 2, expected a share"),
        ("[sources.wiki]\npath = 3", r"path in .*:2: got 3, expected a non-empty text"),
        ("[sources.wiki]\npath = 'a'\nmax_drift = 'x'", r":3: got 'x', expected nats per token"),
        ("[tasks.t]\npath = 'a'\nmin_accuracy = 3", r":3: got 3, expected a share"),
        ("sources = 3", r":1: 'sources' must be a table"),
        ("[sources]\nwiki = 3", r":2: 'wiki' must be a table"),
        ('[sources."a b"]\npath = "x"', r":1: 'a b' names no source: letters"),
        ('[adapters."*".tasks."."]\n', r":1: '.' names no task"),
        ('[adapters."*".sources.w]\nwindow_ = 1', r":2: there is no key 'window_'"),
    ],
)
def test_a_broken_entry_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        profile(tmp_path, text)
    assert str(tmp_path / "lora.toml") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[sources.wiki]\npath = 'a'\nmax_drfit = 1",
        "[sources.wiki]\nmax_drift = 1",
        "[sources.wiki]\npath = 3",
        '[sources."a b"]\npath = "x"',
        "[defaults]\ncycles = 0",
        '[adapters."*"]\nsafe_merge = "x"',
        "[default]",
    ],
)
def test_what_the_reader_refuses_an_editor_marks(tmp_path: Path, text: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(pytest_lora.__file__).with_name("lora.schema.json").read_text())
    with pytest.raises(UsageError):
        profile(tmp_path, text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(text), schema)
    jsonschema.validate(tomllib.loads(TEXT), schema)


def test_the_forms_are_those_that_are_read() -> None:
    from pytest_lora.tasks.formats import FORMATS

    assert set(FORMS) == {form.name for form in FORMATS}


def test_a_mark_at_the_beginning_of_the_file_is_no_part_of_it(tmp_path: Path) -> None:
    found = profile(tmp_path, "\ufeff" + TEXT)
    [wiki, _] = found.entries("sources", "prose")
    assert wiki.origins["path"].endswith(":2")


def test_patterns_that_no_adapter_matches_are_told(tmp_path: Path) -> None:
    found = profile(tmp_path, TEXT)
    assert found.unmatched(["math-v3"]) == ("*-code",)
    assert found.unmatched(["out/math-v3", "my-code"]) == ("math-*",)
    assert found.unmatched(["math-v3", "my-code"]) == ()


def test_an_entry_that_only_one_section_completes_is_told_when_it_is_asked_for(
    tmp_path: Path,
) -> None:
    found = profile(tmp_path, '[adapters."a".sources.wiki]\nmax_drift = 1')
    assert found.entries("sources", "b") == ()
    with pytest.raises(UsageError, match=r"lora.toml:1: \[sources.wiki\] has no 'path'"):
        found.entries("sources", "a")


# -------------------------------------------------------------------------------- places in TOML


def _keys(data: Any, above: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(data, dict):
        return set()
    below = {(*above, key) for key in data}
    return below.union(*(_keys(value, (*above, key)) for key, value in data.items()), set())


def test_lines_are_those_of_the_keys() -> None:
    text = 'a = 1\n\n[t."x]y"] # comment ]\nb = [\n  1,\n]\n"c.d".e = "f = g"\n# g = 1\n[t.z]\n'
    assert find_lines(text) == {
        ("a",): 1,
        ("t", "x]y"): 3,
        ("t", "x]y", "b"): 4,
        ("t", "x]y", "c.d", "e"): 7,
        ("t", "z"): 9,
    }
    assert set(find_lines(text)) <= _keys(tomllib.loads(text))


def test_every_key_of_a_profile_has_a_line() -> None:
    leaves = {keys for keys in _keys(tomllib.loads(TEXT)) if keys in find_lines(TEXT)}
    assert leaves == set(find_lines(TEXT))
    for keys, line in find_lines(TEXT).items():
        assert keys[-1] in TEXT.splitlines()[line - 1]
