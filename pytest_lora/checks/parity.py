"""What is served under an adapter's name: is it that adapter's output, whoever was asked before?

Served means anything that runs elsewhere than in PEFT's own layers: a server, an export, a merged
folder, a pipeline, a loader of one's own.  All of them are held to one law: the output is the
adapted model's, up to the rounding that model has itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.checks.bits import is_routed, median_rms, rms
from pytest_lora.checks.parts import explain
from pytest_lora.checks.reload import Errors
from pytest_lora.errors import NotApplicable, UsageError
from pytest_lora.loading import one_line
from pytest_lora.probe import computing_wide, output_of
from pytest_lora.records import Measurement

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["Mixed", "Serve", "measure_serving_parity"]

Serve = Callable[[Any], torch.Tensor]
"""``serve(name)``: what is served for the probe inputs with the adapter of that name; None, which
only :func:`measure_serving_parity` with ``base=True`` asks for, is the base model."""

Mixed = Callable[[list[Any]], torch.Tensor | Sequence[torch.Tensor]]
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

    def part(self, rows: slice) -> _Reference:
        """The same of some rows."""
        return _Reference(
            self.name, self.output[rows], self.wide[rows], self.base[rows], self.routed
        )

    def ratio(self, found: torch.Tensor) -> float:
        """How much further off ``found`` is than the model's own output; infinite if no number."""
        if found.shape != self.output.shape or not bool(found.isfinite().all()):
            return math.inf
        # An answer in a coarser format than the model's own is not excused by that format.
        dtype = torch.promote_types(found.dtype, self.output.dtype)
        found = found.detach().to(self.output.device, dtype)
        return Errors.of(found, self.output, self.wide, typical=self.routed).ratio

    def apart(self, one: torch.Tensor, other: torch.Tensor) -> float:
        """How far two outputs are from each other, in multiples of the model's own error."""
        errors = Errors.of(self.output, self.output, self.wide, typical=self.routed)
        own = max(errors.unmerged, errors.floor, sys.float_info.min)
        gap = one.double().to(self.output.device) - other.double().to(self.output.device)
        return (median_rms if self.routed else rms)(gap) / own

    def clear(self, allowed: float) -> float:
        """The size of the adapter's effect in multiples of what passes for the same output."""
        return self.apart(self.output, self.base) / (allowed + 1)

    def places(self, one: torch.Tensor, other: torch.Tensor, allowed: float) -> torch.Tensor:
        """Where along all dimensions but the last two outputs are the same: n places whose root
        mean square is within a bound are each within sqrt(n) times that bound.
        """
        errors = Errors.of(self.output, self.output, self.wide, typical=False)
        gaps = (one.double() - other.double()).square().mean(-1).sqrt()
        bound = max(errors.unmerged, errors.floor) * (allowed + 1) * math.sqrt(gaps.numel())
        within: torch.Tensor = gaps <= bound
        return within

    def of_base(self) -> _Reference:
        """What the base model's output would have to be."""
        return _Reference(_BASE, self.base, self.base.double(), self.base, self.routed)


def measure_serving_parity(
    serve: Serve,
    subjects: Mapping[str, Subject],
    *,
    base: bool = False,
    mixed: Mixed | None = None,
    allowed: float = 2.0,
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
        allowed: what will pass.  Nothing else than an adapter's output may, and an answer that does
            not is explained.

    Returns:
        The largest root mean square distance of an answer from the output in the wider format, in
        multiples of the distance that the adapted model's own output has.

    Raises:
        UsageError: there is no adapter, or nothing to mix: one name, one row, other inputs.
        NotApplicable: the base model's output, or another adapter's, would pass for an adapter's,
            so that nothing could be told.
    """
    if not subjects:
        raise UsageError("serving parity needs at least one adapter")
    asked: dict[str | None, _Reference] = {}
    if base:
        asked[None] = _base_reference(next(iter(subjects.values())))
    for name, subject in subjects.items():
        asked[name] = _reference(name, subject)
    references = [asked[name] for name in subjects]
    _require_different(references, allowed)
    if mixed is not None:
        _require_one_batch(subjects, len(asked))
    answers = list(_answers(serve, asked))
    if mixed is not None:
        answers += _mixed_answers(mixed, asked)
    worst = max(answers, key=lambda answer: answer.ratio)
    said = _Diagnosis(asked, subjects, allowed).of(worst, answers)
    after = f", asked after {worst.after}" if worst.after else ""
    return Measurement(
        value=worst.ratio,
        unit=UNIT,
        count=sum(reference.output.numel() for reference in references),
        where=f"{worst.asked}{after}: {said}",
        details={"answers": [{"asked": a.asked, "ratio": a.ratio} for a in answers]},
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer: what was asked for, in which words, what came, and how far off it is.

    ``after`` is who was asked for before, ``row`` the row of the probe inputs that it is of, None
    where it is of all of them.
    """

    name: str | None
    asked: str
    found: torch.Tensor
    ratio: float
    row: int | None = None
    after: str = ""

    @property
    def rows(self) -> slice:
        """The rows of the probe inputs that it is of."""
        return slice(None) if self.row is None else slice(self.row, self.row + 1)


def _answers(serve: Serve, asked: Mapping[str | None, _Reference]) -> Iterator[_Answer]:
    before = ""
    for name, wanted in (*asked.items(), *asked.items()):
        found = serve(name).detach().clone()  # what is served next may be written over it
        yield _Answer(name, wanted.name, found, wanted.ratio(found), after=before)
        before = wanted.name


def _mixed_answers(mixed: Mixed, asked: Mapping[str | None, _Reference]) -> Iterator[_Answer]:
    """Rows by every name in turn, so that each row has had each of them and other neighbours."""
    names = list(asked)
    rows = len(next(iter(asked.values())).output)
    for turn in range(len(names)):
        order = [names[(row + turn) % len(names)] for row in range(rows)]
        found = mixed(list(order))
        if not isinstance(found, torch.Tensor):  # a server gives its answers one by one
            found = _as_batch(found)
        yield _worst_row(found.detach(), order, asked)


def _as_batch(answers: Sequence[torch.Tensor]) -> torch.Tensor:
    try:
        return torch.stack(list(answers))
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"mixed gave what is no batch of rows: {one_line(error)}") from None


