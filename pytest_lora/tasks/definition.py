"""Documents as windows of tokens, and all that their likelihoods depend on, written down.

A document becomes *windows*, as the rolling log-likelihood of lm-eval has it: the first predicts
the first tokens after a prefix (BOS), every later one the next ``stride`` tokens, seeing as many of
the tokens before them as the window has room for.  Every token is scored exactly once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_lora.errors import UsageError

if TYPE_CHECKING:
    from pytest_lora.records import Json
    from pytest_lora.subject import Subject

__all__ = ["Definition", "Window", "define", "encode", "token_counts", "windows"]

LONGEST_WINDOW = 2048
"""Tokens of a window where nothing else is asked for and the model has room for more."""

TOKENS_ON_CPU = 256
"""Tokens of a pass: enough for a matrix product to run at full speed on a core (within 1% of what
512 take per token), and few enough for attention between documents, which is computed and masked,
to cost little."""
TOKENS_ELSEWHERE = 8192

TEXTS_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class Definition:
    """All that a document's negative log-likelihood depends on besides the weights.

    Attributes:
        tokenizer: digest of the tokenizer's vocabulary and rules.
        prefix: id of the token before the first one, which is not scored; None: the first token is
            given and not scored.
        special_tokens: whether the tokenizer adds what it adds by itself; scored like the rest.
        window: most tokens the model sees at a time.
        stride: tokens a later window scores; ``window - stride + 1`` are context at least.
        dtype: of the base model's weights.
        packing: whether documents share a row; changes rounding only.
        tokens: tokens of a pass; changes rounding only.
        padding: whether documents that cannot share a row go through side by side, padded; changes
            rounding only.
    """

    tokenizer: str
    prefix: int | None
    special_tokens: bool
    window: int
    stride: int
    dtype: str
    packing: bool
    tokens: int
    padding: bool = False

    def to_dict(self) -> dict[str, Json]:
        """For the record: JSON-plain, with what is scored and in which unit in words."""
        given = "the prefix" if self.prefix is not None else "the first token"
        return {**asdict(self), "scored": f"every token once; {given} is not", "unit": "nats"}


class Window(NamedTuple):
    """Token ids the model sees, and those it is to predict at its last positions."""

    ids: list[int]
    targets: list[int]


def windows(tokens: Sequence[int], definition: Definition) -> list[Window]:
    """A document's windows; none where there is no token to score."""
    prefix, text = definition.prefix, list(tokens)
    if prefix is None:
        prefix, text = (text[0], text[1:]) if text else (0, [])
    size, seen = definition.window, [prefix, *text]
    found, scored = [], 0
    while scored < len(text):
        count = min(definition.stride if scored else size, len(text) - scored)
        scored += count
        found.append(Window(seen[max(0, scored - size) : scored], text[scored - count : scored]))
    return found


def define(
    subject: Subject,
    tokenizer: Any,
    *,
    prefix: str | int | None = "auto",
    special_tokens: bool = False,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
) -> Definition:
    """The definition for a subject's base model; packing is asked for, and yet to be proven.

    Args:
        subject: the adapter on its base model.
        tokenizer: a Hugging Face tokenizer.
        prefix: ``"auto"`` (BOS, else EOS, else none), ``"bos"``, ``"eos"``, a token id, or None.
        special_tokens: let the tokenizer add its own.
        window: None is what the model has positions for, at most 2,048.
        stride: None is the whole window, as in lm-eval.
        tokens: tokens of a pass; None suits the device.

    Raises:
        UsageError: a prefix the tokenizer lacks, or a window or stride that cannot be.
    """
    room = _positions(subject)
    window = min(room or LONGEST_WINDOW, LONGEST_WINDOW) if window is None else window
    stride = window if stride is None else stride
    if room is not None and window > room:
        raise UsageError(f"a window of {window} tokens, but the model has positions for {room}")
    if window < 1 or not 1 <= stride <= window:
        raise UsageError(f"a window of {window} tokens cannot have a stride of {stride}")
    if tokens is None:
        tokens = TOKENS_ON_CPU if subject.base.device.type == "cpu" else TOKENS_ELSEWHERE
    return Definition(
        tokenizer=_digest(tokenizer),
        prefix=_prefix(tokenizer, prefix),
        special_tokens=special_tokens,
        window=window,
        stride=stride,
        dtype=str(subject.base.dtype).removeprefix("torch."),
        packing=True,
        tokens=tokens,
    )


def _positions(subject: Subject) -> int | None:
    """Tokens of text the model has positions for, those of an adapter's virtual tokens left off."""
    config: Any = getattr(subject.base.module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    virtual = subject.adapter.config.get("num_virtual_tokens")
    taken = virtual if isinstance(virtual, int) else 0
    return limit - taken if isinstance(limit, int) and limit > taken else None


def _prefix(tokenizer: Any, wanted: str | int | None) -> int | None:
    if wanted is None or isinstance(wanted, int):
        return wanted
    known = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")}
    if wanted == "auto":
        return known["bos"] if known["bos"] is not None else known["eos"]
    if wanted not in known:
        raise UsageError(f"prefix {wanted!r} is none of auto, bos, eos, a token id, None")
    if known[wanted] is None:
        raise UsageError(f"prefix {wanted!r}: the tokenizer has no such token")
    return known[wanted]


def _digest(tokenizer: Any) -> str:
    """Of the vocabulary and, for a tokenizer that has them as data, of all its rules."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        for key in ("padding", "truncation"):  # set by whoever used it last
            rules.pop(key, None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    text = json.dumps(rules, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def encode(tokenizer: Any, texts: Sequence[str], definition: Definition) -> list[list[int]]:
    """Token ids of each text."""
    special = definition.special_tokens
    found = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return [list(map(int, ids)) for ids in found]


def token_counts(
    tokenizer: Any, texts: Sequence[str], definition: Definition, numbers: range
) -> Iterator[int]:
    """How many tokens of the texts of those numbers will be scored, a few texts in memory."""
    given = 0 if definition.prefix is not None else 1
    for start in range(numbers.start, numbers.stop, TEXTS_AT_A_TIME):
        block = texts[start : min(start + TEXTS_AT_A_TIME, numbers.stop)]
        for ids in encode(tokenizer, block, definition):
            yield max(0, len(ids) - given)
