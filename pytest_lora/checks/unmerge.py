"""Merging and unmerging again and again: does the base weight come back, and does the error grow?

One cycle cannot be exact in general: the merged weight was rounded.  What one merge and one
unmerge can lose follows from the formats, and every single cycle is held to it.  That still allows
an error that grows with every cycle, so growth is measured as well and reported; it is a property
of the format and of the PEFT version, not of the adapter, and goes away with ``safe_merge=True``
or in float32.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.baseline import FACTS
from pytest_lora.checks.four_bit import block_format
from pytest_lora.checks.merge_layers import (
    LowRankLayer,
    NotMergeable,
    adapters_of,
    as_text,
    base_tensors,
    describe,
    is_token_layer,
    merge,
    mergeable_layers,
    quantisation_of,
    unmerge,
)
from pytest_lora.checks.merge_outputs import attribute
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import quiet
from pytest_lora.numerics.fingerprint import locate_difference
from pytest_lora.numerics.four_bit import judge_requantised
from pytest_lora.numerics.merge_bound import (
    WeightError,
    judge_cycle,
    judge_sum_cycle,
    measure_drift,
)
from pytest_lora.numerics.precision import accurate_products
from pytest_lora.numerics.rounding import precision, unit
from pytest_lora.records import Json, Measurement, Problem
from pytest_lora.structure import on_clones

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_lora.subject import Subject

__all__ = ["measure_unmerge_restoration"]

_ROUNDINGS = 16
"""Roundings to the weight's dtype allowed per cycle in methods without an analysis of their own."""

_LISTED = 20


@dataclass(slots=True)
class _Drift:
    """How far a weight is from where it started, after one of the cycles."""

    changed: int = 0
    elements: int = 0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, start: torch.Tensor, now: torch.Tensor) -> None:
        """Count one tensor in."""
        changed, squares, largest = measure_drift(start, now)
        self.changed += changed
        self.elements += start.numel()
        self.squares += squares
        self.largest = max(self.largest, largest)

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / max(self.elements, 1))

    def to_dict(self, cycle: int) -> dict[str, Json]:
        return {
            "cycle": cycle,
            "changed_share": self.changed / max(self.elements, 1),
            "rms": self.rms,
            "largest": self.largest,
        }


@dataclass(slots=True)
class _Verdict:
    """What was found about one layer."""

    name: str
    value: float = 0.0
    where: str = ""
    found: str = ""
    drifts: list[_Drift] = field(default_factory=list)

    def worst(self, value: float, where: str, found: str) -> None:
        if value > self.value or not self.where:
            self.value, self.where, self.found = value, where, found

    @property
    def growth(self) -> float:
        """Root mean square error after the last cycle less that after the first."""
        return self.drifts[-1].rms - self.drifts[0].rms if self.drifts else 0.0

    def problem(self) -> Problem:
        return Problem(self.where, self.found, "at most 1 times the bound of one cycle")

    def to_dict(self) -> dict[str, Json]:
        cycles: list[Json] = [drift.to_dict(i) for i, drift in enumerate(self.drifts, 1)]
        return {
            "module": self.name,
            "value": self.value,
            "cycles": cycles,
        }


def measure_unmerge_restoration(
    subject: Subject, *, cycles: int = 3, safe_merge: bool = False
) -> Measurement:
    """What merging and unmerging leaves of the base weights, however often it is done.

    Each layer goes through ``cycles`` merges and unmerges by PEFT's own calls, on clones of its
    tensors.  The value is the worst change that any single cycle made to any element, in multiples
    of what the roundings of that one merge and unmerge can cause (docs/numerics.md); biases are
    included.  It is infinite where a tensor changes its dtype or shape, where a tensor changes that
    the adapter has no business with, and where a call fails.

    Growth over the cycles is no failure by itself: in half precision PEFT adds the delta in the
    factors' format and subtracts it rounded to the weight's.  It is reported as a note, with what
    ``safe_merge=True`` makes of it.

    Args:
        subject: adapter and base model; neither is changed.
        cycles: how often, at least 1.
        safe_merge: merge as ``merge(safe_merge=True)`` does.

    Raises:
        NotApplicable: there is nothing to merge, or PEFT refuses to by design.
        ValueError: fewer cycles than one.
    """
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, not {cycles}")
    layers = mergeable_layers(subject.model)
    with quiet(), accurate_products(), torch.no_grad():
        try:
            verdicts = [
                _Cycles(name, layer, safe_merge).run(cycles) for name, layer in layers.items()
            ]
            notes = list(_growth_notes(verdicts, layers, cycles, safe_merge))
        except NotMergeable as error:
            raise NotApplicable(f"PEFT does not unmerge this adapter: {error}") from None
    verdicts.sort(key=lambda item: item.value, reverse=True)
    facts = {"cycles": cycles, "safe_merge": safe_merge}
    return _restoration(verdicts, cycles, notes, facts)


