"""The profile: what differs between adapters, and the data they are judged on.

A TOML file, ``lora.toml``, with four kinds of tables::

    [defaults]                          settings of every adapter
    [sources.NAME]                      a source domain: text that must not be forgotten
    [tasks.NAME]                        a target task: what has to be learned
    [adapters."PATTERN"]                settings of the adapters whose name matches
    [adapters."PATTERN".sources.NAME]   and keys of the other tables, for those adapters

Sections of adapters apply in the order of the file, later ones win.  A file of its own, and not a
table of ``pyproject.toml``: it is reviewed as the release gate it is, people who train adapters
have no Python package, and pytest's own ini keys already live in ``pyproject.toml``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_lora.errors import UsageError
from pytest_lora.names import meant
from pytest_lora.quantities import parse_drift, parse_floor, parse_share
from pytest_lora.settings import Layer, choice, require_per_adapter, resolve, table

__all__ = ["FILE_NAME", "KINDS", "TASK_KEYS", "Entry", "Key", "Profile"]

FILE_NAME = "lora.toml"
"""Looked for in the project's root directory when no other profile is named."""

_PATHS = {"path", "shots_path"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TABLES = 'a profile has [defaults], [sources.NAME], [tasks.NAME] and [adapters."PATTERN"]'


# ------------------------------------------------------------------------------- keys of the tables


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a source or a task.

    Attributes:
        help: one sentence.
        parse: turns what stands in the file into the value; raises ``ValueError`` with what is
            expected.
        schema: JSON Schema of what may stand in the file, for editors.
        required: there is no entry without it.
    """

    help: str
    parse: Callable[[Any], Any]
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    required: bool = False


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty text")
    return value


def _plain_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise ValueError("a text or a list of texts")
    return tuple(items)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _whole(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"a whole number, {least} or more")
        return value

    return parse


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError("a number above 0")
    return float(value)


def _one_of(*valid: str) -> dict[str, Any]:
    return {"enum": list(valid)}


_STRING = {"type": "string", "minLength": 1}
_BOOLEAN = {"type": "boolean"}
_NUMBER = {"type": "number", "exclusiveMinimum": 0}
_QUANTITY = {"type": ["number", "string"]}


def _count(least: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least}


def _key(summary: str, parse: Callable[[Any], Any], schema: Mapping[str, Any], **how: Any) -> Key:
    return Key(summary, parse, schema, **how)


SOURCE_KEYS: Mapping[str, Key] = {
    "path": _key(
        "the texts: a .txt, .jsonl or .parquet file, or the folder of a saved dataset",
        _text,
        _STRING,
        required=True,
    ),
    "max_drift": _key(
        'the most the loss may grow: "0.05 nats" per token, or "5%" of the perplexity; without it '
        "the drift is reported",
        parse_drift,
        _QUANTITY,
    ),
    "max_document_drift": _key(
        "what the drift of a single document is declared never to exceed, in nats per token; "
        "without it a limit is screened from the first documents",
        _number,
        _NUMBER,
    ),
    "max_unseen": _key(
        "no early verdict on a screened limit while a larger share of the documents may lie beyond "
        'it unseen, as in 0.01 or "1%" (default: any)',
        parse_share,
        _QUANTITY,
    ),
    "field": _key(
        'the field of .jsonl, .parquet and datasets that holds the text (default: "text")',
        _text,
        _STRING,
    ),
    "documents": _key(
        "what a document is in a .txt file: paragraphs between blank lines (the default), lines, "
        "or the file",
        choice("paragraphs", "lines", "file"),
        _one_of("paragraphs", "lines", "file"),
    ),
    "split": _key("the split of a saved dataset that has several", _text, _STRING),
    "prefix": _key(
        "what stands before a document's first token: auto (BOS, else EOS, else nothing; the "
        "default), bos, eos or none",
        choice("auto", "bos", "eos", "none"),
        _one_of("auto", "bos", "eos", "none"),
    ),
    "special_tokens": _key(
        "let the tokenizer add its own special tokens (default: false)", _flag, _BOOLEAN
    ),
    "window": _key(
        "tokens the model sees at a time (default: what it has positions for, at most 2048)",
        _whole(1),
        _count(1),
    ),
    "stride": _key(
        "tokens that each window after the first scores (default: the whole window)",
        _whole(1),
        _count(1),
    ),
}
SCORINGS = ("generate", "choices")
FORMS = (
    "prompt_answer",
    "prompt_choices",
    "question_answer",
    "gsm8k",
    "hellaswag",
    "arc",
    "openbookqa",
    "winogrande",
    "piqa",
    "boolq",
    "humaneval",
    "instruction_choices",
    "instruction",
)
LENGTHS = ("none", "characters", "bytes", "tokens")
GRADERS = ("exact", "normalised", "gsm8k", "label", "regex")

TASK_KEYS: Mapping[str, Key] = {
    "path": _key(
        "the items: a .jsonl or .json file, gzipped or not, in one of the known formats",
        _text,
        _STRING,
    ),
    "lm_eval": _key(
        "in place of path: a task of lm-eval by its name, or the .yaml file that defines one "
        "(docs/lm-eval.md)",
        _text,
        _STRING,
    ),
    "metric": _key(
        "with lm_eval: the metric that is an item's score (default: the task's first)",
        _text,
        _STRING,
    ),
    "filter": _key(
        "with lm_eval: the filter that answers go through (default: the task's first)",
        _text,
        _STRING,
    ),
    "limit": _key("with lm_eval: the first so many items only", _whole(1), _count(1)),
    "min_accuracy": _key(
        'the least accuracy: 0.5, "50%", or relative to the base model as in "base - 2%"; without '
        "it the accuracy is reported",
        parse_floor,
        _QUANTITY,
    ),
    "about": _key(
        "what the verdict is about: these items (the default), or the domain they are a sample of, "
        "for which few items may be inconclusive",
        choice("items", "domain"),
        _one_of("items", "domain"),
    ),
    "format": _key(
        "the form of the file, where its fields alone do not tell", choice(*FORMS), _one_of(*FORMS)
    ),
    "grader": _key(
        "how a written answer is judged: " + ", ".join(GRADERS) + " (default: the format's)",
        choice(*GRADERS),
        _one_of(*GRADERS),
    ),
    "pattern": _key("the regular expression of the grader regex", _text, _STRING),
    "scoring": _key(
        "generate an answer, or compare the likelihoods of choices (default: the format's)",
        choice(*SCORINGS),
        _one_of(*SCORINGS),
    ),
    "length": _key(
        "what the log-likelihood of a choice is divided by (default: none)",
        choice(*LENGTHS),
        _one_of(*LENGTHS),
    ),
    "template": _key("the text put to the model, with {prompt} in it", _text, _STRING),
    "separator": _key(
        "what stands between a prompt and its answer, in examples and before choices",
        _plain_text,
        {"type": "string"},
    ),
    "shots": _key("worked examples before the question (default: 0)", _whole(0), _count(0)),
    "shots_path": _key("the file they are drawn from (default: the other items)", _text, _STRING),
    "chat": _key(
        "put the question as a chat, through the tokenizer's template (default: false)",
        _flag,
        _BOOLEAN,
    ),
    "system": _key("the system message of the chat", _plain_text, {"type": "string"}),
    "stop": _key(
        "texts that end an answer",
        _texts,
        {"type": ["string", "array"], "items": {"type": "string"}},
    ),
    "max_new_tokens": _key(
        "tokens an answer may have (default: the format's, or 256, or half of a smaller window)",
        _whole(1),
        _count(1),
    ),
    "max_unstopped": _key(
        "the share of answers that may run into max_new_tokens without an end, whatever the base "
        'model does: 0 for an adapter that was trained to end every answer, or "5%" (default: no '
        "more than the base model's)",
        parse_share,
        _QUANTITY,
    ),
    "batch_size": _key("rows run together (default: 8)", _whole(1), _count(1)),
}
LM_EVAL_KEYS = ("metric", "filter", "limit")
"""Keys of tasks that mean something with ``lm_eval`` only."""
_BESIDE_LM_EVAL = {"lm_eval", *LM_EVAL_KEYS, "min_accuracy", "about", "shots", "chat", "batch_size"}
KINDS: Mapping[str, Mapping[str, Key]] = {"sources": SOURCE_KEYS, "tasks": TASK_KEYS}


# ---------------------------------------------------------------------------------------- entries


@dataclass(frozen=True, slots=True)
class Entry:
    """A source domain or a target task, as the profile declares it for one adapter.

    Attributes:
        kind: "sources" or "tasks".
        name: the name of its table.
        values: the parsed value of every key that was given; a ``path`` relative to the profile is
            resolved.
        origins: where each of them stands, for messages.
        place: file and line where the table begins, for messages.
    """

    kind: str
    name: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    place: str = ""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default`` where it was not given."""
        return self.values.get(key, default)


@dataclass(frozen=True, slots=True)
class _Section:
    """The settings and entries of ``[defaults]`` or of one adapter pattern."""

    pattern: str
    keys: tuple[str, ...]
    settings: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Mapping[str, Any]]]


