"""The same gradients another way: with checkpointing, in micro-batches, in another order.

Mathematically nothing changes, numerically only the order of sums does.  What that can make of the
gradients at hand is measured by Monte Carlo arithmetic (:mod:`pytest_lora.numerics.noise`): the
reference is run again with rounding noise, :data:`DRAWS` times, and the root mean square by which
its gradient moves, with the rounding of adding up micro-batches, is the tensor's *rounding bound*.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.checks.bits import is_routed
from pytest_lora.checks.declared import Declared, declare
from pytest_lora.checks.steps import GradientWatch, Stepper, filled, kept, seeded
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import quiet
from pytest_lora.numerics.noise import accumulation_error, gradient_noise
from pytest_lora.records import Json, Measurement, Problem

if TYPE_CHECKING:
    from pytest_lora.checks.steps import Gradient, Step

__all__ = ["measure_accumulation_equivalent", "measure_checkpointing_equivalent"]

DRAWS = 4
"""Noisy gradients to average over."""

_SEED, _OTHER_SEED = 9973, 31337
_UNIT = "times the rounding bound"
_SHOWN = 8

_Run = Callable[[], object]
_Gradients = Mapping[str, "Gradient"]


# ------------------------------------------------------------------------------ checkpointing


def measure_checkpointing_equivalent(
    step: Step,
    model: torch.nn.Module | None = None,
    *,
    checkpointing: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    trainable: Collection[str] = (),
) -> Measurement:
    """How far gradient checkpointing moves the gradients, in rounding bounds.

    Args:
        step: see :data:`pytest_lora.checks.steps.Step`; it runs in training mode.
        model: the model it trains; a Trainer brings its own.  Checkpointing that is on is tried as
            it is; otherwise it is enabled as transformers does it, and disabled afterwards.
        checkpointing: ``gradient_checkpointing_kwargs`` to enable it with.
        adapter: see :func:`pytest_lora.checks.declared.declare`.
        trainable: likewise.

    Returns:
        The largest distance over a tensor's bound; infinite where a gradient is missing.

    Raises:
        UsageError: the model has no gradient checkpointing.
        CannotRun: there is no gradient to compare, or nothing was recomputed.
    """
    runner = Stepper(step, model)
    declared = declare(runner.model, adapter, trainable)
    options: dict[str, Any] = (
        {"gradient_checkpointing_kwargs": dict(checkpointing)} if checkpointing else {}
    )
    with _training(declared.model), _recomputing(runner, checkpointing) as switched:
        calls = _Calls(declared.model)

        def plain() -> None:
            with _flags_off(switched), calls.counted("plain"):
                runner.run(1, one_batch=True, gradient_checkpointing=False)

        def recomputed() -> None:
            with calls.counted("recomputed"):
                runner.run(1, one_batch=True, gradient_checkpointing=True, **options)

        found = _compare(plain, {"with checkpointing": recomputed}, declared, _CHECKPOINTING)
    if not found.problems and calls.seen["plain"] == calls.seen["recomputed"]:
        raise CannotRun("checkpointing is on, but no module ran a second time: nothing was tried")
    return found


_CHECKPOINTING = (
    "the inputs of the checkpointed blocks need no gradient: use_reentrant=False, or call"
    " enable_input_require_grads() before checkpointing is enabled"
)


@contextlib.contextmanager
def _recomputing(
    runner: Stepper, options: Mapping[str, Any] | None
) -> Iterator[list[torch.nn.Module]]:
    """Checkpointing on, and the modules whose flags say so; off again if it was off before."""
    model = runner.model
    flagged = _flagged(model)
    if flagged:
        yield flagged
        return
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise UsageError(
            f"{type(model).__name__} has no gradient_checkpointing_enable(), and no module of it"
            " has checkpointing on"
        )
    with quiet():
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=dict(options) if options else None
        )
    try:
        yield _flagged(model)
    finally:
        with quiet():
            model.gradient_checkpointing_disable()


def _flagged(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]


@contextlib.contextmanager
def _flags_off(modules: list[torch.nn.Module]) -> Iterator[None]:
    try:
        for module in modules:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextlib.contextmanager
def _training(model: torch.nn.Module) -> Iterator[None]:
    """Training mode, in which alone checkpointing acts, and each module's own mode back."""
    before = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


