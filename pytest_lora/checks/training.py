"""Training code: what one run of it moves, what gets a gradient, what the optimizer holds.

All of it looks at the user's own training step from outside: fingerprints before and after, hooks
on gradients as they come in, the optimizer's groups.  Nothing is trained twice and nothing copied
but the adapter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.checks.declared import Declared, declare, matches, require_busy, unwrapped
from pytest_lora.checks.steps import (
    GradientWatch,
    Stepper,
    filled,
    is_beside,
    is_trainer,
    kept,
    seeded,
)
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.numerics.fingerprint import Fingerprint, fingerprint_state, named_tensors
from pytest_lora.numerics.rounding import dtype_name, unit
from pytest_lora.records import Json, Measurement, Problem

if TYPE_CHECKING:
    from pytest_lora.checks.steps import Gradient, Step

__all__ = [
    "measure_gradient_coverage",
    "measure_optimizer_holds",
    "measure_overfits_one_batch",
    "measure_trains_only_adapter",
]

_TWO_ROUNDINGS = 4 * math.ulp(1.0)
"""Relative distance of two learning rates that are products of the same declared numbers."""

_FREEZES = (
    "it was loaded without is_trainable=True, or frozen by preparing the wrapped model, by"
    " set_adapter of another one or by a second adapter's inference configuration; set it trainable"
    " before the optimizer is built"
)


# ------------------------------------------------------------------------------ what moves


def measure_trains_only_adapter(
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    steps: int = 3,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    may_change: Collection[str] = (),
    idle: Collection[str] = (),
) -> Measurement:
    """Count the tensors that ``steps`` training steps moved and should not have, or the other way.

    Compared are fingerprints of every parameter and every buffer, so that no copy is kept.  Three
    steps are the least that move all of a fresh LoRA adapter under a warm-up: none moves at a
    learning rate of zero, then ``lora_B`` alone, for ``lora_A`` has no gradient while it is zero.

    Args:
        step: see :data:`pytest_lora.checks.steps.Step`.
        model: the model it trains; a Trainer brings its own.
        steps: how often to do it.
        adapter: see :func:`pytest_lora.checks.declared.declare`.
        trainable: likewise.
        may_change: patterns of names of tensors that may move although nothing declares it.
        idle: patterns of declared tensors that this data does not reach (experts, token rows).

    Raises:
        UsageError: the request cannot be meant.
    """
    if steps < 1:
        raise UsageError(f"steps={steps}: after no step at all nothing can be judged")
    runner = Stepper(step, model)
    declared = declare(runner.model, adapter, trainable)
    require_busy(declared, idle)
    problems = list(_wrong_flags(declared))
    before = fingerprint_state(declared.model)
    coarse = {n: t.detach().clone() for n, t in declared.trainable.items() if _is_coarse(t)}
    with GradientWatch(declared.trainable, reach=coarse) as watch:
        losses = runner.run(steps)
    now = dict(named_tensors(declared.model))
    moved = _moved(before, now)
    problems += _unmoved(declared, moved, watch, idle)
    problems += _not_finite(declared)
    problems += _moved_beside(declared, moved, before, now, may_change)
    return Measurement.of_problems(
        problems,
        count=len(before),
        notes=list(_rounded_away(declared, coarse, watch)),
        steps=steps,
        losses=list(losses),
        trained=len(declared.trainable),
    )


def _wrong_flags(declared: Declared) -> Iterator[Problem]:
    for name, parameter in declared.trainable.items():
        if not parameter.requires_grad:
            yield Problem(name, "frozen before training", "trainable", _FREEZES)
    for name, parameter in declared.frozen.items():
        if parameter.requires_grad:
            yield Problem(name, "trainable", "frozen", _thaw_cause(declared, name))


def _thaw_cause(declared: Declared, name: str) -> str:
    other = declared.other_adapter(name)
    if other:
        return f"it belongs to adapter {other!r}: call set_adapter({declared.adapter!r}) first"
    return "something called requires_grad_(True) on the base after the adapter was attached"


def _moved(before: Mapping[str, Fingerprint], now: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of tensors that changed, came or went."""
    after = fingerprint_state(now)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def _unmoved(
    declared: Declared, moved: set[str], watch: GradientWatch, idle: Collection[str]
) -> Iterator[Problem]:
    """Declared tensors that stayed as they were; tied ones count under any of their names."""
    for name in declared.trainable:
        if name not in moved and not matches(name, idle):
            yield Problem(
                name, "did not move", "moved by training", _why_unmoved(declared, watch, name)
            )