# ---------------------------------------------------------------------------------------- profile


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile file, read and validated."""

    path: Path
    sections: tuple[_Section, ...]
    reader: _Reader

    @classmethod
    def read(cls, path: Path, *, shown: str | None = None) -> Profile:
        """Read and validate a profile, which messages call ``shown`` (default: its path).

        Raises:
            UsageError: it cannot be read, is no TOML, or holds what no profile can; the message
                names file, line and key, and the nearest valid name.
        """
        from pytest_lora.toml_places import find_lines

        name = shown or str(path)
        text = _read(path, name)
        data, reader = _parse_toml(name, text), _Reader(name, find_lines(text))
        profile = cls(path, tuple(_sections(reader, data)), reader)
        profile._validate()
        return profile

    @property
    def name(self) -> str:
        """What messages call the file."""
        return self.reader.name

    def layers(self, adapter: str) -> list[Layer]:
        """What the profile says of the settings of the adapter of that name, weakest first."""
        return [
            Layer(self._anchored(section.settings), self._speller(section))
            for section in self._matching(adapter)
            if section.settings
        ]

    def entries(self, kind: str, adapter: str) -> tuple[Entry, ...]:
        """The source domains or tasks of an adapter, in the order of the file."""
        values: dict[str, dict[str, Any]] = {}
        origins: dict[str, dict[str, str]] = {}
        places: dict[str, str] = {}
        for section in self._matching(adapter):
            for name, given in section.entries[kind].items():
                spell = self._speller(section, kind, name)
                parsed = {key: KINDS[kind][key].parse(raw) for key, raw in given.items()}
                values.setdefault(name, {}).update(parsed)
                origins.setdefault(name, {}).update({key: spell(key) for key in given})
                places.setdefault(name, self.reader.place(*section.keys, kind, name))
        return tuple(
            self._entry(Entry(kind, name, values[name], origins[name], places[name]))
            for name in values
        )

    def unmatched(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """The patterns of sections that are about none of these adapters."""
        names = list(adapters)
        return tuple(
            section.pattern
            for section in self.sections
            if not any(fnmatch.fnmatch(name, section.pattern) for name in names)
        )

    def _entry(self, entry: Entry) -> Entry:
        kind, values = entry.kind, dict(entry.values)
        for key, spec in KINDS[kind].items():
            if spec.required and key not in values:
                raise UsageError(
                    f"{entry.place}: [{kind}.{entry.name}] has no {key!r}: {spec.help}"
                )
        if kind == "tasks":
            _require_one_task(entry)
            if str(values.get("lm_eval", "")).endswith((".yaml", ".yml")):
                found = self.path.parent / Path(values["lm_eval"]).expanduser()
                values["lm_eval"] = str(found)
        for key in values.keys() & _PATHS:
            values[key] = self.path.parent / Path(values[key]).expanduser()
        return replace(entry, values=values)

    def _matching(self, adapter: str) -> Iterator[_Section]:
        for section in self.sections:
            if fnmatch.fnmatch(adapter, section.pattern):
                yield section

    def _anchored(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` with paths taken relative to the profile, where something is there."""
        paths = {name for name, setting in table() if setting.path}
        return {
            name: self._found(value) if name in paths else value for name, value in values.items()
        }

    def _found(self, value: Any) -> Any:
        here = self.path.parent / value if isinstance(value, str) else None
        return str(here) if here is not None and here.exists() else value

    def _speller(self, section: _Section, *below: str) -> Callable[[str], str]:
        return lambda key: self.reader.spell(*section.keys, *below, key)

    def _validate(self) -> None:
        for section in self.sections:
            spell = self._speller(section)
            require_per_adapter(section.settings, spell)
            resolve([Layer(section.settings, spell)])
            for kind, entries in section.entries.items():
                for name, given in entries.items():
                    _check_entry(kind, name, given, self._speller(section, kind, name))
        for kind in KINDS:  # what holds for all adapters has to be whole
            self.entries(kind, "")


