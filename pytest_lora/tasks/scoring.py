"""Scores of a task's items under one model, whatever the task's way of scoring."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pytest_lora.errors import UsageError
from pytest_lora.tasks.choices import ChoiceScorer, Likelihood
from pytest_lora.tasks.evaluation import model_identity
from pytest_lora.tasks.generate import Generator
from pytest_lora.tasks.graders import best_choice, choice_lengths, score_of
from pytest_lora.tasks.prompting import Prompter
from pytest_lora.tasks.records import Length, Scoring

if TYPE_CHECKING:
    from pytest_lora.subject import Subject
    from pytest_lora.tasks.prompting import TaskTokenizer
    from pytest_lora.tasks.records import Task, TaskItem

__all__ = ["ItemScore", "ItemScorer", "Store", "excerpt"]

_SHOWN = 120


class Store(Protocol):
    """Keeps scores of finished items, so that an interrupted run can go on."""

    def get(self, key: str) -> float | None:
        """The score put under ``key``, or None."""
        ...

    def put(self, key: str, score: float) -> None:
        """Keep a score in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class ItemScore:
    """How one item came out.

    Attributes:
        index: which item of the task.
        score: from 0 to 1.
        said: what the model answered or chose; None where the score was kept from an earlier run.
        lengths: for choices, the score by each way of normalising, of which ``score`` is one.
        finite: whether every number the model gave was one.
    """

    index: int
    score: float
    said: str | None
    lengths: Mapping[Length, float] = field(default_factory=dict)
    finite: bool = True


