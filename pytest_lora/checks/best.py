"""Training that is to end with its best checkpoint: does it?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.checks.bits import how_different
from pytest_lora.checks.declared import declare
from pytest_lora.checks.steps import Stepper, is_trainer
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import quiet
from pytest_lora.records import Measurement, Problem

if TYPE_CHECKING:
    import torch

__all__ = ["measure_best_checkpoint_restored"]

_METRIC = "pytest_lora"

_ARGUMENTS: Mapping[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": None,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_delay": 0,
    "load_best_model_at_end": True,
    "metric_for_best_model": _METRIC,
    "greater_is_better": False,
}
"""A checkpoint and a metric after each step, and the best one in the end."""


def measure_best_checkpoint_restored(
    build: Callable[[Path], Any],
    *,
    steps: int = 3,
    adapter: str | None = None,
    trainable: Collection[str] = (),
) -> Measurement:
    """Count trained tensors that are not, bit for bit, those of the best checkpoint.

    A metric that gets worse with every step stands in for the evaluation, so that the first
    checkpoint is the best one and the last one is not.

    Args:
        build: is given a folder and returns a fresh Trainer whose output goes there.
        steps: training steps to do, two at least.
        adapter: see :func:`pytest_lora.checks.declared.declare`.
        trainable: likewise.

    Raises:
        UsageError: no Trainer, or too few steps.
        CannotRun: it saves nothing after the first step, or its steps change nothing.
    """
    if steps < 2:
        raise UsageError(f"steps={steps}: the best checkpoint and the last one have to be two")
    with tempfile.TemporaryDirectory(prefix="pytest-lora-") as folder:
        with quiet():
            trainer = build(Path(folder))
        if not is_trainer(trainer):
            raise UsageError(f"build(folder) has to return a Trainer, not {type(trainer).__name__}")
        saved = _run(trainer, steps, adapter, trainable)
        now = _tensors(trainer.model, adapter, trainable)
    best, last = saved.get(1), saved.get(steps)
    if best is None or last is None:
        raise CannotRun(f"{type(trainer).__name__} did not save after each of {steps} steps")
    if _same(best, last):
        raise CannotRun("the steps change nothing, so one checkpoint is as good as another")
    return Measurement.of_problems(list(_problems(now, best, last)), count=len(best), steps=steps)


def _run(
    trainer: Any, steps: int, adapter: str | None, trainable: Collection[str]
) -> dict[int, dict[str, torch.Tensor]]:
    """Train; what is trained as it was at each save, by step."""
    from transformers import TrainerCallback

    saved: dict[int, dict[str, torch.Tensor]] = {}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            saved[state.global_step] = _tensors(given["model"], adapter, trainable)

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        return {f"eval_{_METRIC}": float(trainer.state.global_step)}

    trainer.add_callback(Watch())
    trainer.evaluate = evaluate
    Stepper(trainer, None).run(steps, **_ARGUMENTS)
    return saved


def _tensors(
    model: torch.nn.Module, adapter: str | None, trainable: Collection[str]
) -> dict[str, torch.Tensor]:
    declared = declare(model, adapter, trainable)
    return {name: tensor.detach().clone() for name, tensor in declared.trainable.items()}


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return not any(how_different(other[name], tensor) for name, tensor in one.items())


def _problems(
    now: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor],
    last: Mapping[str, torch.Tensor],
) -> list[Problem]:
    cause = "what was loaded is neither the best checkpoint nor the last: another adapter's?"
    if _same(last, now):
        cause = (
            "the last weights are still there: the checkpoint was not found, as under an adapter's"
            " own name, or not loaded"
        )
    found = ((name, how_different(now[name], tensor)) for name, tensor in best.items())
    return [
        Problem(name, difference, "the bits of the best checkpoint", cause)
        for name, difference in found
        if difference
    ]
