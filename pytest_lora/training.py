"""Assertions about training code: is it the adapter, all of it and nothing else, that learns?

They take the user's own training step: a callable ``step(model)`` that does one step of training
and returns the loss, or a ``transformers.Trainer`` (TRL's trainers included), which then brings its
model along.  Each returns its measurement, and raises :class:`~pytest_lora.errors.CheckFailed` with
every tensor at fault and the likely cause.  docs/training.md has examples, bounds and derivations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, emit
from pytest_lora.report.text import explain

if TYPE_CHECKING:
    import torch

    from pytest_lora.checks.steps import Step

__all__ = [
    "assert_accumulation_equivalent",
    "assert_best_checkpoint_restored",
    "assert_checkpointing_equivalent",
    "assert_gradient_coverage",
    "assert_labels_sound",
    "assert_optimizer_holds",
    "assert_overfits_one_batch",
    "assert_reference_policy",
    "assert_resume_equivalent",
    "assert_seeded_initialisation",
    "assert_trains_only_adapter",
]

CHANCE = 0.001
"""Default of how often a step that learns nothing may pass for one that does."""

_BY_DEFINITION = "definition of the check"


def assert_trains_only_adapter(
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    steps: int = 3,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    may_change: Collection[str] = (),
    idle: Collection[str] = (),
) -> Measurement:
    """After a few steps every tensor of the adapter has moved, and no other parameter or buffer.

    Args:
        step: ``step(model) -> loss``, or a Trainer.
        model: the model it trains; it stays trained.
        steps: training steps to do.
        adapter: which adapter is in training, where the model has several.
        trainable: patterns (:mod:`fnmatch`) of what trains, instead of PEFT's configuration.
        may_change: patterns of tensors that may move although they are not the adapter's.
        idle: patterns of adapter tensors that this data does not reach.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.training import measure_trains_only_adapter

    def measure() -> Measurement:
        return measure_trains_only_adapter(
            step,
            model,
            steps=steps,
            adapter=adapter,
            trainable=trainable,
            may_change=may_change,
            idle=idle,
        )

    return decide("trains_only_adapter", adapter, measure)


def assert_gradient_coverage(
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    idle: Collection[str] = (),
) -> Measurement:
    """Every tensor of the adapter gets a finite gradient that is not zero, frozen ones get none.

    A fresh ``lora_A`` has a zero gradient because ``lora_B`` is zero: it is looked at again with
    that filled.  Adapter and gradients are put back.  Arguments as for
    :func:`assert_trains_only_adapter`.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.training import measure_gradient_coverage

    def measure() -> Measurement:
        return measure_gradient_coverage(
            step, model, adapter=adapter, trainable=trainable, idle=idle
        )

    return decide("gradient_coverage", adapter, measure)


def assert_optimizer_holds(
    optimizer: Any,
    model: torch.nn.Module | None = None,
    *,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    lr: float | Mapping[str, float] | None = None,
    loraplus_lr_ratio: float | None = None,
    weight_decay: float | Mapping[str, float] | None = None,
) -> Measurement:
    """The optimizer holds exactly the adapter's tensors, each once, with its declared settings.

    Args:
        optimizer: anything with ``param_groups``, or a Trainer.
        model: the model it is for.
        adapter: which adapter is in training, where the model has several.
        trainable: patterns of what trains, instead of PEFT's configuration.
        lr: the declared learning rate, or one by pattern of the tensor's name.
        loraplus_lr_ratio: learning rate of each ``lora_B`` over that of its ``lora_A``.
        weight_decay: the declared weight decay, or one by pattern of the tensor's name.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.training import measure_optimizer_holds

    def measure() -> Measurement:
        return measure_optimizer_holds(
            optimizer,
            model,
            adapter=adapter,
            trainable=trainable,
            lr=lr,
            loraplus_lr_ratio=loraplus_lr_ratio,
            weight_decay=weight_decay,
        )

    return decide("optimizer_holds", adapter, measure)