def _worst_row(
    found: torch.Tensor, order: Sequence[str | None], asked: Mapping[str | None, _Reference]
) -> _Answer:
    """The ratio of a whole batch, with the row that is furthest off."""
    wanted = _rows_of(order, asked)
    ratio = wanted.ratio(found)
    if found.shape != wanted.output.shape:
        return _Answer(order[0], wanted.name, found, ratio)
    gaps = (found.to(wanted.output.device).double() - wanted.output.double()).flatten(1)
    row = int(gaps.norm(dim=1).nan_to_num(math.inf, math.inf).argmax())
    said = f"{wanted.name}: row {row}, {asked[order[row]].name}"
    return _Answer(order[row], said, found[row : row + 1], ratio, row)


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
    with computing_wide(subject.model):
        wide = subject.output().double()
    routed = is_routed(subject.base.module)
    subject.release()
    return _Reference(name, output, wide, base, routed)


def _base_reference(subject: Subject) -> _Reference:
    """The untouched base model's output, and the same in the wider format."""
    base = subject.base_output()
    with subject.base.bare() as module:
        with computing_wide(module):
            wide = output_of(module, subject.inputs).double()
        routed = is_routed(module)
    return _Reference(_BASE, base, wide, base, routed)


def _require_different(references: Sequence[_Reference], allowed: float) -> None:
    """Nothing but an adapter's own output may pass for it."""
    known = [(_BASE, references[0].base), *((one.name, one.output) for one in references)]
    for wanted in references:
        for name, output in known:
            away = math.inf if name == wanted.name else wanted.ratio(output)
            if away <= allowed:
                raise NotApplicable(
                    f"the output of {name} is {away:.3g} {UNIT} away from that of {wanted.name},"
                    f" and {allowed:g} would pass: nothing to tell; take inputs that show more of"
                    " the adapter, a wider format, or a smaller bound"
                )


# ------------------------------------------------------------------------------ what it is instead


@dataclass(frozen=True, slots=True)
class _Diagnosis:
    """What an answer is instead of the one that was asked for, as far as that can be seen."""

    asked: Mapping[str | None, _Reference]
    subjects: Mapping[str, Subject]
    allowed: float

    def of(self, answer: _Answer, answers: Sequence[_Answer]) -> str:
        """In words."""
        known = {name: reference.part(answer.rows) for name, reference in self.asked.items()}
        wanted, found = known[answer.name], answer.found
        if found.shape != wanted.output.shape:
            return f"an output of shape {list(found.shape)} instead of {list(wanted.output.shape)}"
        if not bool(found.isfinite().all()):
            return "the output is not finite"
        found = found.to(wanted.output.device)
        numbers = _in_numbers(found, wanted, answer.ratio)
        if answer.ratio <= self.allowed:
            return numbers
        others = [other for other in known.values() if other.name not in (wanted.name, _BASE)]
        exactly = self._exactly(answer, found, wanted, others)
        return (
            exactly
            or self._not_repeated(answer, answers, wanted)
            or numbers
            + (
                _where_wrong(found, wanted, others, self.allowed)
                or "; "
                + (self._not_searched(wanted) if exactly is None else _unexplained(found, wanted))
            )
        )

    def _not_searched(self, wanted: _Reference) -> str:
        clear = wanted.clear(self.allowed)
        return _NOT_SEARCHED if clear >= _CLEAR else f"the effect is {clear:.2g} {_TOO_LITTLE}"

    def _exactly(
        self,
        answer: _Answer,
        found: torch.Tensor,
        wanted: _Reference,
        others: Sequence[_Reference],
    ) -> str | None:
        """Something known that it is, up to rounding; None if nobody looked to the end."""

        def same(output: torch.Tensor) -> bool:
            return wanted.apart(found, output) <= self.allowed + 1  # its own error, and the other's

        if same(wanted.output):
            return ""
        for other in others:
            if same(other.output):
                return f"the output of {other.name}: {_HELD if answer.name else _LEFT_ON}"
        if answer.name is None:
            return ""
        clear = wanted.clear(self.allowed)
        if clear >= _TELLING and same(wanted.base):
            return "the base model's output: nothing of the adapter is used"
        if clear < _CLEAR:
            return None
        rest = {name: subject for name, subject in self.subjects.items() if name != answer.name}
        return explain(self.subjects[answer.name], same, found, answer.rows, rest)

    def _not_repeated(self, answer: _Answer, answers: Sequence[_Answer], wanted: _Reference) -> str:
        """Whether the same question had another answer the other time."""
        if answer.row is not None:
            return ""
        same = [one.found for one in answers if one.name == answer.name and one.row is None]
        away = wanted.apart(*same) if same[0].shape == same[1].shape else math.inf
        if away <= 2 * self.allowed:
            return ""
        return (
            f"the same was asked twice, and the answers are {away:.3g} {UNIT} from each other:"
            " dropout or sampling is on, or being asked changes what is served"
        )


