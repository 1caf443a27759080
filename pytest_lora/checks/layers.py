"""Layers that lack what all others have: the trace of keys lost on the way to the file.

A model may well be irregular itself: hybrids mix attention with other mixers, pruned models skip
blocks, some layers share keys and values.  So a single layer that has less than nearly all others
is a problem, several are a remark, and ``base_compatibility`` decides with the base model at hand.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from pytest_lora.records import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pytest_lora.adapter import Adapter
    from pytest_lora.checks.adapter_config import Findings
    from pytest_lora.checks.tensor_names import NamedTensor

__all__ = ["check_layers"]

_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?[^.]+)\.(?P<index>\d+)\.(?P<rest>.+)")
_ALIKE = 3
"""Layers that have to agree before another one can be called short."""
_MOST = 0.75
"""Share of the other layers that have to agree."""


def check_layers(adapter: Adapter, named: Iterable[NamedTensor], findings: Findings) -> None:
    """Add layers with fewer modules than their like, unless the configuration picks modules."""
    if _picks_single_modules(adapter):
        return
    for stack, layers in _stacks(named).items():
        short = _short_layers(layers)
        for index, absent in short if len(short) == 1 else ():
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            findings.problems.append(
                Problem(
                    f"layer {index} of {stack}",
                    f"no tensors for {absent[0]!r}{more}, which nearly all layers have",
                    "the same modules in every layer",
                    "copy or save the adapter again: keys were lost",
                )
            )
        if len(short) > 1:
            which = ", ".join(str(index) for index, _ in short[:8])
            findings.notes.append(
                f"layers {which} of {stack} have fewer adapted modules than the others: "
                "right only if the base model is built so"
            )


def _picks_single_modules(adapter: Adapter) -> bool:
    """Whether layers were chosen on purpose: by index, by exclusion, or by full module paths."""
    if adapter.config.get("layers_to_transform") is not None or adapter.config.get(
        "exclude_modules"
    ):
        return True
    targets = adapter.target_modules or ()
    names = (targets,) if isinstance(targets, str) else targets
    return any(re.search(r"\d", re.sub(r"[A-Za-z_]\w*", "", name)) for name in names)


def _stacks(named: Iterable[NamedTensor]) -> Mapping[str, Mapping[int, set[str]]]:
    """``{stack of layers: {layer: {what it has}}}``."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for tensor in named:
        match = _LAYER.match(tensor.module + ".")
        if match and tensor.role in ("factor", "part", "saved", "bias"):
            what = match["rest"].rstrip(".")
            what = what if tensor.role in ("factor", "part") else f"{what}.{tensor.part}"
            found[match["stack"]][int(match["index"])].add(what)
    return found


def _short_layers(layers: Mapping[int, set[str]]) -> list[tuple[int, list[str]]]:
    """Layers that have strictly less than the usual, or nothing between layers that have it."""
    kinds = Counter(frozenset(modules) for modules in layers.values())
    usual, count = kinds.most_common(1)[0]
    if count < _ALIKE or count < _MOST * (len(layers) - 1):
        return []
    return list(_lacking(layers, usual))


def _lacking(
    layers: Mapping[int, set[str]], usual: frozenset[str]
) -> Iterator[tuple[int, list[str]]]:
    for index in range(min(layers), max(layers) + 1):
        has = layers.get(index, set())
        if has < usual:
            yield index, sorted(usual - has)
