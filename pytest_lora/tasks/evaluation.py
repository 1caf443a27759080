"""Likelihoods of a whole collection, batch by batch, from a cache as far as it has them.

The batches follow from the texts, the definition and the seed alone, and a batch is computed whole
or not at all: so what is computed is the same bit for bit however often a run was interrupted and
whoever computed the rest.
"""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytest_lora.errors import UsageError
from pytest_lora.installed import installed_version
from pytest_lora.stats.order import seeded_order
from pytest_lora.tasks.definition import token_counts

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter
    from pytest_lora.nll_cache import NllCache
    from pytest_lora.records import Json
    from pytest_lora.subject import BaseModel, Subject
    from pytest_lora.tasks.likelihood import Likelihoods
    from pytest_lora.tasks.texts import Texts

__all__ = ["Collection", "Document", "Evaluation", "base_facts", "identity", "model_identity"]

FORMAT = 1
"""Of what is in the cache: counted up when the computation changes."""
_COUNTED_AT_A_TIME = 4096


class Document(NamedTuple):
    """One document's part.

    Attributes:
        number: its place in the texts.
        tokens: how many are scored.
        base, adapted: negative log-likelihoods in nats; None where not computed.
        kl: Kullback-Leibler divergence summed over its tokens, in nats.
        agree: tokens at which both models put the same token first.
    """

    number: int
    tokens: int
    base: float | None = None
    adapted: float | None = None
    kl: float | None = None
    agree: float | None = None


class Collection:
    """The documents with a token to score, in a seeded order, cut into batches.

    Attributes:
        texts: where they come from.
        tokens: scored tokens in all.
        left_out: documents without a token to score.
        batches: each a list of document numbers with their counts of tokens.
    """

    def __init__(self, texts: Texts, counts: array.array[int], *, seed: int, tokens: int) -> None:
        self.texts, self.seed = texts, seed
        self.tokens = sum(counts)
        self.left_out = sum(1 for count in counts if not count)
        if not self.tokens:
            raise UsageError(f"{texts.name}: no document has a token to score")
        order = seeded_order(len(texts), seed, texts.name)
        self.batches = list(_batches([i for i in order if counts[i]], counts, tokens))

    def __len__(self) -> int:
        return len(self.texts) - self.left_out


