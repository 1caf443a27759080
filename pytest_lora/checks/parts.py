"""What of an adapter an output has in it: each part has a dial, and the dials are turned until the
adapted model gives that output.

A part is the low-rank change of one kind of module, a saved module, trained token rows, DoRA's
magnitudes, a bias.  At 1 it is as trained, at 0 it is not there, and in between or beyond it is
scaled.  An output that the model gives at some setting, up to the rounding it has itself, is
explained by it: that is the scaling the adapter was applied with, and what was left out.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.attach import ADAPTER_NAME, loadable_directory, own_randomness
from pytest_lora.checks.deltas import adapted_modules, kind_of
from pytest_lora.checks.merge_layers import describe, is_token_layer
from pytest_lora.loading import quiet
from pytest_lora.probe import computing_wide

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["explain"]

_SCALES = tuple(2.0**power for power in range(-6, 7))
"""Where a search for one scaling may start: networks saturate, so it begins with the nearest."""

_MOST_GROUPS = 12
"""Dials turned at once: each costs a forward pass for every step of the search."""

_STEPS = 12
_NUDGE = 2.0**-12
"""Change of a dial for a slope: well above float64's rounding and far below any curvature."""

MOST_SECONDS = 120.0
"""The longest search; a forward pass in float64 is done some hundred times."""

_OWN = "its own"

Close = Callable[[torch.Tensor], bool]