class _Cycles:
    """Merging and unmerging one layer several times."""

    def __init__(self, name: str, layer: Any, safe_merge: bool) -> None:
        self.name, self.layer, self.safe_merge = name, layer, safe_merge
        adapters = adapters_of(layer)
        single = len(adapters) == 1
        self.known: LowRankLayer | None = (
            describe(layer, adapters[0], safe_merge=safe_merge) if single else None
        )
        self.start = base_tensors(layer)
        self._merged: torch.Tensor | None = None
        self.verdict = _Verdict(name)

    def run(self, cycles: int) -> _Verdict:
        with on_clones(self.layer):
            before = self.start
            for _ in range(cycles):
                sizes = self._merge(before)
                if not sizes or not self._unmerge():
                    break
                now = self._tensors()
                if not self._judge(before, now, sizes):
                    break
                # PEFT writes the next cycle into the same memory.
                before = {name: tensor.clone() for name, tensor in now.items()}
        return self.verdict

    @property
    def _base(self) -> Any:
        return self.layer.get_base_layer()

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self.known and self.known.four_bit:
            return base_tensors(self.layer)
        return {name: attribute(self._base, name) for name in self.start}

    def _merge(self, before: dict[str, torch.Tensor]) -> dict[str, float]:
        """Merge; returns the merged tensors' norms, none if it failed."""
        failure = self._call(lambda: merge(self.layer, safe_merge=self.safe_merge))
        if failure:
            self.verdict.worst(math.inf, self.name, f"the merge failed: {failure}")
            return {}
        if self.known and self.known.four_bit:
            self._merged = base_tensors(self.layer)["weight"]
        if self.known:
            return dict.fromkeys(before, 0.0)  # not needed: every element has its own bound
        return {name: float(attribute(self._base, name).double().norm()) for name in before}

    def _unmerge(self) -> bool:
        failure = self._call(lambda: unmerge(self.layer))
        if failure:
            self.verdict.worst(math.inf, self.name, f"the unmerge failed: {failure}")
        return not failure

    def _call(self, call: Any) -> str:
        try:
            failure: str = call()
        except NotMergeable as error:
            raise NotMergeable(f"{self.name}: {error}") from None
        return failure

    def _judge(
        self,
        before: dict[str, torch.Tensor],
        now: dict[str, torch.Tensor],
        sizes: dict[str, float],
    ) -> bool:
        """Judge one cycle; false if the tensors are no longer comparable."""
        drift = _Drift()
        for name, old in before.items():
            new, where = now[name], f"{self.name}.{name}"
            if self.known and self.known.four_bit and name == "weight":
                self._judge_four_bit(where, new)
                drift.add(self.start[name], new.to(self.start[name].dtype))
                continue
            if (old.dtype, old.shape) != (new.dtype, new.shape):
                text = f"comes back as {as_text(new)}, was {as_text(old)}"
                self.verdict.worst(math.inf, where, text)
                return False
            self._judge_tensor(name, where, old, new, sizes[name])
            drift.add(self.start[name], new)
        self.verdict.drifts.append(drift)
        return True

    def _judge_tensor(
        self, name: str, where: str, old: torch.Tensor, new: torch.Tensor, size: float
    ) -> None:
        known = self.known
        if known and name == "weight":
            error = judge_cycle(known.matrix(old), known.matrix(new), known.update)
            self._take(where, error, known.place(error.index) if error.index else ())
        elif known and name == "bias" and known.bias is not None:
            error = judge_sum_cycle(old, new, known.bias_ball(), known.bias.dtype)
            self._take(where, error, error.index or ())
        elif known or is_token_layer(self.layer):
            self._judge_untouched(where, old, new)
        else:
            self._judge_norm(where, old, new, size)

    def _judge_four_bit(self, where: str, new: torch.Tensor) -> None:
        """The way back alone: the merged weight less the delta, quantised again."""
        assert self.known is not None
        assert self._merged is not None
        back = replace(self.known.update, scaling=-self.known.update.scaling)
        error = judge_requantised(self._merged, new, back, block_format(self._base.weight))
        self._take(where, error, error.index or ())

    def _take(self, where: str, error: WeightError, index: tuple[int, ...]) -> None:
        cycle = len(self.verdict.drifts) + 1
        text = f"{error.worst:.3g} times what one cycle can lose, {error.ulps:.3g} ulps"
        if error.outside:
            text += f"; {error.outside} of {error.elements} elements outside"
        self.verdict.worst(error.worst, f"{where}{list(index)}", f"{text} (cycle {cycle})")

    def _judge_untouched(self, where: str, old: torch.Tensor, new: torch.Tensor) -> None:
        found = locate_difference(old, new)
        if not found.changed:
            self.verdict.worst(0.0, where, "came back bit for bit")
            return
        place = f"{where}{list(found.place or ())}"
        text = f"{found.changed} elements do not come back bit for bit, though nothing rounds"
        self.verdict.worst(math.inf, place, text)

    def _judge_norm(self, where: str, old: torch.Tensor, new: torch.Tensor, size: float) -> None:
        """Norm-wise, against a number of roundings of the larger of base and merged weight."""
        gap = float((new.double() - old.double()).norm())
        allowed = _ROUNDINGS * unit(old.dtype) * max(float(old.double().norm()), size)
        ratio = 0.0 if gap == 0 else gap / allowed if allowed > 0 and gap < math.inf else math.inf
        ratio = math.inf if math.isnan(ratio) else ratio
        self.verdict.worst(ratio, where, f"{ratio:.3g} times what {_ROUNDINGS} roundings can lose")


