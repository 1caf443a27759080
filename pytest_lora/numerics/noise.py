"""Noise of the size of the rounding that reordering can change: Monte Carlo arithmetic.

Two ways of computing the same thing differ by rounding.  How far that may move a result is measured
on the computation itself (D. S. Parker, "Monte Carlo Arithmetic", 1997): noise is added to what
enters and leaves every module with parameters, in the forward pass and, for gradients, to what
comes back through it.

The size: a sum of k terms in unit roundoff u, one after the other, is off by a random walk of k
steps.  For terms of one sign that is ``sqrt(k)/3 u`` of the result, for terms of mean zero
``sqrt(k/6) u`` of the root of the sum of their squares; two orders of summation differ by
``sqrt(2)`` times that.  ``sqrt(k) u`` of the result's root mean square, and of each term, covers
both (N. J. Higham, T. Mary, "A new approach to probabilistic rounding error analysis", 2019).
Rounding to the tensor's format can come out one ulp apart: ``2 u`` of each value.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["accumulation_error", "gradient_noise", "perturbed", "rounding_noise", "sum_unit"]


def sum_unit(dtype: torch.dtype) -> float:
    """Unit roundoff of the sums behind a result of ``dtype``: kept in float32 or better."""
    return float(min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2)


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


class RowsSeen:
    """The most rows any module's output had: the terms of a weight's gradient."""

    def __init__(self) -> None:
        self.most = 1


@contextlib.contextmanager
def gradient_noise(model: torch.nn.Module, seed: int) -> Iterator[RowsSeen]:
    """Rounding noise in the forward and the backward pass of every module with parameters.

    A weight's gradient is the sum over rows (tokens) of ``d x^T``.  With ``d`` off by ``sqrt(n) u``
    of itself it is off by ``sqrt(n) u`` of the root of its terms' squares, as the analysis asks.
    Not for a model that recomputes its activations: they would come out with other noise.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = RowsSeen()

    def before(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_noisy(item, 0, generator) for item in args)

    def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        terms = args[0].shape[-1] if args and _is_matrix(args[0]) else 1
        items = output if isinstance(output, tuple) else (output,)
        for item in items:
            if _is_matrix(item):
                seen.most = max(seen.most, item.numel() // max(1, item.shape[-1]))
        noisy = tuple(_noisy(item, terms, generator) for item in items)
        return noisy if isinstance(output, tuple) else noisy[0]

    handles = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            if not isinstance(module, torch.nn.Embedding):  # a table look-up rounds nothing
                handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def accumulation_error(norms: Sequence[float], dtype: torch.dtype, rows: int) -> float:
    """Rounding in adding up a gradient, as a Frobenius norm.

    Each partial result ``g_j``, of which all that is known is that ``S_j = S_(j-1) + g_j``, is
    rounded, and so is each ``S_j``; within one the sum over ``rows`` rows adds ``sqrt(rows) u`` of
    a result whose terms have one sign.

    Args:
        norms: ``||S_j||`` after each addition.
        dtype: the gradient's format.
        rows: terms of the longest sum.
    """
    roundoff, inner = float(torch.finfo(dtype).eps / 2), math.sqrt(rows) * sum_unit(dtype)
    total, previous = 0.0, 0.0
    for norm in norms:
        part = norm + previous if previous else norm
        total += (roundoff * norm) ** 2 + ((roundoff + inner) * part) ** 2
        previous = norm
    return math.sqrt(total)


def _is_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


class _Noisy(torch.autograd.Function):
    """The identity, with rounding noise both ways."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, terms: int, generator: torch.Generator
    ) -> torch.Tensor:
        ctx.generator = generator
        noisy: torch.Tensor = perturbed(value, terms, generator)
        return noisy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        width = grad.shape[-1]
        terms = max(width, grad.numel() // max(1, width))
        return perturbed(grad, terms, ctx.generator, of_each=True), None, None


def _noisy(value: Any, terms: int, generator: torch.Generator) -> Any:
    if not _is_matrix(value):
        return value
    return _Noisy.apply(value, terms, generator)  # type: ignore[no-untyped-call]


def perturbed(value: Any, terms: int, generator: torch.Generator, *, of_each: bool = False) -> Any:
    """``value`` moved by an ulp or so, and by what reordering sums of ``terms`` terms may do.

    Args:
        value: a floating-point tensor; anything else, scalars included, comes back as it is.
        terms: how many terms each of its elements is a sum of; 0 for a value that was only rounded.
        generator: of the noise, on the CPU.
        of_each: add the walk of the terms' own size to each element, as for sums of one sign.
    """
    if not _is_matrix(value):
        return value
    wide = torch.promote_types(value.dtype, torch.float32)
    exact = value.to(wide)
    spread = torch.finfo(value.dtype).eps * exact.abs()
    if terms:
        walk = math.sqrt(terms) * sum_unit(value.dtype)
        spread = spread + walk * exact.square().mean(-1, keepdim=True).sqrt()
        if of_each:
            spread = spread + walk * exact.abs()
    noise = torch.randn(exact.shape, generator=generator, dtype=wide).to(exact.device)
    return (exact + spread * noise).to(value.dtype)
