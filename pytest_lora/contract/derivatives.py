"""What a backward pass gives, held against the forward pass it belongs to.

With every random number drawn from one seed, dropout's mask m is the same each time, and the output

    f = x W^T + b + s (m x) A^T B^T

is affine in x, in A and in B.  For a gradient ``g`` of the output and any step E, put in the place
of one of the three,

    <its gradient, E>  =  <g, f(E) - f(0)>.

Nothing is linearised, so only rounding sets the two sides apart.  Both are sums of the same
products, ``g x W``, ``g b`` and ``s g m x A B``, with E for one of the factors.  The magnitudes of
these add up to M, and none is rounded more often than N times on its way, N the sum of all
dimensions and a few more; so either side is off by ``gamma(N) M`` at most (N. J. Higham, Accuracy
and Stability of Numerical Algorithms, 2nd edition, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pytest_lora.contract.dialects import FIRST
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable
from pytest_lora.numerics.rounding import gamma

if TYPE_CHECKING:
    from pytest_lora.contract.experiment import Experiment
    from pytest_lora.contract.reference import Reference, Term

__all__ = ["hold_gradients"]

_FEW = 12
"""Roundings beside those of sums: scaling, mask, bias, what several modules add to one input."""

_INPUT = ("", "x")
_BACKWARD = """
model.train()
def forward(x):
    {seeded}
    return model(x)

factors = {{
    (name, part): factor for name, pair in {live}.items()
    for part, factor in zip('AB', pair) if factor.requires_grad
}}
leaf = x.clone().requires_grad_()
y = forward(leaf)
generator = torch.Generator().manual_seed({seed})
g = torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y)

def backward():
    leaves = {{('', 'x'): leaf, **factors}}
    for tensor in leaves.values():
        tensor.grad = None
    y.backward(g, retain_graph=True)
    return {{key: None if t.grad is None else t.grad.clone() for key, t in leaves.items()}}

found = backward()
"""
_STEP_OF_X = """
step = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
with torch.no_grad():
    change = forward(step).double() - forward(torch.zeros_like(x)).double()
"""
_STEP = """
factor = factors[{key}]
step = torch.randn(factor.shape, generator=generator, dtype=factor.dtype).to(factor)
with torch.no_grad():
    kept = factor.clone()
    factor.copy_(step)
    change = forward(x).double()
    factor.zero_()
    change -= forward(x).double()
    factor.copy_(kept)
"""
_GAP = "(g.double() * change).sum() - (found[{key}].double() * step.double()).sum()"


def hold_gradients(it: Experiment, reference: Reference, terms: Mapping[str, Term]) -> None:
    """Compare each gradient with what the output does, and a second backward pass with the first.

    Args:
        it: with the adapter attached and filled.
        reference: of its network, with the base weights as they are now.
        terms: what the adapter holds.

    Raises:
        ContractBroken: a gradient is wrong, missing, or another one the second time.
        NotApplicable: two forward passes from one seed differ, so nothing could be told.
    """
    seed, live = it.case.seed, it.dialect.live(FIRST)
    _run(it, _BACKWARD.format(seed=seed, seeded=it.dialect.seeded(seed), live=live))
    if not it.trial.value("torch.equal(forward(x), forward(x))"):
        raise NotApplicable("in training it draws random numbers that no seed of torch repeats")
    found: dict[tuple[str, str], torch.Tensor | None] = it.trial.names["found"]
    for key, gradient in found.items():
        if gradient is None:
            raise it.trial.broken(
                f"no gradient reaches {_what(key)}", f"assert found[{key!r}] is not None"
            )
    _hold_once_more(it)
    for key in found:
        _run(it, _STEP_OF_X if key == _INPUT else _STEP.format(key=repr(key)))
        _hold_step(it, key, _reach(it, reference, terms, key))


def _run(it: Experiment, code: str) -> None:
    try:
        it.trial.run(code)
    except Refused as refusal:
        raise it.outcome(refusal, always=it.has_to_run) from None


def _what(key: tuple[str, str]) -> str:
    return "the input" if key == _INPUT else f"{key[1]} of {key[0]}"


def _hold_once_more(it: Experiment) -> None:
    """The same again: what the forward pass kept for the backward one is still what it was."""
    if not it.trial.value("torch.equal(leaf, x)"):
        shown = "assert torch.equal(leaf, x)"
        raise it.trial.broken("the backward pass writes into the input", shown)
    _run(it, "again = backward()")
    for key in it.trial.names["found"]:
        same = f"torch.equal(found[{key!r}], again[{key!r}])"
        if not it.trial.value(same):
            raise it.trial.broken(
                f"a second backward pass gives another gradient of {_what(key)}: the first one"
                " wrote into what it was computed from",
                f"assert {same}",
            )


def _hold_step(it: Experiment, key: tuple[str, str], reach: float) -> None:
    gap = _GAP.format(key=repr(key))
    moved = float(it.trial.value("(g.double() * change).sum()"))
    off = float(it.trial.value(gap))
    allowed = 2 * gamma(_roundings(it), it.x.dtype) * reach
    if not abs(off) <= allowed:
        raise it.trial.broken(
            f"by the gradient of {_what(key)} a step moves the output by {moved - off:.9g}, and it"
            f" moves by {moved:.9g}; rounding allows {allowed:.3g}",
            f"assert abs({gap}) <= {allowed!r}, {gap}",
        )


def _roundings(it: Experiment) -> int:
    return len(it.x) + sum(it.case.sizes) + it.case.r + _FEW


def _reach(
    it: Experiment, reference: Reference, terms: Mapping[str, Term], key: tuple[str, str]
) -> float:
    """M of both sides: with the step in place of what it is a step of, and with zeros there."""
    g, step = it.trial.names["g"].cpu(), it.trial.names["step"].cpu()
    drop = it.case.dropped
    if key == _INPUT:
        inputs = (step, torch.zeros_like(step))
        return sum(reference.reach(g, x, terms, 1 / (1 - drop)) for x in inputs)
    module, part = key
    total = 0.0
    for factor in (step, torch.zeros_like(step)):
        old = terms[module]
        new = replace(old, A=factor) if part == "A" else replace(old, B=factor)
        changed = {**terms, module: new}
        total += reference.reach(g, reference.x, changed, 1 / (1 - drop))
    return total
