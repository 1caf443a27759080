"""Padding and batching: a row's answers must not depend on what else is in the batch.

Two questions with two standards.

*Contents.*  With shapes and mask unchanged, other tokens at padded positions, or in other rows,
must leave a row's outputs as they are, bit for bit: every kernel adds the same numbers in the same
order.

*Shapes.*  A row alone and the same row padded, on either side, or among others, goes through
kernels that add in another order, so rounding differs.  What the model at hand can make of that is
measured on itself, by Monte Carlo arithmetic (:mod:`pytest_lora.numerics.noise`): rounding
noise is added to what enters and leaves every module with parameters, and the row's output moves by
its root mean square, the *rounding bound*.

Where tokens are routed to experts, rounding can tip a decision and the batch decides the shape of
each expert's product: there the median position is judged, and contents are not.

Only where an adapted model fails does the untouched base go through the same: what it does not take
well itself (no relative positions, recurrent state) says nothing about an adapter.

The whole costs seven or eight forward passes: two rows alone, and two batches, each as it is, with
other contents and, unless it agrees with the rows alone bit for bit, with noise.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.attach import ADAPTER_NAME
from pytest_lora.baseline import FACTS
from pytest_lora.checks.bits import how_different, is_routed, median_rms, rms
from pytest_lora.errors import NotApplicable
from pytest_lora.numerics.noise import rounding_noise
from pytest_lora.probe import output_of
from pytest_lora.records import Json, Measurement, Problem

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["measure_padding_invariance"]

SPARE = 3
"""Padded positions even the longest row gets."""

SEED = 9973
FEW = 32
MORE_DRAWS = 8
"""Noisy answers to average over where one yields fewer than :data:`FEW` numbers."""

RIGHT, LEFT, BATCHED = "padded on the right", "padded on the left", "in a batch"
_SHORTEST = 4

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """A row to judge.

    Attributes:
        index: which row of its batch.
        layout: what its place there is called in messages.
        text: which of the texts it holds.
        span: first and last-plus-one of its real positions.
    """

    index: int
    layout: str
    text: int
    span: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A batch and the rows to judge in it.

    Attributes:
        batch: the model's inputs.
        free: where other tokens may stand without any meaning for the judged rows.
        elsewhere: what those places are, in words.
        rows: the judged ones.
    """

    batch: Batch
    free: torch.Tensor
    elsewhere: str
    rows: tuple[Row, ...]

    @property
    def length(self) -> int:
        """Positions of a row."""
        return _length(self.batch)


@dataclass(slots=True)
class _Found:
    """What one model did in one layout: rounding differences, and whether contents leak."""

    ratio: float = 0.0
    where: str = ""
    values: int = 0
    leaks: list[Problem] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return self.ratio <= 1 and not self.leaks


_Layouts = dict[str, _Found]


def measure_padding_invariance(subject: Subject) -> Measurement:
    """How far padding and batching move the adapted model's answers, in rounding bounds.

    Rows of different length are run alone and in a batch in which each is padded on the right and
    on the left; and rows of one length in a batch.  The value is the largest RMS difference at real
    positions over the RMS rounding bound (see the module's own words); infinite if what stands at
    padded positions or in other rows changes a real position's output in any bit where it does not
    in the base model.

    Raises:
        NotApplicable: the model takes no attention mask, or the base model itself is not invariant
            under any of these.
    """
    texts = _texts(subject)
    runner = _Runner(subject.model, subject, texts)
    _require_finite(runner.alone(0))
    bare = _Runner(subject.base.module, subject, texts)
    ours: _Layouts = {}
    base: _Layouts = {}
    for variants in _arrangements(subject, texts):
        adapted, plain = _compare(runner, bare, variants)
        ours |= adapted
        base |= plain
    return _measurement(ours, base, {"inputs": subject.inputs_fact})


