"""A loss per token as someone else computes it: is it that of the texts, and of the right model?

The metric is run on the model in float64, on one text, on several, and on texts of unequal length
padded on either side with ordinary tokens, so that nothing but the mask tells them from text.  Each
time it has to be

    (1 / N) sum over texts and positions t of  -log p(x_t | x_<t),     N: all predicted tokens,

that is, what the masked logits of the same batch give.  Computed in float32 by whoever computes it,
with ``u = 2^-24``: logits are rounded (``|z| u``), so are the normaliser and its difference to the
logit (``3 |z| u`` more) and the sum of V exponentials (``V u``, relative, hence absolute in its
logarithm); the mean adds ``N u`` of itself (N. J. Higham, Accuracy and Stability of Numerical
Algorithms, 2nd edition, section 4.2).  The sum of these is the rounding bound; nothing else
is allowed.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from pytest_lora.errors import UsageError
from pytest_lora.probe import computing_wide
from pytest_lora.records import Measurement

__all__ = ["Metric", "measure_metric"]

Batch = dict[str, torch.Tensor]
Metric = Callable[[Any, Batch], Any]
"""``metric(model, batch)``: nats per token, a number or a tensor of one element."""

DECLARED = ("adapted", "base")
UNIT = "times the rounding bound"
_SHORTER = 3


def measure_metric(
    metric: Metric, model: torch.nn.Module, input_ids: torch.Tensor, *, declared: str = "adapted"
) -> Measurement:
    """How far a metric is from the mean loss per token, at most, over several batches.

    Args:
        metric: see :data:`Metric`.
        model: a causal language model whose output has ``logits``.
        input_ids: shape (rows, tokens); at least two rows of six tokens.
        declared: ``"adapted"``: the metric is of the model as it is; ``"base"``: it is a baseline,
            of the model with its adapter disabled.

    Raises:
        UsageError: too few rows or tokens, or ``declared`` is neither of the two.
    """
    if declared not in DECLARED:
        raise UsageError(f"declared={declared!r}: expected one of {', '.join(DECLARED)}")
    if input_ids.dim() != 2 or input_ids.shape[0] < 2 or input_ids.shape[1] < 2 * _SHORTER:
        shape = list(input_ids.shape)
        raise UsageError(f"input_ids of shape {shape}: expected two rows of six tokens at least")
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), computing_wide(model):
            found = {
                name: _judge(metric, model, batch, declared)
                for name, batch in _batches(input_ids).items()
                if _means_the_same(model, batch)
            }
    finally:
        model.train(training)
    worst = max(found, key=lambda name: found[name][0])
    ratio, where = found[worst]
    return Measurement(
        value=ratio,
        unit=UNIT,
        count=input_ids.numel(),
        where=f"{worst}: {where}",
        details={name: value for name, (value, _) in found.items()},
    )


def _batches(ids: torch.Tensor) -> dict[str, Batch]:
    short = ids.shape[1] - _SHORTER
    padding = ids[:1, :_SHORTER]  # words like any other
    ragged = {"padded on the right": (ids[1:2, :short], padding),
              "padded on the left": (padding, ids[1:2, :short])}  # fmt: skip
    found = {
        "one text": {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])},
        "several texts": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    for name, parts in ragged.items():
        mask = torch.cat([torch.full_like(part, part is not padding) for part in parts], 1)
        found[name] = {
            "input_ids": torch.cat([ids[:1], torch.cat(parts, 1)]),
            "attention_mask": torch.cat([torch.ones_like(ids[:1]), mask]),
        }
    return found


def _logits(model: Any, batch: Mapping[str, torch.Tensor], *, counted: bool = True) -> torch.Tensor:
    """Logits in float64; with ``counted`` every text's positions count from zero, where the model
    lets them.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    more = {}
    if counted and "position_ids" in inspect.signature(inner.forward).parameters:
        more["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits: torch.Tensor = model(**batch, **more).logits
    return logits.double()


def _losses(
    model: Any, batch: Mapping[str, torch.Tensor], shift: int = 1, *, counted: bool = True
) -> torch.Tensor:
    """Losses (rows, positions) in nats; ``shift=0`` predicts each token from itself."""
    ids = batch["input_ids"]
    logits = _logits(model, batch, counted=counted)[:, : ids.shape[1] - shift]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, shift:], reduction="none"
    )


def _mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which losses are of text, predicted from text."""
    mask = batch["attention_mask"].bool()
    return mask[:, 1:] & mask[:, :-1]


def _mean(losses: torch.Tensor, mask: torch.Tensor) -> float:
    return float(losses[mask].mean())


def _means_the_same(model: Any, batch: Batch) -> bool:
    """Whether the model itself takes the padding well; one with absolute positions does not."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    texts = [row[kept][None] for row, kept in zip(ids, mask, strict=True)]
    alone = [
        _losses(model, {"input_ids": text, "attention_mask": torch.ones_like(text)})
        for text in texts
    ]
    together = _losses(model, batch)[_mask(batch)]
    same = torch.cat([row.flatten() for row in alone])
    # In float64; what a model computes in float32 whatever its format (norms, angles) is repeated.
    return bool((together - same).abs().max() <= 2.0**-24 * same.abs().max())


