"""Running somebody's training step, and watching the gradients it makes.

A step is a callable that is given the model and does one step of training, or a
``transformers.Trainer`` (or a class derived from it), recognised by what it can do.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import one_line, quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Gradient",
    "GradientWatch",
    "Step",
    "Stepper",
    "as_number",
    "filled",
    "is_trainer",
    "kept",
    "seeded",
]

Step: TypeAlias = "Callable[[Any], Any] | Any"
"""``step(model) -> loss``, or a ``transformers.Trainer``."""

_ARGUMENTS: Mapping[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "disable_tqdm": True,
}
"""What a Trainer does besides training, off."""


def is_trainer(step: Any) -> bool:
    """Whether ``step`` is a transformers Trainer, TRL's included, to all appearances."""
    wanted = ("training_step", "train", "args", "create_optimizer")
    return all(hasattr(step, name) for name in wanted)


class Stepper:
    """A training step that can be run a number of times.

    Args:
        step: see :data:`Step`.
        model: what a callable is given; a Trainer brings its own.
    """

    def __init__(self, step: Step, model: torch.nn.Module | None) -> None:
        given: Any = step
        self.trainer: Any = given if is_trainer(given) else None
        if self.trainer is None and not callable(step):
            raise UsageError(
                f"a step is a callable step(model) -> loss or a Trainer, not {type(step).__name__}"
            )
        if model is None:
            if self.trainer is None:
                raise UsageError("a step that is a callable needs the model it trains")
            model = given.model
        self.model: Any = model
        self._step: Any = given

    def run(
        self,
        count: int,
        *,
        one_batch: bool = False,
        resume_from: str | None = None,
        **arguments: Any,
    ) -> list[float]:
        """Do ``count`` optimizer steps and return their losses; NaN where a step returns none.

        Args:
            count: steps.
            one_batch: let a Trainer see nothing but its first batch, over and over; a callable is
                expected to do so by itself.
            resume_from: a checkpoint's folder for a Trainer to go on from.
            arguments: training arguments of a Trainer to replace meanwhile.

        Raises:
            CannotRun: the Trainer raised.
        """
        if self.trainer is None:
            return [as_number(self._step(self.model)) for _ in range(count)]
        with self._prepared(count, one_batch, arguments) as losses, quiet():
            try:
                self.trainer.train(resume_from_checkpoint=resume_from)
            except Exception as error:
                raise CannotRun(f"{type(self.trainer).__name__}.train(): {one_line(error)}") from (
                    error
                )
        return losses

    @contextlib.contextmanager
    def _prepared(
        self, count: int, one_batch: bool, arguments: Mapping[str, Any]
    ) -> Iterator[list[float]]:
        """A Trainer that does ``count`` steps and nothing else, put back afterwards."""
        trainer: Any = self.trainer
        args = copy.copy(trainer.args)
        for name, value in {**_ARGUMENTS, "max_steps": count, **arguments}.items():
            setattr(args, name, value)
        changed: dict[str, Any] = {"args": args, "_train_batch_size": args.train_batch_size}
        if one_batch:
            size = args.train_batch_size * args.gradient_accumulation_steps
            changed["train_dataset"] = _first(trainer.train_dataset, size)
        # What train() makes anew, so that no moments and no schedule are left behind.
        made = ("optimizer", "lr_scheduler", "state")
        before = {name: getattr(trainer, name) for name in changed if hasattr(trainer, name)}
        left = {name: getattr(trainer, name) for name in made if hasattr(trainer, name)}
        micro: list[float] = []
        losses: list[float] = []
        inner = trainer.training_step

        def training_step(*given: Any, **named: Any) -> Any:
            loss = inner(*given, **named)
            micro.append(as_number(loss))
            return loss

        try:
            for name in before:
                setattr(trainer, name, changed[name])
            trainer.training_step = training_step
            yield losses
        finally:
            del trainer.training_step
            for name, value in {**before, **left}.items():
                setattr(trainer, name, value)
        losses += _grouped(micro, args.gradient_accumulation_steps)


def _grouped(micro: Sequence[float], size: int) -> list[float]:
    """Losses of micro-batches summed up to optimizer steps."""
    return [math.fsum(micro[start : start + size]) for start in range(0, len(micro), size)]


