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
import difflib
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import one_line, quiet
from pytest_lora.records import Json

if TYPE_CHECKING:
    import torch

    from pytest_lora.subject import Subject

__all__ = ["LmEvalRun", "LmEvalScores", "LmEvalTask", "load_lm_eval_tasks"]

SEED = 1234
"""Seed of the few-shot examples: lm-eval's own default."""

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


@dataclass(frozen=True, slots=True)
class LmEvalTask:
    """One task of the harness, its data at hand.

    Attributes:
        name: what the harness calls it.
        version: the version of its definition.
        items: how many documents it asks about.
        task: the harness's own object.
    """

    name: str
    version: str
    items: int
    task: Any


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
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    hint = f"did you mean {' or '.join(close)}?" if close else "lm-eval ls tasks lists them"
    return f"lm-eval has no task {name!r}, and there is no such file; {hint}"


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
                      len(task.eval_docs), task)  # fmt: skip


# ----------------------------------------------------------------------------------------- runs


class LmEvalRun:
    """A task put to one subject, item by item.

    Attributes:
        task: the task.
        definition: all that decides a score, JSON-plain: for results.
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

    def _scores(self, model: torch.nn.Module, indices: Sequence[int]) -> list[float]:
        """One model's score of each item."""
        asked = {index: [_fresh(one) for one in self._instances[index]] for index in indices}
        requests = [request for group in asked.values() for request in group]
        self._lm._model = model
        with _silence():
            self._answer(requests)
            self._task._instances = requests
            self._task.apply_filters()
            return [self._score(index, asked[index]) for index in indices]

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
