"""Exported weights: is every one of them what the base model and the adapter make of it?

With ``E = W + s B A`` (DoRA: its rows at the trained lengths) an exporter may round the weight, the
delta and their sum once each, in the coarsest of the formats at hand, with unit roundoff ``u``, and
sum the ``r`` products of an element of the delta in float32 at least:

    |found - E| <= u (|W| + 2 |D| + |E|) + gamma_{r+2} |s| |B| |A|,     D = s B A.

What no delta belongs to has to be the base's own, rounded at most to the export's format.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.attach import ADAPTER_NAME
from pytest_lora.checks.deltas import adapted_modules, kind_of
from pytest_lora.checks.export_causes import Change, Known, cause_of, rows_of_others
from pytest_lora.checks.merge_layers import describe, is_token_layer
from pytest_lora.errors import NotApplicable, UsageError
from pytest_lora.loading import load_weights, one_line
from pytest_lora.numerics.rounding import gamma, holds_exactly, smallest, unit
from pytest_lora.numerics.streaming import widened
from pytest_lora.records import Measurement, Problem
from pytest_lora.structure import on_clones

if TYPE_CHECKING:
    from pytest_lora.checks.merge_layers import LowRankLayer
    from pytest_lora.subject import Subject

__all__ = ["Export", "measure_export_parity"]

Export = Path | str | torch.nn.Module | Mapping[str, torch.Tensor]
"""A folder that transformers loads, a model, or weights by the base model's names."""

UNIT = "times the rounding bound"
_LISTED = 5


@dataclass(frozen=True, slots=True)
class _Expected:
    """One weight of the export.

    Attributes:
        wide: what it has to be, in float64, in the shape it is stored in.
        bound: by how much it may be off, for an export with the unit roundoff it is given.
        known: the base's weight and the delta, to tell what is there instead; None where there is
            no delta.
        origin: whose weight it is: "base" for one that no part of the adapter changes.
    """

    wide: torch.Tensor
    size: torch.Tensor
    summed: torch.Tensor | float
    dtype: torch.dtype
    known: Known | None = None
    origin: str = "base"

    def bound(self, dtype: torch.dtype) -> torch.Tensor:
        """By how much a weight exported in ``dtype`` may be off."""
        if self.origin == "base" and holds_exactly(dtype, self.dtype):
            return torch.zeros_like(self.wide)
        coarse = dtype if unit(dtype) > unit(self.dtype) else self.dtype
        return unit(coarse) * self.size + 2 * smallest(coarse) + self.summed


def measure_export_parity(export: Export, subject: Subject) -> Measurement:
    """How far exported weights are from base and adapter merged, in multiples of the bound.

    Args:
        export: see :data:`Export`.
        subject: the adapter on its base model.

    Returns:
        The largest error of an element over its bound; infinite where a weight is missing, has
        another shape, or is not the base's own where it has to be.

    Raises:
        NotApplicable: the adapter is not LoRA, or a layer's merge has no formula here.
        UsageError: there are no weights.
    """
    if subject.adapter.peft_type != "LORA":
        raise NotApplicable(f"no formula for merged weights of {subject.adapter.peft_type}")
    found = _weights_of(export, subject)
    if not found:
        raise UsageError("the export holds no weights")
    worst, elements = 0.0, 0
    problems: list[tuple[str, Problem]] = []
    plan, changes = _plan(subject), _changes(subject.model)
    for name, expect in plan.items():
        if name not in found and _tied_to(name, plan, found, subject):
            continue
        one = expect()
        ratio, problem = _judge(name, one, found.get(name), changes)
        worst, elements = max(worst, ratio), elements + one.wide.numel()
        problems += [(name, problem)] if problem else []
    subject.release()
    grouped = list(_grouped(problems))
    unknown = sorted(set(found) - set(plan))
    return Measurement(
        value=worst,
        unit=UNIT,
        count=elements,
        where=str(grouped[0]) if grouped else None,
        details={
            "problems": [problem.to_dict() for problem in grouped],
            "notes": [_about_unknown(unknown)] if unknown else [],
        },
    )


def _about_unknown(names: list[str]) -> str:
    more = ", ..." if len(names) > _LISTED else ""
    return f"{len(names)} weights the base model does not have: {', '.join(names[:_LISTED])}{more}"


# ------------------------------------------------------------------------------ what is exported


