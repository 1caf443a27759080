"""Any task of EleutherAI's lm-evaluation-harness, on base and adapter, on the same items.

The harness builds the prompts, asks the questions and grades the answers; the model is the one that
is loaded, with the adapter on it or off.  What it does not offer is a slice of the items in a given
order: its few-shot examples depend on what was asked before, and it attributes results to the wrong
documents unless the order rises.  So all prompts are built once, as one whole run of the harness
builds them, and :meth:`LmEvalRun.run` asks whichever of them it is told.

Needs the extra ``lm-eval``, version 0.4.12 or later of the series 0.4: the first whose task manager
gives tasks as one flat table, and the tests hold on 0.4.12 and 0.4.13.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_lora.baseline import digest_of
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import one_line, quiet
from pytest_lora.names import meant
from pytest_lora.records import Json
from pytest_lora.tasks.records import Scoring, Task, TaskItem

if TYPE_CHECKING:
    import torch

    from pytest_lora.subject import Subject

__all__ = [
    "LmEvalOutcome",
    "LmEvalQuestions",
    "LmEvalRun",
    "LmEvalScores",
    "LmEvalTask",
    "lm_eval_task",
    "load_lm_eval_tasks",
]

SEED = 1234
"""Seed of the few-shot examples: lm-eval's own default."""

_PLACE_OF_DATA = {"task", "task_alias", "tag", "custom_dataset", "dataset_path", "dataset_name",
                  "dataset_kwargs", "metadata"}  # fmt: skip

Spec = str | Path | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LmEvalScores:
    """Scores of some items of a task.

    Attributes:
        indices: the items, as asked for.
        adapter: the adapted model's score on each.
        base: the base model's; empty where it was not asked.
    """

    indices: tuple[int, ...]
    adapter: tuple[float, ...]
    base: tuple[float, ...]


class LmEvalOutcome(NamedTuple):
    """How one item came out.

    Attributes:
        score: the metric.
        said: what the model wrote or chose; empty where the harness does not tell.
        finite: whether every likelihood was a number.
    """

    score: float
    said: str
    finite: bool


@dataclass(frozen=True, slots=True)
class LmEvalTask:
    """One task of the harness, its data at hand.

    Attributes:
        name: what the harness calls it.
        version: the version of its definition.
        items: how many documents it asks about.
        task: the harness's own object.
        configuration: digest of how it asks, filters and grades, whatever its version says.
    """

    name: str
    version: str
    items: int
    task: Any
    configuration: str


# ---------------------------------------------------------------------------------------- tasks


def load_lm_eval_tasks(spec: Spec) -> tuple[LmEvalTask, ...]:
    """The task of that name, or those of the group of that name, with their data.

    Args:
        spec: a name lm-eval knows, the path of a task's YAML file, or its configuration.  A YAML
            file may name Python functions, which are run: read it as you would read code.

    Raises:
        UsageError: no such task; or it runs programs a model has written, without a sandbox.
        CannotRun: lm-eval is not installed, or the data cannot be had.
    """
    _require_lm_eval()
    named = isinstance(spec, str) and not Path(spec).is_file()
    with _silence():
        from lm_eval.tasks import TaskManager

        # Knowing all its names takes the harness seconds, and only a name needs them.
        manager = TaskManager(include_defaults=named)
        if named and spec not in manager.all_tasks:
            raise UsageError(_unknown(str(spec), manager.all_tasks))
        try:
            loaded = manager.load(dict(spec) if isinstance(spec, Mapping) else str(spec))["tasks"]
        except Exception as error:  # whatever a data set or its definition makes libraries raise
            name = spec.get("task", "?") if isinstance(spec, Mapping) else spec
            raise CannotRun(_no_data(str(name), error)) from None
    return tuple(_described(name, task) for name, task in loaded.items())


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise CannotRun(
            'tasks of lm-eval need it: pip install "pytest-lora[lm-eval]"', missing=True
        )


def _unknown(name: str, known: Sequence[str]) -> str:
    hint = meant(name, known, "lm-eval ls tasks lists them")
    return f"lm-eval has no task {name!r}, and there is no such file{hint}"


def _no_data(name: str, error: Exception) -> str:
    return (
        f"task {name} of lm-eval cannot be loaded: {one_line(error)};"
        " where its data is not in the cache of Hugging Face datasets, load it once with a network"
        " or give a task configuration whose data is a local file (docs/lm-eval.md)"
    )