def _require_one_task(entry: Entry) -> None:
    """A task is a file or one of lm-eval's, and has the keys of what it is."""
    values, origins = entry.values, entry.origins
    if "path" not in values and "lm_eval" not in values:
        raise UsageError(
            f"{entry.place}: [tasks.{entry.name}] has no 'path' and no 'lm_eval': which file"
            " holds the items, or which task of lm-eval is it?"
        )
    if "lm_eval" in values:
        wrong = [key for key in values if key not in _BESIDE_LM_EVAL]
        known = ", ".join(sorted(_BESIDE_LM_EVAL))
        why = f"does not go with lm_eval, whose tasks say it themselves; keys that do: {known}"
    else:
        wrong = [key for key in values if key in LM_EVAL_KEYS]
        why = "goes with lm_eval only"
    if wrong:
        raise UsageError(f"{origins[wrong[0]]}: {wrong[0]!r} {why}")
    if (values.get("grader") == "regex") != ("pattern" in values):
        alone = "pattern" if "pattern" in values else "grader"
        raise UsageError(f'{origins[alone]}: grader = "regex" and pattern go together')


def _check_entry(
    kind: str, name: str, given: Mapping[str, Any], spell: Callable[[str], str]
) -> None:
    known = KINDS[kind]
    for key, raw in given.items():
        if key not in known:
            hint = meant(key, known, f"one of {', '.join(known)}")
            raise UsageError(f"{spell(key)}: there is no key {key!r}{hint}")
        try:
            known[key].parse(raw)
        except ValueError as expected:
            near = meant(raw, known[key].schema.get("enum", ())) if isinstance(raw, str) else ""
            raise UsageError(f"{spell(key)}: got {raw!r}, expected {expected}{near}") from None


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Reader:
    """Names places of a file in messages."""

    name: str
    lines: Mapping[tuple[str, ...], int]

    def spell(self, *keys: str) -> str:
        """``cycles in lora.toml:7``."""
        line = self.lines.get(keys)
        return f"{keys[-1]} in {self.name}" + (f":{line}" if line else "")

    def place(self, *keys: str) -> str:
        """``lora.toml:7``: where a table begins, or the first of its keys where it has no head."""
        inside = [line for at, line in self.lines.items() if at[: len(keys)] == keys]
        return f"{self.name}:{min(inside)}" if inside else self.name

    def table(self, value: Any, *keys: str) -> Mapping[str, Any]:
        """``value``, which has to be a table."""
        if not isinstance(value, Mapping):
            raise UsageError(f"{self.spell(*keys)}: {keys[-1]!r} must be a table; {_TABLES}")
        return value


