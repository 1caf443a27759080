"""Rounding noise: what reordering sums can do to a model's output, measured on the model itself.

Monte Carlo arithmetic (D. S. Parker, "Monte Carlo Arithmetic", 1997): noise of the size of the
rounding that another order of summation can change is added to what enters and leaves every module
with parameters.  docs/checks/padding_invariance.md derives the size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["perturbed", "rounding_noise"]


@contextlib.contextmanager
def rounding_noise(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Rounding noise at the inputs and outputs of every module that has parameters of its own."""
    generator = torch.Generator().manual_seed(seed)

    def before(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(perturbed(item, 0, generator) for item in args)

    def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        terms = args[0].shape[-1] if args and isinstance(args[0], torch.Tensor) else 1
        if isinstance(output, tuple):
            return tuple(perturbed(item, terms, generator) for item in output)
        return perturbed(output, terms, generator)

    handles = []
    for module in model.modules():
        # A table look-up rounds nothing.
        if next(module.parameters(recurse=False), None) is not None and not isinstance(
            module, torch.nn.Embedding
        ):
            handles += [module.register_forward_pre_hook(before)]
            handles += [module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def perturbed(value: Any, terms: int, generator: torch.Generator) -> Any:
    """``value`` moved by an ulp or so, and by what reordering sums of ``terms`` terms may do.

    Anything but a floating-point tensor of at least one dimension is returned as it is.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() == 0:
        return value
    wide = torch.promote_types(value.dtype, torch.float32)
    exact, roundoff = value.to(wide), torch.finfo(value.dtype).eps / 2
    spread = 2 * roundoff * exact.abs()
    if terms:
        single = min(roundoff, torch.finfo(torch.float32).eps / 2)  # sums are kept in float32
        spread = spread + math.sqrt(terms) * single * exact.square().mean(-1, keepdim=True).sqrt()
    noise = torch.randn(exact.shape, generator=generator, dtype=wide).to(exact.device)
    return (exact + spread * noise).to(value.dtype)