def _weights_of(export: Export, subject: Subject) -> dict[str, torch.Tensor]:
    if isinstance(export, str | Path):
        if subject.base.spec is None:
            raise UsageError(
                "the base model was passed in, so nobody knows how to load a folder: load the"
                " export yourself and pass the model, or its weights by name"
            )
        spec = dataclasses.replace(subject.base.spec, path=Path(export), dtype=None)
        export = load_weights(spec).module
    if isinstance(export, torch.nn.Module):
        export = dict(export.named_parameters(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in export.items()}


# ------------------------------------------------------------------------------ what it has to be


_Plan = dict[str, Callable[[], _Expected]]


def _plan(subject: Subject) -> _Plan:
    """For every parameter of the base model what makes its expected value, one at a time."""
    own = subject.base.overwritten_by(subject.adapter)
    merged = dict(_merged(subject.model))  # which attaches the adapter
    plan: _Plan = {}
    for name, tensor in subject.base.tensors():
        if isinstance(tensor, torch.nn.Parameter):
            now = tensor.detach()
            loaded = partial(_stored, now, subject.base.on_disk(name, now)) if name in own else None
            plan[name] = loaded or partial(_unchanged, now)
    return plan | merged


def _tied_to(name: str, plan: _Plan, found: Mapping[str, torch.Tensor], subject: Subject) -> bool:
    """Whether the weight is one that the export has under another name."""
    tensors = dict(subject.base.tensors())
    if name not in tensors or plan[name].func is not _unchanged:  # type: ignore[attr-defined]
        return False
    place = tensors[name].data_ptr()
    return any(tensors[other].data_ptr() == place for other in found if other in tensors)


def _changes(model: torch.nn.Module) -> dict[str, Change]:
    """The deltas that are products, by the names of their weights."""
    found: dict[str, Change] = {}
    for name, module in adapted_modules(model):
        known = describe(module, ADAPTER_NAME, safe_merge=False)
        if known is not None and known.update.magnitude is None:
            update = known.update
            found[f"{name}.weight"] = Change(update.B, update.A, update.scaling)
    return found


def _unchanged(tensor: torch.Tensor) -> _Expected:
    wide = tensor.double()
    return _Expected(wide, wide.abs(), 0.0, tensor.dtype)


def _merged(model: torch.nn.Module) -> Iterator[tuple[str, Callable[[], _Expected]]]:
    for name, module in adapted_modules(model):
        if hasattr(module, "modules_to_save"):
            yield from _saved(name, module)
        elif is_token_layer(module):
            yield f"{name}.weight", partial(_with_rows, module)
        elif hasattr(module, "parameter_name"):
            full = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            yield full, partial(_parameter, name, module)
        elif ADAPTER_NAME in getattr(module, "scaling", ()):
            yield from _low_rank(name, module)


def _saved(name: str, wrapper: Any) -> Iterator[tuple[str, Callable[[], _Expected]]]:
    if ADAPTER_NAME in wrapper.modules_to_save:
        own = dict(wrapper.original_module.named_parameters())
        for part, tensor in wrapper.modules_to_save[ADAPTER_NAME].named_parameters():
            base = own[part].detach() if part in own else None
            yield f"{name}.{part}", partial(_stored, tensor.detach(), base)


def _with_rows(layer: Any) -> _Expected:
    base = layer.get_base_layer().weight.detach()
    trained = base.clone()
    rows = torch.as_tensor(layer.token_indices[ADAPTER_NAME]).to(base.device)
    trained[rows] = layer.trainable_tokens_delta[ADAPTER_NAME].detach().to(base.dtype)
    return _stored(trained, base)


def _stored(tensor: torch.Tensor, base: torch.Tensor | None) -> _Expected:
    """A weight that the adapter holds whole."""
    wide = tensor.double()
    known = None
    if base is not None and base.shape == tensor.shape:
        base = base.to(tensor.device)
        change = (wide - base.double()).reshape(len(wide), -1)
        known = Known(base, Change.dense(change), whole=True)
    return _Expected(wide, wide.abs(), 0.0, tensor.dtype, known, "adapter")


def _low_rank(name: str, layer: Any) -> Iterator[tuple[str, Callable[[], _Expected]]]:
    known = describe(layer, ADAPTER_NAME, safe_merge=False)
    if known is None or known.four_bit:
        raise NotApplicable(f"{name}: no formula for the merged weight of {type(layer).__name__}")
    base = layer.get_base_layer()
    yield f"{name}.weight", partial(_of_formula, base.weight.detach(), known)
    if known.bias is not None:
        delta = known.update.scaling * known.bias.double()
        yield f"{name}.bias", partial(_of_bias, base.bias.detach(), delta)


def _of_bias(bias: torch.Tensor, delta: torch.Tensor) -> _Expected:
    wide = bias.double() + delta
    size = bias.double().abs() + 2 * delta.abs() + wide.abs()
    known = Known(bias, Change.dense(delta[:, None]))
    return _Expected(wide, size, 0.0, bias.dtype, known, "adapter")


def _of_formula(weight: torch.Tensor, known: LowRankLayer) -> _Expected:
    update, matrix = known.update, known.matrix(weight).double()
    b, a = update.B.double(), update.A.double()
    delta = update.scaling * (b @ a)
    wide = matrix + delta
    size = matrix.abs() + 2 * delta.abs() + wide.abs()
    summed = gamma(b.shape[1] + 2, torch.float32) * abs(update.scaling) * (b.abs() @ a.abs())
    low = update.dtype if unit(update.dtype) > unit(weight.dtype) else weight.dtype
    change, without = Change(update.B, update.A, update.scaling), None
    if update.magnitude is not None:
        lengths = wide.norm(dim=1, keepdim=True)
        factor = update.magnitude.double()[:, None] / lengths
        wide = factor * wide
        # The length of a row is off by what the row is, and by the rounding of its own sum.
        spread = (size.norm(dim=1, keepdim=True) / lengths + 4) * wide.abs()
        added = gamma(matrix.shape[1] + 4, torch.float32)
        added = added + summed.norm(dim=1, keepdim=True) / lengths
        size, summed = factor.abs() * size + spread, factor.abs() * summed + added * wide.abs()
        change, without = Change.dense(wide - matrix), change

    def back(x: torch.Tensor) -> torch.Tensor:
        return x.T if known.transposed else x.reshape(known.shape)

    made = Known(weight, change, known.transposed, without)
    return _Expected(back(wide), back(size), back(summed), low, made, "adapter")


def _parameter(name: str, layer: Any) -> _Expected:
    """A parameter of its own, such as the fused weights of all experts, by PEFT's own delta."""
    weight = getattr(layer.get_base_layer(), layer.parameter_name).detach()
    try:
        with on_clones(layer), widened(layer, torch.float64):
            delta = layer.get_delta_weight(ADAPTER_NAME).detach()
            rank = layer.r[ADAPTER_NAME]
            for factor in (layer.lora_A, layer.lora_B):
                factor[ADAPTER_NAME].weight.data.abs_()
            sums = layer.get_delta_weight(ADAPTER_NAME).detach().abs()
    except (RuntimeError, ValueError, TypeError) as error:
        raise NotApplicable(f"{name}: PEFT gives no delta: {one_line(error)}") from None
    base, wide = weight.double(), weight.double() + delta
    size = base.abs() + 2 * delta.abs() + wide.abs()
    summed = gamma(rank + 2, torch.float32) * sums
    known = Known(weight, Change.dense(delta.reshape(len(delta), -1)))
    return _Expected(wide, size, summed, weight.dtype, known, "adapter")


# ------------------------------------------------------------------------------ verdicts


def _judge(
    name: str, one: _Expected, found: torch.Tensor | None, changes: Mapping[str, Change]
) -> tuple[float, Problem | None]:
    shape = list(one.wide.shape)
    if found is None:
        return math.inf, Problem(name, "not in the export", f"a weight of shape {shape}")
    if found.shape != one.wide.shape:
        return math.inf, Problem(name, f"shape {list(found.shape)}", f"{shape}", _SHAPE)
    found = found.to(one.wide.device)
    gap, bound = (found.double() - one.wide).abs(), one.bound(found.dtype)
    ratio = float((gap / bound).nan_to_num(math.inf, math.inf).where(gap != 0, gap).max())
    if ratio <= 1:
        return ratio, None
    beside = _beside(name, changes)
    if one.known is None or not bool(found.isfinite().all()):
        return ratio, _plain_problem(name, one, found, gap > bound, beside)
    said, fix = cause_of(found, one.known, bound, changes, beside, _module_of(name))
    wanted = "the trained weight" if one.known.whole else "the base's weight with the delta"
    return ratio, Problem(name, said, wanted, fix)


def _beside(name: str, changes: Mapping[str, Change]) -> dict[str, Change]:
    """The deltas of the modules in the same block, its own among them, by their modules' names."""
    block = name.rsplit(".", 2)[0]
    return {
        _module_of(other): change
        for other, change in changes.items()
        if other.rsplit(".", 2)[0] == block
    }


def _module_of(name: str) -> str:
    return name.split(".")[-2] if "." in name else name


_SHAPE = "a vocabulary that was resized, or cut to the tokenizer's, is not the one trained with"


def _plain_problem(
    name: str,
    one: _Expected,
    found: torch.Tensor,
    wrong: torch.Tensor,
    beside: Mapping[str, Change],
) -> Problem:
    bad = int((~found.isfinite()).sum())
    if bad:
        return Problem(name, f"{bad} of {found.numel()} values are not finite", "finite numbers")
    what = f"{int(wrong.sum())} of {found.numel()} values are off"
    if one.origin == "base":
        foreign = _foreign_rows(name, one.wide, found, beside)
        if foreign is not None:
            return Problem(name, foreign[0], "the base's own weight", foreign[1])
        fix = "nothing of the adapter belongs here: it is another base model, or was written over"
        return Problem(name, what, "the base's own weight", fix)
    return Problem(name, what, "what the adapter makes of it")


def _foreign_rows(
    name: str, base: torch.Tensor, found: torch.Tensor, beside: Mapping[str, Change]
) -> tuple[str, str] | None:
    """What of the deltas beside it was added to a weight that has none."""
    if base.dim() != 2:
        return None
    change = found.double() - base
    room = unit(found.dtype) * (base.abs() + 2 * change.abs() + found.double().abs())
    return rows_of_others(change, room, _module_of(name), beside)


def _grouped(problems: list[tuple[str, Problem]]) -> Iterator[Problem]:
    """The same of all layers as one problem."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, problem in problems:
        groups[kind_of(name), problem.found, problem.expected, problem.fix].append(name)
    for (kind, found, expected, fix), names in groups.items():
        where = names[0] if len(names) == 1 else f"{kind} ({len(names)})"
        yield Problem(where, found, expected, fix)
