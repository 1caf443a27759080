"""Padding and batching: a row's answers must not depend on what else is in the batch.

Two questions with two standards.

*Contents.*  With shapes and mask unchanged, other tokens at padded positions, or in other rows,
must leave a row's outputs as they are, bit for bit: every kernel adds the same numbers in the same
order.

*Shapes.*  A row alone and the same row padded, on either side, or among others, goes through
kernels that add in another order, so rounding differs.  What the model at hand can make of that is
measured on itself, by Monte Carlo arithmetic (D. S. Parker, "Monte Carlo Arithmetic", 1997): noise
of the size of the rounding that reordering can change is added to what enters and leaves every
module with parameters, and the output moves by its root mean square, the *rounding bound*.

The noise: a product of k terms summed one after the other in unit roundoff u is off by a random
walk of k steps, sqrt(k/2) u/sqrt(3) of the result's RMS (sqrt(k)/3 u where the terms have one
sign), and two orders differ by sqrt(2) times that at most; sqrt(k) u of the RMS, normal, covers it
(N. J. Higham, T. Mary, "A new approach to probabilistic rounding error analysis", 2019).  Rounding
a result to the tensor's format can come out one ulp apart, 2 u of each value.  Blocked and pairwise
sums, which real kernels use, are off by less.

Where tokens are routed to experts, rounding can tip a decision and the batch decides the shape of
each expert's product: there the median position is judged, and contents are not.

The untouched base goes through the same: a side it does not itself take well (no relative
positions, recurrent state) says nothing about an adapter and is left out.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.attach import ADAPTER_NAME
from pytest_lora.checks.bits import how_different, is_routed, median_rms, rms
from pytest_lora.errors import NotApplicable
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
"""Noisy runs of a row that yields fewer than :data:`FEW` numbers to average over, not one."""

_SHORTEST = 4

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch, and where in it the real tokens of each row are.

    Attributes:
        name: what it is called in messages.
        batch: the model's inputs.
        spans: first and last-plus-one real position of each row.
        alone: the inputs of each row by itself, without padding.
    """

    name: str
    batch: Batch
    spans: tuple[tuple[int, int], ...]
    alone: tuple[Batch, ...]

    @property
    def length(self) -> int:
        """Positions of a row."""
        return _length(self.batch)


@dataclass(slots=True)
class _Found:
    """What one model did in one layout: rounding differences, and whether contents leak."""

    ratios: list[float] = field(default_factory=list)
    leaks: list[Problem] = field(default_factory=list)
    values: int = 0

    @property
    def ratio(self) -> float:
        return max(self.ratios, key=lambda item: math.inf if math.isnan(item) else item)


def measure_padding_invariance(subject: Subject) -> Measurement:
    """How far padding and batching move the adapted model's answers, in rounding bounds.

    Rows of different length are run alone, in a batch padded on the right, on the left, and rows of
    one length in a batch.  The value is the largest RMS difference at real positions over the RMS
    rounding bound (see the module's own words); infinite if what stands at padded positions or in
    other rows changes a real position's output in any bit where it does not in the base model.

    Raises:
        NotApplicable: the model takes no attention mask, or the base model itself is not invariant
            under any of these.
    """
    layouts = _layouts(subject)
    judged: dict[str, tuple[_Found, _Found]] = {}
    notes: list[str] = []
    with subject.base.bare() as module:
        runner = _Runner(module, subject)
        base = [_best(runner, layout) for layout in layouts]
    with subject.attached() as model:
        runner = _Runner(model, subject)
        _require_finite(runner.alone(layouts[0].alone[0]))
        for layout, found in base:
            if not found.ratio <= 1:
                notes.append(f"{layout.name}: the base model itself is not invariant; left out")
                continue
            adapted = _examine(runner, layout)
            judged[layout.name] = adapted, found
            if found.leaks:  # positions counted from the padding tokens, and the like
                adapted.leaks.clear()
    if not judged:
        raise NotApplicable("the base model's own answers depend on padding and batch size")
    return _measurement(judged, notes)


def _measurement(judged: Mapping[str, tuple[_Found, _Found]], notes: list[str]) -> Measurement:
    problems = [problem for adapted, _ in judged.values() for problem in adapted.leaks]
    worst = max(judged, key=lambda name: judged[name][0].ratio)
    ratio = judged[worst][0].ratio
    table: Json = {name: {"adapter": adapted.ratio, "base": base.ratio}
                   for name, (adapted, base) in judged.items()}  # fmt: skip
    return Measurement(
        value=math.inf if problems else ratio,
        unit="times the rounding bound",
        count=sum(adapted.values for adapted, _ in judged.values()),
        where=str(problems[0]) if problems else f"a row {worst}, against the same row alone",
        details={
            "layouts": table,
            "problems": [problem.to_dict() for problem in problems],
            "notes": notes,
        },
    )


