"""Monte Carlo arithmetic: how far rounding can move what a model computes, measured on the model.

D. S. Parker, "Monte Carlo Arithmetic", 1997.  Noise of the size of the rounding that another order
of summation can change is added to what enters and what leaves every module with parameters; what
that does to the output is what reordering may do to it.

The noise: a product of k terms summed one after the other in unit roundoff u is off by a random
walk of k steps, sqrt(k/2) u/sqrt(3) of the result's RMS (sqrt(k)/3 u where the terms have one
sign), and two orders differ by sqrt(2) times that at most; sqrt(k) u of the RMS, normal, covers it
(N. J. Higham, T. Mary, "A new approach to probabilistic rounding error analysis", 2019).  Rounding
a result to the tensor's format can come out one ulp apart, 2 u of each value.  Blocked and pairwise
sums, which real kernels use, are off by less.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["rounding_noise"]


@contextlib.contextmanager
def rounding_noise(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Rounding noise at the inputs and outputs of every module that has parameters of its own."""
    generator = torch.Generator().manual_seed(seed)

    def before(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_perturbed(item, 0, generator) for item in args)

    def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        terms = args[0].shape[-1] if args and isinstance(args[0], torch.Tensor) else 1
        if isinstance(output, tuple):
            return tuple(_perturbed(item, terms, generator) for item in output)
        return _perturbed(output, terms, generator)

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


def _perturbed(value: Any, terms: int, generator: torch.Generator) -> Any:
    """``value`` moved by an ulp or so, and by what reordering sums of ``terms`` terms may do."""
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