def _why_unmoved(declared: Declared, watch: GradientWatch, name: str) -> str:
    seen = watch.seen[name]
    if not declared.trainable[name].requires_grad:
        return f"it is frozen: {_FREEZES}"
    if not seen.calls:
        return _no_gradient_cause(declared.model)
    if not seen.finite:
        return "its gradient is not finite, and whoever scales the loss skips such steps"
    if seen.zero:
        return "its gradient is zero everywhere: the factor it is multiplied with never moved"
    too_small = ""
    if _is_coarse(declared.trainable[name]):
        form = dtype_name(declared.trainable[name].dtype)
        too_small = f"; or {form} rounds its steps away: {_IN_FLOAT32}"
    return (
        "it has a gradient, so the optimizer does not hold it, its learning rate is zero, or the"
        " gradient is gone before the step: build the optimizer after the adapter is attached and"
        f" active{too_small}"
    )


_IN_FLOAT32 = "keep the adapter in float32, unless the optimizer has float32 copies of its own"


def _is_coarse(tensor: torch.Tensor) -> bool:
    """Whether steps that float32 would keep can be rounded away in its format."""
    return tensor.is_floating_point() and unit(tensor.dtype) > unit(torch.float32)


def _rounded_away(
    declared: Declared, before: Mapping[str, torch.Tensor], watch: GradientWatch
) -> Iterator[str]:
    """What is remarked of a tensor that moved, where most numbers with a gradient did not."""
    stuck = {}
    for name, old in before.items():
        reached, now = watch.seen[name].reached, declared.trainable[name].detach()
        if reached is None or not (is_beside(now, old) and is_beside(reached, old)):
            continue  # moved or taken apart meanwhile
        if bool(reached.any()):
            still = (now == old) & reached
            stuck[name] = float(still.sum() / reached.sum())
    most = {name: share for name, share in stuck.items() if 0.5 < share < 1}
    if most:
        worst = max(most, key=lambda name: most[name])
        yield (
            f"{dtype_name(before[worst].dtype)} rounds steps away: of the numbers that had a"
            f" gradient {most[worst]:.0%} are as before in {worst}, and most in {len(most)}"
            f" tensors; {_IN_FLOAT32}"
        )


def _no_gradient_cause(model: torch.nn.Module) -> str:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return (
            "gradient checkpointing is on and the inputs of the checkpointed blocks need no"
            " gradient: use_reentrant=False, or enable_input_require_grads() before it is enabled"
        )
    return (
        "no gradient arrives: its module is not part of the forward pass (a wrapper goes around"
        " it), or the loss is computed under no_grad or detached"
    )


def _not_finite(declared: Declared) -> Iterator[Problem]:
    for name, parameter in declared.trainable.items():
        if not bool(parameter.detach().isfinite().all()):
            yield Problem(name, "not finite after training", "finite", "training diverged")


def _moved_beside(
    declared: Declared,
    moved: set[str],
    before: Mapping[str, Fingerprint],
    now: Mapping[str, torch.Tensor],
    may_change: Collection[str],
) -> Iterator[Problem]:
    """Whatever moved without being declared; each piece of memory once."""
    own = {tensor.data_ptr() for tensor in declared.trainable.values() if tensor.numel()}
    parameters = {name for name, _ in declared.model.named_parameters(remove_duplicate=False)}
    told: set[int] = set()
    for name in sorted(moved - declared.trainable.keys()):
        if matches(name, may_change) or _is_own_buffer(declared, name, parameters):
            continue
        if name not in now or name not in before:
            yield Problem(name, "came or went during training", "the same tensors throughout")
            continue
        place = now[name].data_ptr()
        if place not in own and place not in told:
            told.add(place)
            yield Problem(name, "moved", "bit for bit as before", _why_moved(declared, name, now))


def _is_own_buffer(declared: Declared, name: str, parameters: set[str]) -> bool:
    return name not in parameters and declared.adapter in name.split(".")


def _why_moved(declared: Declared, name: str, now: Mapping[str, torch.Tensor]) -> str:
    other = declared.other_adapter(name)
    if other:
        return (
            f"adapter {other!r} is being trained instead: call set_adapter({declared.adapter!r})"
            " before the optimizer is built"
        )
    if not isinstance(now[name], torch.nn.Parameter):
        owner = declared.model.get_submodule(name.rpartition(".")[0])
        return (
            f"a buffer of {type(owner).__name__}, which keeps statistics in training mode: call"
            " eval() on it, or set track_running_stats=False"
        )
    if now[name].requires_grad:
        return "it requires a gradient and the optimizer holds it: freeze the base before training"
    return "the optimizer holds a frozen tensor (weight decay), or the code writes into it"