def _compare(
    runner: _Runner, bare: _Runner, variants: Sequence[Arrangement]
) -> tuple[_Layouts, _Layouts]:
    """What the adapted model makes of the first variant that it or the base model takes well, and
    what the base model does, where that had to be looked at.
    """
    adapted: _Layouts = {}
    plain: _Layouts = {}
    for arrangement in variants:
        adapted, plain = _examine(runner, arrangement), {}
        if all(found.sound for found in adapted.values()):
            break
        with runner.subject.base.bare():
            plain = _examine(bare, arrangement)
        if all(found.ratio <= 1 for found in plain.values()):
            break
    return adapted, plain


def _measurement(ours: _Layouts, base: _Layouts, facts: Mapping[str, Json]) -> Measurement:
    judged: _Layouts = {}
    notes = []
    for layout, found in ours.items():
        plain = base.get(layout, _Found())
        if not plain.ratio <= 1:
            notes.append(f"{layout}: the base model itself is not invariant; left out")
            continue
        if plain.leaks:  # positions counted from the padding tokens, and the like
            notes.append(f"{layout}: the base model itself reads other tokens; contents not judged")
            found.leaks.clear()
        judged[layout] = found
    if not judged:
        raise NotApplicable("the base model's own answers depend on padding and batch size")
    problems = [problem for found in judged.values() for problem in found.leaks]
    worst = max(judged.values(), key=lambda found: _ordered(found.ratio))
    table: dict[str, Json] = {name: _ratios(name, judged, base) for name in judged}
    return Measurement(
        value=math.inf if problems else worst.ratio,
        unit="times the rounding bound",
        count=sum(found.values for found in judged.values()),
        where=str(problems[0]) if problems else worst.where or None,
        details={
            "layouts": table,
            FACTS: facts,
            "problems": [problem.to_dict() for problem in problems],
            "notes": notes,
        },
    )


def _ratios(layout: str, ours: _Layouts, base: _Layouts) -> dict[str, Json]:
    both = {"adapter": ours, "base": base}
    return {who: found[layout].ratio for who, found in both.items() if layout in found}


