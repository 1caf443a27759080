"""Log-likelihoods of continuations, without logits that nobody asked for.

Only the positions that predict a continuation's tokens go through the output layer: a hook takes
them out of the hidden states before it, so that logits of tokens x vocabulary never exist for a
whole batch.  Requests with the same input are run once (one-token choices such as yes and no share
theirs), and where a prompt is long against its choices it is run once and its keys and values are
shared between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.loading import one_line, quiet
from pytest_lora.tasks.models import known_tokens, text_config, window

if TYPE_CHECKING:
    from pytest_lora.tasks.prompting import TaskTokenizer

__all__ = ["ChoiceScorer", "Likelihood"]

LOGIT_BYTES = 64 << 20
"""Bytes of float32 logits at a time, unless a single row needs more."""

WORTH = 256
"""Tokens that sharing a context has to save: where it begins to pay on a model of one million
parameters (benchmarks/choices.py); larger ones gain earlier, and nothing but speed hangs on it."""

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-likelihood of one continuation in nats, and over how many tokens."""

    value: float
    tokens: int


@dataclass(slots=True)
class _Row:
    """One input and what is asked of it: (request, first position, continuation)."""

    ids: list[int]
    asked: list[tuple[int, int, list[int]]] = field(default_factory=list)

    @property
    def positions(self) -> list[int]:
        """Positions whose logits are needed, in order."""
        return sorted({start + i for _, start, tokens in self.asked for i in range(len(tokens))})


class ChoiceScorer:
    """Scores continuations with one model.

    Attributes:
        batch_size: rows run together.
        notes: what a reader of the results has to know.
    """

    def __init__(self, model: Any, tokens: TaskTokenizer, *, batch_size: int = 8) -> None:
        """Raises NotApplicable where the model has no output layer over a vocabulary."""
        self.model, self.tokens, self.batch_size = model, tokens, batch_size
        self.notes: list[str] = []
        self._bare = getattr(model, "get_base_model", lambda: model)()
        config = getattr(self._bare, "config", None)
        self._head = _output_layer(self._bare)
        if self._head is None or getattr(config, "is_encoder_decoder", False):
            raise NotApplicable(f"{type(self._bare).__name__} gives no likelihood of a text")
        self._vocabulary = known_tokens(self._bare)
        self._window = window(self._bare)
        self._shares = _can_share(model, self._bare)

    def likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Log p(continuation | context) of each pair of token ids, in order.

        Contexts have at least one token.  Logits are in the model's dtype, everything after them
        in float64.  Requests with one context are best given side by side.

        Raises:
            CannotRun: the model fails, or a token id is beyond its vocabulary.
        """
        fitted = [self._fitted(*pair) for pair in pairs]
        values = [0.0] * len(pairs)
        whole: list[int] = []
        for group in _by_context(fitted):
            if self._shares and _worth_sharing([fitted[i] for i in group]):
                self._share(fitted, group, values)
            else:
                whole += group
        for batch in self._batches(_rows(fitted, whole)):
            self._run(batch, values)
        return [Likelihood(value, len(pair[1])) for value, pair in zip(values, fitted, strict=True)]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """The pair, the context's beginning cut off where it exceeds the model's window."""
        ids, room = [*context, *continuation], self._window + 1
        if max(ids) >= self._vocabulary:
            raise CannotRun(
                f"the tokenizer ({self.tokens.source}) gives token {max(ids)}, but the model"
                f" knows {self._vocabulary}: they do not belong together"
            )
        if len(continuation) >= room:
            raise CannotRun(
                f"a choice of {len(continuation)} tokens exceeds the model's window of"
                f" {self._window}"
            )
        if len(ids) > room:
            note = f"contexts had their beginning cut off to fit {self._window} tokens"
            if note not in self.notes:
                self.notes.append(note)
        return list(context[-(room - len(continuation)) :]), list(continuation)

    # ---------------------------------------------------------------------------- whole rows

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Rows of like length together, as many as the logits allow."""
        most = max(1, LOGIT_BYTES // (4 * self._vocabulary))
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: -len(row.ids)):
            logits = sum(len(each.positions) for each in [*batch, row])
            if batch and (len(batch) == self.batch_size or logits > most):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _run(self, batch: Sequence[_Row], values: list[float]) -> None:
        """Rows padded on the right, where nothing real can see the padding."""
        ids, mask = _right_padded([row.ids for row in batch], self.tokens.pad)
        needed = [row.positions for row in batch]
        found = self._forward({"input_ids": ids, "attention_mask": mask}, needed)
        _collect(batch, needed, found, values)

    # ------------------------------------------------------------------------- shared context

    def _share(self, pairs: Sequence[Pair], group: Sequence[int], values: list[float]) -> None:
        """The context but for its last token once, then every choice behind a copy of its cache."""
        context = pairs[group[0]][0]
        start = torch.tensor([context[:-1]])
        mask = torch.ones_like(start)
        outputs = self._call({"input_ids": start, "attention_mask": mask}, [[0]], use_cache=True)
        rows = [_Row([context[-1], *pairs[i][1][:-1]], [(i, 0, pairs[i][1])]) for i in group]
        ids, tail = _right_padded([row.ids for row in rows], self.tokens.pad)
        cache = outputs.past_key_values
        cache.batch_repeat_interleave(len(rows))
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.cat([mask.expand(len(rows), -1), tail], 1),
        }
        needed = [row.positions for row in rows]
        found = self._forward(inputs, needed, past_key_values=cache)
        _collect(rows, needed, found, values)

    # ------------------------------------------------------------------------------ running

    def _forward(
        self, inputs: dict[str, torch.Tensor], needed: Sequence[list[int]], **more: Any
    ) -> torch.Tensor:
        """Logits at the ``needed`` positions of each row, one after the other."""
        logits: torch.Tensor = self._call(inputs, needed, **more).logits
        return logits.reshape(-1, logits.shape[-1])

    def _call(
        self, inputs: dict[str, torch.Tensor], needed: Sequence[list[int]], **more: Any
    ) -> Any:
        device = next(self._bare.parameters()).device
        placed = {name: tensor.to(device) for name, tensor in inputs.items()}
        with quiet(), torch.inference_mode(), _only(self._head, needed, inputs["input_ids"]):
            try:
                return self.model(**placed, **{"use_cache": False, **more})
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise CannotRun(f"the model fails: {one_line(error)}") from error


