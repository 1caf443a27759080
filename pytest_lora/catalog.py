"""The built-in checks as plain facts: what each asks, needs, costs and builds upon.

A table, not a registry: nothing is registered, dispatched or run from here.  The suite's test
``test_<id>`` carries a check out; this table lets the plugin order, select and list the tests
without importing them, and lets the documentation be checked against the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["CHECKS", "CheckSpec", "Need", "expand_selection", "find_check"]


class Need(IntEnum):
    """What has to be at hand for a check, cheapest first; the suite runs in this order."""

    FILES = 1
    """The adapter's files: no torch, milliseconds."""
    BASE = 2
    """The base model's configuration, on the meta device: no weights."""
    WEIGHTS = 3
    """The base model's weights."""
    FORWARD = 4
    """Forward passes through the base model."""
    PROCESS = 5
    """A fresh process that loads the model from disk."""
    DATA = 6
    """Texts or tasks that a profile names, and passes over them."""

    @property
    def label(self) -> str:
        """The name ``--lora-checks`` takes for the whole group."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class CheckSpec:
    """The facts about one check.

    Attributes:
        id: stable id; the suite's test is ``test_<id>``, its page ``docs/checks/<id>.md``.
        question: what the check asks, in one line.
        need: the heaviest thing it needs.
        cost: rough cost on a 1B model on CPU, for people planning a run.
        after: checks whose failure makes this one meaningless; it then skips and names the first.
        limit: ``"at most"`` or ``"at least"`` where the user may move the bound, else ``""``.
        default: the default limit of a movable bound; infinite where any finite value is allowed,
            and what is measured is reported.
        unit: unit of the movable bound.
        per: kind of entry of the profile, ``"sources"`` or ``"tasks"``, that the check is made for;
            without any there is nothing to check.  Empty for checks made once per adapter.
        opt_in: made only for adapters whose bound somebody set; there is no default.
    """

    id: str
    question: str
    need: Need
    cost: str
    after: tuple[str, ...] = ()
    limit: str = ""
    default: float = 0.0
    unit: str = ""
    per: str = ""
    opt_in: bool = False


_SOUND = ("adapter_files", "config_matches_weights", "finite_weights")
_LOADS = (*_SOUND, "base_compatibility")
_ACTS = (*_LOADS, "adapter_effect")
_BOUND_UNIT = "times the rounding bound"
_SIZE_UNIT = "GiB of GPU memory"

CHECKS: tuple[CheckSpec, ...] = (
    CheckSpec(
        "adapter_files",
        "Is the folder complete, readable and free of anything that could run?",
        Need.FILES,
        "milliseconds",
    ),
    CheckSpec(
        "config_matches_weights",
        "Does every tensor follow from the configuration, and the other way round?",
        Need.FILES,
        "milliseconds",
        after=("adapter_files",),
    ),
    CheckSpec(
        "finite_weights",
        "Is every number in the weights finite?",
        Need.FILES,
        "under a second",
        after=("adapter_files",),
    ),
    CheckSpec(
        "serving_profile",
        "Would vLLM, SGLang, LoRAX or llama.cpp take it, and at the right scale?",
        Need.FILES,
        "milliseconds",
        after=("adapter_files", "config_matches_weights"),
    ),
    CheckSpec(
        "base_compatibility",
        "Does every tensor, target and pattern land on this base model?",
        Need.BASE,
        "seconds",
        after=_SOUND,
    ),
    CheckSpec(
        "adapter_effect",
        "Does the adapter change anything, in its weights and at the output?",
        Need.FORWARD,
        "seconds",
        after=_LOADS,
        limit="at least",
        default=0.0,
        unit="output change relative to the base model's output",
    ),
    CheckSpec(
        "delta_spectrum",
        "How large are the updates beside their weights, and of what rank?",
        Need.WEIGHTS,
        "seconds",
        after=_LOADS,
        limit="at most",
        default=math.inf,
        unit="of the weight's norm",
    ),
    CheckSpec(
        "disable_equals_base",
        "Is the model with the adapter disabled exactly the base model?",
        Need.FORWARD,
        "seconds",
        after=_LOADS,
    ),
    CheckSpec(
        "requires_grad",
        "Is exactly what the configuration declares trainable, after every call?",
        Need.WEIGHTS,
        "seconds",
        after=_LOADS,
    ),
    CheckSpec(
        "frozen_weights",
        "Does every base weight and buffer survive each operation, bit for bit?",
        Need.FORWARD,
        "tens of seconds",
        after=_LOADS,
    ),
    CheckSpec(
        "adapter_isolation",
        "Do a second adapter's coming, switching and going leave this one alone?",
        Need.FORWARD,
        "seconds",
        after=_ACTS,
    ),
    CheckSpec(
        "padding_invariance",
        "Do padding side and batch size leave the answers alone?",
        Need.FORWARD,
        "seconds",
        after=_LOADS,
        limit="at most",
        default=1.0,
        unit=_BOUND_UNIT,
    ),
    CheckSpec(
        "merge_equivalence",
        "Is the merged model the adapted model, up to unavoidable rounding?",
        Need.FORWARD,
        "tens of seconds",
        after=_ACTS,
        limit="at most",
        default=1.0,
        unit=_BOUND_UNIT,
    ),
    CheckSpec(
        "unmerge_restoration",
        "Does unmerging give the base weights back, however often it is done?",
        Need.FORWARD,
        "tens of seconds",
        after=(*_ACTS, "merge_equivalence"),
        limit="at most",
        default=1.0,
        unit=_BOUND_UNIT,
    ),
    CheckSpec(
        "memory_load",
        "Does putting it on its base take no more GPU memory than you allow?",
        Need.FORWARD,
        "seconds",
        after=_LOADS,
        limit="at most",
        default=math.inf,
        unit=_SIZE_UNIT,
        opt_in=True,
    ),
    CheckSpec(
        "memory_inference",
        "Does inference take no more GPU memory than you allow?",
        Need.FORWARD,
        "seconds",
        after=_LOADS,
        limit="at most",
        default=math.inf,
        unit=_SIZE_UNIT,
        opt_in=True,
    ),
    CheckSpec(
        "memory_train_step",
        "Does a training step take no more GPU memory than you allow?",
        Need.FORWARD,
        "seconds",
        after=_LOADS,
        limit="at most",
        default=math.inf,
        unit=_SIZE_UNIT,
        opt_in=True,
    ),
    CheckSpec(
        "memory_merge",
        "Does merging take no more GPU memory than you allow?",
        Need.FORWARD,
        "seconds",
        after=_LOADS,
        limit="at most",
        default=math.inf,
        unit=_SIZE_UNIT,
        opt_in=True,
    ),
    CheckSpec(
        "save_reload",
        "Does saving and loading in a fresh process give the same outputs, bit for bit?",
        Need.PROCESS,
        "tens of seconds",
        after=_ACTS,
    ),
    CheckSpec(
        "merged_reload",
        "Does the merged model, saved and loaded in a fresh process, stay the same?",
        Need.PROCESS,
        "tens of seconds",
        after=(*_ACTS, "merge_equivalence"),
        limit="at most",
        default=2.0,
        unit="times the unmerged model's own rounding error",
    ),
    CheckSpec(
        "perplexity_drift",
        "Does it predict texts of a source domain as well as the base model does?",
        Need.DATA,
        "minutes, seconds with a warm cache",
        after=_LOADS,
        limit="at most",
        default=math.inf,
        unit="nats per token",
        per="sources",
    ),
    CheckSpec(
        "dtype_stability",
        "Is the drift in bfloat16 and float16 what it is in float32?",
        Need.DATA,
        "minutes",
        after=_LOADS,
        limit="at most",
        default=1.0,
        unit=_BOUND_UNIT,
        per="sources",
    ),
    CheckSpec(
        "task_accuracy",
        "Does it solve enough of a target task?",
        Need.DATA,
        "minutes",
        after=_LOADS,
        per="tasks",
    ),
    CheckSpec(
        "generation_health",
        "Do its answers to a task end, without loops, silence or leaked templates?",
        Need.DATA,
        "minutes",
        after=_LOADS,
        per="tasks",
    ),
    CheckSpec(
        "generation_diversity",
        "Do sampled answers to a task still differ as the base model's do?",
        Need.DATA,
        "minutes",
        after=_LOADS,
        limit="at least",
        default=0.0,
        unit="of the base model's diversity",
        per="tasks",
    ),
)


def find_check(check_id: str) -> CheckSpec:
    """The check of that id; raises ``KeyError`` for an unknown one."""
    for spec in CHECKS:
        if spec.id == check_id:
            return spec
    raise KeyError(check_id)


def expand_selection(words: tuple[str, ...]) -> frozenset[str]:
    """Check ids named by ``words``, each a check id or a group (``files``, ``base``, ...).

    A group stands for everything that needs no more than it says: ``forward`` includes ``files``.
    Raises ``KeyError`` with the first word that is neither.
    """
    groups = {need.label: need for need in Need}
    chosen: set[str] = set()
    for word in words:
        if word in groups:
            chosen.update(spec.id for spec in CHECKS if spec.need <= groups[word])
        else:
            chosen.add(find_check(word).id)
    return frozenset(chosen)