# ------------------------------------------------------------------------------ gradients


def measure_gradient_coverage(
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    idle: Collection[str] = (),
) -> Measurement:
    """Count tensors that have no sound gradient after one step, or one they should not have.

    Every declared tensor needs a gradient that is finite and not zero everywhere.  A product has
    none in one factor where another is zero, so a fresh LoRA's ``lora_A`` rightly has a zero one.
    Where tensors have, and others are zero themselves, these are filled and the step done again.
    The trainable tensors and their gradients are put back; arguments as for
    :func:`measure_trains_only_adapter`.
    """
    runner = Stepper(step, model)
    declared = declare(runner.model, adapter, trainable)
    require_busy(declared, idle)
    problems = list(_wrong_flags(declared))
    with kept(declared.trainable):
        seen, by_theory = _gradients(runner, declared)
        problems += _stray_gradients(declared)
    for name, gradient in seen.items():
        fault = _gradient_fault(gradient)
        if fault and declared.trainable[name].requires_grad and not matches(name, idle):
            problems.append(Problem(name, fault[0], fault[1], _gradient_cause(declared, gradient)))
    notes = []
    if by_theory:
        notes.append(
            f"{len(by_theory)} tensors have a zero gradient only because another factor is zero"
            f" (such as {by_theory[0]}); looked at again with that one filled"
        )
    count = len(declared.trainable) + len(declared.frozen)
    return Measurement.of_problems(problems, count=count, notes=notes)


def _gradients(runner: Stepper, declared: Declared) -> tuple[dict[str, Gradient], list[str]]:
    """What was seen, and which tensors had a zero gradient only where others were zero."""
    with kept(declared.trainable), seeded(0), GradientWatch(declared.trainable) as watch:
        runner.run(1)
    empty = [name for name, gradient in watch.seen.items() if gradient.calls and gradient.zero]
    if not empty:
        return watch.seen, []
    with filled(declared.trainable) as zeros, kept(declared.trainable), seeded(0):
        if not zeros:
            return watch.seen, []
        with GradientWatch({name: declared.trainable[name] for name in empty}) as again:
            runner.run(1)
    seen = {**watch.seen, **again.seen}
    return seen, [name for name in empty if not seen[name].zero]


def _gradient_fault(gradient: Gradient) -> tuple[str, str] | None:
    if not gradient.calls:
        return "no gradient", "one that is finite and not zero"
    if not gradient.finite:
        return "a gradient that is not finite", "a finite one"
    if gradient.zero:
        return "a gradient that is zero everywhere", "one that is not zero somewhere"
    return None


def _gradient_cause(declared: Declared, gradient: Gradient) -> str:
    if not gradient.calls:
        return _no_gradient_cause(declared.model)
    if not gradient.finite:
        return "lower the learning rate or the loss scale, and look for log or division by zero"
    return "its output is multiplied by zero (scaling, mask, dropout of everything)"


def _stray_gradients(declared: Declared) -> Iterator[Problem]:
    for name, parameter in declared.frozen.items():
        if not parameter.requires_grad and parameter.grad is not None:
            yield Problem(
                name,
                "a gradient on a frozen tensor",
                "none",
                "it was trainable during the backward pass, or a gradient from before was never"
                " cleared; an optimizer that holds it would apply it",
            )


# ------------------------------------------------------------------------------ the optimizer


@dataclass(frozen=True, slots=True)
class _Held:
    """One tensor in an optimizer: the group's number, learning rate and weight decay."""

    group: int
    lr: float
    decay: float