def assert_overfits_one_batch(
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    steps: int = 20,
    chance: float = CHANCE,
) -> Measurement:
    """The loss falls on one batch, more often than chance would have it.

    Args:
        step: trains on the same batch at every call; a Trainer is given its first one.
        model: the model it trains; it stays trained.
        steps: an even number of training steps.
        chance: the most probable a step that learns nothing may be to pass (a sign test).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.training import measure_overfits_one_batch

    if not 0 < chance < 1 or 2.0 ** -(steps // 2) > chance:
        raise UsageError(
            f"{steps} steps cannot show anything at chance={chance:g}: even if every loss falls,"
            f" the probability is {2.0 ** -(steps // 2):g}"
        )
    bound = Bound.at_most(chance, "default" if chance == CHANCE else "argument")
    return decide(
        "overfits_one_batch",
        None,
        lambda: measure_overfits_one_batch(step, model, steps=steps),
        bound,
        advice="the adapter does not learn: see assert_gradient_coverage and"
        " assert_optimizer_holds, the sign and size of the learning rate, and whether the labels"
        " are masked; with much dropout take more steps",
    )


def assert_checkpointing_equivalent(
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    checkpointing: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    bound: float | Bound = 1.0,
) -> Measurement:
    """Gradient checkpointing leaves every gradient as it is, up to rounding.

    Args:
        step: ``step(model)``, or a Trainer; does forward and backward at least.
        model: the model it trains, with checkpointing on or not.
        checkpointing: ``gradient_checkpointing_kwargs``, should it have to be enabled.
        adapter: which adapter is in training, where the model has several.
        trainable: patterns of what trains, instead of PEFT's configuration.
        bound: the most, in multiples of the rounding bound.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.gradients import measure_checkpointing_equivalent

    def measure() -> Measurement:
        return measure_checkpointing_equivalent(
            step, model, checkpointing=checkpointing, adapter=adapter, trainable=trainable
        )

    return decide("checkpointing_equivalent", adapter, measure, limit_of(bound))


def assert_accumulation_equivalent(
    whole: Step,
    *others: Step,
    model: torch.nn.Module | None = None,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    bound: float | Bound = 1.0,
) -> Measurement:
    """Micro-batches, and the same examples in another order, give one batch's gradients.

    Args:
        whole: a step on one batch, or a Trainer, which is then split as its arguments say.
        others: steps on the same examples, split or ordered otherwise.
        model: the model they train.
        adapter: which adapter is in training, where the model has several.
        trainable: patterns of what trains, instead of PEFT's configuration.
        bound: the most, in multiples of the rounding bound.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.gradients import measure_accumulation_equivalent

    def measure() -> Measurement:
        return measure_accumulation_equivalent(
            whole, *others, model=model, adapter=adapter, trainable=trainable
        )

    return decide("accumulation_equivalent", adapter, measure, limit_of(bound))


def assert_resume_equivalent(
    build: Callable[..., Any],
    step: Callable[[Any], Any] | None = None,
    save: Callable[[Any, Path], Any] | None = None,
    resume: Callable[[Path], Any] | None = None,
    *,
    before: int = 2,
    after: int = 2,
    adapter: str | None = None,
    trainable: Collection[str] = (),
) -> Measurement:
    """Training that is stopped, saved and resumed ends where uninterrupted training does, bitwise.

    Args:
        build: ``build()`` begins a run and returns it; alone, ``build(folder)`` returns a Trainer.
        step: ``step(run) -> loss``.
        save: ``save(run, folder)``.
        resume: ``resume(folder)`` returns a run.
        before: steps before the interruption.
        after: steps after it.
        adapter: which adapter is in training, where the model has several.
        trainable: patterns of what trains, instead of PEFT's configuration.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.repeatable import measure_resume_equivalent

    def measure() -> Measurement:
        return measure_resume_equivalent(
            build,
            step,
            save,
            resume,
            before=before,
            after=after,
            adapter=adapter,
            trainable=trainable,
        )

    return decide("resume_equivalent", adapter, measure)


def assert_best_checkpoint_restored(
    build: Callable[[Path], Any],
    *,
    steps: int = 3,
    adapter: str | None = None,
    trainable: Collection[str] = (),
) -> Measurement:
    """A Trainer that is to load its best checkpoint in the end has its weights then, bitwise.

    Args:
        build: ``build(folder)`` returns a fresh Trainer; checkpoints, a metric that gets worse and
            ``load_best_model_at_end`` are seen to.
        steps: training steps to do.
        adapter: which adapter is in training, where the model has several.
        trainable: patterns of what trains, instead of PEFT's configuration.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.best import measure_best_checkpoint_restored

    def measure() -> Measurement:
        return measure_best_checkpoint_restored(
            build, steps=steps, adapter=adapter, trainable=trainable
        )

    return decide("best_checkpoint_restored", adapter, measure)


def assert_seeded_initialisation(
    build: Callable[[int], torch.nn.Module],
    *,
    seed: int = 0,
    hash_seeds: Collection[int] | None = None,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    timeout: float = 600.0,
) -> Measurement:
    """One seed gives one adapter, bit for bit, in this process and in fresh ones.

    Args:
        build: sets the seed it is given and returns the model with its adapter.
        seed: the seed.
        hash_seeds: values of PYTHONHASHSEED for fresh processes; None tries two if ``build`` can
            be imported there, an empty collection none.
        adapter: which adapter is in training, where the model has several.
        trainable: patterns of what trains, instead of PEFT's configuration.
        timeout: seconds one process may take.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.repeatable import measure_seeded_initialisation

    def measure() -> Measurement:
        return measure_seeded_initialisation(
            build,
            seed=seed,
            hash_seeds=hash_seeds,
            adapter=adapter,
            trainable=trainable,
            timeout=timeout,
        )

    return decide("seeded_initialisation", adapter, measure)


