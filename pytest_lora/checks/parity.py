"""What is served under an adapter's name: is it that adapter's output, whoever was asked before?

Served means anything that runs elsewhere than in PEFT's own layers: a server, an export, a merged
folder, a pipeline, a loader of one's own.  All of them are held to one law: the output is the
adapted model's, up to the rounding that model has itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.checks.bits import is_routed
from pytest_lora.checks.reload import Errors
from pytest_lora.errors import NotApplicable, UsageError
from pytest_lora.numerics.streaming import computing_in
from pytest_lora.probe import output_of
from pytest_lora.records import Measurement

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["Mixed", "Serve", "measure_serving_parity", "widened"]

Serve = Callable[[Any], torch.Tensor]
"""``serve(name)``: what is served for the probe inputs with the adapter of that name; None, which
only :func:`measure_serving_parity` with ``base=True`` asks for, is the base model."""

Mixed = Callable[[list[Any]], torch.Tensor]
"""``mixed(names)``: what is served for the probe inputs in one batch, each row with the adapter of
its name; None, as above, is the base model."""

UNIT = "times the adapted model's own rounding error"
_BASE = "the base model"


@dataclass(frozen=True, slots=True)
class _Reference:
    """An adapter's outputs as PEFT computes them: in the model's format and in a wider one."""

    name: str
    output: torch.Tensor
    wide: torch.Tensor
    base: torch.Tensor
    routed: bool

    def row(self, index: int) -> _Reference:
        """The same of one row."""
        part = slice(index, index + 1)
        return _Reference(
            self.name, self.output[part], self.wide[part], self.base[part], self.routed
        )

    def ratio(self, found: torch.Tensor) -> float:
        """How much further off ``found`` is than the model's own output; infinite if no number."""
        if found.shape != self.output.shape or not bool(found.isfinite().all()):
            return math.inf
        # An answer in a coarser format than the model's own is not excused by that format.
        dtype = torch.promote_types(found.dtype, self.output.dtype)
        found = found.detach().to(self.output.device, dtype)
        return Errors.of(found, self.output, self.wide, typical=self.routed).ratio


