"""A task is data and a grader: items, how they are put to a model, and how answers are judged."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_lora.errors import UsageError

if TYPE_CHECKING:
    from pytest_lora.tasks.graders import Grader
    from pytest_lora.tasks.lm_eval_bridge import LmEvalQuestions

__all__ = ["Length", "Scoring", "Task", "TaskItem"]


class Scoring(StrEnum):
    """How an item becomes a score."""

    GENERATE = "generate"
    """The model writes an answer and a grader reads it."""
    CHOICES = "choices"
    """The model's likelihood of each given choice decides; nothing is written."""
    HARNESS = "lm-eval"
    """lm-eval asks and grades (:mod:`pytest_lora.tasks.lm_eval_bridge`)."""


class Length(StrEnum):
    """What a choice's log-likelihood is divided by before the largest is taken."""

    NONE = "none"
    """Nothing: what published harnesses call ``acc``."""
    CHARACTERS = "characters"
    """The choice's characters: what published harnesses call ``acc_norm``."""
    BYTES = "bytes"
    """Its bytes in UTF-8: the same for ASCII, fairer across scripts."""
    TOKENS = "tokens"
    """Its tokens, which depends on the tokenizer."""


@dataclass(frozen=True, slots=True)
class TaskItem:
    """One question.

    Attributes:
        id: the name the file gives it, else the number of its record, from 1.
        prompt: what the model is shown, before any template.
        answer: the reference the grader compares with; empty for choices.
        choices: the possible answers, without the space that separates them from the prompt.
        correct: index of the right choice.
        contexts: where the choices differ in what precedes them instead (WinoGrande), one context
            per choice; all are then followed by the same words.
        solution: what stands for the answer in a few-shot example, worked steps included.
        extra: what else the file says (a question's options, a program's tests), JSON-plain.
    """

    id: str
    prompt: str
    answer: str = ""
    choices: tuple[str, ...] = ()
    correct: int | None = None
    contexts: tuple[str, ...] = ()
    solution: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.correct is not None and not 0 <= self.correct < len(self.choices):
            raise ValueError(f"choice {self.correct} of {len(self.choices)} choices")
        if self.contexts and len(self.contexts) != len(self.choices):
            raise ValueError(f"{len(self.contexts)} contexts for {len(self.choices)} choices")

    def plain(self) -> dict[str, Any]:
        """The item as JSON-plain data."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "answer": self.answer,
            "choices": list(self.choices),
            "correct": self.correct,
            "contexts": list(self.contexts),
            "solution": self.solution,
            "extra": dict(self.extra),
        }


@dataclass(frozen=True, slots=True)
class Task:
    """Questions, how they are put and how answers are judged.

    Attributes:
        name: what results call it.
        items: the questions; never empty.
        format: the form of the file they came from (see :mod:`pytest_lora.tasks.formats`).
        scoring: generation and a grader, or the likelihood of choices.
        grader: ``(answer, item) -> bool or float in [0, 1]``; needed for generation.
        length: what log-likelihoods of choices are divided by.
        template: the text put to the model, with ``{prompt}`` for the item's prompt.
        separator: stands between prompt and answer, in examples and before choices.
        shots: number of worked examples before the question.
        pool: where they are drawn from; None draws from :attr:`items`, never the item itself.
        chat: put the question as a chat, through the tokenizer's chat template.
        system: system message of the chat.
        stop: texts that end an answer; they are not part of it.
        max_new_tokens: tokens an answer may have; None is 256, or half of a smaller window.
        min_accuracy: the floor the file or the caller set; None where there is none.
        harness: the task of lm-eval that asks and grades; None where we do.
    """

    name: str
    items: tuple[TaskItem, ...]
    format: str = "given"
    scoring: Scoring = Scoring.GENERATE
    grader: Grader | Callable[[str, TaskItem], bool | float] | None = None
    length: Length = Length.NONE
    template: str = "{prompt}"
    separator: str = " "
    shots: int = 0
    pool: tuple[TaskItem, ...] | None = None
    chat: bool = False
    system: str = ""
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    min_accuracy: float | None = None
    harness: LmEvalQuestions | None = None

    def __post_init__(self) -> None:
        if not self.items:
            raise UsageError(f"task {self.name}: there are no items in it")
        if "{prompt}" not in self.template:
            raise UsageError(
                f"task {self.name}: the template {self.template!r} has no place for {{prompt}}"
            )
        if self.scoring is Scoring.CHOICES:
            self._require_choices()
        if self.shots and self.shots > len(self.items if self.pool is None else self.pool) - (
            self.pool is None
        ):
            raise UsageError(f"task {self.name}: not enough items to draw {self.shots} shots from")

    @property
    def is_written(self) -> bool:
        """Whether the model writes answers, rather than choosing among given ones."""
        return self.scoring is Scoring.GENERATE

    def _require_choices(self) -> None:
        for item in self.items:
            if len(item.choices) < 2 or item.correct is None:
                raise UsageError(
                    f"task {self.name}, item {item.id}: scoring by choices needs at least two"
                    f" choices and the right one (format {self.format} gives {len(item.choices)})"
                )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def digest(self) -> str:
        """SHA-256 over the items and everything that decides a score: 64 hexadecimal digits.

        A grader of one's own counts by its name, its source and the values it was made with, not
        by what it calls.
        """
        whole: dict[str, Any] = {
            "items": [item.plain() for item in self.items],
            "pool": None if self.pool is None else [item.plain() for item in self.pool],
            "rules": self.rules(),
        }
        text = json.dumps(whole, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def rules(self) -> dict[str, Any]:
        """How items are put and judged, JSON-plain: what a result records beside its numbers."""
        harness = {} if self.harness is None else {"lm_eval": self.harness.plain()}
        return {
            **harness,
            "format": self.format,
            "scoring": self.scoring.value,
            "grader": grader_name(self.grader),
            **_own_source(self.grader),
            "length": self.length.value,
            "template": self.template,
            "separator": self.separator,
            "shots": self.shots,
            "chat": self.chat,
            "system": self.system,
            "stop": list(self.stop),
            "max_new_tokens": self.max_new_tokens,
        }

    def with_rules(self, **changes: Any) -> Task:
        """The same items under other rules (any attribute may be given)."""
        return replace(self, **changes)


def grader_name(grader: Any) -> str | None:
    """What results call a grader."""
    if grader is None:
        return None
    if isinstance(grader, partial):
        return grader_name(grader.func)
    name = getattr(grader, "name", None) or getattr(grader, "__qualname__", None)
    return str(name or type(grader).__name__)


def _own_source(grader: Any) -> dict[str, str]:
    """What tells one's own grader from an earlier one of the same name, where it has a source."""
    given: list[Any] = []
    while isinstance(grader, partial):
        given.append([grader.args, grader.keywords])
        grader = grader.func
    function = getattr(grader, "__func__", grader)  # of a method
    if not inspect.isfunction(function):
        return {}
    try:
        source = inspect.getsource(function)
    except OSError:  # typed in, there is no file
        return {}
    given += inspect.getclosurevars(function).nonlocals.values()
    if given:
        source += json.dumps(given, default=lambda value: type(value).__qualname__, skipkeys=True)
    return {"grader_source": hashlib.sha256(source.encode()).hexdigest()[:16]}
