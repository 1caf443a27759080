"""bitsandbytes' 4-bit weights as the checks see them: read back, and the format they are in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.numerics.four_bit import BlockFormat, Scales, dequantise

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "block_format",
    "doubt_about",
    "four_bit_modules",
    "is_four_bit",
    "is_packed",
    "read_back",
    "readable",
]


def is_four_bit(tensor: object) -> bool:
    """Whether a parameter holds 4-bit codes of bitsandbytes."""
    return (
        type(tensor).__name__ == "Params4bit" and getattr(tensor, "quant_state", None) is not None
    )


def is_packed(weight: Any) -> bool:
    """Whether a 4-bit weight holds two codes per byte, as its constants have it."""
    held: int = weight.numel() * weight.element_size()
    packed: int = (math.prod(weight.quant_state.shape) + 1) // 2
    return held == packed


def four_bit_modules(model: torch.nn.Module) -> list[str]:
    """Names of the modules whose weight is held in 4 bits."""
    return [name for name, m in model.named_modules() if is_four_bit(m._parameters.get("weight"))]


def doubt_about(weight: Any) -> str:
    """Why a 4-bit weight cannot be read back; empty where it can."""
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return "its 4-bit codes have been put in an order for this CPU"
    if weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
        return (
            f"its rows of {state.shape[-1]} are no whole blocks of {state.blocksize}, and "
            "bitsandbytes on a CPU begins a new block with each row when it reads them"
        )
    return ""


def block_format(weight: Any) -> BlockFormat:
    """The format a 4-bit weight is held in."""
    state = weight.quant_state
    scales = None
    if state.nested:
        outer = state.state2
        scales = BlockFormat(outer.code.double().sort().values, outer.blocksize, torch.float32)
    return BlockFormat(state.code.double().sort().values, state.blocksize, state.dtype, scales)


def read_back(weight: Any) -> torch.Tensor:
    """A 4-bit weight in the floating format it stands for."""
    state = weight.quant_state
    scales = Scales(state.absmax)
    if state.nested:
        outer = state.state2
        scales = Scales(state.absmax, outer.absmax, outer.code, state.offset)
    return dequantise(
        weight.detach().as_subclass(torch.Tensor),
        scales,
        state.code,
        shape=tuple(state.shape),
        size=state.blocksize,
        dtype=state.dtype,
    )


def readable(name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The weight of that name, read back where it is held in 4 bits; None if there is none."""
    weight = weights.get(name)
    if weight is None or not is_four_bit(weight) or doubt_about(weight):
        return weight
    return read_back(weight)
