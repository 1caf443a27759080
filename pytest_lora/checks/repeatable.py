"""Training that can be repeated: resumed where it stopped, and begun from a seed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from pytest_lora.checks.bits import how_different
from pytest_lora.checks.declared import declare
from pytest_lora.checks.steps import Stepper, as_number, is_trainer, seeded
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import one_line, quiet
from pytest_lora.numerics.fingerprint import fingerprint, named_tensors
from pytest_lora.records import Measurement, Problem

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["measure_resume_equivalent", "measure_seeded_initialisation"]

_SEED, _OTHER_SEED = 101, 202
HASH_SEEDS = (1, 2)
"""PYTHONHASHSEED of the fresh processes that build the model again."""


# ------------------------------------------------------------------------------ resuming


@dataclass(frozen=True, slots=True)
class _End:
    """Where a run ended: its trained tensors, copied, and the losses of its last steps."""

    tensors: Mapping[str, torch.Tensor]
    losses: tuple[float, ...]


def measure_resume_equivalent(
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
    """Count trained tensors that differ, bit for bit, when training is stopped and resumed.

    One run does ``before + after`` steps.  Another does ``before``, saves, is resumed among other
    random numbers, as in a new process, and does the rest.

    Args:
        build: begins a training run and returns it: anything that has a ``model``, or a tuple or
            mapping that holds one.  Alone, it is given a folder and returns a fresh Trainer whose
            output goes there.
        step: does one step of a run and returns the loss.
        save: saves a run to a folder.
        resume: a run from such a folder.
        before: steps before the interruption.
        after: steps after it.
        adapter: see :func:`pytest_lora.checks.declared.declare`.
        trainable: likewise.

    Raises:
        UsageError: some of the four are missing.
        CannotRun: the uninterrupted run does not repeat itself either.
    """
    if before < 1 or after < 1:
        raise UsageError("before and after count steps: at least one of each")
    plan = _Plan(before, after, adapter, trainable)
    given = (step, save, resume)
    if not any(given):
        trial: _Trial = _TrainerTrial(build, plan)
    elif step and save and resume:
        trial = _CallableTrial(build, step, save, resume, plan)
    else:
        raise UsageError("step, save and resume belong together; a Trainer's factory stands alone")
    whole = trial.whole()
    at_start, saved, resumed = trial.interrupted()
    problems = list(_lost(at_start, saved))
    apart = _differences(resumed.tensors, whole.tensors)
    if apart and not problems:
        if _differences(trial.whole().tensors, whole.tensors):
            raise CannotRun("two uninterrupted runs differ as well: training does not repeat here")
        cause = _resume_cause(resumed.losses, whole.losses)
        expected = "the bits of the uninterrupted run"
        problems = [Problem(name, found, expected, cause) for name, found in apart.items()]
    return Measurement.of_problems(
        problems,
        count=len(whole.tensors),
        losses=list(whole.losses),
        resumed_losses=list(resumed.losses),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    before: int
    after: int
    adapter: str | None
    trainable: Collection[str]

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Copies of what a model trains."""
        declared = declare(model, self.adapter, self.trainable)
        return {name: tensor.detach().clone() for name, tensor in declared.trainable.items()}