def _described(name: str, task: Any) -> LmEvalTask:
    if getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False):
        raise UsageError(
            f"task {name} of lm-eval runs programs a model has written in this very process; use"
            " the format humaneval, which runs them in a sandbox (docs/code-execution.md)"
        )
    version = getattr(task, "VERSION", None)
    return LmEvalTask(name, "unknown" if version is None else str(version),
                      len(task.eval_docs), task, _configuration(task))  # fmt: skip


def _configuration(task: Any) -> str:
    """Digest of a task's configuration, but for the place of its data: items are digested as such.

    A task's own version is what its author remembers to count up; the numbers of another filter or
    metric are others all the same.
    """
    names = {item.name for item in dataclasses.fields(task.config)} - _PLACE_OF_DATA
    rules = {name: _defined(getattr(task.config, name)) for name in names}
    return digest_of([_source(type(task)), sorted(rules.items())])


def _defined(value: Any) -> Any:
    """A value of a configuration as JSON-plain data that is the same in every process."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return sorted([str(key), _defined(item)] for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_defined(item) for item in value]
    if isinstance(value, functools.partial):
        return [_defined(part) for part in (value.func, value.args, value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [[item.name, _defined(getattr(value, item.name))]
                for item in dataclasses.fields(value)]  # fmt: skip
    return _source(value if callable(value) else type(value))


def _source(code: Any) -> list[str | None]:
    """A function or class by its name, its own lines, and the file of what it calls."""
    name = getattr(code, "__qualname__", type(code).__qualname__)
    try:
        path = inspect.getsourcefile(code)
        whole = hashlib.blake2b(Path(path).read_bytes()).hexdigest() if path else None
        return [name, inspect.getsource(code), whole]
    except (OSError, TypeError):  # built in, or made by other code
        return [name, None, None]


# ------------------------------------------------------------------------------ tasks of a profile


@dataclass(frozen=True, slots=True)
class LmEvalQuestions:
    """A task of the harness and how it is put, before it is put to a model.

    Attributes:
        task: the task.
        metric, filter_name, num_fewshot, chat: as for :class:`LmEvalRun`.
    """

    task: LmEvalTask
    metric: str | None
    filter_name: str | None
    num_fewshot: int | None
    chat: bool

    def plain(self) -> dict[str, Json]:
        """For the record, JSON-plain."""
        return {
            "harness": f"lm-eval {_version()}",
            "task": self.task.name,
            "task_version": self.task.version,
            "configuration": self.task.configuration,
            "metric": self.metric,
            "filter": self.filter_name,
            "num_fewshot": self.num_fewshot,
            "chat": self.chat,
        }

    def asked_of(self, subject: Subject, tokenizer: Any, batch_size: int) -> LmEvalRun:
        """The questions put to a subject."""
        return LmEvalRun(
            subject,
            self.task,
            metric=self.metric,
            filter_name=self.filter_name,
            num_fewshot=self.num_fewshot,
            batch_size=batch_size,
            chat=self.chat,
            tokenizer=tokenizer,
        )


def lm_eval_task(
    name: str,
    spec: Spec,
    *,
    metric: str | None = None,
    filter_name: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> Task:
    """A task of the harness as one of ours: scored item by item, in any order, with early verdicts.

    Args:
        name: what results call it.
        spec: as for :func:`load_lm_eval_tasks`; one task, no group.
        metric: as for :class:`LmEvalRun`, like all that follow.
        filter_name: the filter of answers.
        num_fewshot: worked examples before each question.
        limit: the first so many items only.
        chat: put each question through the tokenizer's chat template.

    Raises:
        UsageError: no such task, metric or filter; or it is a group.
        CannotRun: lm-eval is not installed, or the data cannot be had.  An error, not a skip: a
            gate that was asked for must not open where the package is forgotten.
    """
    try:
        loaded = load_lm_eval_tasks(spec)
    except CannotRun as error:
        raise CannotRun(f"task {name}: {error}") from None
    if len(loaded) != 1:
        listed = ", ".join(task.name for task in loaded[:8]) + (", ..." if loaded[8:] else "")
        raise UsageError(
            f"task {name}: lm-eval's {spec} is a group of {len(loaded)} tasks; name them one by"
            f" one: {listed}"
        )
    [known] = loaded
    filter_name = _one_of("filter", filter_name, _filters(known.task), known.name)
    metric = _one_of("metric", metric, _metrics(known.task), known.name)
    count = known.items if limit is None else min(limit, known.items)
    documents = known.task.eval_docs
    items = tuple(_item(known.task, number, documents[number]) for number in range(count))
    questions = LmEvalQuestions(known, metric, filter_name, num_fewshot, chat)
    return Task(
        name, items, format="lm-eval", scoring=Scoring.HARNESS, chat=chat, harness=questions
    )


def _item(task: Any, number: int, document: Any) -> TaskItem:
    """What reports show of a document, as far as its task says it plainly."""
    prompt, answer = "", ""
    choices: tuple[str, ...] = ()
    with contextlib.suppress(Exception):  # whatever a definition makes of its documents
        prompt = str(task.doc_to_text(document))
    with contextlib.suppress(Exception):
        target = task.doc_to_target(document)
        answer = str(target)
        choices = tuple(str(choice) for choice in task.doc_to_choice(document))
        if isinstance(target, int) and 0 <= target < len(choices):
            return TaskItem(str(number), prompt, choices=choices, correct=target)
    return TaskItem(str(number), prompt, answer)


# ----------------------------------------------------------------------------------------- runs


class LmEvalRun:
    """A task put to one subject, item by item.

    Attributes:
        task: the task.
        definition: all that decides a score, JSON-plain: for results.
        batch_size: items a forward pass has at most.
        notes: what had to be done otherwise than asked.
    """

    def __init__(
        self,
        subject: Subject,
        task: LmEvalTask,
        *,
        metric: str | None = None,
        filter_name: str | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        chat: bool = False,
        tokenizer: Any = None,
    ) -> None:
        """Build every prompt.

        Args:
            subject: adapter and base.
            task: from :func:`load_lm_eval_tasks`.
            metric: the metric that is an item's score; default the task's first.
            filter_name: the filter of answers it is taken after; default the task's first.
            num_fewshot: worked examples before each question; default the task's own number.
            batch_size: items a forward pass has at most.
            max_length: tokens of a prompt at most; default the model's own.
            chat: put each question through the tokenizer's chat template.
            tokenizer: default the base model's.

        Raises:
            UsageError: the task has no such metric or filter.
            CannotRun: the base model has no tokenizer.
        """
        self.task, self._subject, self._task = task, subject, task.task
        self.batch_size = batch_size
        self.notes: list[str] = []
        tokenizer = subject.base.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise CannotRun(f"task {task.name}: the base model has no tokenizer", missing=True)
        with _silence(), subject.base.bare() as module:
            self._lm = _wrapped(module, tokenizer, batch_size, max_length)
            self._instances = self._build(num_fewshot, chat)
        self._filter = _one_of("filter", filter_name, _filters(self._task), task.name)
        self._metric = _one_of("metric", metric, _metrics(self._task), task.name)
        self.definition: dict[str, Json] = {
            "harness": f"lm-eval {_version()}",
            "task": task.name,
            "task_version": task.version,
            "configuration": task.configuration,
            "metric": self._metric,
            "filter": self._filter,
            "num_fewshot": int(self._task.config.num_fewshot or 0),
            "fewshot_seed": SEED,
            "items": task.items,
            "output_type": str(self._task.config.output_type),
            "chat": chat,
            "tokenizer": type(tokenizer).__name__,
            "batch_size": batch_size,
            "max_length": int(self._lm.max_length),
            "dtype": str(subject.base.dtype).removeprefix("torch."),
        }

    def __len__(self) -> int:
        """Items of the task; indices run from 0."""
        return self.task.items

    def run(self, indices: Sequence[int] | None = None, *, base: bool = True) -> LmEvalScores:
        """Scores of the items at ``indices``, in that order; of all of them by default.

        Args:
            indices: each from 0 to ``len(self) - 1``, none of them twice.
            base: ask the base model as well.

        Raises:
            UsageError: an index is out of range or comes twice; or the metric is not a number an
                item has by itself (a perplexity, an F1 over the whole set).
        """
        chosen = range(len(self)) if indices is None else indices
        _require_indices(chosen, len(self))
        adapted = self._scores(self._subject.model, chosen)
        plain: list[float] = []
        if base:
            with self._subject.base.bare() as module:
                plain = self._scores(module, chosen)
        return LmEvalScores(tuple(chosen), tuple(adapted), tuple(plain))

    def _build(self, num_fewshot: int | None, chat: bool) -> dict[int, list[Any]]:
        """Every request of the task by its document, as one whole run of the harness has them."""
        task = self._task
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests(
            rank=0,
            world_size=1,
            apply_chat_template=chat,
            chat_template=self._lm.apply_chat_template if chat else None,
            tokenizer_name=self._lm.tokenizer_name if chat else "",
        )
        by_document: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        for group in by_document.values():
            group.sort(key=lambda instance: instance.idx)
        return by_document

    def asked(self, index: int) -> list[str]:
        """All that the model is asked for an item, as text: what its score depends on."""
        return [repr(request.args) for request in self._instances[index]]

    def _scores(self, model: torch.nn.Module, indices: Sequence[int]) -> list[float]:
        return [outcome.score for outcome in self.outcomes(model, indices)]

    def outcomes(self, model: Any, indices: Sequence[int]) -> list[LmEvalOutcome]:
        """How each item comes out with the module that is given: the base while it is bare, or the
        adapted model.
        """
        asked = {index: [_fresh(one) for one in self._instances[index]] for index in indices}
        requests = [request for group in asked.values() for request in group]
        self._lm._model = model
        with _silence():
            self._answer(requests)
            self._task._instances = requests
            self._task.apply_filters()
            return [
                LmEvalOutcome(self._score(index, asked[index]), *self._said(asked[index]))
                for index in indices
            ]

    def _answer(self, requests: Sequence[Any]) -> None:
        kinds: dict[str, list[Any]] = {}
        for request in requests:
            kinds.setdefault(request.request_type, []).extend([request] * (request.repeats or 1))
        for kind, repeated in kinds.items():
            answers = getattr(self._lm, kind)(repeated, disable_tqdm=True)
            for request, answer in zip(repeated, answers, strict=True):
                request.resps.append(answer)

    def _score(self, index: int, group: Sequence[Any]) -> float:
        answers = [request.filtered_resps[self._filter] for request in group]
        found = self._task.process_results(group[0].doc, answers)
        value = found.get(self._metric)
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if math.isnan(score):
            raise UsageError(
                f"task {self.task.name}: metric {self._metric!r} of item {index} is {value!r},"
                f" expected a number; this task's items have {', '.join(found)}"
            )
        return score

    def _said(self, group: Sequence[Any]) -> tuple[str, bool]:
        """What the model answered in words, and whether its likelihoods are numbers."""
        answers = [request.filtered_resps[self._filter] for request in group]
        if not all(isinstance(answer, tuple | list) for answer in answers):
            return str(answers[0]), True
        values = [answer[0] for answer in answers]
        if not all(isinstance(value, int | float) for value in values):
            return str(values[0]), True
        said = ""
        with contextlib.suppress(Exception):  # not every task has choices by the document
            said = str(self._task.doc_to_choice(group[0].doc)[values.index(max(values))])
        return said, all(map(math.isfinite, values))


def _wrapped(
    module: torch.nn.Module, tokenizer: Any, batch_size: int, max_length: int | None
) -> Any:
    from lm_eval.models.huggingface import HFLM

    # Made with the bare base: it ties weights again, which an adapter's saved modules may not like.
    return HFLM(
        pretrained=module, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
    )


def _fresh(instance: Any) -> Any:
    """The request without any answer."""
    return dataclasses.replace(instance, resps=[], filtered_resps={})


def _require_indices(indices: Sequence[int], size: int) -> None:
    if len(set(indices)) != len(indices):
        raise UsageError("an item is asked for twice")
    outside = [index for index in indices if not 0 <= index < size]
    if outside or not indices:
        what = f"item {outside[0]}" if outside else "nothing"
        raise UsageError(f"{what} was asked for, expected items from 0 to {size - 1}")


def _filters(task: Any) -> list[str]:
    return [ensemble.name for ensemble in getattr(task, "_filters", ())]


def _metrics(task: Any) -> list[str]:
    return list(task.aggregation())


def _one_of(what: str, wanted: str | None, known: Sequence[str], task: str) -> str:
    if wanted is None and known:
        return known[0]
    if wanted is None or wanted not in known:
        listed = ", ".join(known) or "none"
        raise UsageError(
            f"task {task} of lm-eval has no {what} {wanted!r}, expected one of {listed}"
        )
    return wanted


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lm_eval")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the harness's remarks, progress bars and deprecations from the run."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
