"""What a profile's sources and tasks become: data that is open, bounds that know who set them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from pytest_lora.nll_cache import NllCache, Scores
from pytest_lora.quantities import Floor, Margin
from pytest_lora.records import Bound

if TYPE_CHECKING:
    from pytest_lora.baseline import Reference
    from pytest_lora.profile import Entry
    from pytest_lora.tasks.records import Task
    from pytest_lora.tasks.texts import Texts

__all__ = ["SourceDomain", "TargetTask", "how_to_open", "open_source", "open_task"]

RECORDED = "being recorded, not judged"
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


Recorded = Callable[[str], "Reference | None"]
"""Gives what a baseline has, for a bound whose origin it is told; None while it is recorded."""


def how_to_open(entry: Entry) -> dict[str, Any]:
    """What :func:`~pytest_lora.tasks.texts.open_texts` takes of a source domain's keys."""
    return {key: entry.values[key] for key in _OPENING if key in entry.values}


def open_source(
    entry: Entry,
    texts: Texts,
    *,
    otherwise: tuple[float | Margin | None, str],
    evaluation: Mapping[str, Any],
    reference: Recorded,
) -> SourceDomain:
    """The source domain that an entry of the profile declares.

    Args:
        entry: of the profile.
        texts: its documents.
        otherwise: the limit where the entry has none of its own, and who set it.
        evaluation: options that hold for all data of the run.
        reference: what the baseline has of this domain's drift.

    Raises:
        CannotRun: the bound is relative to a baseline that has nothing of this.
    """
    limit, origin = otherwise
    if entry.get("max_drift") is not None:
        limit, origin = entry.values["max_drift"], entry.origins["max_drift"]
    bound, recorded = _ceiling(limit, origin, reference)
    options = {key: entry.values[key] for key in _SCORING if key in entry.values}
    if "prefix" in entry.values:
        prefix = entry.values["prefix"]
        options["prefix"] = None if prefix == "none" else prefix
    if recorded is not None:
        options["reference"] = recorded
    return SourceDomain(entry.name, {entry.name: texts}, bound, {**evaluation, **options})


def _ceiling(
    limit: float | Margin | None, origin: str, reference: Recorded
) -> tuple[Bound, Reference | None]:
    """The bound, and what it is relative to."""
    if isinstance(limit, Margin):
        found = reference(origin)
        if found is None:
            return Bound.at_most(math.inf, f"{origin}: {RECORDED}"), None
        return Bound.at_most(found.value + limit.value, f"{origin}: {limit}"), found
    if limit is None:
        return Bound.at_most(math.inf, REPORTED), None
    return Bound.at_most(limit, origin), None


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
    entry: Entry, task: Task, *, evaluation: Mapping[str, Any], reference: Recorded
) -> TargetTask:
    """The task that an entry of the profile declares.

    Args:
        entry: of the profile.
        task: its items, as :func:`~pytest_lora.tasks.configure.make_task` reads them.
        evaluation: options that hold for all data of the run.
        reference: what the baseline has of this task's accuracy.

    Raises:
        CannotRun: the floor is relative to a baseline that has nothing of this.
    """
    shared = dict(evaluation)
    cache: NllCache = shared.pop("cache")
    batch = {key: entry.values[key] for key in ("batch_size",) if key in entry.values}
    drawn = {**batch, "seed": shared["seed"]}
    options = {**shared, **batch, "store": Scores(cache, entry.name)}
    domain = entry.get("about") == "domain"
    if domain:
        options["domain"] = True
    floor, recorded = _floor(entry, domain, reference)
    if recorded is not None:
        options["reference"] = recorded
    writing = {**drawn, "alpha": shared["alpha"]}
    if "max_unstopped" in entry.values:
        writing["limits"] = {"unstopped": entry.values["max_unstopped"]}
    return TargetTask(task, floor, options, writing, drawn)


def _floor(
    entry: Entry, domain: bool, reference: Recorded
) -> tuple[dict[str, Bound], Reference | None]:
    """The bound under the name of its argument, and what it is relative to.

    Relative to a baseline, these items decide by the recorded accuracy, of which nothing is
    uncertain; the domain they come from decides by what changed, item by item.
    """
    floor: Floor | None = entry.get("min_accuracy")
    if floor is None:
        return {"min_accuracy": Bound.at_least(-math.inf, REPORTED)}, None
    origin = entry.origins["min_accuracy"]
    if floor.to == "base":
        return {"min_change": Bound.at_least(floor.value, origin)}, None
    if floor.to == "":
        return {"min_accuracy": Bound.at_least(floor.value, origin)}, None
    found = reference(origin)
    if found is None:
        return {"min_accuracy": Bound.at_least(-math.inf, f"{origin}: {RECORDED}")}, None
    if domain:
        return {"min_change": Bound.at_least(floor.value, f"{origin}: {floor}")}, found
    least = max(0.0, float(_share(found) + floor.exact))
    return {"min_accuracy": Bound.at_least(least, f"{origin}: {floor}")}, found


def _share(found: Reference) -> Fraction:
    """A recorded accuracy before it was rounded: ``k`` of its ``n`` items.

    The limit is worked out from it without rounding and rounded once, as every accuracy is.
    Rounding keeps order, so ``m / n`` reaches the limit as a float wherever it does as a number:
    0.8 less 0.1, in floats, is above 7 / 10.  A mean of graded scores may be no such fraction, and
    is what its float says.
    """
    share = Fraction(round(found.value * found.count), found.count)
    return share if float(share) == found.value else Fraction(found.value)