class _Trial:
    """Two ways through the same steps."""

    def whole(self) -> _End:
        """Without interruption."""
        raise NotImplementedError

    def interrupted(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], _End]:
        """What a resumed run began with, what had been saved, and where it ended."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _CallableTrial(_Trial):
    build: Callable[..., Any]
    step: Callable[[Any], Any]
    save: Callable[[Any, Path], Any]
    resume: Callable[[Path], Any]
    plan: _Plan

    def whole(self) -> _End:
        with seeded(_SEED):
            run = self.build()
            model = _model_of(run)
            losses = self._steps(run, self.plan.before + self.plan.after)
            return _End(self.plan.tensors(model), losses[self.plan.before :])

    def interrupted(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], _End]:
        with tempfile.TemporaryDirectory(prefix="pytest-lora-") as folder:
            with seeded(_SEED):
                run = self.build()
                self._steps(run, self.plan.before)
                saved = self.plan.tensors(_model_of(run))
                self.save(run, Path(folder))
            del run
            with seeded(_OTHER_SEED):
                run = self.resume(Path(folder))
                at_start = self.plan.tensors(_model_of(run))
                losses = self._steps(run, self.plan.after)
                return at_start, saved, _End(self.plan.tensors(_model_of(run)), losses)

    def _steps(self, run: Any, count: int) -> tuple[float, ...]:
        return tuple(as_number(self.step(run)) for _ in range(count))


@dataclass(frozen=True, slots=True)
class _TrainerTrial(_Trial):
    build: Callable[..., Any]
    plan: _Plan

    def whole(self) -> _End:
        with tempfile.TemporaryDirectory(prefix="pytest-lora-") as folder, seeded(_SEED):
            trainer = self._built(Path(folder))
            losses = Stepper(trainer, None).run(self.plan.before + self.plan.after)
            return _End(self.plan.tensors(trainer.model), tuple(losses[self.plan.before :]))

    def interrupted(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], _End]:
        before, total = self.plan.before, self.plan.before + self.plan.after
        with tempfile.TemporaryDirectory(prefix="pytest-lora-") as folder:
            with seeded(_SEED):
                trainer = self._built(Path(folder))
                trainer.add_callback(_stop_after(before))
                Stepper(trainer, None).run(total, save_strategy="steps", save_steps=before)
                saved = self.plan.tensors(trainer.model)
            checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{before}"
            if not checkpoint.is_dir():
                raise CannotRun(f"the Trainer saved no {checkpoint.name} in its output_dir")
            del trainer
            with seeded(_OTHER_SEED):
                trainer = self._built(Path(folder))
                watch = _first_values(self.plan)
                trainer.add_callback(watch)
                losses = Stepper(trainer, None).run(total, resume_from=str(checkpoint))
                end = _End(self.plan.tensors(trainer.model), tuple(losses))
                return watch.values, saved, end

    def _built(self, folder: Path) -> Any:
        with quiet():
            trainer = self.build(folder)
        if not is_trainer(trainer):
            raise UsageError(
                f"build(folder) alone has to return a Trainer, not {type(trainer).__name__}; give"
                " step, save and resume for training code of your own"
            )
        return trainer


def _stop_after(steps: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    return Stop()


def _first_values(plan: _Plan) -> Any:
    """A callback that keeps what a run trains as it is before the first step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        values: dict[str, torch.Tensor]

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.values = plan.tensors(given["model"])

    return Watch()


def _model_of(run: Any) -> torch.nn.Module:
    """The model of a run: itself, its ``model``, or the one module it holds."""
    if isinstance(run, torch.nn.Module):
        return run
    model = run.get("model") if isinstance(run, Mapping) else getattr(run, "model", None)
    if isinstance(model, torch.nn.Module):
        return model
    for item in run if isinstance(run, Sequence) else ():
        if isinstance(item, torch.nn.Module):
            return item
    raise UsageError(f"a training run has a model; this {type(run).__name__} has none to be found")


def _differences(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """In words, by name, how tensors differ; what only one side has differs too."""
    apart = dict.fromkeys(found.keys() ^ expected.keys(), "only on one side")
    for name in expected.keys() & found.keys():
        difference = how_different(found[name], expected[name])
        if difference:
            apart[name] = difference
    return dict(sorted(apart.items()))


def _lost(
    at_start: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]
) -> Iterator[Problem]:
    for name, found in _differences(at_start, saved).items():
        yield Problem(
            name,
            f"right after resuming: {found}",
            "the bits that were saved",
            "the checkpoint was not loaded, or the loaded adapter was wrapped with a fresh one",
        )


def _resume_cause(resumed: Sequence[float], whole: Sequence[float]) -> str:
    """The weights were right at the start, so the first loss tells data from state."""
    if resumed and whole and resumed[0] != whole[0]:
        return (
            "the first loss after resuming is another one: the data order or the random state"
            " (dropout) was not restored"
        )
    return (
        "the first loss after resuming is the right one, the step is not: the state of the"
        " optimizer or of the scheduler was not restored"
    )


# ------------------------------------------------------------------------------ seeds


