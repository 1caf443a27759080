"""What is served under an adapter's name: is it that adapter's output, whoever was asked before?

Served means anything that runs elsewhere than in PEFT's own layers: a server, an export, a merged
folder, a pipeline, a loader of one's own.  All of them are held to one law: the output is the
adapted model's, up to the rounding that model has itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.checks.bits import is_routed
from pytest_lora.checks.reload import Errors
from pytest_lora.errors import NotApplicable, UsageError
from pytest_lora.numerics.streaming import computing_in
from pytest_lora.records import Measurement

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["Serve", "measure_serving_parity", "widened"]

Serve = Callable[[str], torch.Tensor]
"""``serve(name)``: what is served for the probe inputs with the adapter of that name."""

UNIT = "times the adapted model's own rounding error"


@dataclass(frozen=True, slots=True)
class _Reference:
    """An adapter's outputs as PEFT computes them: in the model's format and in a wider one."""

    name: str
    output: torch.Tensor
    wide: torch.Tensor
    base: torch.Tensor
    routed: bool

    def ratio(self, found: torch.Tensor) -> float:
        """How much further off ``found`` is than the model's own output; infinite if no number."""
        if found.shape != self.output.shape or not bool(found.isfinite().all()):
            return math.inf
        # An answer in a coarser format than the model's own is not excused by that format.
        dtype = torch.promote_types(found.dtype, self.output.dtype)
        found = found.detach().to(self.output.device, dtype)
        return Errors.of(found, self.output, self.wide, typical=self.routed).ratio


def measure_serving_parity(serve: Serve, subjects: Mapping[str, Subject]) -> Measurement:
    """How far what is served under each name is from that adapter's output.

    Every adapter is asked for, and then all of them again in the same order: a cache that takes one
    for another shows in the second round, if not in the first.

    Args:
        serve: ``serve(name)``: outputs for the probe inputs, shape as the subject's.
        subjects: the adapters by the names they are served under, with the probe inputs.

    Returns:
        The largest root mean square distance of an answer from the output in the wider format, in
        multiples of the distance that the adapted model's own output has.

    Raises:
        UsageError: there is no adapter.
        NotApplicable: an adapter does not change the output, or two give the same, so that nothing
            could be told.
    """
    if not subjects:
        raise UsageError("serving parity needs at least one adapter")
    references = {name: _reference(name, subject) for name, subject in subjects.items()}
    _require_different(references)
    worst, where, said = 0.0, "", []
    order = [*references, *references]
    for turn, name in enumerate(order):
        found = serve(name)
        ratio = references[name].ratio(found)
        said.append({"asked": name, "ratio": ratio})
        if ratio > worst or not where:
            before = order[turn - 1] if turn else ""
            worst, where = ratio, _where(found, references[name], references, before, ratio)
    return Measurement(
        value=worst,
        unit=UNIT,
        count=sum(reference.output.numel() for reference in references.values()),
        where=where,
        details={"answers": said},  # type: ignore[dict-item]
    )


def _reference(name: str, subject: Subject) -> _Reference:
    base, output = subject.base_output(), subject.output()
    with widened(subject.model):
        wide = subject.output().double()
    routed = is_routed(subject.base.module)
    subject.release()
    return _Reference(name, output, wide, base, routed)


def widened(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """The model computes in float64, one module's weights at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return computing_in(model, torch.float64, whole=lambda m: isinstance(m, BaseTunerLayer))


def _require_different(references: Mapping[str, _Reference]) -> None:
    known: dict[str, torch.Tensor] = {}
    for name, reference in references.items():
        known.setdefault("the base model", reference.base)
        for other, output in known.items():
            if torch.equal(reference.output, output):
                raise NotApplicable(f"the output with {name} is that of {other}: nothing to tell")
        known[name] = reference.output


def _where(
    found: Any, wanted: _Reference, all_of_them: Mapping[str, _Reference], before: str, ratio: float
) -> str:
    """The answer at fault and what it is instead, as far as that can be seen."""
    asked = f"{wanted.name}, asked after {before}" if before else wanted.name
    if found.shape != wanted.output.shape:
        shapes = f"{list(found.shape)} instead of {list(wanted.output.shape)}"
        return f"{asked}: an output of shape {shapes}"
    if not bool(found.isfinite().all()):
        return f"{asked}: the output is not finite"
    found = found.detach().to(wanted.output.device)
    effect = wanted.output.double() - wanted.base.double()
    share = float((found.double() - wanted.base.double()).flatten() @ effect.flatten())
    share /= float(effect.square().sum())
    others = [other for other in all_of_them.values() if other is not wanted]
    same = next((other.name for other in others if _nearer(found, other.output, wanted)), "")
    if same:
        return f"{asked}: nearer to the output of {same}: is a cache or a slot kept by name?"
    if _nearer(found, wanted.base, wanted) and ratio > 1:
        return f"{asked}: nearer to the base model's output: most of the adapter is not used"
    return f"{asked}: {ratio:.3g} {UNIT}; {share:.3g} times the adapter's effect"


def _nearer(found: torch.Tensor, other: torch.Tensor, wanted: _Reference) -> bool:
    """Whether an answer is nearer to another output than to the one asked for."""
    if found.shape != other.shape:
        return False
    there = (found.double() - other.double()).norm()
    return bool(there < (found.double() - wanted.output.double()).norm())