def _batches(
    order: list[int], counts: array.array[int], tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """As many documents as come to no more than ``tokens``; a longer one by itself."""
    batch: list[tuple[int, int]] = []
    size = 0
    for index in order:
        if batch and size + counts[index] > tokens:
            yield batch
            batch, size = [], 0
        batch.append((index, counts[index]))
        size += counts[index]
    yield batch


class Evaluation:
    """A collection under a base model and an adapted one.

    Attributes:
        collection: the documents.
        hits: likelihoods that were there already, by model.
    """

    def __init__(self, likelihoods: Likelihoods, texts: Texts, cache: NllCache, seed: int) -> None:
        self._likelihoods = likelihoods
        common, adapter = identity(likelihoods)
        counts = _counts(likelihoods, texts, cache)
        definition = likelihoods.definition
        self.collection = Collection(texts, counts, seed=seed, tokens=definition.tokens)
        key = {**common, "texts": texts.digest, "name": texts.name, "seed": seed}
        both: dict[str, Json] = {**key, "adapter": adapter}
        self._ledgers = {
            "base": cache.ledger({**key, "of": "base"}),
            "adapted": cache.ledger({**both, "of": "adapted"}),
            "divergence": cache.ledger({**both, "of": "divergence"}),
        }
        self.hits = {"base": 0, "adapted": 0}
        self._met: set[tuple[str, int]] = set()

    def batch(
        self, number: int, *, base: bool = False, adapted: bool = False, divergence: bool = False
    ) -> tuple[list[Document], bool]:
        """The documents of a batch with what is asked for, and whether anything was computed.

        ``divergence`` brings both likelihoods along.
        """
        documents = self.collection.batches[number]
        divergence = divergence and self._likelihoods.compares
        wanted = {
            "base": base or divergence,
            "adapted": adapted or divergence,
            "divergence": divergence,
        }
        known = {name: self._known(name, number) for name, wants in wanted.items() if wants}
        for name, rows in known.items():
            if name in self.hits and (name, number) not in self._met:
                self._met.add((name, number))
                self.hits[name] += len(documents) if rows else 0
        missing = {name for name, rows in known.items() if rows is None}
        if missing:
            known |= self._compute(number, missing)
        columns = {name: rows for name, rows in known.items() if rows}
        return [
            _document(index, tokens, {name: rows[i] for name, rows in columns.items()})
            for i, (index, tokens) in enumerate(documents)
        ], bool(missing)

    def _known(self, name: str, number: int) -> list[list[float]] | None:
        rows, ledger = len(self.collection.batches[number]), self._ledgers[name]
        found = ledger.get(number, rows)
        if found is None:
            ledger.refresh()
            found = ledger.get(number, rows)
        return found

    def _compute(self, number: int, missing: set[str]) -> dict[str, list[list[float]] | None]:
        documents = self.collection.batches[number]
        pair = "divergence" in missing
        scores = self._likelihoods.score(
            [self.collection.texts[index] for index, _ in documents],
            base=pair or "base" in missing,
            adapted=pair or "adapted" in missing,
            divergence=pair,
        )
        found: dict[str, list[list[float]] | None] = {}
        if pair or "base" in missing:
            found["base"] = [[_there(score.base)] for score in scores]
        if pair or "adapted" in missing:
            found["adapted"] = [[_there(score.adapted)] for score in scores]
        if pair:
            found["divergence"] = [[_there(score.kl), _there(score.agree)] for score in scores]
        for name, rows in found.items():
            if rows is not None and self._ledgers[name].get(number, len(rows)) is None:
                self._ledgers[name].put(number, rows)
        return found


def _there(value: float | None) -> float:
    assert value is not None
    return float(value)


def _document(index: int, tokens: int, rows: dict[str, list[float]]) -> Document:
    kl, agree = rows.get("divergence", (None, None))
    base, adapted = rows.get("base", (None,)), rows.get("adapted", (None,))
    return Document(index, tokens, base[0], adapted[0], kl, agree)


def _counts(likelihoods: Likelihoods, texts: Texts, cache: NllCache) -> array.array[int]:
    """Scored tokens of every document."""
    definition = likelihoods.definition
    key: dict[str, Json] = {
        "format": FORMAT,
        "of": "tokens",
        "texts": texts.digest,
        "tokenizer": definition.tokenizer,
        "special_tokens": definition.special_tokens,
        "prefix": definition.prefix is not None,
        "versions": _versions("tokenizers", "transformers"),
    }
    ledger = cache.ledger(key)
    counts = array.array("L")
    for number, start in enumerate(range(0, len(texts), _COUNTED_AT_A_TIME)):
        block = range(start, min(start + _COUNTED_AT_A_TIME, len(texts)))
        rows = ledger.get(number, len(block))
        if rows is None:
            fresh = token_counts(likelihoods.tokenizer, texts, definition, block)
            rows = [[count] for count in fresh]
            ledger.put(number, rows)
        counts.extend(int(row[0]) for row in rows)
    return counts


# ------------------------------------------------------------------------------ identity


def identity(likelihoods: Likelihoods) -> tuple[dict[str, Json], str]:
    """All that the base's likelihoods depend on besides the texts, and the adapter's digest."""
    models, adapter = model_identity(likelihoods.subject)
    common: dict[str, Json] = {
        "format": FORMAT,
        **models,
        "definition": likelihoods.definition.to_dict(),
        "rows": likelihoods.rows,
    }
    return common, adapter


def base_facts(base: BaseModel) -> dict[str, Any]:
    """What makes numbers of different runs with a base model comparable, for a baseline.

    The kind of device is the card's name, and on a CPU just that: what its instructions change is
    rounding, which no baseline's margin is about.
    """
    is_cuda = base.device.type == "cuda"
    return {
        "base": base.digest,
        "device": _device_kind(base.device) if is_cuda else base.device.type,
        "dtype": str(base.dtype).removeprefix("torch."),
        "versions": _versions("torch", "transformers", "peft"),
    }


def model_identity(subject: Subject) -> tuple[dict[str, Json], str]:
    """All that the base model's arithmetic depends on, and the adapter's digest."""
    base: dict[str, Json] = {
        "base": subject.base.digest,
        "device": _device_kind(subject.base.device),
        "versions": _versions("torch", "transformers", "peft"),
    }
    return base, _adapter_digest(subject.adapter)


def _adapter_digest(adapter: Adapter) -> str:
    digest = hashlib.blake2b(json.dumps(adapter.config, sort_keys=True).encode(), digest_size=16)
    for path in sorted(adapter.weights_files):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _device_kind(device: torch.device) -> str:
    """The processor, as far as its kind decides how sums are rounded."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _versions(*names: str) -> dict[str, Json]:
    return {name: installed_version(name) for name in names}