class _Calls:
    """How often modules ran, by kind of run: recomputing shows in it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen = {"plain": 0, "recomputed": 0}
        self._modules = [part for part in model.modules() if not list(part.children())]

    @contextlib.contextmanager
    def counted(self, kind: str) -> Iterator[None]:
        self.seen[kind] = 0

        def count(*_: object) -> None:
            self.seen[kind] += 1

        handles = [part.register_forward_pre_hook(count) for part in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# ------------------------------------------------------------------------------ accumulation


def measure_accumulation_equivalent(
    whole: Step,
    *others: Step,
    model: torch.nn.Module | None = None,
    adapter: str | None = None,
    trainable: Collection[str] = (),
) -> Measurement:
    """How far gradients from micro-batches lie from those of one batch, in rounding bounds.

    Dropout is off meanwhile: other batches draw other masks.

    Args:
        whole: a step on one batch; or a Trainer, whose first batch is then also split as its
            arguments say (one example at a time where they ask for no accumulation).
        others: steps on the same examples in micro-batches, in another order, padded otherwise.
        model: the model they train; a Trainer brings its own.
        adapter: see :func:`pytest_lora.checks.declared.declare`.
        trainable: likewise.

    Raises:
        UsageError: there is nothing to compare with.
        CannotRun: no gradient to compare, or the steps draw random numbers.
    """
    runner = Stepper(whole, model)
    declared = declare(runner.model, adapter, trainable)
    if runner.trainer is not None:
        reference, ways = _trainer_ways(runner)
    else:
        reference, ways = (lambda: runner.run(1)), {}
    for number, step in enumerate(others, 1):
        ways[f"step {number}"] = _once(Stepper(step, runner.model))
    if not ways:
        raise UsageError("give a second step that splits the same examples into micro-batches")
    with _training(declared.model), _without_dropout(declared.model):
        found = _compare(reference, ways, declared, _ACCUMULATION)
        if not found.value <= 1 and runner.trainer is None:
            _require_repeatable(reference, declared)
    return found


_ACCUMULATION = (
    "divide the summed loss by the number of tokens of the whole batch; the mean of means of"
    " micro-batches weighs tokens of short ones more, and texts packed in a row may not see each"
    " other"
)


def _once(stepper: Stepper) -> _Run:
    return lambda: stepper.run(1)


def _trainer_ways(runner: Stepper) -> tuple[_Run, dict[str, _Run]]:
    """A Trainer's first batch at once, and as it would take it."""
    args: Any = runner.trainer.args
    size, pieces = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if pieces == 1:
        size, pieces = 1, size
    if pieces == 1:
        raise UsageError("the Trainer takes one example a step: nothing can be split")

    def at_once() -> None:
        runner.run(1, one_batch=True, per_device_train_batch_size=size * pieces,
                   gradient_accumulation_steps=1)  # fmt: skip

    def split() -> None:
        runner.run(1, one_batch=True, per_device_train_batch_size=size,
                   gradient_accumulation_steps=pieces)  # fmt: skip

    return at_once, {f"in {pieces} micro-batches of {size}": split}


@contextlib.contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Every rate of dropout zero: those of modules and those that modules keep as numbers."""
    changed: list[tuple[torch.nn.Module, str, float]] = []
    for module in model.modules():
        for name, value in vars(module).items():
            rate = isinstance(value, float) and ("drop" in name)
            if rate or (name == "p" and isinstance(module, torch.nn.modules.dropout._DropoutNd)):
                changed.append((module, name, value))
    try:
        for module, name, _ in changed:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _require_repeatable(reference: _Run, declared: Declared) -> None:
    """That the reference's gradients do not hang on random numbers, else there is no verdict."""
    first, second = (_gradients(reference, declared, seed) for seed in (_SEED, _OTHER_SEED))
    for name in first:
        a, b = first[name].value, second[name].value
        if a is not None and b is not None and not torch.equal(a, b):
            raise CannotRun(
                f"the gradient of {name} depends on the random seed even without dropout: batches"
                " that draw other random numbers cannot be compared"
            )


# ------------------------------------------------------------------------------ comparing


@dataclass(frozen=True, slots=True)
class _Apart:
    """Two gradients of one tensor."""

    name: str
    way: str
    ratio: float
    relative: float


def _compare(
    reference: _Run, ways: Mapping[str, _Run], declared: Declared, cause: str
) -> Measurement:
    with kept(declared.trainable), filled(declared.trainable):
        expected = _gradients(reference, declared)
        if not any(_usable(gradient) for gradient in expected.values()):
            raise CannotRun(
                "no declared tensor gets a gradient in the first place; assert_gradient_coverage"
                " says why"
            )
        found = {way: _gradients(run, declared) for way, run in ways.items()}
        same = all(_agree(expected, other) for other in found.values())
        bounds = {} if same else _bounds(reference, expected, declared)
    problems: list[Problem] = []
    distances: list[_Apart] = []
    for way, gradients in found.items():
        problems += _missing(expected, gradients, way, cause)
        distances += _distances(expected, gradients, way, bounds)
    causes = {
        way: _factor(expected, gradients, bounds) or cause for way, gradients in found.items()
    }
    return _judged(problems, distances, causes, routed=is_routed(declared.model))