def _first(dataset: Any, size: int) -> Any:
    if not hasattr(dataset, "__len__"):
        raise CannotRun("a Trainer with a dataset without length has no first batch to repeat")
    count = min(size, len(dataset))
    if hasattr(dataset, "select"):
        return dataset.select(range(count))
    return torch.utils.data.Subset(dataset, range(count))


def as_number(loss: Any) -> float:
    """A loss as a number: a tensor, a float, or an output that has one."""
    loss = getattr(loss, "loss", loss)
    if isinstance(loss, torch.Tensor):
        return float(loss.detach().float().mean())
    return float(loss) if isinstance(loss, int | float) else math.nan


# ------------------------------------------------------------------------------ gradients


@dataclass(slots=True)
class Gradient:
    """What was seen of one parameter's gradient during a step.

    Attributes:
        calls: how often something was added to it.
        finite: whether it was finite every time.
        zero: whether it was zero everywhere, every time.
        value: the gradient as it stood after the last addition, where it was asked for.
        norms: Frobenius norms after each addition since it was last empty, where asked for.
        reached: which of its numbers were other than zero at least once, where asked for.
    """

    calls: int = 0
    finite: bool = True
    zero: bool = True
    value: torch.Tensor | None = None
    norms: tuple[float, ...] = ()
    reached: torch.Tensor | None = None


def _either(seen: torch.Tensor | None, now: torch.Tensor) -> torch.Tensor:
    """Both together, or the later one if they are not of one place and shape."""
    return seen | now if seen is not None and is_beside(seen, now) else now


def is_beside(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors can be compared number by number: of one shape, on one device."""
    return (one.shape, one.device) == (other.shape, other.device)


class GradientWatch:
    """Gradients as they come in, whatever the step does with them afterwards.

    Hooks run after each accumulation, so that clipping, ``zero_grad`` and the optimizer's step,
    which the watched code is free to do, hide nothing.
    """

    def __init__(
        self,
        named: Mapping[str, torch.Tensor],
        *,
        keep: bool = False,
        reach: Collection[str] = (),
    ) -> None:
        self.seen = {name: Gradient() for name in named}
        self._named, self._keep, self._reach = named, keep, reach
        self._handles: list[Any] = []

    def __enter__(self) -> GradientWatch:
        for name, tensor in self._named.items():
            if tensor.requires_grad:
                hook = self._hook(self.seen[name], name in self._reach)
                handle = tensor.register_post_accumulate_grad_hook(hook)
                self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, into: Gradient, reach: bool) -> Callable[[torch.Tensor], None]:
        def look(tensor: torch.Tensor) -> None:
            grad = tensor.grad
            if grad is None:
                return
            into.calls += 1
            into.finite = into.finite and bool(grad.isfinite().all())
            into.zero = into.zero and not bool(grad.any())
            if reach:
                into.reached = _either(into.reached, grad != 0)
            if self._keep:
                into.value = grad.detach().clone()
                into.norms = (*into.norms, float(grad.double().norm()))

        return look


# ------------------------------------------------------------------------------ keeping things


@contextlib.contextmanager
def kept(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put the tensors' values and gradients back afterwards; the copy is as large as they are."""
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    grads = {name: tensor.grad for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])
                tensor.grad = grads[name]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All random numbers from ``seed``, and the generators as they were afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    numpy = sys.modules.get("numpy")
    python, array = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=list(devices)):
        try:
            _seed_all(seed)
            yield
        finally:
            random.setstate(python)
            if numpy is not None and array is not None:
                numpy.random.set_state(array)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


@contextlib.contextmanager
def filled(tensors: Mapping[str, torch.Tensor], seed: int = 0) -> Iterator[tuple[str, ...]]:
    """Tensors that are zero everywhere get values for a while; yields their names.

    A product has no gradient in one factor where another is zero, so that a fresh LoRA says nothing
    about ``lora_A``.  The values are normal with variance one over the size of a row, which leaves
    the size of what passes through a matrix as it is.
    """
    empty = {name: tensor for name, tensor in tensors.items() if not bool(tensor.any())}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in empty.values():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise / math.sqrt(_row_size(tensor)))
    try:
        yield tuple(empty)
    finally:
        with torch.no_grad():
            for tensor in empty.values():
                tensor.zero_()


def _row_size(tensor: torch.Tensor) -> int:
    return max(1, tensor.numel() // tensor.shape[0]) if tensor.dim() > 1 else 1
