"""What an adapter's updates look like: how large, of what rank, along which directions.

D. Biderman et al., "LoRA Learns Less and Forgets Less" (2024), relate both learning and forgetting
to the size and the spectrum of the weights' change.  It is read from the factors in the adapter's
file; the base model is needed only for what is relative to it.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.adapter import lora_modules
from pytest_lora.checks.four_bit import readable
from pytest_lora.errors import CannotRun, NotApplicable, UsageError
from pytest_lora.loading import read_tensor
from pytest_lora.numerics.spectrum import Spectrum, intruders, low_rank_spectrum, relative_norm
from pytest_lora.records import Json, Measurement, Problem

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter, LoraModule
    from pytest_lora.subject import BaseModel, Subject

__all__ = ["measure_delta_spectrum"]

LARGEST = 1 << 22
"""Elements of the largest weight that is decomposed in search of intruders: 2048 x 2048."""

_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class _Update:
    """One module's update and what is known of it."""

    module: LoraModule
    spectrum: Spectrum
    relative: float | None = None
    intruders: int | None = None

    def row(self) -> dict[str, Json]:
        """The numbers for the report."""
        found: dict[str, Json] = {
            "rank": self.spectrum.rank,
            "of": len(self.spectrum.values),
            "effective_rank": self.spectrum.effective_rank,
            "stable_rank": self.spectrum.stable_rank,
            "frobenius": self.spectrum.frobenius,
            "spectral": self.spectrum.spectral,
        }
        if self.relative is not None:
            found["relative"] = self.relative
        if self.intruders is not None:
            found["intruders"] = self.intruders
        return found


@dataclass(slots=True)
class _Found:
    """All updates, what could not be looked at, and what is wrong."""

    updates: list[_Update] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def measure_delta_spectrum(
    adapter: Adapter | Subject,
    *,
    least_effective_rank: float | None = None,
    find_intruders: bool = False,
) -> Measurement:
    """The largest update relative to the weight it is added to, and the spectrum of every one.

    Args:
        adapter: an adapter's files, or a subject, whose base then gives the weights.
        least_effective_rank: the least effective rank any module may have; None asks for none.
        find_intruders: decompose weights of up to :data:`LARGEST` elements, before and after, and
            count intruder dimensions; needs a subject.

    Returns:
        With a base: the largest Frobenius norm of an update over that of its weight.  Without: the
        largest Frobenius norm.  Infinite where a factor is not finite, or a rank too small.
        ``details["modules"]`` has every module's numbers.

    Raises:
        NotApplicable: no module has low-rank factors that can be judged.
        UsageError: intruders without a base.
        CannotRun: the weights cannot be read.
    """
    base = getattr(adapter, "base", None)
    known: Any = adapter if base is None else adapter.adapter  # type: ignore[union-attr]
    if find_intruders and base is None:
        raise UsageError("intruder dimensions are relative to the base's weights: give a subject")
    if known.peft_type != "LORA":
        raise NotApplicable(f"{known.peft_type or 'the adapter'} has no low-rank factors A and B")
    modules = lora_modules(known)
    if not modules:
        raise NotApplicable("no tensor of the adapter is a low-rank factor")
    found = _Found()
    weights = dict(base.tensors()) if base is not None else None
    for module in modules:
        _look(module, base, weights, find_intruders, found)
    if not found.updates:
        raise NotApplicable(f"no module's update can be judged: {'; '.join(found.notes)}")
    _judge_ranks(found, least_effective_rank)
    return _measurement(found, relative=base is not None)


def _look(
    module: LoraModule,
    base: BaseModel | None,
    weights: dict[str, torch.Tensor] | None,
    find_intruders: bool,
    found: _Found,
) -> None:
    factors = _factors(module, found)
    if factors is None:
        return
    spectrum = low_rank_spectrum(*factors, module.scaling)
    if not spectrum.finite:
        found.problems.append(
            Problem(
                module.name,
                "a factor or the scaling is not finite",
                "numbers",
                "see finite_weights and config_matches_weights",
            )
        )
    if module.dora:
        found.notes.append(f"{module.name}: DoRA's magnitudes rescale more than this update shows")
    if weights is None or base is None:
        found.updates.append(_Update(module, spectrum))
        return
    weight = readable(f"{module.name}.weight", weights)
    doubt = _doubt(weight, factors)
    if weight is None or doubt:
        found.notes.append(f"{module.name}: its weight is {doubt}, so nothing relative to it")
        found.updates.append(_Update(module, spectrum))
        return
    relative = relative_norm(spectrum, _norm(weight))
    count = None
    if find_intruders and spectrum.finite:
        count = _intruders(module, base, weight, factors, found)
    found.updates.append(_Update(module, spectrum, relative, count))