def _factor(expected: _Gradients, found: _Gradients, bounds: Mapping[str, float]) -> str:
    """The number that all gradients are multiplied by, if it is one."""
    pairs = {
        name: (gradient.value.double(), other.double())
        for name, gradient in expected.items()
        if gradient.value is not None and (other := found[name].value) is not None
    }
    size = sum(float(a.square().sum()) for a, _ in pairs.values())
    share = sum(float((a * b).sum()) for a, b in pairs.values()) / (size or math.nan)
    said = f"{share:.3g}"
    if not bounds or said in ("1", "nan"):
        return ""
    gaps = {name: float((b - share * a).norm()) for name, (a, b) in pairs.items()}
    if any(gap > (1 + abs(share)) * bounds[name] for name, gap in gaps.items()):
        return ""
    return (
        f"all of them are {said} times what they should be: the loss is divided by another"
        " number of micro-batches or tokens than there are, or not at all"
    )


def _gradients(run: _Run, declared: Declared, seed: int = _SEED) -> dict[str, Gradient]:
    with kept(declared.trainable), seeded(seed):
        with GradientWatch(declared.trainable, keep=True) as watch:
            run()
        return watch.seen


def _usable(gradient: Gradient) -> bool:
    return gradient.value is not None and not gradient.zero


def _agree(expected: _Gradients, found: _Gradients) -> bool:
    pairs = ((gradient.value, found[name].value) for name, gradient in expected.items())
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _missing(expected: _Gradients, found: _Gradients, way: str, cause: str) -> Iterator[Problem]:
    for name, gradient in expected.items():
        if _usable(gradient) and not _usable(found[name]):
            what = "no gradient" if found[name].value is None else "a gradient of zero"
            yield Problem(name, f"{what} {way}", "the one it has otherwise", cause)


def _distances(
    expected: _Gradients, found: _Gradients, way: str, bounds: Mapping[str, float]
) -> Iterator[_Apart]:
    for name, gradient in expected.items():
        a, b = gradient.value, found[name].value
        if a is None or b is None:
            continue
        gap = float((a.double() - b.double()).norm())
        if gap == 0:
            yield _Apart(name, way, 0.0, 0.0)
            continue
        extra = accumulation_error(found[name].norms, a.dtype, 1)
        bound = math.hypot(bounds[name], extra) or math.ulp(0.0)
        size = float(a.double().norm()) or math.ulp(0.0)
        ratio = gap / bound
        yield _Apart(name, way, ratio if math.isfinite(ratio) else math.inf, gap / size)


def _bounds(reference: _Run, expected: _Gradients, declared: Declared) -> dict[str, float]:
    """Root mean square, as a Frobenius norm, of what rounding noise does to each gradient."""
    squares = dict.fromkeys(expected, 0.0)
    rows = 1
    for draw in range(DRAWS):
        with gradient_noise(declared.model, _SEED + draw) as seen:
            noisy = _gradients(reference, declared)
        rows = max(rows, seen.most)
        for name, gradient in expected.items():
            a, b = gradient.value, noisy[name].value
            if a is not None and b is not None:
                squares[name] += float((a.double() - b.double()).square().sum()) / DRAWS
    return {
        name: math.hypot(math.sqrt(squares[name]), _own_error(gradient, rows))
        for name, gradient in expected.items()
    }


def _own_error(gradient: Gradient, rows: int) -> float:
    if gradient.value is None:
        return 0.0
    return accumulation_error(gradient.norms, gradient.value.dtype, rows)


def _judged(
    problems: list[Problem],
    distances: list[_Apart],
    causes: Mapping[str, str],
    *,
    routed: bool,
) -> Measurement:
    """The worst tensor; the median one where rounding can tip a token to another expert."""
    worst = max(distances, key=lambda apart: apart.ratio, default=None)
    value = worst.ratio if worst else 0.0
    if routed and distances:
        value = statistics.median(apart.ratio for apart in distances)
    if problems:
        value = math.inf
    elif worst is not None and value > 1:
        problems = [_problem(apart, causes[apart.way]) for apart in distances if apart.ratio > 1]
    table: dict[str, Json] = {
        apart.name: apart.ratio
        for apart in sorted(distances, key=lambda apart: -apart.ratio)[:_SHOWN]
    }
    return Measurement(
        value=value,
        unit=_UNIT,
        count=len(distances) + len(problems),
        where=_where(problems, worst),
        details={
            "problems": [problem.to_dict() for problem in problems],
            "worst": table,
            "relative": max((apart.relative for apart in distances), default=0.0),
        },
    )


def _problem(apart: _Apart, cause: str) -> Problem:
    return Problem(
        apart.name,
        f"its gradient {apart.way} is {apart.relative:.3g} of its size away,"
        f" {apart.ratio:.3g} times what rounding explains",
        "the same gradient",
        cause,
    )


def _where(problems: list[Problem], worst: _Apart | None) -> str | None:
    if problems:
        return str(problems[0])
    if worst is None or not worst.ratio:
        return None
    return f"{worst.name} {worst.way}: {worst.relative:.3g} of its size apart"
