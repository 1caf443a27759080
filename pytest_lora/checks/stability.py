"""Number formats: what the adapter does to the likelihood must not depend on the dtype.

Base and adapted model run side by side on the same tokens in float32, bfloat16 and float16.  Their
*drift*, the mean negative log-likelihood per token with the adapter minus without, is what verdicts
rest on; its change from float32 is the answer.  An adapter that overflows float16, or whose effect
lives in digits that bfloat16 has not, shows here and nowhere else.

Weights.  In each format base weights are read again from disk and the old ones are gone before: one
copy at a time, and nothing is cast back and forth.  The adapter's own weights are cast to the
format, too, as servers do that hold one dtype.

Bound.  Rounding alone moves the drift as well.  By how much is measured on the float32 model by
Monte Carlo arithmetic (D. S. Parker, 1997): noise of the size of the format's roundings goes onto
every weight (uniform, at most a unit roundoff ``u`` of it) and every module's output (normal,
``2 u`` of each value: an ulp, as in :mod:`pytest_lora.checks.padding`).  The same noise meets base
and adapted model where they share a module, as roundings of shared weights do.  Eight draws give
eight changes of drift ``m_k`` caused by nothing but rounding.  If the real change is of their kind,
then it over their root mean square is Student's t with 8 degrees of freedom, and exceeds the
quantile ``t`` with a chance of 0.0005 in each of two formats:

    rounding bound = 5.617 sqrt(mean of m_k^2)

Measured in float32, the bound cannot grow with what overflows in the format under test.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.baseline import FACTS, digest_of
from pytest_lora.errors import CannotRun, NotApplicable, UsageError
from pytest_lora.numerics.rounding import dtype_name, unit
from pytest_lora.probe import output_of
from pytest_lora.records import Json, Measurement

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["measure_dtype_stability"]

REFERENCE = torch.float32
FORMATS = (torch.bfloat16, torch.float16)

DRAWS = 8
QUANTILE = 5.617
"""Student's t with :data:`DRAWS` degrees of freedom at 1 - 0.0005 / 2."""

WINDOW = 128
"""Tokens of a forward pass: no more logits than for these exist at a time."""

MOST_TOKENS = 512
_BLOCK = 32
_TABLE = 1 << 20
_SEED = 20231


@dataclass(frozen=True, slots=True)
class _Side:
    """One model in one format.

    Attributes:
        losses: negative log-likelihood of each token, ``(tokens,)``, float64, nats.
        best: the token thought most likely there, ``(tokens,)``, int64.
    """

    losses: torch.Tensor
    best: torch.Tensor

    @property
    def finite(self) -> bool:
        return bool(self.losses.isfinite().all())


@dataclass(frozen=True, slots=True)
class _Pair:
    """Base and adapted model in one format."""

    base: _Side
    adapter: _Side

    @property
    def drift(self) -> float:
        """Mean loss with the adapter minus without, nats per token."""
        return float((self.adapter.losses - self.base.losses).mean())


def measure_dtype_stability(
    subject: Subject,
    texts: Sequence[str] | None = None,
    *,
    max_tokens: int = MOST_TOKENS,
    in_nats: bool = False,
) -> Measurement:
    """How far bfloat16 and float16 move the adapter's drift from what it is in float32.

    The value is the larger change, over its rounding bound (see the module's own words), or in nats
    per token with ``in_nats``; infinite where the adapted model's likelihood is not finite and the
    base's is.  Each format's drift, change, rounding bound and top-1 agreement with float32 are in
    the details.

    Args:
        subject: a causal language model; its base has to come from a folder.
        texts: what to score, in windows of 128 tokens; None scores the probe inputs.
        max_tokens: tokens of the texts at most.
        in_nats: give the change itself instead of its ratio to the rounding bound.

    Raises:
        NotApplicable: not a causal language model, a quantized base, a base that is finite in
            neither format, or an adapted model that is not finite in float32.
        CannotRun: the base was passed in, not loaded; there is no tokenizer for the texts; or the
            device computes in neither format.
        UsageError: the texts hold no two tokens.
    """
    base = subject.base
    _require_causal(subject)
    windows = _windows(subject, texts, max_tokens)
    if base.source is None:
        raise CannotRun(
            "the base model was passed in, not loaded, so it cannot be read in another dtype",
            missing=True,
        )
    native = base.dtype
    found: dict[torch.dtype, _Pair] = {}
    bounds: dict[torch.dtype, float] = {}
    notes: list[str] = []
    try:
        # The format that is loaded comes first: it needs no reading.
        for dtype in sorted((REFERENCE, *FORMATS), key=lambda dtype: dtype != native):
            if dtype != base.dtype:
                subject.release()
                base.reload(dtype)
            try:
                found[dtype] = _run(subject, windows)
            except CannotRun as error:
                if dtype == REFERENCE:
                    raise
                notes.append(f"{dtype_name(dtype)}: {error}")
            if dtype == REFERENCE:
                _require_finite(found[dtype])
                bounds = _rounding_bounds(subject, windows, found[dtype])
    finally:
        subject.release()
        if base.dtype != native:
            base.reload()
    return _measurement(
        found,
        bounds,
        notes,
        in_nats,
        {"windows": digest_of([window.tolist() for window in windows])},
    )


