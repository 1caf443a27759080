"""The likelihood of documents under a base model and under the same model with its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytest_lora.errors import NotApplicable, UsageError
from pytest_lora.numerics.likelihood import pair_scores, rows_within
from pytest_lora.numerics.precision import accurate_products
from pytest_lora.tasks.causal_lm import (
    AdaptedModel,
    BaseModelAlone,
    Batch,
    CausalModel,
    predicts_tokens,
)
from pytest_lora.tasks.definition import Definition, Window, encode, windows

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["Likelihoods", "Scores"]

BUDGET_ON_CPU = 32 << 20
"""Bytes of logits and what is computed from them, at a time: 65 rows of 32,000 tokens.  With half
as many a core reads the head's weights so often that a product takes a quarter longer; the
allocator keeps up to three times as much."""
BUDGET_ELSEWHERE = 512 << 20
"""Likewise on an accelerator, where small products leave it idle."""
MOST_PADDING = 1 / 8
"""Share of the positions of a pass that may be padding, where windows cannot share a row.  It is
what can be lost where a single window fills the device already; where it does not, a few passes
take the place of many."""


class Scores(NamedTuple):
    """Sums over the scored tokens of a document; None for what was not asked for, or where there is
    no token.

    Attributes:
        tokens: how many there are.
        base, adapted: negative log-likelihoods in nats.
        kl: Kullback-Leibler divergence of the adapted from the base model's predictions, in nats.
        agree: tokens at which both put the same token first.
    """

    tokens: int
    base: float | None = None
    adapted: float | None = None
    kl: float | None = None
    agree: int | None = None


class Likelihoods:
    """Scores documents with a subject's base model and with its adapted model.

    The base is the untouched one (:meth:`~pytest_lora.subject.BaseModel.bare`), not the adapted one
    with its adapter disabled: the two are the same for plain LoRA only.  Adapters that change the
    base when they are attached (PiSSA and its kind, ``bias="all"``, saved embeddings), or that do
    not switch off, would have their drift measured against themselves.  Exchanging the modules
    costs milliseconds a batch; hooks put on them meanwhile do not last.

    Attributes:
        definition: as given, with ``packing`` and ``padding`` as the models have proven them.
        notes: what had to be done otherwise than usual, in words.
    """

    def __init__(
        self,
        subject: Subject,
        tokenizer: Any,
        definition: Definition,
        *,
        budget: int | None = None,
    ) -> None:
        module: Any = subject.base.module
        config = getattr(module, "config", None)
        if getattr(config, "is_encoder_decoder", False) or not predicts_tokens(module):
            raise NotApplicable("the base model is no causal language model: it predicts no token")
        self.subject, self.tokenizer = subject, tokenizer
        self.notes: list[str] = []
        self._budget = budget
        self._base, self._adapted = BaseModelAlone(subject), AdaptedModel(subject)
        self._prepare(definition)

    def _prepare(self, definition: Definition) -> None:
        models = (self._base, self._adapted)
        for model in models:
            with model.active(), _evaluating():
                model.learn(self._rows)
        packs = definition.packing and all(model.packs for model in models)
        pads = not packs and all(self._pads(model) for model in models)
        if definition.packing and not packs:
            instead = "a row each, padded" if pads else "one at a time"
            self.notes.append(f"the model does not keep documents in one row apart: {instead}")
        if not self.compares:
            self.notes.append("the model cannot be split before its head: run over its cache")
        self.definition = replace(definition, packing=packs, padding=pads)
        # The same for both, whatever is asked for: other rows, other rounding.
        self._base.rows = self._adapted.rows = min(model.rows for model in models)

    def _pads(self, model: CausalModel) -> bool:
        with model.active(), _evaluating():
            return model.pads()

    @property
    def compares(self) -> bool:
        """Whether divergence and agreement can be had: both models split."""
        return self._base.body is not None and self._adapted.body is not None

    @property
    def rows(self) -> int:
        """Rows of logits at a time."""
        return self._base.rows

    def _rows(self, vocabulary: int) -> int:
        cpu = self.subject.base.device.type == "cpu"
        budget = self._budget or (BUDGET_ON_CPU if cpu else BUDGET_ELSEWHERE)
        return rows_within(budget, vocabulary, self.subject.base.dtype)

    def score(
        self,
        texts: Sequence[str],
        *,
        base: bool = True,
        adapted: bool = True,
        divergence: bool = False,
    ) -> list[Scores]:
        """Scores of each text; ``divergence`` needs both models and is left out where a model does
        not split.

        The values depend on the texts and the definition alone, bit for bit on one machine: which
        of them are asked for changes nothing.
        """
        documents = [windows(ids, self.definition) for ids in self._encode(texts)]
        totals = [_Total(sum(len(w.targets) for w in document)) for document in documents]
        owned = [(total, window) for total, doc in zip(totals, documents, strict=True)
                 for window in doc]  # fmt: skip
        for group in _groups(owned, self.definition):
            self._score(group, base=base, adapted=adapted, divergence=divergence)
        return [total.scores() for total in totals]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = encode(self.tokenizer, texts, self.definition)
        rows = self.subject.base.embedding[1] if self.subject.base.embedding else None
        largest = max((max(ids, default=0) for ids in found), default=0)
        if rows is not None and largest >= rows:
            raise UsageError(
                f"the tokenizer has the token id {largest}, the base model only {rows} tokens; give"
                " the tokenizer that belongs to the base model"
            )
        return found

    def _score(
        self, group: list[tuple[_Total, Window]], *, base: bool, adapted: bool, divergence: bool
    ) -> None:
        batch = Batch(
            [window for _, window in group],
            self.subject.base.device,
            padded=self.definition.padding,
        )
        totals = [total for total, _ in group]
        if divergence and base and adapted and self.compares:
            self._score_pair(batch, totals)
            return
        for wanted, model, name in (
            (base, self._base, "base"),
            (adapted, self._adapted, "adapted"),
        ):
            if wanted:
                with model.active(), _evaluating():
                    nll = model.nll(batch)
                for total, values in zip(totals, batch.by_window(nll), strict=True):
                    total.add(name, values)

    def _score_pair(self, batch: Batch, totals: Sequence[_Total]) -> None:
        with self._base.active(), _evaluating():
            before = self._base.states(batch)
        with self._adapted.active(), _evaluating():
            found = pair_scores(
                before,
                self._adapted.states(batch),
                batch.targets,
                self._base.switching_head,
                self._adapted.head,
                rows=self._base.rows,
            )
        for name in ("base", "adapted", "kl", "agree"):
            values = batch.by_window(getattr(found, name))
            for total, each in zip(totals, values, strict=True):
                total.add(name, each)


class _Total:
    """Sums over the windows of a document, in float64."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._sums: dict[str, float] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())

    def scores(self) -> Scores:
        agree = self._sums.get("agree")
        return Scores(
            self.tokens,
            self._sums.get("base"),
            self._sums.get("adapted"),
            self._sums.get("kl"),
            None if agree is None else int(agree),
        )


_Owned = tuple[_Total, Window]


def _groups(owned: Sequence[_Owned], definition: Definition) -> Iterator[list[_Owned]]:
    """Windows that go through the models together."""
    if definition.packing:
        fits = _fits_a_row
    elif definition.padding:
        fits, owned = _fits_beside, sorted(owned, key=lambda item: len(item[1].ids))
    else:
        yield from ([item] for item in owned)
        return
    group: list[_Owned] = []
    for item in owned:
        if group and not fits([len(window.ids) for _, window in [*group, item]], definition.tokens):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _fits_a_row(lengths: Sequence[int], tokens: int) -> bool:
    return sum(lengths) <= tokens


def _fits_beside(lengths: Sequence[int], tokens: int) -> bool:
    """Up to the tokens of a pass, and with so little padding that it costs less than it saves."""
    positions = len(lengths) * max(lengths)
    return positions <= tokens and MOST_PADDING * positions >= positions - sum(lengths)


@contextlib.contextmanager
def _evaluating() -> Iterator[None]:
    """No gradients and no TF32.  The model is in eval mode already, PEFT's layers too."""
    with torch.no_grad(), accurate_products():
        yield