def _doubt(weight: torch.Tensor | None, factors: tuple[torch.Tensor, torch.Tensor]) -> str:
    """Why an update cannot be compared with a weight; empty where it can."""
    if weight is None:
        return "not found in the base"
    if not weight.is_floating_point():
        return f"stored as {weight.dtype}"
    b, a = factors
    if weight.numel() != b.shape[0] * a.shape[1]:
        return f"of shape {list(weight.shape)} and the update {b.shape[0]} x {a.shape[1]}"
    return ""


def _factors(module: LoraModule, found: _Found) -> tuple[torch.Tensor, torch.Tensor] | None:
    """B as (out, r) and A as (r, in), convolutions' kernels being part of in; None with a note."""
    reason = ""
    if module.a is None or module.b is None:
        reason = "one of its factors is missing"
    elif module.kind == "parameter":
        reason = "its factors are those of several experts side by side"
    if reason or module.a is None or module.b is None:
        found.notes.append(f"{module.name}: left out, {reason}")
        return None
    try:
        a, b = read_tensor(module.a), read_tensor(module.b)
    except Exception as error:
        raise CannotRun(f"{module.a.file}: {error}") from error
    a, b = a.flatten(1), b.flatten(1)
    if b.shape[1] != a.shape[0]:
        what = "a grouped convolution" if module.kind == "conv" else "its factors do not multiply"
        found.notes.append(f"{module.name}: left out, {what}: {list(b.shape)} by {list(a.shape)}")
        return None
    return b, a


def _norm(weight: torch.Tensor) -> float:
    """Frobenius norm in float64, in bounded memory."""
    flat = weight.detach().reshape(-1)
    parts = torch.split(flat, _BLOCK)
    return math.sqrt(math.fsum(float(part.double().square().sum()) for part in parts))


def _intruders(
    module: LoraModule,
    base: BaseModel,
    weight: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    found: _Found,
) -> int | None:
    b, a = factors
    if module.dora:
        found.notes.append(f"{module.name}: no intruders, DoRA's weight is not W + s B A")
        return None
    if weight.numel() > LARGEST:
        found.notes.append(f"{module.name}: no intruders, {weight.numel()} elements are too many")
        return None
    matrix = weight.detach().cpu()
    owner = type(base.module.get_submodule(module.name)).__name__
    turned = owner in ("Conv1D", "Embedding")  # these store (in, out)
    matrix = matrix.T if turned else matrix.flatten(1)
    if matrix.shape != (b.shape[0], a.shape[1]):
        found.notes.append(f"{module.name}: no intruders, the weight has another shape")
        return None
    return intruders(matrix, b, a, module.scaling)


def _judge_ranks(found: _Found, least: float | None) -> None:
    """Too small ranks are problems where the user says what is too small, else remarks."""
    for update in found.updates:
        spectrum, name = update.spectrum, update.module.name
        if not spectrum.finite:
            continue
        if least is not None and spectrum.effective_rank < least:
            found.problems.append(
                Problem(
                    name,
                    f"effective rank {spectrum.effective_rank:.3g} of {len(spectrum.values)}",
                    f"at least {least:g}",
                    "train with a smaller rank, a higher learning rate for lora_B or rsLoRA",
                )
            )
        elif spectrum.rank < len(spectrum.values):
            found.notes.append(f"{name}: rank {spectrum.rank} of {len(spectrum.values)}")


def _measurement(found: _Found, *, relative: bool) -> Measurement:
    sized = [(_size(update, relative), update) for update in found.updates]
    known = [(size, update) for size, update in sized if size is not None]
    if not known:
        raise NotApplicable(f"no weight to compare with: {'; '.join(found.notes)}")
    value, worst = max(known, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    rows: dict[str, Json] = {update.module.name: update.row() for update in found.updates}
    effective = [u.spectrum.effective_rank for u in found.updates if u.spectrum.finite]
    where = str(found.problems[0]) if found.problems else _words(worst)
    return Measurement(
        value=math.inf if found.problems else value,
        unit="of the weight's norm" if relative else "Frobenius norm",
        count=len(found.updates),
        where=where,
        details={
            "modules": rows,
            "median_effective_rank": statistics.median(effective) if effective else math.nan,
            "problems": [problem.to_dict() for problem in found.problems],
            "notes": list(found.notes),
        },
    )


def _size(update: _Update, relative: bool) -> float | None:
    return update.relative if relative else update.spectrum.frobenius


def _words(update: _Update) -> str:
    spectrum = update.spectrum
    return (
        f"{update.module.name}: Frobenius norm {spectrum.frobenius:.4g}, spectral norm"
        f" {spectrum.spectral:.4g}, effective rank {spectrum.effective_rank:.3g} of"
        f" {len(spectrum.values)}"
    )
