"""What of an adapter an output has in it: each part has a dial, and the dials are turned until the
adapted model gives that output.

A part is the low-rank change of one kind of module, a saved module, trained token rows, DoRA's
magnitudes, a bias.  At 1 it is as trained, at 0 it is not there, and in between or beyond it is
scaled.  An output that the model gives at some setting, up to the rounding it has itself, is
explained by it: that is the scaling the adapter was applied with, and what was left out.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.attach import ADAPTER_NAME
from pytest_lora.checks.deltas import adapted_modules, kind_of
from pytest_lora.checks.merge_layers import describe, is_token_layer
from pytest_lora.probe import computing_wide

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["explain"]

_SCALES = tuple(2.0**power for power in range(-6, 7))
"""Where a search for one scaling starts: networks saturate, so the nearest start is tried first."""

_MOST_GROUPS = 12
"""Dials turned at once: each costs a forward pass for every step of the search."""

_STEPS = 12
_NUDGE = 2.0**-12
"""Change of a dial for a slope: well above float64's rounding and far below any curvature."""

Close = Callable[[torch.Tensor], bool]


@dataclass(frozen=True, slots=True)
class _Dial:
    """One part of an adapter at one module; ``turn(1.0)`` is the state it was found in."""

    module: str
    what: str
    turn: Callable[[float], None]

    @property
    def kind(self) -> str:
        """The part's name for all layers together."""
        return self.what.format(kind_of(self.module))

    @property
    def layer(self) -> int | None:
        """The first number in the module's path."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.module)
        return int(number[1]) if number else None


def explain(subject: Subject, close: Close, output: torch.Tensor, rows: slice) -> str:
    """Which setting of the adapter's parts gives ``output``; empty where none does.

    Args:
        subject: the adapter, with the inputs.
        close: whether an output, in float64, is the one to be explained up to rounding.
        output: that one.
        rows: which rows of the subject's output it is of.
    """
    with _dials(subject) as dials, computing_wide(subject.model):
        for grouped in (_by_kind(dials), _by_layer(dials)):
            found = _search(subject, grouped, close, output.double(), rows)
            if found is not None:
                return _words(found)
    return ""


# ------------------------------------------------------------------------------ dials


@contextlib.contextmanager
def _dials(subject: Subject) -> Iterator[list[_Dial]]:
    plain = _overwritten(subject)
    dials = list(_all_dials(subject.model))
    dials += [
        _Dial(name, "the trained {}", _between(tensor, plain[name]))
        for name, tensor in subject.base.tensors()
        if name in plain and plain[name].shape == tensor.shape
    ]
    try:
        yield dials
    finally:
        for dial in dials:
            dial.turn(1.0)


def _all_dials(model: torch.nn.Module) -> Iterator[_Dial]:
    for name, module in adapted_modules(model):
        if ADAPTER_NAME in getattr(module, "scaling", ()):
            yield _Dial(_full_name(name, module), "{}", _scaled(module.scaling))
            yield from _magnitude(name, module)
        elif hasattr(module, "modules_to_save"):
            yield from _saved(name, module)
        elif is_token_layer(module) and ADAPTER_NAME in module.token_indices:
            rows = torch.as_tensor(module.token_indices[ADAPTER_NAME])
            trained = module.trainable_tokens_delta[ADAPTER_NAME]
            own = module.get_base_layer().weight.detach()[rows.to(trained.device)]
            yield _Dial(name, "the trained rows of {}", _between(trained, own))


def _full_name(name: str, module: Any) -> str:
    parameter = getattr(module, "parameter_name", None)
    return f"{name.replace('.base_layer', '')}.{parameter}" if parameter else name


def _scaled(scaling: dict[str, float]) -> Callable[[float], None]:
    whole = scaling[ADAPTER_NAME]

    def turn(share: float) -> None:
        scaling[ADAPTER_NAME] = whole if share == 1 else whole * share

    return turn


def _between(tensor: torch.Tensor, origin: torch.Tensor) -> Callable[[float], None]:
    """Moves a tensor along the line from ``origin`` to where it is now."""
    trained, start = tensor.data, origin.to(tensor.dtype)

    def turn(share: float) -> None:
        tensor.data = trained if share == 1 else start + share * (trained - start)

    return turn


def _magnitude(name: str, module: Any) -> Iterator[_Dial]:
    known = describe(module, ADAPTER_NAME, safe_merge=False)
    if known is None or known.update.magnitude is None:
        return
    update = known.update
    matrix = known.matrix(module.get_base_layer().weight.detach()).double()
    changed = matrix + update.scaling * (update.B.double() @ update.A.double())
    held = module.lora_magnitude_vector[ADAPTER_NAME].weight
    lengths = changed.norm(dim=1).to(held.dtype).view_as(held)
    yield _Dial(name, "DoRA's magnitudes of {}", _between(held, lengths))


def _saved(name: str, wrapper: Any) -> Iterator[_Dial]:
    if ADAPTER_NAME not in wrapper.modules_to_save:
        return
    own = dict(wrapper.original_module.named_parameters())
    saved = wrapper.modules_to_save[ADAPTER_NAME].named_parameters()
    turns = [_between(p, own[key].detach()) for key, p in saved
             if key in own and own[key].shape == p.shape]  # fmt: skip

    def turn(share: float) -> None:
        for each in turns:
            each(share)

    yield _Dial(name, "the saved {}", turn)


def _overwritten(subject: Subject) -> dict[str, torch.Tensor]:
    """The base's own tensors under those that the adapter's file was loaded over."""
    names = subject.base.overwritten_by(subject.adapter)
    if not names:
        return {}
    subject.release()
    return {name: tensor.clone() for name, tensor in subject.base.tensors() if name in names}


# ------------------------------------------------------------------------------ groups


def _by_kind(dials: Sequence[_Dial]) -> dict[str, list[_Dial]]:
    """Dials of one kind together; by their last names where that makes too many."""
    groups: dict[str, list[_Dial]] = defaultdict(list)
    for dial in dials:
        groups[dial.kind].append(dial)
    short = {kind: kind.rpartition(".")[2] for kind in groups if " " not in kind}
    if len(set(short.values())) == len(short) or len(groups) > _MOST_GROUPS:
        merged: dict[str, list[_Dial]] = defaultdict(list)
        for kind, members in groups.items():
            merged[short.get(kind, kind)] += members
        groups = merged
    return dict(groups)


def _by_layer(dials: Sequence[_Dial]) -> dict[str, list[_Dial]]:
    groups: dict[str, list[_Dial]] = defaultdict(list)
    for dial in dials:
        if dial.layer is not None:
            groups[f"layer {dial.layer}"].append(dial)
    return dict(groups) if len(groups) > 1 else {}


# ------------------------------------------------------------------------------ the search


def _search(
    subject: Subject,
    groups: Mapping[str, list[_Dial]],
    close: Close,
    output: torch.Tensor,
    rows: slice,
) -> dict[str, float] | None:
    """Shares by group at which the model gives the output."""
    if not groups:
        return None
    names = list(groups)

    def run(shares: Sequence[float]) -> torch.Tensor:
        for name, share in zip(names, shares, strict=True):
            for dial in groups[name]:
                dial.turn(share)
        return subject.output()[rows].double()

    for shares in _starts(len(names)):
        found = run(shares)
        if close(found):
            return dict(zip(names, shares, strict=True))
    if len(names) > _MOST_GROUPS:
        return None
    shares = _refined(run, _best_start(run, len(names), output), output)
    for rounded in ([round(share, 2) for share in shares], shares):
        if close(run(rounded)):
            return dict(zip(names, rounded, strict=True))
    return None


def _starts(count: int) -> Iterator[list[float]]:
    """All together at some scaling, then each left out alone, then all up to one left out."""
    yield from ([scale] * count for scale in _SCALES)
    yield from ([float(place != out) for place in range(count)] for out in range(count))
    yield from ([float(place < first) for place in range(count)] for first in range(1, count))
    yield from ([float(place >= first) for place in range(count)] for first in range(1, count))


def _best_start(
    run: Callable[[Sequence[float]], torch.Tensor], count: int, output: torch.Tensor
) -> list[float]:
    return min(
        [*_starts(count)][: len(_SCALES) + count], key=lambda s: float((run(s) - output).norm())
    )


def _refined(
    run: Callable[[Sequence[float]], torch.Tensor], start: Sequence[float], output: torch.Tensor
) -> list[float]:
    """Levenberg's and Marquardt's steps towards the shares that give the output."""
    shares = torch.tensor(start, dtype=torch.float64)
    here = run(shares.tolist())
    damping = 1e-3
    for _ in range(_STEPS):
        slopes = torch.stack([
            (run((shares + _NUDGE * one).tolist()) - here).flatten() / _NUDGE
            for one in torch.eye(len(shares), dtype=torch.float64)
        ], 1)  # fmt: skip
        normal = slopes.T @ slopes
        damped = normal + damping * (normal.diagonal() + 1e-30).diag()
        step = torch.linalg.lstsq(damped, slopes.T @ (output - here).flatten()).solution
        there = run((shares + step).tolist())
        if (output - there).norm() < (output - here).norm():
            shares, here, damping = shares + step, there, damping / 10
        else:
            damping *= 10
        if float(step.abs().max()) < 1e-9:
            break
    return [float(share) for share in shares]


# ------------------------------------------------------------------------------ words


def _words(shares: Mapping[str, float]) -> str:
    if all(share == 0 for share in shares.values()):
        return "none of the adapter is used"
    scales = {f"{share:.3g}" for share in shares.values()}
    if len(scales) == 1:
        return f"the whole adapter is at {scales.pop()} times its scaling"
    absent = [name for name, share in shares.items() if share == 0]
    others = {name: share for name, share in shares.items() if share not in (0, 1)}
    said = [f"{_few(absent)} left out"] if absent else []
    said += [f"{name} at {share:.3g} times" for name, share in others.items()]
    return "the adapter is used with " + ", ".join(said)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
