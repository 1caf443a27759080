"""A tokenizer for the tiny models, texts in its words, and the plain way to score them."""

from __future__ import annotations

import random
from typing import Any

import tokenizers
import torch
import transformers

WORDS = 60
"""Words of the tokenizer; ids 0 to 2 are special, ``w3`` to ``w59`` are words."""


def tokenizer(words: int = WORDS, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """One id per word; ids 0 to 2 are the padding, BOS and EOS tokens."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, words))]
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<pad>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def documents(count: int, *, low: int = 3, high: int = 40, seed: int = 0) -> list[str]:
    """Random words."""
    draw = random.Random(seed)
    lengths = [draw.randint(low, high) for _ in range(count)]
    return [" ".join(f"w{draw.randrange(3, WORDS)}" for _ in range(n)) for n in lengths]


def spoken_by(model: Any, count: int, *, low: int = 3, high: int = 40, seed: int = 0) -> list[str]:
    """Documents that the model itself would write: what it predicts as well as anything can."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.ones((count, 1), dtype=torch.int64)
    for _ in range(high):
        with torch.no_grad():
            chances = model(input_ids=ids).logits[:, -1, 3:WORDS].softmax(-1)
        drawn = torch.multinomial(chances, 1, generator=generator) + 3
        ids = torch.cat([ids, drawn], 1)
    lengths = [draw.randint(low, high) for _ in range(count)]
    rows = zip(ids[:, 1:].tolist(), lengths, strict=True)
    return [" ".join(f"w{token}" for token in row[:length]) for row, length in rows]


def plain_nll(model: Any, ids: list[int]) -> float:
    """Negative log-likelihood of ``ids[1:]``: all logits at once, cross-entropy in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logits = logits[-len(ids) :]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    return float(loss)
