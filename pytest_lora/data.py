"""What a profile's sources and tasks become: data that is open, bounds that know who set them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_lora.nll_cache import NllCache, Scores
from pytest_lora.records import Bound
from pytest_lora.tasks.configure import make_task
from pytest_lora.tasks.texts import Texts, open_texts

if TYPE_CHECKING:
    from pytest_lora.profile import Entry
    from pytest_lora.tasks.records import Task

__all__ = ["SourceDomain", "TargetTask", "open_source", "open_task"]

REPORTED = "no bound set: reported, not judged"
_OPENING = ("field", "documents", "split")
_SCORING = ("max_document_drift", "max_unseen", "special_tokens", "window", "stride")


@dataclass(frozen=True, slots=True)
class SourceDomain:
    """A source domain, ready to be measured.

    Attributes:
        name: its name in the profile.
        texts: its documents, by that name.
        max_drift: the bound, in nats per token; where nobody set one, a bound that only a drift
            that is no number can miss.
        options: further arguments of :func:`~pytest_lora.assertions.assert_perplexity_drift`.
    """

    name: str
    texts: Mapping[str, Texts]
    max_drift: Bound
    options: Mapping[str, Any]


def open_source(
    entry: Entry, *, otherwise: Bound | None, evaluation: Mapping[str, Any]
) -> SourceDomain:
    """The source domain that an entry of the profile declares.

    Args:
        entry: of the profile.
        otherwise: the bound where the entry has none of its own.
        evaluation: options that hold for all data of the run.

    Raises:
        UsageError: its texts cannot be read.
    """
    how = {key: entry.values[key] for key in _OPENING if key in entry.values}
    texts = open_texts(entry.values["path"], **how)
    bound = otherwise or Bound.at_most(math.inf, REPORTED)
    if entry.get("max_drift") is not None:
        bound = Bound.at_most(entry.values["max_drift"], entry.origins["max_drift"])
    options = {key: entry.values[key] for key in _SCORING if key in entry.values}
    if "prefix" in entry.values:
        prefix = entry.values["prefix"]
        options["prefix"] = None if prefix == "none" else prefix
    return SourceDomain(entry.name, {entry.name: texts}, bound, {**evaluation, **options})


@dataclass(frozen=True, slots=True)
class TargetTask:
    """A target task, ready to be measured.

    Attributes:
        task: its items and how they are put and judged.
        floor: ``{"min_accuracy": bound}``, or ``{"min_change": bound}`` relative to the base model;
            where nobody set one, a bound that only an accuracy that is no number can miss.
        options: further arguments of :func:`~pytest_lora.assertions.assert_task_accuracy`.
        writing: those of :func:`~pytest_lora.assertions.assert_generation_health`.
        sampling: those of :func:`~pytest_lora.assertions.assert_generation_diversity`.
    """

    task: Task
    floor: Mapping[str, Bound]
    options: Mapping[str, Any]
    writing: Mapping[str, Any]
    sampling: Mapping[str, Any]


def open_task(
    entry: Entry, *, evaluation: Mapping[str, Any], allow_code_execution: bool
) -> TargetTask:
    """The task that an entry of the profile declares.

    Args:
        entry: of the profile.
        evaluation: options that hold for all data of the run.
        allow_code_execution: let HumanEval run what the model wrote.

    Raises:
        UsageError: its items cannot be read, or code may not be run.
    """
    task = make_task(entry.name, entry.values, allow_code_execution=allow_code_execution)
    shared = dict(evaluation)
    cache: NllCache = shared.pop("cache")
    batch = {key: entry.values[key] for key in ("batch_size",) if key in entry.values}
    drawn = {**batch, "seed": shared["seed"]}
    options = {**shared, **batch, "store": Scores(cache, entry.name)}
    if entry.get("about") == "domain":
        options["domain"] = True
    floor = _floor(entry)
    if "min_change" in floor:  # always on all items
        options = {key: options[key] for key in options if key not in ("alpha", "full")}
    return TargetTask(task, floor, options, {**drawn, "alpha": shared["alpha"]}, drawn)


def _floor(entry: Entry) -> dict[str, Bound]:
    floor = entry.get("min_accuracy")
    if floor is None:
        return {"min_accuracy": Bound.at_least(-math.inf, REPORTED)}
    name = "min_change" if floor.of_base else "min_accuracy"
    return {name: Bound.at_least(floor.value, entry.origins["min_accuracy"])}
