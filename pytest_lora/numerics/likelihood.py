"""Log-likelihoods of tokens from hidden states, without ever holding a document's logits.

With hidden states ``h`` (n, width) and an output head that maps rows of them to logits over a
vocabulary of V tokens, the negative log-likelihood of token ``t`` at a position is

    nll = log sum_v exp(z_v) - z_t,        z = head(h),

in nats.  The head is applied to a few rows at a time, as many as a budget of bytes has room for, so
that peak memory depends neither on n nor on V.  Logits are computed in the model's own dtype and
everything after them in float32 or better: a log-softmax kept in bfloat16 is off by 1e-2 nats at
single tokens, and not evenly to both sides.

Between two models on the same tokens, in one walk over the rows, also

    KL(base || adapted) = sum_v p_v (log p_v - log q_v),    p, q = softmax of either's logits,

and whether both put the same token first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["Head", "PairScores", "pair_scores", "rows_within", "token_nll"]

Head = Callable[[torch.Tensor], torch.Tensor]
"""Rows of hidden states (n, width) to their logits (n, V), in the model's dtype."""

_WIDE = 4
"""Vocabulary-wide float32 rows alive at a time, at most: the logits of both models, those of one of
them in the model's own dtype, and the log-probabilities or weights made of them."""


@dataclass(frozen=True, slots=True)
class PairScores:
    """What two models make of the same tokens, per token.

    Attributes:
        base, adapted: negative log-likelihoods in nats, (n,).
        kl: Kullback-Leibler divergence of the adapted model's prediction from the base's, nats.
        agree: whether both put the same token first, bool.
    """

    base: torch.Tensor
    adapted: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor


def rows_within(budget: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows of logits over ``vocabulary`` tokens whose working memory stays within ``budget`` bytes.

    One at least: less than one row's logits cannot be computed.
    """
    return max(1, budget // (_WIDE * vocabulary * _statistics(dtype).itemsize))


def token_nll(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, *, rows: int
) -> torch.Tensor:
    """Negative log-likelihood of every target in nats, (n,), float32 (float64 for float64 models).

    Args:
        hidden: hidden states (n, width) as the head takes them.
        targets: token ids (n,), int64, on the same device.
        head: the model's own head, with whatever the model does to its logits.
        rows: how many rows to give it at a time (see :func:`rows_within`).
    """
    result = torch.empty(len(hidden), dtype=_statistics(hidden.dtype), device=hidden.device)
    for piece in _pieces(len(hidden), rows):
        result[piece] = _nll(_wide(head(hidden[piece])), targets[piece])
    return result


def pair_scores(
    base_hidden: torch.Tensor,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    base_head: Head,
    head: Head,
    *,
    rows: int,
) -> PairScores:
    """The same for two models at once, with what sets their predictions apart.

    The likelihoods are bit for bit those of :func:`token_nll` with as many rows.  Where one model
    knows tokens that the other does not (an enlarged vocabulary), divergence and agreement are
    those on the tokens both know, renormalised.
    """
    count, kind, device = len(hidden), _statistics(hidden.dtype), hidden.device
    base, adapted, kl = (torch.empty(count, dtype=kind, device=device) for _ in range(3))
    agree = torch.empty(count, dtype=torch.bool, device=device)
    for piece in _pieces(count, rows):
        p, q = _wide(base_head(base_hidden[piece])), _wide(head(hidden[piece]))
        base[piece], adapted[piece] = _nll(p, targets[piece]), _nll(q, targets[piece])
        shared = min(p.shape[-1], q.shape[-1])
        kl[piece], agree[piece] = _divergence(p[..., :shared], q[..., :shared])
    return PairScores(base, adapted, kl, agree)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(_statistics(logits.dtype))


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Never negative, which rounding may make of a token that is nearly certain."""
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return loss.clamp_min_(0)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and agreement of two sets of logits; overwrites ``p``.

    sum_v p_v (log p_v - log q_v) = sum_v p_v (z_v - y_v) - logsumexp(z) + logsumexp(y).  Never
    negative; what rounding makes of a zero may be, and is set to it.
    """
    agree = p.argmax(-1) == q.argmax(-1)
    apart = torch.logsumexp(q, -1) - torch.logsumexp(p, -1)
    weights = torch.softmax(p, -1)
    mean = weights.mul_(p.sub_(q)).sum(-1)
    return (mean + apart).clamp_min_(0), agree


def _pieces(count: int, rows: int) -> Iterator[slice]:
    for start in range(0, count, rows):
        yield slice(start, start + rows)