def measure_seeded_initialisation(
    build: Callable[[int], torch.nn.Module],
    *,
    seed: int = 0,
    hash_seeds: Collection[int] | None = None,
    adapter: str | None = None,
    trainable: Collection[str] = (),
    timeout: float = 600.0,
) -> Measurement:
    """Count adapter tensors that come out otherwise when the model is built again from its seed,
    and those that are drawn and come out the same from any seed.

    ``build(seed)`` runs twice among different random numbers, then once in a fresh process for each
    hash seed, if it can be imported there: Python's hashes of strings differ between processes,
    and so does everything that follows from them or from the order of a set.  Another seed then
    has to give another adapter, unless nothing of it is drawn.

    Args:
        build: sets the seed and returns the model with its adapter.  To be found in a fresh
            process it has to be a function of a module, not one inside another.
        seed: what it is given; the one next to it as well.
        hash_seeds: PYTHONHASHSEED of the fresh processes; None tries 1 and 2 where it can.
        adapter: see :func:`pytest_lora.checks.declared.declare`.
        trainable: likewise.
        timeout: seconds one process may take.

    Raises:
        UsageError: hash seeds are asked for and ``build`` cannot be imported.
        CannotRun: the fresh process failed.
    """

    def digests() -> dict[str, str]:
        return _digests(build(seed), adapter, trainable)

    with seeded(_SEED):
        expected = digests()
    with seeded(_OTHER_SEED):
        again = digests()
    problems = list(_unlike(again, expected, "built twice from one seed", _SEED_TOO_LATE))
    notes = []
    try:
        problems += [] if problems else _unmoved_by_seed(build, seed, expected, adapter, trainable)
    except Exception as error:  # it may know its own seed alone, and insist that it is set
        notes.append(f"another seed was not tried: {one_line(error)}")
    place = _place_of(build)
    if place is None:
        reason = f"{getattr(build, '__qualname__', build)} cannot be imported by another process"
        if hash_seeds:
            raise UsageError(f"hash_seeds: {reason}; make it a function of a module")
        notes.append(f"{reason}: other hash seeds were not tried")
    job = {"seed": seed, "adapter": adapter, "trainable": list(trainable), **(place or {})}
    tried = HASH_SEEDS if hash_seeds is None else tuple(hash_seeds)
    for hash_seed in tried if place and not problems else ():
        found = _in_fresh_process(job, hash_seed, timeout)
        problems += _unlike(found, expected, f"under PYTHONHASHSEED={hash_seed}", _HASHED)
    return Measurement.of_problems(
        problems, count=len(expected), notes=notes, hash_seeds=list(tried) if place else []
    )


def _unmoved_by_seed(
    build: Callable[[int], torch.nn.Module],
    seed: int,
    expected: Mapping[str, str],
    adapter: str | None,
    trainable: Collection[str],
) -> list[Problem]:
    """Tensors that are drawn, and are the same from another seed as well, if all are the same.

    Drawn are those that follow from the state of the generators: with nobody setting a seed, they
    are others from one state to the next.  What is computed from the base's weights, or drawn by a
    generator of its own, is the same, and no seed is missing there.
    """
    other = seed - 1 if seed > 0 else seed + 1
    with seeded(_SEED):
        if _digests(build(other), adapter, trainable) != expected:
            return []
    first, second = (_unseeded(build, seed, state) for state in (_SEED, _OTHER_SEED))
    if {**first, **expected} != {**second, **expected}:
        return []  # the base is drawn as well, and what is computed from it follows
    found, wanted = f"the same bits from the seeds {seed} and {other}", "other bits"
    return [
        Problem(name, found, wanted, _NOT_READ)
        for name in expected
        if first.get(name) != second.get(name)
    ]


def _unseeded(build: Callable[[int], torch.nn.Module], seed: int, state: int) -> dict[str, str]:
    """Fingerprints of all tensors, with the generators in this state and nobody setting a seed."""
    with seeded(state), _nobody_seeding():
        return {name: fingerprint(tensor) for name, tensor in named_tensors(build(seed))}