@dataclass(frozen=True, slots=True)
class _Dial:
    """One part of an adapter at one module; ``turn(1.0)`` is the part as it was trained."""

    module: str
    what: str
    turn: Callable[[float], None]

    @property
    def kind(self) -> str:
        """The part's name for all layers together, without what all of them begin with."""
        return self.what.format(kind_of(self.module).rpartition("*.")[2])

    @property
    def layer(self) -> int | None:
        """The first number in the module's path."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.module)
        return int(number[1]) if number else None


def explain(
    subject: Subject,
    close: Close,
    output: torch.Tensor,
    rows: slice,
    others: Mapping[str, Subject] | None = None,
) -> str | None:
    """Which setting of the adapter's parts gives ``output``; empty where none does.

    Args:
        subject: the adapter, with the inputs.
        close: whether an output, in float64, is the one to be explained up to rounding.
        output: that one.
        rows: which rows of the subject's output it is of.
        others: adapters of the same base model of which something may be in it as well.

    Returns:
        The setting in words; None if the search takes too long, on a large model.
    """
    search = _Search(subject, close, output.double(), rows, time.monotonic() + MOST_SECONDS)
    try:
        with _dials(subject) as dials, computing_wide(subject.model):
            found = search.among(_by_kind(dials)) or search.among(_by_layer(dials))
        if found is None:
            with _beside(subject, others or {}) as groups, computing_wide(subject.model):
                found = search.among(groups)
    except _TookTooLongError:
        return None
    finally:
        subject.release()
    return "" if found is None else _words(found)


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


@contextlib.contextmanager
def _beside(subject: Subject, others: Mapping[str, Subject]) -> Iterator[dict[str, list[_Dial]]]:
    """The adapter in one group, and beside it, at first at 0, others by kind of module."""
    plain = {name: other for name, other in others.items()
             if _only_low_rank(other) and other.base is subject.base}  # fmt: skip
    if not plain or not _only_low_rank(subject):
        yield {}
        return
    model = subject.model
    groups = {_OWN: list(_scalings(model, ADAPTER_NAME, "{}"))}
    for place, (name, other) in enumerate(plain.items()):
        held = f"beside_{place}"
        with loadable_directory(other.adapter) as folder, own_randomness(), quiet():
            model.load_adapter(folder, adapter_name=held)
        for dial in _scalings(model, held, f"{{}} of {name}"):
            groups.setdefault(dial.kind, []).append(dial)
    model.base_model.set_adapter([ADAPTER_NAME, *(f"beside_{n}" for n in range(len(plain)))])
    yield groups


def _only_low_rank(subject: Subject) -> bool:
    adapter = subject.adapter
    return (
        adapter.peft_type == "LORA"
        and not adapter.modules_to_save
        and not subject.base.overwritten_by(adapter)
    )


def _scalings(model: torch.nn.Module, adapter: str, what: str) -> Iterator[_Dial]:
    for name, module in adapted_modules(model):
        if adapter in getattr(module, "scaling", ()):
            yield _Dial(_full_name(name, module), what, _scaled(module.scaling, adapter))


def _all_dials(model: torch.nn.Module) -> Iterator[_Dial]:
    yield from _scalings(model, ADAPTER_NAME, "{}")
    for name, module in adapted_modules(model):
        if ADAPTER_NAME in getattr(module, "scaling", ()):
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


def _scaled(scaling: dict[str, float], adapter: str) -> Callable[[float], None]:
    whole = scaling[adapter]

    def turn(share: float) -> None:
        scaling[adapter] = whole if share == 1 else whole * share

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
    groups: dict[str, list[_Dial]] = defaultdict(list)
    for dial in dials:
        groups[dial.kind].append(dial)
    return dict(groups)


def _by_layer(dials: Sequence[_Dial]) -> dict[str, list[_Dial]]:
    groups: dict[str, list[_Dial]] = defaultdict(list)
    for dial in dials:
        if dial.layer is not None:
            groups[f"layer {dial.layer}"].append(dial)
    return dict(groups) if len(groups) > 1 else {}


# ------------------------------------------------------------------------------ the search


class _TookTooLongError(Exception):
    """The search is over."""


@dataclass(frozen=True, slots=True)
class _Search:
    """What is looked for, and until when."""

    subject: Subject
    close: Close
    output: torch.Tensor
    rows: slice
    until: float

    def among(self, groups: Mapping[str, list[_Dial]]) -> dict[str, float] | None:
        """Shares by group at which the model gives the output."""
        if not groups:
            return None
        names = list(groups)

        def run(shares: Sequence[float]) -> torch.Tensor:
            if time.monotonic() > self.until:
                raise _TookTooLongError
            for name, share in zip(names, shares, strict=True):
                for dial in groups[name]:
                    dial.turn(share)
            return self.subject.output()[self.rows].double()

        best, nearest = [1.0] * len(names), math.inf
        for shares in _starts(names):
            found = run(shares)
            if self.close(found) and {0.0, 1.0} >= set(shares):
                return dict(zip(names, shares, strict=True))
            gap = float((found - self.output).norm())
            if gap < nearest:
                best, nearest = shares, gap
        if len(names) > _MOST_GROUPS:
            return dict(zip(names, best, strict=True)) if self.close(run(best)) else None
        exact = _refined(run, best, self.output)
        for shares in ([round(share, 2) for share in exact], exact):
            if self.close(run(shares)):
                return dict(zip(names, shares, strict=True))
        return None


def _starts(names: Sequence[str]) -> Iterator[list[float]]:
    """Settings that are tried as they are, and the nearest of which is where the search begins."""
    count = len(names)
    if names[0] == _OWN:  # all the others, then each of them alone, on top
        yield [1.0] * count
        yield from ([1.0, *(float(place == one) for place in range(1, count))]
                    for one in range(1, count))  # fmt: skip
        return
    yield from ([scale] * count for scale in _SCALES)
    yield from ([float(place != out) for place in range(count)] for out in range(count))
    yield from ([float(place < first) for place in range(count)] for first in range(1, count))
    yield from ([float(place >= first) for place in range(count)] for first in range(1, count))


def _refined(
    run: Callable[[Sequence[float]], torch.Tensor], start: Sequence[float], output: torch.Tensor
) -> list[float]:
    """Levenberg's and Marquardt's steps towards the shares that give the output."""
    shares = torch.tensor(start, dtype=torch.float64)
    here, damping = run(shares.tolist()), 1e-3
    for _ in range(_STEPS):
        slopes = torch.stack([
            (run((shares + _NUDGE * one).tolist()) - here).flatten().cpu() / _NUDGE
            for one in torch.eye(len(shares), dtype=torch.float64)
        ], 1)  # fmt: skip
        normal = slopes.T @ slopes
        damped = normal + (damping * normal.diagonal() + sys.float_info.min).diag()
        step = torch.linalg.lstsq(damped, slopes.T @ (output - here).flatten().cpu()).solution
        there = run((shares + step).tolist())
        if (output - there).norm() < (output - here).norm():
            shares, here, damping = shares + step, there, damping / 10
        else:
            damping *= 10
        if float(step.abs().max()) < _NUDGE**3:
            break
    return [float(share) for share in shares]


# ------------------------------------------------------------------------------ words


def _words(shares: Mapping[str, float]) -> str:
    if _OWN in shares:
        return "the adapter with " + ", ".join(_beside_words(shares)) + " beside it"
    scales = {f"{share:.3g}" for share in shares.values()}
    if scales == {"0"}:
        return "nothing of the adapter is used"
    if len(scales) == 1:
        return f"the whole adapter at {scales.pop()} times its scaling"
    absent = [name for name, share in shares.items() if share == 0]
    said = [f"without {_few(absent)}"] if absent else []
    said += [f"with {name} at {share:.3g} times its scaling"
             for name, share in shares.items() if share != 0 and f"{share:.3g}" != "1"]  # fmt: skip
    if not said:  # all within rounding of what is right
        name, share = max(shares.items(), key=lambda item: abs(item[1] - 1))
        said = [f"with {name} at {share:.6g} times its scaling"]
    return "the adapter " + ", ".join(said)


def _beside_words(shares: Mapping[str, float]) -> Iterator[str]:
    if shares[_OWN] != 1:
        yield f"its own at {shares[_OWN]:.3g} times"
    there = {name: share for name, share in shares.items() if share != 0 and name != _OWN}
    if all(share == 1 for share in there.values()):
        yield _few(list(there))
    else:
        yield from (f"{share:.3g} times {name}" for name, share in there.items())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
