"""What a profile's sources and tasks become: data that is open, bounds that know who set them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_lora.records import Bound
from pytest_lora.tasks.texts import Texts, open_texts

if TYPE_CHECKING:
    from pytest_lora.profile import Entry

__all__ = ["SourceDomain", "open_source"]

REPORTED = "no bound set: reported, not judged"
_OPENING = ("field", "documents", "split")
_SCORING = ("max_document_drift", "special_tokens", "window", "stride")


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