@contextlib.contextmanager
def _only(head: Any, needed: Sequence[list[int]], ids: torch.Tensor) -> Iterator[None]:
    """Have the output layer see the ``needed`` positions only, as one row."""
    rows = torch.tensor([row for row, places in enumerate(needed) for _ in places])
    places = torch.tensor([place for row in needed for place in row])

    def select(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        ahead = hidden.shape[1] - ids.shape[1]  # virtual tokens of a learned prompt
        index = (rows.to(hidden.device), (places + ahead).to(hidden.device))
        return hidden[index][None], *args[1:]

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _collect(
    rows: Sequence[_Row], needed: Sequence[list[int]], logits: torch.Tensor, values: list[float]
) -> None:
    """Add up the log-probabilities of what was asked."""
    begin = 0
    for row, places in zip(rows, needed, strict=True):
        block = logits[begin : begin + len(places)]
        logp = block.double().log_softmax(-1)
        begin += len(places)
        at = {place: index for index, place in enumerate(places)}
        for request, start, tokens in row.asked:
            index = torch.tensor([at[start + i] for i in range(len(tokens))], device=logp.device)
            chosen = logp[index, torch.tensor(tokens, device=logp.device)]
            values[request] = float(chosen.sum())


def _rows(pairs: Sequence[Pair], requests: Sequence[int]) -> list[_Row]:
    """The inputs that answer the requests; equal ones once."""
    rows: dict[tuple[int, ...], _Row] = {}
    for request in requests:
        context, continuation = pairs[request]
        ids = [*context, *continuation[:-1]]
        row = rows.setdefault(tuple(ids), _Row(ids))
        row.asked.append((request, len(context) - 1, continuation))
    return list(rows.values())


def _by_context(pairs: Sequence[Pair]) -> Iterator[list[int]]:
    """Runs of requests with the same context."""
    group: list[int] = []
    for request, (context, _) in enumerate(pairs):
        if group and pairs[group[0]][0] != context:
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def _worth_sharing(pairs: Sequence[Pair]) -> bool:
    """Whether running the context once saves enough tokens to pay for a call of its own."""
    apart = len({tuple(tokens[:-1]) for _, tokens in pairs})
    return (len(pairs[0][0]) - 1) * (apart - 1) >= WORTH


def _can_share(model: Any, bare: Any) -> bool:
    """Whether keys and values of a prefix are all that every layer keeps of it."""
    from transformers import DynamicCache

    config = text_config(bare)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)
    configs = getattr(model, "peft_config", None) or {}
    return (
        getattr(config, "model_type", "") in _PLAIN_CACHES
        and kinds == {"full_attention"}
        and not windowed
        and not any(getattr(item, "is_prompt_learning", False) for item in configs.values())
        and hasattr(DynamicCache, "batch_repeat_interleave")
    )


_PLAIN_CACHES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "granite", "olmo", "olmo2"}
)
"""Kinds of model for which that is known; others run whole rows."""


def _right_padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _output_layer(module: Any) -> Any | None:
    try:
        return module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
