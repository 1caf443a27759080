"""A task from a few lines of a profile: what each key means, and what is said of a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytest_lora.errors import UsageError
from pytest_lora.tasks.formats import read_task
from pytest_lora.tasks.graders import GRADERS, RegexAnswer
from pytest_lora.tasks.names import meant
from pytest_lora.tasks.records import Length, Scoring, Task

__all__ = ["TASK_KEYS", "task_from_config"]


def task_from_config(name: str, config: Mapping[str, Any], folder: Path | str = ".") -> Task:
    """The task that a table such as ``[tasks.gsm8k]`` of a profile declares.

    Args:
        name: the table's name.
        config: its keys: :data:`TASK_KEYS`; only ``path`` is needed.
        folder: what relative paths are relative to.

    Raises:
        UsageError: a key is unknown, a value is not what it takes, or the file cannot be read.
    """
    where = f"[tasks.{name}]"
    for key in config:
        if key not in TASK_KEYS:
            raise UsageError(
                f"{where}: there is no key {key!r}{meant(key, TASK_KEYS)}; keys are"
                f" {', '.join(TASK_KEYS)}"
            )
    if "path" not in config:
        raise UsageError(f"{where}: path is missing: which file holds the items?")
    rules = {key: _checked(where, key, value) for key, value in config.items()}
    path = Path(folder, rules.pop("path"))
    grader = _grader(where, rules.pop("grader", None), rules.pop("pattern", None))
    if grader is not None:
        rules.setdefault("scoring", Scoring.GENERATE)
        rules["grader"] = grader
    if "shots_path" in rules:
        examples = Path(folder, rules.pop("shots_path"))
        rules["pool"] = read_task(examples, format=rules.get("format")).items
    return read_task(path, name=name, **rules)


def _grader(where: str, name: str | None, pattern: str | None) -> Any:
    if (name == "regex") != (pattern is not None):
        raise UsageError(f'{where}: grader = "regex" and pattern go together')
    if name is None:
        return None
    return RegexAnswer.of(str(pattern)) if name == "regex" else GRADERS[name]


def _checked(where: str, key: str, value: Any) -> Any:
    parse, expected = TASK_KEYS[key]
    try:
        return parse(value)
    except (TypeError, ValueError):
        near = meant(value, expected.split(", ")) if isinstance(value, str) else ""
        shown = repr(value)[:80]
        raise UsageError(f"{where}: {key} = {shown}, expected {expected}{near}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _named(value: Any) -> str:
    if not _text(value).strip():
        raise ValueError
    return str(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError
        return value

    return parse


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError
    return float(value)


def _texts(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(_text(item) for item in values):
        raise TypeError
    return tuple(values)


def _grader_name(value: Any) -> str:
    if value not in (*GRADERS, "regex"):
        raise ValueError
    return str(value)


TASK_KEYS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "path": (_named, "the path of a file"),
    "min_accuracy": (_share, "a number from 0 to 1"),
    "format": (_named, "the name of a form"),
    "grader": (_grader_name, ", ".join([*GRADERS, "regex"])),
    "pattern": (_named, "a regular expression"),
    "scoring": (Scoring, ", ".join(Scoring)),
    "length": (Length, ", ".join(Length)),
    "template": (_named, "a text with {prompt} in it"),
    "separator": (_text, "a text"),
    "shots": (_whole(0), "a whole number, 0 or more"),
    "shots_path": (_named, "the path of a file"),
    "chat": (_flag, "true or false"),
    "system": (_text, "a text"),
    "stop": (_texts, "a text or a list of texts"),
    "max_new_tokens": (_whole(1), "a whole number, 1 or more"),
}
"""The keys of a task's table: how each is read, and what it takes."""