def _growth_notes(
    verdicts: list[_Verdict], layers: dict[str, Any], cycles: int, safe_merge: bool
) -> Iterator[str]:
    """Tell an error that stays from one that grows with every cycle, and what helps."""
    total = _total(verdicts, cycles)
    if total and any(quantisation_of(layer) for layer in layers.values()):
        share = total[-1].changed / max(total[-1].elements, 1)
        yield (
            f"the base does not come back: unmerging quantises it again, after which {share:.1%} "
            f"of the weights differ, by {total[-1].rms:.3g} (root mean square). Load the base "
            "weights again rather than unmerge"
        )
        return
    half = any(_is_half(layer) for layer in layers.values())  # in wider formats it is immaterial
    if not half or len(total) < 2 or not all(a.rms < b.rms for a, b in itertools.pairwise(total)):
        return
    worst = max(verdicts, key=lambda item: item.growth)
    note = (
        f"the error grows with every cycle: root mean square {_steps(total)} after each of "
        f"{cycles} cycles, {total[-1].changed / total[-1].elements:.1%} of the weights changed, by "
        f"at most {total[-1].largest:.3g}; most in {worst.name}: {_steps(worst.drifts)}"
    )
    if not safe_merge:
        safe = _Cycles(worst.name, layers[worst.name], True).run(cycles)
        note += f" (there with safe_merge=True: {_steps(safe.drifts)})"
    yield f"{note}. Merge in float32, or load the base weights again, rather than unmerge often"


def _is_half(layer: Any) -> bool:
    return any(precision(t.dtype) < precision(torch.float32) for t in base_tensors(layer).values())


def _steps(drifts: list[_Drift]) -> str:
    return ", ".join(f"{drift.rms:.3g}" for drift in drifts) or "failed"


def _restoration(
    verdicts: list[_Verdict], cycles: int, notes: list[str], facts: Mapping[str, Json]
) -> Measurement:
    worst = verdicts[0]
    outside = [item for item in verdicts if not item.value <= 1]
    return Measurement(
        value=worst.value,
        unit="times the rounding bound",
        count=len(verdicts),
        where=f"{worst.where}: {worst.found}",
        details={
            "problems": [item.problem().to_dict() for item in outside[:_LISTED]],
            "notes": notes,
            "cycles": cycles,
            FACTS: facts,
            "total": [item.to_dict(i) for i, item in enumerate(_total(verdicts, cycles), 1)],
            "layers": [item.to_dict() for item in verdicts[:_LISTED]],
        },
    )


def _total(verdicts: list[_Verdict], cycles: int) -> list[_Drift]:
    """Drift over all layers together, cycle by cycle, as far as all of them got."""
    totals = []
    for number in range(cycles):
        if any(len(item.drifts) <= number for item in verdicts):
            break
        drifts = [item.drifts[number] for item in verdicts]
        totals.append(
            _Drift(
                sum(drift.changed for drift in drifts),
                sum(drift.elements for drift in drifts),
                math.fsum(drift.squares for drift in drifts),
                max(drift.largest for drift in drifts),
            )
        )
    return totals