def _measurement(
    found: Mapping[torch.dtype, _Pair],
    bounds: Mapping[torch.dtype, float],
    notes: list[str],
    in_nats: bool,
    facts: Mapping[str, Json],
) -> Measurement:
    reference = found[REFERENCE]
    table: dict[str, Json] = {"float32": {"drift": reference.drift}}
    values: dict[str, float] = {}
    for dtype in FORMATS:
        if dtype not in found:
            continue
        name, pair = dtype_name(dtype), found[dtype]
        if not pair.base.finite:
            notes.append(f"{name}: the base model's own likelihood is not finite; left out")
            continue
        change = abs(pair.drift - reference.drift) if pair.adapter.finite else math.inf
        values[name] = change if in_nats else _ratio(change, bounds[dtype])
        table[name] = _row(pair, reference, change, bounds[dtype])
    if not values:
        if len(found) == 1:
            raise CannotRun("; ".join(notes), missing=True)
        raise NotApplicable("; ".join(notes))
    worst = max(values, key=values.__getitem__)
    return Measurement(
        value=values[worst],
        unit="nats per token" if in_nats else "times the rounding bound",
        count=len(reference.base.losses),
        where=_where(worst, found, reference),
        details={"formats": table, FACTS: facts, "notes": notes},
    )


def _require_finite(pair: _Pair) -> None:
    for who, side in (("base", pair.base), ("adapted", pair.adapter)):
        if not side.finite:
            raise NotApplicable(f"the {who} model's likelihood is not finite in float32 either")


def _row(pair: _Pair, reference: _Pair, change: float, bound: float) -> dict[str, Json]:
    """A format's numbers; those in nats are per token."""
    return {
        "drift": pair.drift,
        "change": change,
        "rounding_bound": bound,
        "agreement_adapter": _agreement(pair.adapter, reference.adapter),
        "agreement_base": _agreement(pair.base, reference.base),
    }


def _agreement(side: _Side, reference: _Side) -> float:
    return float((side.best == reference.best).double().mean())


def _where(worst: str, found: Mapping[torch.dtype, _Pair], reference: _Pair) -> str:
    pair = next(pair for dtype, pair in found.items() if dtype_name(dtype) == worst)
    if not pair.adapter.finite:
        lost = int((~pair.adapter.losses.isfinite()).sum())
        return (
            f"{worst}: with the adapter the likelihood of {lost} of {len(pair.adapter.losses)}"
            " tokens is not finite, without it all are"
        )
    return f"{worst}: drift {pair.drift:.4g} nats per token, in float32 {reference.drift:.4g}"


def _ratio(change: float, bound: float) -> float:
    return change / bound if bound else (math.inf if change else 0.0)


# ------------------------------------------------------------------------------------- the tokens


def _require_causal(subject: Subject) -> None:
    module = subject.base.module
    config = getattr(module, "config", None)
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if subject.adapter.task_type not in ("CAUSAL_LM", None) or head is None:
        raise NotApplicable("the adapter is not one of a causal language model")
    if getattr(config, "is_encoder_decoder", False):
        raise NotApplicable("the model is no causal language model, but an encoder and a decoder")
    if getattr(config, "quantization_config", None):
        raise NotApplicable("the base model is quantized: its weights are in no other dtype")


def _windows(subject: Subject, texts: Sequence[str] | None, most: int) -> list[torch.Tensor]:
    """Token ids, ``(1, length)`` each, int64, two or more of them, on the base's device."""
    if texts is None:
        ids = subject.inputs.get("input_ids")
        return list(torch.split(ids, 1)) if ids is not None else _no_tokens()
    tokenizer = subject.base.tokenizer
    if tokenizer is None:
        raise CannotRun("the base model has no tokenizer, so texts have no tokens", missing=True)
    windows: list[torch.Tensor] = []
    left = most
    for text in texts:
        tokens = list(tokenizer(text)["input_ids"])[:left]
        left -= len(tokens)
        pieces = torch.split(torch.tensor([tokens], dtype=torch.int64), _longest(subject), 1)
        windows += [piece.to(subject.base.device) for piece in pieces if piece.shape[1] > 1]
        if left < 2:
            break
    return windows or _no_tokens()


def _no_tokens() -> list[torch.Tensor]:
    raise UsageError("dtype_stability was given no text of two tokens or more")