def _judge(metric: Metric, model: Any, batch: Batch, declared: str) -> tuple[float, str]:
    with _declared(model, declared):
        losses, logits = _losses(model, batch), _logits(model, batch)
    mask = _mask(batch)
    expected = _mean(losses, mask)
    value, again = (
        float(metric(model, {name: tensor.clone() for name, tensor in batch.items()}))
        for _ in range(2)
    )
    model.eval()
    largest, vocabulary = float(logits.abs().max()), logits.shape[-1]
    bound = 2.0**-24 * (4 * largest + vocabulary + int(mask.sum()) * expected)
    ratio = max(abs(found - expected) / bound for found in (value, again))
    if not math.isfinite(ratio):
        return math.inf, f"{value} nats per token"
    if ratio <= 1:
        return ratio, f"{value:.6g} nats per token"
    if abs(value - again) > 2 * bound:
        cause = f", and {again:.6g} when asked again: dropout or sampling is on"
    else:
        cause = _cause(value, model, batch, declared, bound)
    return ratio, f"{value:.6g} instead of {expected:.6g} nats per token{cause}"


def _cause(value: float, model: Any, batch: Batch, declared: str, bound: float) -> str:
    """What else the number is, if it is something known."""
    with _declared(model, declared):
        known = _other_means(model, batch)
    if hasattr(model, "disable_adapter"):
        other = DECLARED[declared == "adapted"]
        with _declared(model, other):
            known[f"it is that of the {other} model"] = _mean(_losses(model, batch), _mask(batch))
    found = next((name for name, number in known.items() if abs(number - value) <= bound), "")
    if not found:
        with _declared(model, declared):
            losses, mask = _losses(model, batch), _mask(batch)
        found = (
            _in_other_units(value, losses, mask, bound)
            or _mean_of_means(value, losses, mask, bound)
            or _divisor(value, losses, mask, bound)
        )
    return f": {found}" if found else ""


def _other_means(model: Any, batch: Batch) -> dict[str, float]:
    """What other ways of taking the mean give, by what is wrong with them."""
    mask, full = _mask(batch), batch["attention_mask"].bool()
    losses = _losses(model, batch, counted=False)
    unmasked = _losses(model, {**batch, "attention_mask": torch.ones_like(full).long()})
    rows = [_mean(row, kept) for row, kept in zip(losses, mask, strict=True)]
    mirrored = full.flip(1)[:, 1:] & full.flip(1)[:, :-1]
    return {
        "the labels are not shifted": _mean(_losses(model, batch, 0, counted=False), full),
        "padding is counted": float(losses.mean()),
        "the first token after padding is predicted from it": _mean(losses, full[:, 1:]),
        "what follows a text, its padding, is predicted from it": _mean(losses, full[:, :-1]),
        "the mask is of the other side": _mean(losses, mirrored),
        "it is the mean of the texts' means": sum(rows) / len(rows),
        "the model is not given the mask": _mean(unmasked, mask),
        "the model is not given the mask, and padding is counted": float(unmasked.mean()),
        "the first token of each text is masked": _without_first(model, batch),
    }


def _without_first(model: Any, batch: Batch) -> float:
    """The mean loss where the model does not see where texts begin."""
    mask = batch["attention_mask"].clone()
    mask[torch.arange(len(mask)), mask.argmax(1)] = 0
    return _mean(_losses(model, {**batch, "attention_mask": mask}, counted=False), _mask(batch))


def _in_other_units(value: float, losses: torch.Tensor, mask: torch.Tensor, bound: float) -> str:
    mean = _mean(losses, mask)
    rows = [_mean(row, kept) for row, kept in zip(losses, mask, strict=True)]
    perplexities = sum(map(math.exp, rows)) / len(rows)
    # The bound is one of nats; an exponential takes it times itself.
    known = {
        "it is the perplexity, not its logarithm": (math.exp(mean), math.exp(mean)),
        "it is the mean of the texts' perplexities": (perplexities, math.exp(max(rows))),
        "it is the logarithm of the mean of the texts' perplexities": (math.log(perplexities), 1),
        "it is in bits": (mean / math.log(2), 1 / math.log(2)),
    }
    near = (name for name, (number, by) in known.items() if abs(number - value) <= 2 * by * bound)
    return next(near, "")


def _mean_of_means(value: float, losses: torch.Tensor, mask: torch.Tensor, bound: float) -> str:
    """The groups of texts, positions or tokens whose means were averaged, where it is that."""
    rows, places = losses.shape
    sizes = {"texts": rows, "positions": places, "tokens": int(mask.sum())}
    for what, most in sizes.items():
        for size in range(2, most):
            means = [_mean(*group) for group in _groups(losses, mask, what, size)]
            if abs(sum(means) / len(means) - value) <= bound:
                return (
                    f"it is the mean of the means of {size} {what} each, of unequally many tokens"
                )
    return ""


def _groups(
    losses: torch.Tensor, mask: torch.Tensor, what: str, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Groups of that size that have tokens, in order."""
    if what == "tokens":
        losses, mask = losses[mask][None], mask[mask][None]
    side = 0 if what == "texts" else 1
    for part, kept in zip(losses.split(size, side), mask.split(size, side), strict=True):
        if kept.any():
            yield part, kept


def _divisor(value: float, losses: torch.Tensor, mask: torch.Tensor, bound: float) -> str:
    """The number that the sum of the losses was divided by, where that is a whole one."""
    total, tokens = float(losses[mask].sum()), int(mask.sum())
    count = round(total / value) if value else 0
    if count > 0 and count != tokens and abs(total / count - value) <= bound * tokens / count:
        return f"the sum is divided by {count}, not by the {tokens} tokens that are predicted"
    return ""


@contextlib.contextmanager
def _declared(model: Any, declared: str) -> Iterator[None]:
    if declared == "adapted" or not hasattr(model, "disable_adapter"):
        yield
        return
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with model.disable_adapter():
        yield
    for parameter, flag in flags:  # some releases of PEFT do not restore them
        parameter.requires_grad = flag
