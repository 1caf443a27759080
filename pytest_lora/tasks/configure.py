"""A task from a few lines of a profile: what each key means, and what is said of a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_lora.errors import UsageError
from pytest_lora.names import meant
from pytest_lora.profile import TASK_KEYS
from pytest_lora.tasks.formats import read_task
from pytest_lora.tasks.graders import GRADERS, RegexAnswer
from pytest_lora.tasks.humaneval import HumanEvalGrader
from pytest_lora.tasks.records import Length, Scoring, Task

__all__ = ["HOW_TO_JUDGE", "make_task", "task_from_config"]

HOW_TO_JUDGE = ("min_accuracy", "about", "max_unstopped", "batch_size")
"""Keys of a table that its task does not depend on."""


def task_from_config(
    name: str,
    config: Mapping[str, Any],
    folder: Path | str = ".",
    *,
    allow_code_execution: bool = False,
) -> Task:
    """The task that a table such as ``[tasks.gsm8k]`` of a profile declares.

    Args:
        name: the table's name.
        config: its keys as they stand there, see ``docs/settings.md``; only ``path`` is needed.
            An absolute ``min_accuracy`` becomes the task's own.
        folder: what relative paths are relative to.
        allow_code_execution: let HumanEval run what the model wrote.

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
    if "path" not in config and "lm_eval" not in config:
        raise UsageError(f"{where}: path is missing: which file holds the items?")
    values = {key: _checked(where, key, value) for key, value in config.items()}
    for key in ("path", "shots_path"):
        if key in values:
            values[key] = Path(folder, values[key])
    task = make_task(name, values, allow_code_execution=allow_code_execution)
    floor = values.get("min_accuracy")
    if floor is None or floor.to:
        return task
    return replace(task, min_accuracy=floor.value)


def make_task(name: str, values: Mapping[str, Any], *, allow_code_execution: bool = False) -> Task:
    """The task of an entry whose values are parsed and whose paths are found.

    Raises:
        UsageError: keys contradict each other, a file cannot be read, or HumanEval is to be graded
            without permission to run code.
    """
    where = f"[tasks.{name}]"
    rules = {key: value for key, value in values.items() if key not in HOW_TO_JUDGE}
    if "lm_eval" in rules:
        return _of_lm_eval(name, rules)
    path = rules.pop("path")
    grader = _grader(where, rules.pop("grader", None), rules.pop("pattern", None))
    if grader is not None:
        rules.setdefault("scoring", Scoring.GENERATE)
        rules["grader"] = grader
    if "shots_path" in rules:
        rules["pool"] = read_task(rules.pop("shots_path"), format=rules.get("format")).items
    if "scoring" in rules:
        rules["scoring"] = Scoring(rules["scoring"])
    if "length" in rules:
        rules["length"] = Length(rules["length"])
    task = read_task(path, name=name, **rules)
    if task.format == "humaneval" and grader is None:
        return replace(task, grader=HumanEvalGrader(allow_code_execution))
    return task


def _of_lm_eval(name: str, rules: Mapping[str, Any]) -> Task:
    from pytest_lora.tasks.lm_eval_bridge import lm_eval_task

    return lm_eval_task(
        name,
        rules["lm_eval"],
        metric=rules.get("metric"),
        filter_name=rules.get("filter"),
        num_fewshot=rules.get("shots"),
        limit=rules.get("limit"),
        chat=rules.get("chat", False),
    )


def _grader(where: str, name: str | None, pattern: str | None) -> Any:
    if (name == "regex") != (pattern is not None):
        raise UsageError(f'{where}: grader = "regex" and pattern go together')
    if name is None:
        return None
    return RegexAnswer.of(str(pattern)) if name == "regex" else GRADERS[name]


def _checked(where: str, key: str, value: Any) -> Any:
    try:
        return TASK_KEYS[key].parse(value)
    except ValueError as error:
        expected = str(error)
        near = meant(value, expected.split(", ")) if isinstance(value, str) else ""
        shown = repr(value)[:80]
        raise UsageError(f"{where}: {key} = {shown}, expected {expected}{near}") from None