def _longest(subject: Subject) -> int:
    limit = getattr(getattr(subject.base.module, "config", None), "max_position_embeddings", WINDOW)
    return min(WINDOW, limit) if isinstance(limit, int) and limit > 1 else WINDOW


# ------------------------------------------------------------------------------------ the models


def _run(subject: Subject, windows: Sequence[torch.Tensor]) -> _Pair:
    """Base and adapted model on the same tokens, in the base's present dtype."""
    with subject.base.bare() as module:
        base = _side(module, windows)
    model = subject.model
    shared = {id(tensor) for _, tensor in subject.base.structure.tensors()}
    for parameter in model.parameters():
        if id(parameter) not in shared and parameter.is_floating_point():
            parameter.data = parameter.data.to(subject.base.dtype)
    return _Pair(base, _side(model, windows))


def _side(model: torch.nn.Module, windows: Sequence[torch.Tensor]) -> _Side:
    losses, best = [], []
    for ids in windows:
        # Virtual tokens stand in front; the last position predicts what is not there.
        logits = output_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        logits = logits[0, -ids.shape[1] : -1]
        losses.append(_losses(logits, ids[0, 1:]))
        best.append(logits.argmax(-1).cpu())
    return _Side(torch.cat(losses), torch.cat(best))


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of ``targets``, ``(positions,)``, in float64 a block at a time."""
    parts = [
        torch.nn.functional.cross_entropy(part.double(), target, reduction="none").cpu()
        for part, target in zip(
            torch.split(logits, _BLOCK), torch.split(targets, _BLOCK), strict=True
        )
    ]
    return torch.cat(parts)


# ------------------------------------------------------------------------------------- Monte Carlo


def _rounding_bounds(
    subject: Subject, windows: Sequence[torch.Tensor], quiet: _Pair
) -> dict[torch.dtype, float]:
    """What rounding to each format may do to the drift, nats per token."""
    bounds = {}
    for dtype in FORMATS:
        changes = []
        for draw in range(DRAWS):
            with subject.base.bare() as module, _noise(module, {}, dtype, draw):
                base = _side(module, windows)
            names = _names(subject)
            with _noise(subject.model, names, dtype, draw):
                adapter = _side(subject.model, windows)
            changes.append(_Pair(base, adapter).drift - quiet.drift)
        bounds[dtype] = QUANTILE * math.sqrt(sum(change**2 for change in changes) / DRAWS)
    return bounds


def _names(subject: Subject) -> dict[int, str]:
    """The base's own modules by identity, under the names they have without an adapter."""
    with subject.base.bare() as module:
        return {id(part): name for name, part in module.named_modules()}


@contextlib.contextmanager
def _noise(
    model: torch.nn.Module, names: Mapping[int, str], dtype: torch.dtype, draw: int
) -> Iterator[None]:
    """Roundings of ``dtype`` on every weight and every module's output, the same for a name."""
    handles = []
    for own, module in model.named_modules():
        source = _Noise(names.get(id(module), own), unit(dtype), draw)
        weighted = isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        # A table's entries are looked up: noise on what comes out is noise on them.
        if weighted and not isinstance(module, torch.nn.Embedding):
            handles.append(module.register_forward_pre_hook(source.before))
            handles.append(module.register_forward_hook(source.restore, always_call=True))
        handles.append(module.register_forward_hook(source.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Noise:
    """One module's noise in one draw.  At any time one module's weights exist twice."""

    def __init__(self, name: str, roundoff: float, draw: int) -> None:
        self._seed = zlib.crc32(f"{draw}/{name}".encode()) ^ _SEED
        self._roundoff = roundoff
        self._kept: torch.Tensor | None = None

    def before(self, module: Any, _: Any) -> None:
        """Put a noisy weight in the place of the weight."""
        weight = module.weight.data
        generator = torch.Generator().manual_seed(self._seed)
        table = 2 * torch.rand(min(_TABLE, weight.numel()), generator=generator) - 1
        table = table.to(weight.device, weight.dtype)
        noise = table.repeat(-(-weight.numel() // len(table)))[: weight.numel()]
        noise = noise.mul_(self._roundoff).add_(1)
        self._kept = weight
        module.weight.data = noise.view(weight.shape).mul_(weight)

    def restore(self, module: Any, _: Any, output: Any) -> None:
        """Put the weight back."""
        if self._kept is not None:
            module.weight.data, self._kept = self._kept, None

    def after(self, module: Any, _: Any, output: Any) -> Any:
        """The output, each value moved by an ulp or so."""
        if isinstance(output, tuple):
            return tuple(self._moved(item) for item in output)
        return self._moved(output)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        generator = torch.Generator().manual_seed(self._seed + 1)
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        return value * (1 + 2 * self._roundoff * noise.to(value.device, value.dtype))
