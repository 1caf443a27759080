"""Whether an adapter does anything: in its weights, module by module, and at the model's output."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.attach import ADAPTER_NAME
from pytest_lora.baseline import FACTS
from pytest_lora.checks.deltas import Delta, adapted_modules, kind_of, measure_delta
from pytest_lora.loading import quiet
from pytest_lora.numerics.rounding import dtype_name
from pytest_lora.records import Json, Measurement, Problem
from pytest_lora.structure import on_clones

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_lora.subject import Subject

__all__ = ["measure_adapter_effect"]

UNIT = "output change relative to the base model's output"
AMPLIFIED = 2.0**12
"""Brings an effect lost in the rounding of bfloat16 (8 bits) or float16 (11 bits) to light."""

_LISTED = 1000
"""Modules whose numbers are listed in the details; a model of experts can have many more."""

_FIX_ZERO = (
    "train it longer, or drop these modules from target_modules; if they were trained, the weights "
    "were lost while saving or their keys do not match"
)
_FIX_ROWS = "gather all shards before saving: part of lora_B has its initial value, zero"
_FIX_BYPASS = (
    "the model (or a patch of it) calls the base layer directly; the adapter cannot act there: "
    "do not target this module, or remove the patch"
)


@dataclass
class _Kind:
    """All modules of one kind: their deltas, and the objects that switch them on and off."""

    name: str
    deltas: list[Delta] = field(default_factory=list)
    modules: list[Any] = field(default_factory=list)
    change: float | None = None

    @property
    def acts(self) -> bool:
        """Whether any of its modules changes weights (or may, where that cannot be told)."""
        return not self.deltas or not all(delta.zero for delta in self.deltas)

    @property
    def relative(self) -> float | None:
        """``||delta|| / ||weights||`` over all of its modules."""
        norms = [delta.norm for delta in self.deltas]
        if not norms or None in norms:
            return None
        weight = math.hypot(*(delta.weight for delta in self.deltas))
        return (
            math.hypot(*(norm for norm in norms if norm is not None)) / weight if weight else None
        )

    def report(self) -> dict[str, Json]:
        zero = sum(delta.zero for delta in self.deltas)
        return {"modules": len(self.deltas), "zero": zero, "delta_per_weight": self.relative,
                "output_change_alone": self.change}  # fmt: skip


def measure_adapter_effect(subject: Subject) -> Measurement:
    """How much the adapter changes the model's output, provided that every part of it acts.

    Looks for modules without any change of weights (all of a kind, some layers, a block of rows),
    for modules whose wrapper the forward pass goes around, and for kinds of modules that, enabled
    alone, leave the output as it is.

    Returns:
        ``value``: root mean square of the change of the output over that of the base model's
        output; 0.0 as soon as one problem was found.  ``count``: modules looked at.  ``details``:
        ``problems``, ``notes``, ``kinds``, ``delta_per_weight`` by module, and ``output_change``,
        the same number whatever was found.

    Raises:
        CannotRun: the adapter cannot be attached, or the model cannot run.
    """
    plain = subject.base_output()
    with quiet():
        model = subject.model
        kinds = _kinds(model)
        problems = _weight_problems(kinds)
        with _call_counter(model) as skipped:
            adapted = subject.output(model)
        problems += [_bypassed(name) for name in skipped()]
        change = relative_change(adapted, plain)
        notes = [text for text in subject.load_warnings if "missing" in text.lower()]
        notes += _remarks(kinds)
        _ablate(subject, model, kinds, adapted, plain, problems, notes)
    if not change:
        notes.append(_nothing_arrives(kinds, plain))
    modules = sum(len(kind.deltas) for kind in kinds.values())
    return Measurement(
        value=0.0 if problems and math.isfinite(change) else change,
        unit=UNIT,
        count=max(modules, 1),
        where=str(problems[0]) if problems else _weakest(kinds),
        details={
            "problems": [problem.to_dict() for problem in problems],
            "notes": notes,
            FACTS: {"inputs": subject.inputs_fact},
            "output_change": change,
            "kinds": {name: kind.report() for name, kind in kinds.items()},
            "delta_per_weight": _by_module(kinds),
        },
    )


def _by_module(kinds: Mapping[str, _Kind]) -> dict[str, Json]:
    """``||delta|| / ||weights||`` of each module, in three digits: for looking at, not judging."""
    deltas = [delta for kind in kinds.values() for delta in kind.deltas]
    return {
        delta.name: float(f"{delta.norm / delta.weight:.3g}")
        for delta in deltas[:_LISTED]
        if delta.norm is not None and delta.weight
    }


def relative_change(changed: torch.Tensor, plain: torch.Tensor) -> float:
    """``rms(changed - plain) / rms(plain)`` in float64; ``rms(changed - plain)`` if plain is 0."""
    difference = float((changed.double() - plain.double()).square().mean().sqrt())
    size = float(plain.double().square().mean().sqrt())
    return difference / size if size else difference


# ------------------------------------------------------------------------------ at the weights


def _kinds(model: torch.nn.Module) -> dict[str, _Kind]:
    kinds: dict[str, _Kind] = {}
    for name, module in adapted_modules(model):
        kind = kinds.setdefault(kind_of(name), _Kind(kind_of(name)))
        kind.modules.append(module)
        delta = measure_delta(name, module)
        if delta is not None:
            kind.deltas.append(delta)
    return kinds


def _weight_problems(kinds: Mapping[str, _Kind]) -> list[Problem]:
    problems = []
    for kind in kinds.values():
        idle = [delta.name for delta in kind.deltas if delta.zero]
        if idle and not (kind.acts and ".experts." in kind.name):
            problems.append(_idle(kind, idle))
        problems += [_lost_rows(delta) for delta in kind.deltas if delta.zero_rows]
    return problems


def _idle(kind: _Kind, names: Sequence[str]) -> Problem:
    total = len(kind.deltas)
    if len(names) == total:
        found = f"all {total} change nothing" if total > 1 else "changes nothing"
        return Problem(kind.name, found, "a change of weights that is not zero", _FIX_ZERO)
    found = f"{len(names)} of {total} change nothing: {_few(names)}"
    return Problem(kind.name, found, "a change of weights in every one", _FIX_ZERO)


def _lost_rows(delta: Delta) -> Problem:
    run, total = delta.zero_rows or (0, 0)
    found = f"{run} of {total} output rows of lora_B, in one block, are exactly zero"
    if run == total:
        found = "lora_B is exactly zero; only the magnitude vector acts"
    return Problem(delta.name, found, "no block of rows that is exactly zero", _FIX_ROWS)


def _remarks(kinds: Mapping[str, _Kind]) -> list[str]:
    remarks = [delta.remark for kind in kinds.values() for delta in kind.deltas if delta.remark]
    for kind in kinds.values():
        unknown = sum(delta.norm is None for delta in kind.deltas)
        if unknown:
            remarks.append(f"{kind.name}: the size of {unknown} deltas cannot be told")
        idle = [delta.name for delta in kind.deltas if delta.zero]
        if idle and kind.acts and ".experts." in kind.name:
            remarks.append(f"{kind.name}: {len(idle)} experts were never trained: {_few(idle)}")
    return remarks


# ------------------------------------------------------------------------------ at the output


@contextlib.contextmanager
def _call_counter(model: torch.nn.Module) -> Iterator[Any]:
    """Yields a function: names of wrapped modules that ran while their wrappers did not."""
    wrapper_ran: set[str] = set()
    base_ran: set[str] = set()
    handles = []
    names = []
    for name, module in adapted_modules(model):
        base = getattr(module, "base_layer", None)
        if not isinstance(base, torch.nn.Module) or hasattr(base, "base_layer"):
            continue
        names.append(name)
        handles.append(module.register_forward_pre_hook(_note(wrapper_ran, name)))
        handles.append(base.register_forward_pre_hook(_note(base_ran, name)))
    try:
        yield lambda: [name for name in names if name in base_ran - wrapper_ran]
    finally:
        for handle in handles:
            handle.remove()


def _note(ran: set[str], name: str) -> Any:
    def hook(*_: object) -> None:
        ran.add(name)

    return hook


def _bypassed(name: str) -> Problem:
    found = "the forward pass runs the base layer without its adapter"
    return Problem(name, found, "the wrapped layer to be called", _FIX_BYPASS)


def _ablate(
    subject: Subject,
    model: torch.nn.Module,
    kinds: Mapping[str, _Kind],
    adapted: torch.Tensor,
    plain: torch.Tensor,
    problems: list[Problem],
    notes: list[str],
) -> None:
    """Enable one kind at a time; each that changes weights has to change the output."""
    with _switched(kinds, None):
        off = subject.output(model)
    for kind in kinds.values():
        if not kind.acts:
            continue
        with _switched(kinds, kind):
            alone = adapted if len(kinds) == 1 else subject.output(model)
            kind.change = relative_change(alone, off)
            if torch.equal(alone, off):
                _explain_silence(subject, model, kind, off, problems, notes)


@contextlib.contextmanager
def _switched(kinds: Mapping[str, _Kind], only: _Kind | None) -> Iterator[None]:
    """All adapted modules disabled but those of one kind.

    Sets the flag behind ``enable_adapters`` itself, which would also touch requires_grad.
    """
    modules = [(module, kind is only) for kind in kinds.values() for module in kind.modules]
    before = [(module, module._disable_adapters) for module, _ in modules]
    try:
        for module, enabled in modules:
            module._disable_adapters = not enabled
        yield
    finally:
        for module, flag in before:
            module._disable_adapters = flag


def _explain_silence(
    subject: Subject,
    model: torch.nn.Module,
    kind: _Kind,
    off: torch.Tensor,
    problems: list[Problem],
    notes: list[str],
) -> None:
    """Why does a kind that changes weights not change the output?"""
    with _amplified(kind) as possible:
        loud = possible and not torch.equal(subject.output(model), off)
    lossy = off.dtype in (torch.bfloat16, torch.float16)
    if loud or (lossy and not possible):
        notes.append(f"{kind.name}: its effect is lost in the rounding of {dtype_name(off.dtype)}; "
                     "check it with --lora-dtype=float32")  # fmt: skip
    elif any(isinstance(_base_of(module), torch.nn.Embedding) for module in kind.modules):
        notes.append(f"{kind.name}: the inputs show no token whose row it changes")
    elif not _reached(subject, model, kind, off):
        notes.append(f"{kind.name}: the inputs do not reach these modules, so they are untested")
    else:
        found = f"enabled alone, its {len(kind.deltas)} modules leave the output as it is"
        problems.append(Problem(kind.name, found, "a change of the output", _FIX_BYPASS))


@contextlib.contextmanager
def _amplified(kind: _Kind) -> Iterator[bool]:
    """The scalings of a LoRA kind multiplied by a large number; False where there are none."""
    scalings = [module.scaling for module in kind.modules if hasattr(module, "scaling")]
    before = [dict(scaling) for scaling in scalings]
    try:
        for scaling in scalings:
            if ADAPTER_NAME in scaling:
                scaling[ADAPTER_NAME] *= AMPLIFIED
        yield bool(scalings)
    finally:
        for scaling, values in zip(scalings, before, strict=True):
            scaling.update(values)


def _reached(subject: Subject, model: torch.nn.Module, kind: _Kind, off: torch.Tensor) -> bool:
    """Whether the weights under one of the wrappers matter for the output at all."""
    base = _base_of(kind.modules[0])
    if base is None:
        return False
    with on_clones(base):
        for parameter in base.parameters():
            if parameter.is_floating_point():
                parameter.data.mul_(1.5)
        return not torch.equal(subject.output(model), off)


def _base_of(module: Any) -> torch.nn.Module | None:
    for name in ("base_layer", "original_module"):
        base = getattr(module, name, None)
        if isinstance(base, torch.nn.Module):
            inner = getattr(module, "get_base_layer", None)
            return inner() if inner is not None else base
    return None


# ------------------------------------------------------------------------------ words


def _nothing_arrives(kinds: Mapping[str, _Kind], plain: torch.Tensor) -> str:
    if any(kind.acts for kind in kinds.values()):
        return (
            f"the weights change, but nothing of it arrives at the {dtype_name(plain.dtype)} output"
        )
    return "no weight changes: this adapter is the base model"


def _weakest(kinds: Mapping[str, _Kind]) -> str | None:
    measured = [(kind.change, name) for name, kind in kinds.items() if kind.change is not None]
    return f"least alone: {min(measured)[1]} ({min(measured)[0]:.3g})" if measured else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
