"""A reference policy: is it the frozen model it is said to be, and does it stay that?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.checks.steps import Stepper
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.records import Measurement

if TYPE_CHECKING:
    from pytest_lora.checks.steps import Step

__all__ = ["measure_reference_policy"]

DECLARED = ("start", "base")

Output = Callable[[Any], torch.Tensor]


def measure_reference_policy(
    reference: Output,
    policy: Output,
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    declared: str = "start",
    steps: int = 3,
) -> Measurement:
    """How far the reference is from what it is declared to be, before and after training.

    Args:
        reference: ``reference(model)``: the outputs on a fixed batch that the training code uses
            as the reference's (logits, log probabilities).
        policy: ``policy(model)``: those of the policy on that batch.
        step: see :data:`pytest_lora.checks.steps.Step`.
        model: the model it trains; a Trainer brings its own.
        declared: ``"start"``: the policy as training begins, so that their divergence begins at
            zero; ``"base"``: the model with its adapter disabled.
        steps: training steps between the two looks.

    Returns:
        The largest absolute difference at any output, before training from what is declared, after
        it from the reference's own outputs before; infinite where shapes differ or a value is
        not finite.

    Raises:
        UsageError: ``declared`` is neither.
        CannotRun: training did not move the policy, so that nothing could be told.
    """
    if declared not in DECLARED:
        raise UsageError(f"declared={declared!r}: expected one of {', '.join(DECLARED)}")
    runner = Stepper(step, model)
    model = runner.model
    with _evaluating(model):
        policy_before = policy(model).detach().clone()
        with _declared(model, declared):
            expected = policy(model).detach().clone()
        before = reference(model).detach().clone()
    runner.run(steps)
    with _evaluating(model):
        policy_after, after = policy(model).detach(), reference(model).detach()
    at_start, drift = _distance(before, expected), _distance(after, before)
    moved = _distance(policy_after, policy_before)
    if not moved and not at_start and not drift:
        raise CannotRun(f"{steps} steps did not move the policy, so the reference proves nothing")
    return Measurement(
        value=max(at_start, drift),
        unit="largest difference",
        count=before.numel(),
        where=_where(at_start, drift, declared, steps),
        details={"at the start": at_start, "after training": drift, "policy moved": moved},
    )


def _where(at_start: float, drift: float, declared: str, steps: int) -> str | None:
    meant = "the policy" if declared == "start" else "the base model"
    if at_start >= drift and at_start:
        cause = (
            "the policy started from an adapter that is not fresh, and the reference is the model"
            " with it disabled, or with a fresh one in its place: load a frozen copy of the adapter"
            if declared == "start"
            else "it is not the base: an adapter, a saved module or a token row stays active"
        )
        return f"before training the reference is {at_start:.3g} away from {meant}; {cause}"
    if drift:
        return (
            f"the reference moved by {drift:.3g} in {steps} steps: it shares tensors with what is"
            " trained, or is itself trained"
        )
    return None


@contextlib.contextmanager
def _declared(model: Any, declared: str) -> Iterator[None]:
    if declared == "start":
        yield
        return
    if not hasattr(model, "disable_adapter"):
        raise UsageError(f"declared='base' needs a PeftModel, not {type(model).__name__}")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with model.disable_adapter():
        yield
    for parameter, flag in flags:  # some releases of PEFT do not restore them
        parameter.requires_grad = flag


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    gap = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return gap if math.isfinite(gap) else math.inf
