"""The peak of a deep model from three shallow ones: exact, or not used.

Layers that repeat run the same operators.  Traced at three depths p layers apart (p the period of
the layer pattern), each phase of the step is one sequence of operators into which every further
period inserts the same block.  What is alive after an operator of layer i of L is then an affine
function of i and L; for a given L it is largest in the first layer or in the last.  So it is enough
to follow every operator counted from the start of its phase, and every operator counted from its
end, each an affine function of L, and to take the largest at the depth asked for.

All of this is checked, not assumed: that layers repeat in shape, type and trainability, that the
three sequences differ by such blocks only, and that every one of those functions is affine through
its three points.  Where anything is off, the answer is None, and the whole model has to be traced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch

from pytest_lora.memory.records import CATEGORIES, MemoryPeak, Moment
from pytest_lora.memory.workload import Workload, make_model

__all__ = ["extrapolate", "period"]

Kernels = Mapping[str, int]
Trace = Callable[[Workload], tuple[MemoryPeak, Kernels]]
_BOUNDARY = 2
"""Layers at either end that may differ: nothing before the first needs a gradient, say."""
_LAYER = re.compile(r"\.(\d+)\.")


def extrapolate(workload: Workload, trace: Trace) -> tuple[MemoryPeak, Kernels] | None:
    """The peak at the workload's depth from three traces that keep their timeline.

    Returns:
        The peak, with the largest tensors of the deepest model traced, and the kernels' calls; None
        where layers do not repeat or the model is not deep enough for this to save anything.
    """
    depth = getattr(workload.config, "num_hidden_layers", None)
    step = period(workload) if isinstance(depth, int) else None
    if step is None or not isinstance(depth, int):
        return None
    first = depth % step
    while first < _BOUNDARY + 1:
        first += step
    probes = [first, first + step, first + 2 * step]
    if sum(probes) >= depth:
        return None
    traced = [trace(workload.of_depth(layers)) for layers in probes]
    steps_on = (depth - probes[-1]) // step
    peak = _combine([peak for peak, _ in traced], steps_on)
    kernels = _counts([kernels for _, kernels in traced], steps_on)
    return None if peak is None or kernels is None else (peak, kernels)


def period(workload: Workload) -> int | None:
    """After how many layers the model repeats itself; None where it does not."""
    layers = _layers(make_model(workload, "meta"))
    depth = workload.config.num_hidden_layers
    kinds = getattr(workload.config, "layer_types", None) or [""] * depth
    if sorted(layers) != list(range(depth)) or len(kinds) != depth or _other_lists(workload):
        return None
    signs = [(kinds[index], layers[index]) for index in range(depth)]
    for step in range(1, depth // 3 + 1):
        if all(signs[index] == signs[index - step] for index in range(step, depth)):
            return step
    return None


Sign = tuple[tuple[str, tuple[int, ...], torch.dtype, bool], ...]


def _layers(model: torch.nn.Module) -> dict[int, Sign]:
    """Everything trainable or not in each layer: names, shapes, formats, flags."""
    found: dict[int, list[tuple[str, tuple[int, ...], torch.dtype, bool]]] = {}
    for name, parameter in model.named_parameters():
        match = _LAYER.search(name)
        if match:
            rest = name[: match.start()] + name[match.end() :]
            entry = (rest, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
            found.setdefault(int(match[1]), []).append(entry)
    return {index: tuple(entries) for index, entries in found.items()}


def _other_lists(workload: Workload) -> bool:
    """Whether the configuration says something else about each layer (experts, windows, rope)."""
    depth = workload.config.num_hidden_layers
    return any(
        isinstance(value, list | tuple) and len(value) == depth and key != "layer_types"
        for key, value in vars(workload.config).items()
    )


# ----------------------------------------------------------------------------- three timelines


def _combine(peaks: Sequence[MemoryPeak], steps_on: int) -> MemoryPeak | None:
    timelines = [_segments(peak.timeline) for peak in peaks]
    if len({tuple(phase for phase, _ in segments) for segments in timelines}) != 1:
        return None
    best: Moment | None = None
    phases: dict[str, int] = {}
    for parts in zip(*timelines, strict=True):
        moments = _follow([moments for _, moments in parts], steps_on)
        if moments is None:
            return None
        highest = max(moments, key=_live)
        phases[highest.phase] = max(phases.get(highest.phase, 0), _live(highest))
        if best is None or _live(highest) > _live(best):
            best = highest
    if best is None:
        return None
    deepest = peaks[-1]
    module = deepest.module if deepest.op == best.op else ""
    columns = dict(zip(CATEGORIES, best.columns, strict=True))
    return MemoryPeak(_live(best), columns, best.op, module, best.phase, phases, deepest.largest)


def _counts(kernels: Sequence[Kernels], steps_on: int) -> Kernels | None:
    """Calls of each kernel, carried on likewise."""
    names = sorted({name for counts in kernels for name in counts})
    rows = [Moment("", "", tuple(counts.get(name, 0) for name in names)) for counts in kernels]
    carried = tuple(_affine(rows, steps_on))
    return dict(zip(names, carried, strict=True)) if len(carried) == len(names) else None


def _live(moment: Moment) -> int:
    return sum(moment.columns)


def _segments(timeline: Sequence[Moment]) -> list[tuple[str, list[Moment]]]:
    """The timeline cut where the phase changes."""
    return [(phase, list(part)) for phase, part in groupby(timeline, lambda item: item.phase)]


def _follow(parts: Sequence[Sequence[Moment]], steps_on: int) -> list[Moment] | None:
    """Every operator of one phase, from its start and from its end, ``steps_on`` blocks deeper.

    None unless the two together reach over all that is not the inserted block, and a block more:
    then the first layer and the last are both followed from the outside in.
    """
    sizes = [len(part) for part in parts]
    block = sizes[1] - sizes[0]
    if sizes[2] - sizes[1] != block:
        return None
    head = _affine_run(parts, steps_on)
    tail = _affine_run([part[::-1] for part in parts], steps_on)
    once = _common_ends(parts)  # all that stands outside the blocks
    enough = min(sizes[0], once + block)
    if block and min(len(head), len(tail)) < enough:
        return None
    return [*head, *tail] if block or len(head) == sizes[0] else None


def _common_ends(parts: Sequence[Sequence[Moment]]) -> int:
    """At most how many operators of a phase stand outside its repeated blocks."""
    block = len(parts[1]) - len(parts[0])
    if not block:
        return len(parts[0])
    deepest = [moment.op for moment in parts[2]]
    repeated = [op == deepest[place + block] for place, op in enumerate(deepest[:-block])]
    longest = max((sum(1 for _ in run) for same, run in groupby(repeated) if same), default=0)
    return len(deepest) - longest - block


def _affine_run(parts: Sequence[Sequence[Moment]], steps_on: int) -> list[Moment]:
    """The operators from the start on that are the same in all three and affine, carried on."""
    found = []
    for moments in zip(*parts, strict=False):
        columns = tuple(_affine(moments, steps_on))
        if len({moment.op for moment in moments}) != 1 or len(columns) != len(CATEGORIES):
            break
        found.append(moments[0]._replace(columns=columns))
    return found


def _affine(moments: Sequence[Moment], steps_on: int) -> Iterator[int]:
    for first, second, third in zip(*(moment.columns for moment in moments), strict=True):
        if third - second != second - first:
            return
        yield third + steps_on * (third - second)