def _sections(reader: _Reader, data: Mapping[str, Any]) -> Iterator[_Section]:
    for name in data:
        if name not in ("defaults", "adapters", *KINDS):
            near = meant(name, ("defaults", "adapters", *KINDS))
            raise UsageError(f"{reader.spell(name)}: unknown table [{name}]{near}; {_TABLES}")
    shared = {kind: data[kind] for kind in KINDS if kind in data}
    defaults = reader.table(data.get("defaults", {}), "defaults")
    yield _Section("*", ("defaults",), defaults, {kind: {} for kind in KINDS})
    yield _Section("*", (), {}, _entries(reader, shared, ()))
    for pattern, values in reader.table(data.get("adapters", {}), "adapters").items():
        keys = ("adapters", pattern)
        given = reader.table(values, *keys)
        settings = {name: value for name, value in given.items() if name not in KINDS}
        yield _Section(pattern, keys, settings, _entries(reader, given, keys))


def _entries(
    reader: _Reader, given: Mapping[str, Any], keys: tuple[str, ...]
) -> dict[str, dict[str, Mapping[str, Any]]]:
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for kind in KINDS:
        entries = reader.table(given.get(kind, {}), *keys, kind)
        for name in entries:
            if not _NAME.fullmatch(name):
                raise UsageError(
                    f"{reader.spell(*keys, kind, name)}: {name!r} names no "
                    f"{kind.removesuffix('s')}: letters, digits, '_', '-' and '.' do"
                )
        found[kind] = {
            name: reader.table(values, *keys, kind, name) for name, values in entries.items()
        }
    return found


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except OSError as error:
        raise UsageError(f"{name}: cannot read the profile: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not a TOML file: {error}") from None


def _parse_toml(name: str, text: str) -> dict[str, Any]:
    import tomllib  # only runs with a profile need it

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: not a TOML file: {error}") from None
