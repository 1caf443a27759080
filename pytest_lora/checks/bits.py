"""Comparing outputs: bit for bit, saying where they part, or by their distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_lora.numerics.fingerprint import locate_difference
from pytest_lora.records import Problem

if TYPE_CHECKING:
    import torch

__all__ = ["how_different", "is_routed", "median_rms", "output_problem", "rms", "same_bits"]

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit (NaN equals the same NaN)."""
    return not how_different(found, expected)


def how_different(found: torch.Tensor, expected: torch.Tensor) -> str:
    """In words, how ``found`` differs from ``expected``; empty where every bit agrees."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{_kind(found)} instead of {_kind(expected)}"
    there = locate_difference(found, expected.to(found.device))
    if there.place is None:
        return ""
    numbers = f"{found[there.place].item():.6g} instead of {expected[there.place].item():.6g}"
    return (
        f"{there.changed} of {found.numel()} values differ, by at most {there.largest:.3g}"
        f" at {list(there.place)} ({numbers})"
    )


def output_problem(
    where: str, found: torch.Tensor, expected: torch.Tensor, *, meaning: str, fix: str = ""
) -> Problem | None:
    """A problem at ``where`` unless the outputs agree in every bit; ``meaning`` is what they ought
    to agree with.
    """
    difference = how_different(found, expected)
    return Problem(where, f"output: {difference}", meaning, fix) if difference else None


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def rms(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def median_rms(values: torch.Tensor) -> float:
    """The median over positions of the root mean square along the last dimension."""
    return float(values.double().square().mean(-1).sqrt().median())


def is_routed(module: torch.nn.Module) -> bool:
    """Whether tokens are routed to experts.

    There rounding can tip a decision and move a position far, and what stands in the batch decides
    how large each expert's product is, and so how it is rounded.
    """
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)