class ItemScorer:
    """Scores items of a task with the adapted model or with the untouched base.

    Attributes:
        task: the task.
        computed: how many items were not found in the store.
    """

    def __init__(
        self,
        subject: Subject,
        task: Task,
        tokens: TaskTokenizer,
        *,
        base: bool = False,
        batch_size: int = 8,
        store: Store | None = None,
    ) -> None:
        """Raises UsageError for a task without a grader, NotApplicable where the model is none."""
        if task.scoring is Scoring.GENERATE and task.grader is None:
            raise UsageError(
                f"task {task.name} ({task.format}) has no grader: give one, grader=...;"
                " programs are graded by running them, which has to be allowed"
            )
        self.subject, self.task, self.base = subject, task, base
        self.computed = 0
        self._prompter = Prompter(task, tokens)
        self._store = store
        self._identity = self._identify() if store is not None else ""
        self._runner = self._make(batch_size)

    def _make(self, batch_size: int) -> Any:
        tokens = self._prompter.tokens
        if self.task.harness is not None:
            return self.task.harness.asked_of(self.subject, tokens.tokenizer, batch_size)
        with self._active() as model:
            if self.task.scoring is Scoring.CHOICES:
                return ChoiceScorer(model, tokens, batch_size=batch_size)
            return Generator(
                model,
                tokens,
                max_new_tokens=self.task.max_new_tokens,
                stop=self.task.stop,
                batch_size=batch_size,
            )

    def _active(self) -> Any:
        if self.base:
            return self.subject.base.bare()
        return contextlib.nullcontext(self.subject.model)

    @property
    def notes(self) -> list[str]:
        """What had to be done otherwise than asked."""
        notes: list[str] = self._runner.notes
        return notes

    @property
    def batch_size(self) -> int:
        """Rows run together at the moment."""
        size: int = self._runner.batch_size
        return size

    def scores(self, indices: Sequence[int]) -> list[ItemScore]:
        """The scores of these items, in order."""
        known = {index: self._kept(index) for index in indices}
        missing = [index for index, score in known.items() if score is None]
        if missing:
            with self._active():
                fresh = self._compute(missing)
            self.computed += len(fresh)
            for score in fresh:
                self._keep(score)
                known[score.index] = score
        return [score for score in map(known.get, indices) if score is not None]

    def _compute(self, indices: Sequence[int]) -> list[ItemScore]:
        if self.task.scoring is Scoring.CHOICES:
            return self._choose(indices)
        if self.task.harness is not None:
            return self._by_harness(indices)
        answers = self._runner.answers([self._prompter.prompt_ids(index) for index in indices])
        found = []
        for index, answer in zip(indices, answers, strict=True):
            grader: Any = self.task.grader
            score = score_of(grader, answer.text, self.task.items[index])
            score = score if answer.finite else 0.0  # read off numbers that are none
            found.append(ItemScore(index, score, answer.text, finite=answer.finite))
        return found

    def _by_harness(self, indices: Sequence[int]) -> list[ItemScore]:
        model = self.subject.base.module if self.base else self.subject.model
        found = []
        for index, outcome in zip(indices, self._runner.outcomes(model, indices), strict=True):
            if not 0 <= outcome.score <= 1:
                raise UsageError(
                    f"task {self.task.name}: the metric {self._runner.definition['metric']!r} of"
                    f" item {self.task.items[index].id} is {outcome.score:g}; an accuracy takes"
                    " scores from 0 to 1, name another metric"
                )
            score = outcome.score if outcome.finite else 0.0
            found.append(ItemScore(index, score, outcome.said, finite=outcome.finite))
        return found

    def _choose(self, indices: Sequence[int]) -> list[ItemScore]:
        pairs = [self._prompter.choices(index) for index in indices]
        flat = self._runner.likelihoods([pair for item in pairs for pair in item])
        found, begin = [], 0
        for index, item in zip(indices, pairs, strict=True):
            found.append(self._chosen(index, flat[begin : begin + len(item)]))
            begin += len(item)
        return found

    def _chosen(self, index: int, likelihoods: Sequence[Likelihood]) -> ItemScore:
        item = self.task.items[index]
        values = [found.value for found in likelihoods]
        tokens = [found.tokens for found in likelihoods]
        picks = {
            length: best_choice(values, choice_lengths(item, tokens, length)) for length in Length
        }
        pick = picks[self.task.length]
        return ItemScore(
            index,
            float(pick == item.correct),
            "NaN" if pick is None else _option(item, pick),
            {length: float(chosen == item.correct) for length, chosen in picks.items()},
            all(math.isfinite(value) for value in values),
        )

    # ------------------------------------------------------------------------------ store

    def _identify(self) -> str:
        base, adapter = model_identity(self.subject)
        grader = self.task.grader
        rules = {**self.task.rules(), "grader_type": str(type(grader)), "length": None}
        whole = [base, None if self.base else adapter, rules]
        return json.dumps(whole, sort_keys=True, default=str)

    def _key(self, index: int, length: Length | None) -> str:
        item = self.task.items[index]
        asked: Any
        if self.task.harness is not None:
            asked = [self._runner.definition, self._runner.asked(index)]
        elif self.task.scoring is Scoring.CHOICES:
            asked = self._prompter.choices(index)
        else:
            asked = self._prompter.prompt_ids(index)
        text = json.dumps([self._identity, asked, item.plain(), length], sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def _kept(self, index: int) -> ItemScore | None:
        if self._store is None:
            return None
        lengths: dict[Length, float] = {}
        for length in Length if self.task.scoring is Scoring.CHOICES else ():
            kept = self._store.get(self._key(index, length))
            if kept is None:
                return None
            lengths[length] = kept
        score = lengths.get(self.task.length)
        if score is None:
            score = self._store.get(self._key(index, None))
        return None if score is None else ItemScore(index, float(score), None, lengths)

    def _keep(self, score: ItemScore) -> None:
        """Only what was computed from numbers is kept: NaN may be a passing fault of a machine."""
        if self._store is None or not score.finite:
            return
        for length, value in score.lengths.items():
            self._store.put(self._key(score.index, length), value)
        if not score.lengths:
            self._store.put(self._key(score.index, None), score.score)


def _option(item: TaskItem, index: int) -> str:
    """A choice in words: what tells it from the others."""
    options = item.extra.get("options")
    if item.contexts and options:
        return str(options[index])
    return item.choices[index]


def excerpt(text: str, limit: int = _SHOWN) -> str:
    """A text on one line, its control characters escaped, its middle left out where it is long."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text.strip())
    if len(shown) <= limit:
        return shown
    half = (limit - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"