def measure_optimizer_holds(
    optimizer: Any,
    model: torch.nn.Module | None = None,
    *,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    lr: float | Mapping[str, float] | None = None,
    loraplus_lr_ratio: float | None = None,
    weight_decay: float | Mapping[str, float] | None = None,
) -> Measurement:
    """Count tensors that the optimizer lacks, holds in vain or twice, or with a wrong setting.

    Args:
        optimizer: anything with ``param_groups``, or a Trainer, which is asked for its own.
        model: the model; a Trainer brings its own.
        adapter: see :func:`pytest_lora.checks.declared.declare`.
        trainable: likewise.
        lr: the learning rate declared for every tensor, or by pattern of the name, the first that
            matches; where a scheduler has begun to change it, ``initial_lr`` counts.
        loraplus_lr_ratio: rate of the B factors over the rate of the A factors (LoRA+: S. Hayou et
            al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024).
        weight_decay: the weight decay declared, as for ``lr``; a group without one has 0.

    Raises:
        UsageError: no optimizer, or a pattern matches nothing.
    """
    model = model if model is not None else getattr(optimizer, "model", None)
    if model is None:
        raise UsageError("assert_optimizer_holds needs the model the optimizer is for")
    declared = declare(model, adapter, trainable)
    groups = _groups(optimizer)
    tensors = {id(tensor): tensor for group in groups for tensor in group["params"]}
    held = _held(groups)
    problems = [] if held else [_empty_optimizer()]
    problems += _not_held(declared, held) if held else []
    problems += _held_in_vain(declared, held, tensors)
    problems += _held_twice(declared, held)
    first = {name: held[id(p)][0] for name, p in declared.trainable.items() if id(p) in held}
    rates = {name: place.lr for name, place in first.items()}
    decays = {name: place.decay for name, place in first.items()}
    problems += _wrong_setting("lr", "learning rate", rates, lr)
    problems += _wrong_setting("weight_decay", "weight decay", decays, weight_decay)
    problems += _wrong_ratio(rates, loraplus_lr_ratio, lr)
    return Measurement.of_problems(
        problems,
        count=len(declared.trainable) + len(tensors),
        groups=len(groups),
        learning_rates=sorted(set(rates.values())),
        weight_decays=sorted(set(decays.values())),
    )


def _held(groups: Sequence[Mapping[str, Any]]) -> dict[int, list[_Held]]:
    """Where each tensor is held, by its id."""
    held: dict[int, list[_Held]] = {}
    for number, group in enumerate(groups):
        rate = float(group.get("initial_lr", group["lr"]))
        place = _Held(number, rate, float(group.get("weight_decay", 0.0)))
        for tensor in group["params"]:
            held.setdefault(id(tensor), []).append(place)
    return held


def _groups(optimizer: Any) -> Sequence[Mapping[str, Any]]:
    if is_trainer(optimizer):
        trainer = optimizer
        optimizer = trainer.optimizer if trainer.optimizer is not None else None
        if optimizer is None:
            optimizer = trainer.create_optimizer()
    groups: Sequence[Mapping[str, Any]] | None = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise UsageError(f"{type(optimizer).__name__} is no optimizer: it has no param_groups")
    return groups


def _empty_optimizer() -> Problem:
    return Problem(
        "optimizer",
        "holds nothing",
        "the adapter's tensors",
        "everything was frozen when it was built: build it after the adapter is set trainable",
    )


def _not_held(declared: Declared, held: Mapping[int, Any]) -> Iterator[Problem]:
    for name, parameter in declared.trainable.items():
        if id(parameter) not in held:
            yield Problem(name, "not in the optimizer", "in one of its groups",
                          _why_not_held(parameter))  # fmt: skip


def _why_not_held(parameter: torch.nn.Parameter) -> str:
    if not parameter.requires_grad:
        return f"it is frozen: {_FREEZES}"
    return (
        "the optimizer was built before the adapter was attached, set active or moved to another"
        " dtype; build it again"
    )


def _held_in_vain(
    declared: Declared, held: Mapping[int, list[_Held]], tensors: Mapping[int, torch.Tensor]
) -> Iterator[Problem]:
    names = {id(p): name for name, p in unwrapped(declared.model).named_parameters()}
    own = {id(parameter) for parameter in declared.trainable.values()}
    for key in held:
        if key in own:
            continue
        tensor, group, name = tensors[key], held[key][0].group, names.get(key)
        if name is None:
            shape = list(tensor.shape)
            yield Problem(
                f"group {group}",
                f"a tensor of shape {shape} that is not part of the model",
                "the model's own tensors",
                "the model was made anew, cast or moved after the optimizer was built",
            )
        else:
            state = "trainable" if tensor.requires_grad else "frozen"
            yield Problem(name, f"in the optimizer, {state}", "not in it",
                          _thaw_cause(declared, name))  # fmt: skip


def _held_twice(declared: Declared, held: Mapping[int, list[_Held]]) -> Iterator[Problem]:
    """In two groups, or as two parameters that share their memory: both update it."""
    for name, parameter in declared.trainable.items():
        times = len(held.get(id(parameter), ()))
        if times > 1:
            yield Problem(name, f"in the optimizer {times} times", "once", "its groups overlap")
    places = Counter(
        parameter.data_ptr()
        for parameter in declared.trainable.values()
        if id(parameter) in held and parameter.numel()
    )
    for name, parameter in declared.trainable.items():
        if places[parameter.data_ptr()] > 1:
            yield Problem(
                name,
                "shares its memory with another parameter in the optimizer",
                "one parameter for one piece of memory",
                "tie the weights by assigning the parameter itself",
            )