def _require_finite(output: torch.Tensor) -> None:
    if not bool(output.isfinite().all()):
        raise NotApplicable(
            f"the adapted model's output is not finite in {output.dtype} even without padding"
        )


# ------------------------------------------------------------------------------ the batches


def _length(batch: Mapping[str, torch.Tensor]) -> int:
    return batch["input_ids"].shape[1]


def _layouts(subject: Subject) -> list[Layout]:
    """Right, left, and batched without padding; NotApplicable where a model knows no padding."""
    inputs = subject.inputs
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None or not _takes(subject.base.module, "attention_mask"):
        raise NotApplicable("the model takes no attention mask, so it knows no padding")
    length = _most_tokens(subject)
    if len(ids) < 2 or length < _SHORTEST or not bool(mask.all()):
        raise NotApplicable("the inputs are padded, or too short or few, to be padded further")
    whole = [_row(inputs, row, length) for row in (0, 1)]
    mixed = [whole[0], _row(inputs, 1, length // 2)]
    pad = _pad_token(subject)
    layouts = [
        _stack("padded on the right", mixed, pad, left=False, spare=SPARE),
        _stack("in a batch", whole, pad, left=False, spare=0),
    ]
    if not _prompt_learning(subject):  # there, virtual tokens stand before the padding
        layouts.append(_stack("padded on the left", mixed, pad, left=True, spare=SPARE))
    return layouts


def _takes(module: torch.nn.Module, name: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return name in parameters


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


def _stack(name: str, rows: list[Batch], pad: int, *, left: bool, spare: int) -> Layout:
    lengths = [row["input_ids"].shape[1] for row in rows]
    total = max(lengths) + spare
    spans = tuple((total - n, total) if left else (0, n) for n in lengths)
    batch = {key: torch.cat([_placed(row, key, span, total, pad)
                             for row, span in zip(rows, spans, strict=True)])
             for key in rows[0]}  # fmt: skip
    return Layout(name, batch, spans, tuple(rows))


def _placed(row: Batch, key: str, span: tuple[int, int], total: int, pad: int) -> torch.Tensor:
    tensor = row[key]
    if tensor.shape[:2] != row["input_ids"].shape or key.startswith("decoder_"):
        return tensor
    fill = pad if key == "input_ids" else 0
    wide = tensor.new_full((1, total, *tensor.shape[2:]), fill)
    wide[:, span[0] : span[1]] = tensor
    return wide


def _with_positions(layout: Layout) -> Layout:
    """Positions counted from each row's first real token, as generation does it."""
    positions = (layout.batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return replace(layout, batch={**layout.batch, "position_ids": positions})


def _other_contents(layout: Layout, kept: int | None) -> Layout:
    """The layout with other tokens at every padded position, or, given ``kept``, other real tokens
    in every row but that one.
    """
    ids = layout.batch["input_ids"]
    real = layout.batch["attention_mask"].bool()
    others = ids[0, slice(*layout.spans[0])].roll(1).repeat(2)[: ids.shape[1]].expand_as(ids)
    if kept is None:
        changed = torch.where(real, ids, others)
    else:
        free = real.clone()
        free[kept] = False
        changed = torch.where(free, others.roll(1, dims=1), ids)
    return replace(layout, batch={**layout.batch, "input_ids": changed})


# ------------------------------------------------------------------------------ running them


class _Runner:
    """One model, and what it makes of each row alone: run once, whatever the layouts."""

    def __init__(self, model: Any, subject: Subject) -> None:
        self.subject, self._model = subject, model
        self.routed = is_routed(subject.base.module)
        self._alone: dict[int, torch.Tensor] = {}
        self._bounds: dict[int, float] = {}

    def run(self, batch: Batch) -> torch.Tensor:
        """The model's output on a batch.

        Where positions are given an adapted model is called without its PeftModel, for some of
        these drop them (PeftModelForQuestionAnswering in PEFT 0.21.2).
        """
        inner = getattr(self._model, "get_base_model", None)
        return output_of(inner() if inner and "position_ids" in batch else self._model, batch)

    def alone(self, row: Batch) -> torch.Tensor:
        """Outputs of a row by itself, ``(positions, values)``."""
        if id(row) not in self._alone:
            self._alone[id(row)] = self._values(row)
        return self._alone[id(row)]

    def bound(self, row: Batch) -> float:
        """RMS over positions and values of what rounding noise does to a row by itself."""
        if id(row) not in self._bounds:
            clean = self.alone(row)
            squares = []
            for draw in range(MORE_DRAWS if clean.numel() < FEW else 1):
                with _noise(self._model, SEED + draw):
                    squares.append(self.distance(self._values(row), clean) ** 2)
            self._bounds[id(row)] = math.sqrt(sum(squares) / len(squares)) or math.ulp(0.0)
        return self._bounds[id(row)]

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """RMS difference; the median position's where tokens are routed to experts."""
        return (median_rms if self.routed else rms)(a.double() - b.double())

    def _values(self, row: Batch) -> torch.Tensor:
        return _per_position(output_of(self._model, row), _length(row), self.subject)[0]


def _best(runner: _Runner, layout: Layout) -> tuple[Layout, _Found]:
    """The layout as the base model takes it best: with explicit positions, or without."""
    shifted = any(start > 0 for start, _ in layout.spans)
    if shifted and _takes(runner.subject.base.module, "position_ids"):
        explicit = _with_positions(layout)
        found = _examine(runner, explicit)
        if found.ratio <= 1:
            return explicit, found
    return layout, _examine(runner, layout)


def _examine(runner: _Runner, layout: Layout) -> _Found:
    """Differences in rounding bounds, and leaks of contents."""
    found = _Found()
    clean = runner.run(layout.batch)
    for row, alone in enumerate(layout.alone):
        here = _real(clean, layout, row, runner.subject)
        difference = runner.distance(here, runner.alone(alone))
        found.ratios.append(difference / runner.bound(alone) if difference else 0.0)
        found.values += here.numel()
    found.leaks = [] if runner.routed else _leaks(runner, layout, clean)
    return found


def _leaks(runner: _Runner, layout: Layout, clean: torch.Tensor) -> list[Problem]:
    """Rows whose real outputs change with what stands elsewhere in the batch."""
    problems = []
    padded = not bool(layout.batch["attention_mask"].all())
    for kept in (None,) if padded else range(len(layout.alone)):
        output = runner.run(_other_contents(layout, kept).batch)
        for row in range(len(layout.alone)) if kept is None else (kept,):
            difference = how_different(
                _real(output, layout, row, runner.subject),
                _real(clean, layout, row, runner.subject),
            )
            if difference:
                cause = "padded positions" if kept is None else "the other row"
                problems.append(Problem(f"row {row}, {layout.name}",
                                        f"with other tokens at {cause}: {difference}",
                                        "no influence, bit for bit"))  # fmt: skip
    return problems


def _real(output: torch.Tensor, layout: Layout, row: int, subject: Subject) -> torch.Tensor:
    """A row's outputs at its real positions; all of them where outputs are not per position."""
    start, stop = layout.spans[row]
    values = _per_position(output, layout.length, subject)[row]
    return values[start:stop] if len(values) == layout.length else values


def _per_position(output: torch.Tensor, length: int, subject: Subject) -> torch.Tensor:
    """``(rows, positions, values)``, virtual tokens left out; one position for a whole row's."""
    if subject.adapter.task_type == "QUESTION_ANS" and output.shape[1] == 2 * length:
        return output.view(len(output), 2, length).transpose(1, 2)
    if output.dim() < 3 or "decoder_input_ids" in subject.inputs:
        return output.flatten(1)[:, None]
    return output[:, -length:]


# ------------------------------------------------------------------------------ Monte Carlo


@contextlib.contextmanager
def _noise(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Rounding noise at the inputs and outputs of every module that has parameters of its own."""
    generator = torch.Generator().manual_seed(seed)

    def before(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_perturbed(item, 0, generator) for item in args)

    def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        terms = args[0].shape[-1] if args and isinstance(args[0], torch.Tensor) else 1
        if isinstance(output, tuple):
            return tuple(_perturbed(item, terms, generator) for item in output)
        return _perturbed(output, terms, generator)

    handles = []
    for module in model.modules():
        # A table look-up rounds nothing.
        if next(module.parameters(recurse=False), None) is not None and not isinstance(
            module, torch.nn.Embedding
        ):
            handles += [module.register_forward_pre_hook(before)]
            handles += [module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _perturbed(value: Any, terms: int, generator: torch.Generator) -> Any:
    """``value`` moved by an ulp or so, and by what reordering sums of ``terms`` terms may do."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() == 0:
        return value
    wide = torch.promote_types(value.dtype, torch.float32)
    exact, roundoff = value.to(wide), torch.finfo(value.dtype).eps / 2
    spread = 2 * roundoff * exact.abs()
    if terms:
        single = min(roundoff, torch.finfo(torch.float32).eps / 2)  # sums are kept in float32
        spread = spread + math.sqrt(terms) * single * exact.square().mean(-1, keepdim=True).sqrt()
    noise = torch.randn(exact.shape, generator=generator, dtype=wide).to(exact.device)
    return (exact + spread * noise).to(value.dtype)