@contextlib.contextmanager
def _nobody_seeding() -> Iterator[None]:
    """Setting a seed of Python, numpy or torch has no effect.

    Within ``torch.random.fork_rng`` it has: what is drawn there is what its author meant to repeat.
    """
    numpy, forks = sys.modules.get("numpy"), _Forks(torch.random.fork_rng)
    setters: list[tuple[Any, str]] = [(random, "seed"), (torch, "manual_seed")]
    setters += [(torch.random, "manual_seed"), (torch.cuda, "manual_seed"),
                (torch.cuda, "manual_seed_all")]  # fmt: skip
    setters += [(numpy.random, "seed")] if numpy else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", forks.fork))
        for module, name in setters:
            no_seed = forks.or_nothing(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, no_seed))
        yield


class _Forks:
    """Knows whether the generators' state is one that is thrown away again."""

    def __init__(self, fork: Callable[..., Any]) -> None:
        self._fork, self._open = fork, 0

    @contextlib.contextmanager
    def fork(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """``torch.random.fork_rng``."""
        self._open += 1
        try:
            with self._fork(*args, **kwargs):
                yield
        finally:
            self._open -= 1

    def or_nothing(self, setter: Callable[..., Any]) -> Callable[..., Any]:
        """``setter``, which does nothing outside of a fork."""

        def set_seed(*args: Any, **kwargs: Any) -> Any:
            # What torch.manual_seed returns; nobody asks what the others do.
            return setter(*args, **kwargs) if self._open else torch.default_generator

        return set_seed


_NOT_READ = (
    "it is drawn, and not from the seed that was given: something sets a seed of its own before the"
    " adapter is initialised"
)
_SEED_TOO_LATE = (
    "the seed is set after the adapter was initialised, or not at all: set it before get_peft_model"
)
_HASHED = (
    "initial values follow from hash() of a name or from the order of a set: derive seeds from"
    " hashlib, and sort"
)


def _unlike(
    found: Mapping[str, str], expected: Mapping[str, str], when: str, cause: str
) -> Iterator[Problem]:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield Problem(name, f"other bits {when}", "the same bits", cause)


def _digests(
    model: torch.nn.Module, adapter: str | None, trainable: Collection[str]
) -> dict[str, str]:
    """Fingerprints of what the adapter trains and of every other tensor under its name."""
    declared = declare(model, adapter, trainable)
    return {
        name: fingerprint(tensor)
        for name, tensor in named_tensors(declared.model)
        if name in declared.trainable or declared.adapter in name.split(".")
    }


def _place_of(build: Callable[..., Any]) -> dict[str, str] | None:
    """Where a fresh process finds a function; None where it cannot."""
    name, module = getattr(build, "__qualname__", ""), getattr(build, "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None)
    if not name or "<" in name or not module or file is None:
        return None
    return {"module": module, "file": os.path.abspath(file), "name": name}


def _in_fresh_process(job: Mapping[str, Any], hash_seed: int, timeout: float) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }
    code = "from pytest_lora.checks.repeatable import answer; answer()"
    with tempfile.TemporaryDirectory(prefix="pytest-lora-") as folder:
        result = Path(folder) / "digests.json"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                input=json.dumps({**job, "result": str(result)}),
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CannotRun(f"building the model took a fresh process over {timeout:g} s") from None
        if done.returncode or not result.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise CannotRun(f"a fresh process could not build the model: {last[:300]}")
        digests: dict[str, str] = json.loads(result.read_text(encoding="utf-8"))
        return digests


def answer() -> None:
    """What the fresh process does: build the model a job on standard input names, and write the
    fingerprints of its adapter.
    """
    job = json.load(sys.stdin)
    build: Any = _imported(job["module"], job["file"])
    for part in job["name"].split("."):
        build = getattr(build, part)
    found = _digests(build(job["seed"]), job["adapter"], job["trainable"])
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


def _imported(name: str, file: str) -> ModuleType:
    """The module by its name; by its file where the name leads nowhere or elsewhere."""
    try:
        module = importlib.import_module(name)
        if os.path.abspath(module.__file__ or "") == file:
            return module
    except ImportError:
        pass
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise CannotRun(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CannotRun(f"{file}: {one_line(error)}") from error
    return module