_TELLING, _CLEAR = 4.0, 16.0
"""How many times what passes an effect has to be, so that none of it can be told from some of it,
and so that its parts and places can: scalings to a sixteenth.
"""
_HELD = "is a cache or a slot kept by name?"
_LEFT_ON = "it is at work where no adapter is named"
_TOO_LITTLE = "times what passes, too little to say what this is instead: ask in a wider format"
_NOT_SEARCHED = "what it is instead was looked for too long: ask with a smaller model"

_SMALL = 2.0**-4
"""Share of an adapter's effect up to which a coarser format is the first thing to think of."""


def _unexplained(found: torch.Tensor, wanted: _Reference) -> str:
    """Where to look if nothing that is known gives the answer."""
    if wanted.name == _BASE:
        return (
            "something served before is still in it, its weights were written over, or it is"
            " another base model"
        )
    off = _off(found, wanted)
    if off <= _SMALL:
        return (
            f"off by {off:.2g} of that effect, as a coarser format, quantised weights or another"
            " revision of the base make it: if they are meant, give a bound of your own"
        )
    return (
        "no other scaling and no part left out gives it: look for rows, columns or factors in"
        " another order, another base model, or more than one fault"
    )


def _off(found: torch.Tensor, wanted: _Reference) -> float:
    """The size of the error over that of the adapter's effect."""
    effect = float(_flat(wanted.output, wanted.base).norm())
    return float(_flat(found, wanted.output).norm()) / effect if effect else math.inf


def _where_wrong(
    found: torch.Tensor, wanted: _Reference, others: Sequence[_Reference], allowed: float
) -> str:
    """Which places of the rows are wrong, and whose output is there, where others are right."""
    if found.dim() != 3 or wanted.routed or wanted.clear(allowed) < _CLEAR:
        return ""
    same = wanted.places(wanted.base, wanted.output, allowed)  # whoever is right there says nothing
    right = wanted.places(found, wanted.output, allowed) & ~same
    said = f"; right at {_places(right)}" if right.any() else ""
    for other in (*others, wanted.of_base()):
        common = wanted.places(other.output, wanted.output, allowed)
        theirs = wanted.places(found, other.output, allowed) & ~common
        if theirs.any():
            return f"{said}; at {_places(theirs)} the output of {other.name}"
    return f"{said}, wrong at {_places(~right & ~same)}" if said else ""


def _places(chosen: torch.Tensor) -> str:
    """``(row, place)`` flags in words: whole rows, else places that are the same in all rows."""
    rows, columns = chosen.any(1), chosen.any(0)
    if bool((chosen.all(1) == rows).all()):
        return f"row {_ranges(rows)}"
    if bool((chosen.all(0) == columns).all()):
        return f"place {_ranges(columns)}"
    return f"{int(chosen.sum())} of {chosen.numel()} places"


def _ranges(flags: torch.Tensor) -> str:
    chosen = [place for place, flag in enumerate(flags.tolist()) if flag]
    starts = [place for place in chosen if place - 1 not in chosen]
    ends = [place for place in chosen if place + 1 not in chosen]
    said = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(said[:4]) + (", ..." if len(said) > 4 else "")


def _flat(output: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return (output.double() - base.double()).flatten()


def _in_numbers(found: torch.Tensor, wanted: _Reference, ratio: float) -> str:
    said = f"{ratio:.3g} {UNIT}"
    if wanted.name == _BASE:
        return said
    effect = _flat(wanted.output, wanted.base)
    share = float(_flat(found, wanted.base) @ effect) / (float(effect.square().sum()) or math.nan)
    return f"{said}; {share:.3g} times the adapter's effect"