def _ordered(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio


def _require_finite(output: torch.Tensor) -> None:
    if not bool(output.isfinite().all()):
        raise NotApplicable(
            f"the adapted model's output is not finite in {output.dtype} even without padding"
        )


# ------------------------------------------------------------------------------ the batches


def _length(batch: Mapping[str, torch.Tensor]) -> int:
    return batch["input_ids"].shape[1]


def _texts(subject: Subject) -> tuple[Batch, Batch, Batch]:
    """A row, half of another, and that other in full; NotApplicable if a model knows no padding."""
    ids, mask = subject.inputs.get("input_ids"), subject.inputs.get("attention_mask")
    if ids is None or not _takes(subject.base.module, "attention_mask"):
        raise NotApplicable("the model takes no attention mask, so it knows no padding")
    mask = torch.ones_like(ids) if mask is None else mask
    length = _most_tokens(subject)
    if length < _SHORTEST or not bool(mask.all()):
        raise NotApplicable("the inputs are padded, or too short, to be padded further")
    inputs = {**subject.inputs, "attention_mask": mask}
    last = min(1, len(ids) - 1)
    return _row(inputs, 0, length), _row(inputs, last, length // 2), _row(inputs, last, length)


def _takes(module: torch.nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _arrangements(subject: Subject, texts: Sequence[Batch]) -> list[list[Arrangement]]:
    """Padded on either side, and batched without padding; each in its variants, the best first."""
    padded = _padded(subject, texts)
    variants = [padded]
    shifted = any(row.layout == LEFT for row in padded.rows)
    if shifted and _takes(subject.base.module, "position_ids"):
        variants.insert(0, _with_positions(padded))
    return [variants, [_batched(texts)]]


def _padded(subject: Subject, texts: Sequence[Batch]) -> Arrangement:
    """Both texts padded on the right and on the left, side by side."""
    # Before the padding of a row stand its virtual tokens, where there are any.
    layouts = (RIGHT,) if _prompt_learning(subject) else (RIGHT, LEFT)
    total, pad = _length(texts[0]) + SPARE, _pad_token(subject)
    rows: list[Row] = []
    for layout in layouts:
        for text in (0, 1):
            size = _length(texts[text])
            span = (0, size) if layout == RIGHT else (total - size, total)
            rows.append(Row(len(rows), layout, text, span))
    batch = _stack([_wide(texts[row.text], row.span, total, pad) for row in rows])
    return Arrangement(batch, ~batch["attention_mask"].bool(), "padded positions", tuple(rows))


def _batched(texts: Sequence[Batch]) -> Arrangement:
    """A row before and behind another one of its length."""
    batch = _stack([texts[0], texts[2], texts[0]])
    free = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    free[1] = True
    rows = tuple(Row(index, BATCHED, 0, (0, _length(texts[0]))) for index in (0, 2))
    return Arrangement(batch, free, "the other row", rows)


def _prompt_learning(subject: Subject) -> bool:
    model: Any = subject.model
    return bool(model.peft_config[ADAPTER_NAME].is_prompt_learning)


def _pad_token(subject: Subject) -> int:
    config = getattr(subject.base.module, "config", None)
    rows = subject.base.embedding[1] if subject.base.embedding else math.inf
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < rows:
            return value
    return 0


def _most_tokens(subject: Subject) -> int:
    """Tokens of the probe that leave room to pad (two positions are lost in some models)."""
    config = getattr(subject.base.module, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    given = subject.inputs["input_ids"].shape[1]
    return min(given, limit - SPARE - 2) if isinstance(limit, int) and limit > 0 else given


def _row(inputs: Mapping[str, torch.Tensor], row: int, length: int) -> Batch:
    """One row of the inputs, cut to ``length`` tokens wherever it runs along them."""
    shape = inputs["input_ids"].shape
    cut = {}
    for name, tensor in inputs.items():
        one = tensor[row : row + 1]
        along = tensor.shape[:2] == shape and not name.startswith("decoder_")
        cut[name] = one[:, :length] if along else one
    return cut


def _stack(rows: Sequence[Batch]) -> Batch:
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def _wide(row: Batch, span: tuple[int, int], total: int, pad: int) -> Batch:
    """The row with its tokens at ``span`` among ``total`` positions."""
    placed = {}
    for key, tensor in row.items():
        placed[key] = tensor
        if tensor.shape[:2] == row["input_ids"].shape and not key.startswith("decoder_"):
            fill = pad if key == "input_ids" else 0
            placed[key] = tensor.new_full((1, total, *tensor.shape[2:]), fill)
            placed[key][:, span[0] : span[1]] = tensor
    return placed


def _with_positions(padded: Arrangement) -> Arrangement:
    """Positions counted from each row's first real token, as generation does it."""
    positions = (padded.batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return replace(padded, batch={**padded.batch, "position_ids": positions})


def _other_contents(arrangement: Arrangement) -> Batch:
    """The batch with other tokens wherever they may not matter."""
    ids, row = arrangement.batch["input_ids"], arrangement.rows[0]
    real = ids[row.index, slice(*row.span)].roll(1)
    others = real.repeat(2)[: ids.shape[1]].expand_as(ids)
    return {**arrangement.batch, "input_ids": torch.where(arrangement.free, others, ids)}


# ------------------------------------------------------------------------------ running them


class _Runner:
    """One model, and what it makes of each text alone: run once, whatever the arrangements."""

    def __init__(self, model: Any, subject: Subject, texts: Sequence[Batch]) -> None:
        self.model, self.subject = model, subject
        self.routed = is_routed(subject.base.module)
        self._texts = texts
        self._alone: dict[int, torch.Tensor] = {}

    def run(self, batch: Batch) -> torch.Tensor:
        """The model's output on a batch."""
        model = self.model
        if "position_ids" in batch and hasattr(model, "get_base_model") and _drops(model):
            model = model.get_base_model()
        return output_of(model, batch)

    def alone(self, text: int) -> torch.Tensor:
        """Outputs of a text by itself, ``(positions, values)``."""
        if text not in self._alone:
            batch = self._texts[text]
            output = output_of(self.model, batch)
            self._alone[text] = _per_position(output, _length(batch), self.subject)[0]
        return self._alone[text]

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """RMS difference; the median position's where tokens are routed to experts."""
        return (median_rms if self.routed else rms)(a.double() - b.double())

    def real(self, output: torch.Tensor, arrangement: Arrangement, row: Row) -> torch.Tensor:
        """Outputs at a row's real positions; all of them where they are not per position."""
        values = _per_position(output, arrangement.length, self.subject)[row.index]
        return values[slice(*row.span)] if len(values) == arrangement.length else values


def _drops(model: Any) -> bool:
    """Whether a PeftModel takes positions and does not hand them on.

    PeftModelForQuestionAnswering (PEFT 0.21.2) is the one class that names them at all.
    """
    return "position_ids" in inspect.signature(type(model).forward).parameters


def _examine(runner: _Runner, arrangement: Arrangement) -> _Layouts:
    """Differences in rounding bounds, and leaks of contents, by layout."""
    clean = runner.run(arrangement.batch)
    found: _Layouts = {row.layout: _Found() for row in arrangement.rows}
    bounds: dict[int, float] = {}
    for row in arrangement.rows:
        here, alone = runner.real(clean, arrangement, row), runner.alone(row.text)
        into = found[row.layout]
        into.values += here.numel()
        difference = runner.distance(here, alone)
        if not difference:
            continue
        bounds = bounds or _bounds(runner, arrangement, clean)
        ratio = difference / bounds[row.text]
        if _ordered(ratio) > into.ratio:
            into.ratio, into.where = ratio, _worst(row, here, alone, difference)
    if not runner.routed:
        _find_leaks(runner, arrangement, clean, found)
    return found


def _worst(row: Row, here: torch.Tensor, alone: torch.Tensor, difference: float) -> str:
    size = row.span[1] - row.span[0]
    text = f"a row of {size} tokens {row.layout}, against itself alone: RMS {difference:.3g} apart"
    if len(alone) != size:
        return text
    position = int((here.double() - alone.double()).abs().amax(-1).argmax())
    return f"{text}, most at token {position}"


def _find_leaks(
    runner: _Runner, arrangement: Arrangement, clean: torch.Tensor, found: _Layouts
) -> None:
    """Rows whose real outputs change with what stands elsewhere in the batch."""
    output = runner.run(_other_contents(arrangement))
    for row in arrangement.rows:
        difference = how_different(
            runner.real(output, arrangement, row), runner.real(clean, arrangement, row)
        )
        if difference:
            found[row.layout].leaks.append(
                Problem(
                    f"row {row.index}, {row.layout}",
                    f"with other tokens at {arrangement.elsewhere}: {difference}",
                    "no influence, bit for bit",
                )
            )


def _per_position(output: torch.Tensor, length: int, subject: Subject) -> torch.Tensor:
    """``(rows, positions, values)``, virtual tokens left out; one position for a whole row's."""
    if subject.adapter.task_type == "QUESTION_ANS" and output.shape[1] == 2 * length:
        return output.view(len(output), 2, length).transpose(1, 2)
    if output.dim() < 3 or "decoder_input_ids" in subject.inputs:
        return output.flatten(1)[:, None]
    return output[:, -length:]


# ------------------------------------------------------------------------------ Monte Carlo


def _bounds(runner: _Runner, arrangement: Arrangement, clean: torch.Tensor) -> dict[int, float]:
    """By text, the RMS over positions and values of what rounding noise does to its rows."""
    squares: dict[int, list[float]] = {}
    for draw in range(_draws(runner, arrangement, clean)):
        with rounding_noise(runner.model, SEED + draw):
            noisy = runner.run(arrangement.batch)
        for row in arrangement.rows:
            pair = (runner.real(output, arrangement, row) for output in (noisy, clean))
            squares.setdefault(row.text, []).append(runner.distance(*pair) ** 2)
    return {
        text: math.sqrt(sum(each) / len(each)) or math.ulp(0.0) for text, each in squares.items()
    }


def _draws(runner: _Runner, arrangement: Arrangement, clean: torch.Tensor) -> int:
    row = arrangement.rows[0]
    copies = sum(other.text == row.text for other in arrangement.rows)
    few = runner.real(clean, arrangement, row).numel() < FEW
    return -(-MORE_DRAWS // copies) if few else 1
