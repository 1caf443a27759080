"""What would bring a peak down, told from what it consists of; the largest saving first."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_lora.memory.records import MemoryPeak
from pytest_lora.records import Json
from pytest_lora.sizes import format_bytes

__all__ = ["advice"]

_CHECKPOINT = (
    "recompute activations (gradient checkpointing): the forward pass holds {} until backward"
)
_BATCH = (
    "what the forward pass makes, its cache of keys and values included, takes {}: fewer rows or "
    "tokens at a time"
)
_LOGITS = "logits take {}: fewer tokens per batch, or a loss that does not build them all at once"
_COPIES = (
    "float32 adapters on a half-precision base keep {} of float32 copies of their inputs: train "
    "them in the base's format (adapter_dtype), or adapt fewer modules"
)
_CASTS = (
    "autocast keeps {} of casts, those of frozen weights among them: load the base in that format"
)
_EAGER = "eager attention keeps its scores, {}: attn_implementation='sdpa'"
_BASE = "the frozen base takes {}: load it in bfloat16 or in 4 bits (QLoRA)"
_HALF_BASE = "the frozen base takes {}: load it in 4 bits (QLoRA)"
_TRAINED = (
    "gradients and optimizer state take {}: a lower rank, fewer target modules, or an optimizer "
    "with less state"
)


def advice(peak: MemoryPeak, request: Mapping[str, Json] | None = None) -> list[str]:
    """Remedies, each with the bytes it is about: an upper end of what it can save.

    Args:
        peak: what was alive.
        request: how the step was set up, where that is known; nothing already done is advised.
    """
    known = request or {}
    held = peak.by_category
    # Of a block nobody described, what ran in it tells.
    job = known.get("job", "train_step" if "backward" in peak.phases else "inference")
    checkpointed = not _unless(known, "checkpointing", ("off",))
    plain = _unless(known, "autocast", ("off",))
    base = _HALF_BASE if known.get("dtype") in ("bfloat16", "float16") else _BASE
    options = (
        (held.get("forward", 0), job == "train_step" and not checkpointed, _CHECKPOINT),
        (held.get("forward", 0), job == "inference", _BATCH),
        (held.get("logits", 0), True, _LOGITS),
        (_copies(peak), plain and _unless(known, "adapter_dtype", ("auto", "float32")), _COPIES),
        (_copies(peak), not plain and known.get("dtype") == "float32", _CASTS),
        (_scores(peak), _unless(known, "attention", ("eager",)), _EAGER),
        (held.get("frozen", 0), _unless(known, "quantisation", ("none",)), base),
        (held.get("gradients", 0) + held.get("optimizer", 0), True, _TRAINED),
    )
    useful = [(size, text) for size, possible, text in options if possible and size > 0]
    useful.sort(key=lambda item: -item[0])
    return [text.format(format_bytes(size)) for size, text in useful]


def _unless(request: Mapping[str, Json], key: str, values: tuple[str, ...]) -> bool:
    """Whether ``key`` has one of ``values``, or nobody knows."""
    return key not in request or request[key] in values


def _copies(peak: MemoryPeak) -> int:
    return sum(
        tensor.bytes * tensor.count
        for tensor in peak.largest
        if tensor.category == "forward" and tensor.op.startswith("aten._to_copy")
    )


def _scores(peak: MemoryPeak) -> int:
    return sum(
        tensor.bytes * tensor.count
        for tensor in peak.largest
        if tensor.category == "forward" and "softmax" in tensor.op
    )