def measure_serving_parity(
    serve: Serve,
    subjects: Mapping[str, Subject],
    *,
    base: bool = False,
    mixed: Mixed | None = None,
) -> Measurement:
    """How far what is served under each name is from that adapter's output.

    Every adapter is asked for, and then all of them again in the same order: a cache that takes one
    for another shows in the second round, if not in the first.

    Args:
        serve: ``serve(name)``: outputs for the probe inputs, shape as the subject's.
        subjects: the adapters by the names they are served under, with the probe inputs.
        base: ask for the base model as well, ``serve(None)``, before the adapters and after them:
            an adapter that was served may not show in what follows it.
        mixed: ``mixed(names)``: outputs for the probe inputs in one batch, each row with the
            adapter of its name; asked until every row had every name.

    Returns:
        The largest root mean square distance of an answer from the output in the wider format, in
        multiples of the distance that the adapted model's own output has.

    Raises:
        UsageError: there is no adapter, or nothing to mix: one name, one row, other inputs.
        NotApplicable: an adapter does not change the output, or two give the same, so that nothing
            could be told.
    """
    if not subjects:
        raise UsageError("serving parity needs at least one adapter")
    asked: dict[str | None, _Reference] = {}
    if base:
        asked[None] = _base_reference(next(iter(subjects.values())))
    for name, subject in subjects.items():
        asked[name] = _reference(name, subject)
    references = [asked[name] for name in subjects]
    _require_different(references)
    if mixed is not None:
        _require_one_batch(subjects, len(asked))
    answers = list(_answers(serve, asked))
    if mixed is not None:
        answers += _mixed_answers(mixed, asked)
    worst = max(answers, key=lambda answer: answer.ratio)
    return Measurement(
        value=worst.ratio,
        unit=UNIT,
        count=sum(reference.output.numel() for reference in references),
        where=worst.where,
        details={"answers": [{"asked": a.asked, "ratio": a.ratio} for a in answers]},
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer: what was asked for, how far off it is, and what it is instead."""

    asked: str
    ratio: float
    where: str


def _answers(serve: Serve, asked: Mapping[str | None, _Reference]) -> Iterator[_Answer]:
    before = ""
    for name, wanted in (*asked.items(), *asked.items()):
        found = serve(name)
        ratio = wanted.ratio(found)
        yield _Answer(wanted.name, ratio, _where(found, wanted, asked.values(), before, ratio))
        before = wanted.name


def _mixed_answers(mixed: Mixed, asked: Mapping[str | None, _Reference]) -> Iterator[_Answer]:
    """Rows by every name in turn, so that each row has had each of them and other neighbours."""
    names = list(asked)
    rows = len(next(iter(asked.values())).output)
    for turn in range(len(names)):
        order = [names[(row + turn) % len(names)] for row in range(rows)]
        found = mixed(list(order))
        wanted = _rows_of(order, asked)
        ratio = wanted.ratio(found)
        yield _Answer(wanted.name, ratio, _worst_row(found, order, asked, ratio))


def _rows_of(order: Sequence[str | None], asked: Mapping[str | None, _Reference]) -> _Reference:
    """What a batch of these rows has to be."""
    picked = [asked[name] for name in order]
    one = picked[0]
    return _Reference(
        "a mixed batch of " + ", ".join(reference.name for reference in picked),
        _stacked([reference.output for reference in picked]),
        _stacked([reference.wide for reference in picked]),
        one.base,
        one.routed,
    )


def _stacked(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([output[row] for row, output in enumerate(outputs)])


def _worst_row(
    found: torch.Tensor,
    order: Sequence[str | None],
    asked: Mapping[str | None, _Reference],
    ratio: float,
) -> str:
    """The row that is furthest off, as an answer of its own."""
    wanted = _rows_of(order, asked)
    if found.shape != wanted.output.shape or not bool(found.isfinite().all()):
        return _where(found, wanted, (), "", ratio)
    gaps = (found.detach().to(wanted.output.device).double() - wanted.output.double()).flatten(1)
    row = int(gaps.norm(dim=1).argmax())
    others = [reference.row(row) for reference in asked.values()]
    said = _where(found[row : row + 1], asked[order[row]].row(row), others, "", ratio)
    return f"{wanted.name}: row {row}, {said}"


def _require_one_batch(subjects: Mapping[str, Subject], names: int) -> None:
    """All adapters on the same inputs, of two rows at least, and two names to give them."""
    if names < 2:
        raise UsageError("a mixed batch of one adapter is none: give another one, or base=True")
    first, *rest = [subject.inputs for subject in subjects.values()]
    for other in rest:
        if first.keys() != other.keys() or not all(
            torch.equal(first[key], other[key]) for key in first
        ):
            raise UsageError("a mixed batch needs the same probe inputs for all adapters")
    rows = min(len(tensor) for tensor in first.values())
    if rows < 2:
        raise UsageError(f"a mixed batch needs probe inputs of two rows, not of {rows}")


def _reference(name: str, subject: Subject) -> _Reference:
    base, output = subject.base_output(), subject.output()
    with widened(subject.model):
        wide = subject.output().double()
    routed = is_routed(subject.base.module)
    subject.release()
    return _Reference(name, output, wide, base, routed)


def _base_reference(subject: Subject) -> _Reference:
    """The untouched base model's output, and the same in the wider format."""
    base = subject.base_output()
    with subject.base.bare() as module:
        with widened(module):
            wide = output_of(module, subject.inputs).double()
        routed = is_routed(module)
    return _Reference(_BASE, base, wide, base, routed)


def widened(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """The model computes in float64, one module's weights at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return computing_in(model, torch.float64, whole=lambda m: isinstance(m, BaseTunerLayer))


def _require_different(references: Iterable[_Reference]) -> None:
    known: dict[str, torch.Tensor] = {}
    for reference in references:
        known.setdefault(_BASE, reference.base)
        for other, output in known.items():
            if torch.equal(reference.output, output):
                told = f"the output with {reference.name} is that of {other}"
                raise NotApplicable(f"{told}: nothing to tell")
        known[reference.name] = reference.output


def _where(
    found: Any, wanted: _Reference, all_of_them: Iterable[_Reference], before: str, ratio: float
) -> str:
    """The answer at fault and what it is instead, as far as that can be seen."""
    asked = f"{wanted.name}, asked after {before}" if before else wanted.name
    if found.shape != wanted.output.shape:
        shapes = f"{list(found.shape)} instead of {list(wanted.output.shape)}"
        return f"{asked}: an output of shape {shapes}"
    if not bool(found.isfinite().all()):
        return f"{asked}: the output is not finite"
    found = found.detach().to(wanted.output.device)
    nearest = min(
        (other for other in all_of_them if other.name not in (wanted.name, _BASE)),
        key=lambda other: _distance(found, other.output),
        default=wanted,
    )
    to_base, to_nearest = _distance(found, wanted.base), _distance(found, nearest.output)
    if ratio > 1 and to_base <= to_nearest and to_base < _distance(found, wanted.output):
        return f"{asked}: nearer to the base model's output: most of the adapter is not used"
    if to_nearest < _distance(found, wanted.output):
        return (
            f"{asked}: nearer to the output of {nearest.name}: is a cache or a slot kept by name?"
        )
    if wanted.name == _BASE:
        return f"{asked}: {ratio:.3g} {UNIT}"
    effect = wanted.output.double() - wanted.base.double()
    share = float((found.double() - wanted.base.double()).flatten() @ effect.flatten())
    share /= float(effect.square().sum()) or math.nan
    return f"{asked}: {ratio:.3g} {UNIT}; {share:.3g} times the adapter's effect"


def _distance(found: torch.Tensor, other: torch.Tensor) -> float:
    """How far apart two outputs are; infinite if their shapes differ."""
    if found.shape != other.shape:
        return math.inf
    return float((found.double() - other.double()).norm())