def _wrong_setting(
    argument: str,
    words: str,
    found: Mapping[str, float],
    declared: float | Mapping[str, float] | None,
) -> Iterator[Problem]:
    """Tensors whose group has another number than the first pattern that matches declares."""
    wanted = {"*": declared} if isinstance(declared, int | float) else dict(declared or {})
    for pattern in wanted:
        if found and not any(matches(name, (pattern,)) for name in found):
            raise UsageError(
                f"{argument}: {pattern!r} matches no trainable tensor of the optimizer"
            )
    for name, value in found.items():
        first = next((pattern for pattern in wanted if matches(name, (pattern,))), None)
        if first is not None and not _same_number(value, wanted[first]):
            yield Problem(name, f"a {words} of {value:g}", f"{wanted[first]:g}",
                          f"it is in the wrong group for {first!r}, or the group was made without"
                          " it")  # fmt: skip


def _wrong_ratio(
    rates: Mapping[str, float], ratio: float | None, lr: float | Mapping[str, float] | None
) -> Iterator[Problem]:
    """Each B factor against the A factor of its own module, where no rate is declared for both."""
    if ratio is None:
        return
    pairs, declared = 0, tuple(lr) if isinstance(lr, Mapping) else ()
    for name, rate in rates.items():
        partner = name.replace("lora_embedding_B", "lora_embedding_A").replace("lora_B", "lora_A")
        if partner == name or partner not in rates:
            continue
        pairs += 1
        if matches(name, declared) and matches(partner, declared):
            continue  # held to those
        if not _same_number(rate, ratio * rates[partner]):
            found = rate / rates[partner] if rates[partner] else math.inf
            yield Problem(name, f"{found:g} times the learning rate of its lora_A", f"{ratio:g}",
                          "build the groups by factor, lora_B apart from lora_A")  # fmt: skip
    if rates and not pairs:
        raise UsageError("loraplus_lr_ratio: the optimizer holds no lora_A and lora_B together")


def _same_number(found: float, declared: float) -> bool:
    return math.isclose(found, declared, rel_tol=_TWO_ROUNDINGS, abs_tol=0.0)


# ------------------------------------------------------------------------------ the loss


def measure_overfits_one_batch(
    step: Step, model: torch.nn.Module | None = None, *, steps: int = 20
) -> Measurement:
    """How likely a step that learns nothing would be to lower its loss this often.

    The loss of each step in the first half is paired with that of the step half a run later.  If
    the step does nothing, both are draws of one distribution (dropout), so the later one is smaller
    with a probability of at most one half, pair by pair; ties are no falls.  The value is the sign
    test's p-value: the probability of as many falls among as many pairs of fair coins.

    Args:
        step: trains on one batch, the same at every call; a Trainer is given its first one.
        model: the model it trains; a Trainer brings its own.
        steps: an even number of steps; n steps can reach ``2 ** -(n / 2)``.

    Raises:
        UsageError: fewer than two steps, or the step returns no loss.
    """
    if steps < 2 or steps % 2:
        raise UsageError(f"steps={steps}: pairs of losses need an even number of steps")
    losses = Stepper(step, model).run(steps, one_batch=True)
    if all(math.isnan(loss) for loss in losses):
        raise UsageError("the step returns no loss: it has to return the loss it trained on")
    if len(losses) != steps:
        raise CannotRun(f"{len(losses)} losses came of {steps} steps")
    half = steps // 2
    pairs = list(zip(losses[:half], losses[half:], strict=True))
    falls = sum(later < earlier for earlier, later in pairs)
    finite = all(math.isfinite(loss) for loss in losses)
    shown: list[Json] = list(losses)
    return Measurement(
        value=sign_test(falls, half) if finite else math.inf,
        unit="probability of such a fall by chance",
        count=steps,
        where=f"from {losses[0]:.6g} to {losses[-1]:.6g}: {falls} of {half} losses are smaller"
        f" {half} steps later",
        details={"losses": shown, "falls": falls, "pairs": half},
    )


def sign_test(falls: int, pairs: int) -> float:
    """``P(X >= falls)`` for ``X`` binomial with ``pairs`` fair coins."""
    favourable = sum(math.comb(pairs, count) for count in range(falls, pairs + 1))
    return float(favourable / 2**pairs)