def assert_reference_policy(
    reference: Callable[[Any], torch.Tensor],
    policy: Callable[[Any], torch.Tensor],
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    declared: str = "start",
    steps: int = 3,
    bound: float | Bound | None = None,
) -> Measurement:
    """The reference is the model it is declared to be, and stays that while the policy trains.

    Args:
        reference: ``reference(model)``: the reference's outputs on a fixed batch.
        policy: ``policy(model)``: the policy's.
        step: ``step(model)``, or a Trainer.
        model: the model it trains; it stays trained.
        declared: ``"start"``, the policy as training begins, or ``"base"``, the adapter disabled.
        steps: training steps to do.
        bound: the largest absolute difference allowed; by default none, which a reference computed
            by the same kernels keeps.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.reference import measure_reference_policy

    def measure() -> Measurement:
        return measure_reference_policy(
            reference, policy, step, model, declared=declared, steps=steps
        )

    limit = None if bound is None else limit_of(bound)
    return decide("reference_policy", None, measure, limit)


def assert_labels_sound(
    batch: Any,
    *,
    end: int | Collection[int] | None = None,
    trailing: int = 0,
    begin: int | None = None,
    prompts: Sequence[int] | None = None,
    answers: Sequence[int] | None = None,
    ignored: int = -100,
) -> Measurement:
    """The labels of a batch are its tokens in place, and teach the answers up to their end.

    Args:
        batch: ``input_ids`` and ``labels``, ``attention_mask`` where there is padding, and
            ``position_ids`` where a row holds several texts, as the model is given them; or a
            Trainer, whose first training batch is looked at.
        end: the token that has to end each text and be taught, or several that may.
        trailing: how many tokens a template writes after it.
        begin: the token that has to begin each text, once.
        prompts: how many tokens of each text are its prompt: ignored, while all others are taught.
        answers: the tokens that open each answer of a chat, taught up to the end token and with it,
            while all else is ignored.
        ignored: the label that stands for none.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.labels import measure_labels_sound

    def measure() -> Measurement:
        return measure_labels_sound(
            batch,
            end=end,
            trailing=trailing,
            begin=begin,
            prompts=prompts,
            answers=answers,
            ignored=ignored,
        )

    return decide("labels_sound", None, measure)


def limit_of(bound: float | Bound, usual: float = 1.0) -> Bound:
    """A bound given as a number says who set it: the default, which is ``usual``, or the caller."""
    if isinstance(bound, Bound):
        return bound
    return Bound.at_most(bound, "default" if bound == usual else "argument")


def decide(
    check: str,
    adapter: str | None,
    measure: Callable[[], Measurement],
    bound: Bound | None = None,
    advice: str = "",
) -> Measurement:
    """Measure, judge, emit the result, and raise unless it passed."""
    __tracebackhide__ = True
    limits = bound if bound is not None else Bound.at_most(0, _BY_DEFINITION)
    name, started = adapter or "training", time.perf_counter()
    try:
        measurement = measure()
    except (NotApplicable, CannotRun) as reason:
        skipped = isinstance(reason, NotApplicable) or reason.missing
        outcome = Outcome.SKIPPED if skipped else Outcome.ERROR
        seconds = time.perf_counter() - started
        emit(CheckResult(check, name, outcome, reason=str(reason), seconds=seconds))
        raise
    outcome = limits.judge(measurement)
    if outcome is not Outcome.PASSED:
        advice = next((problem.fix for problem in measurement.problems if problem.fix), advice)
    result = CheckResult(
        check=check,
        adapter=name,
        outcome=outcome,
        advice=advice if outcome is not Outcome.PASSED else "",
        measurement=measurement,
        bound=limits,
        seconds=time.perf_counter() - started,
    )
    emit(result)
    if outcome is not Outcome.PASSED:
        raise CheckFailed(explain(result), result)
    return measurement
