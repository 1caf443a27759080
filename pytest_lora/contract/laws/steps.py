"""What laws of several modules do on their way: what they need, build again, and read off."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_lora.checks.bits import same_bits
from pytest_lora.checks.merge_layers import tuner_layers
from pytest_lora.contract.dialects import FIRST, SECOND, Case, Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.law import rewriting
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable

if TYPE_CHECKING:
    import torch

__all__ = [
    "COME_AND_GO",
    "HASH_SEEDS",
    "NOWHERE",
    "adapted_modules",
    "anew",
    "attach_layers",
    "configure",
    "is_plain",
    "known",
    "layers_of",
    "own_terms",
    "renew",
    "require_effect",
    "require_peft",
    "require_unmerged",
    "require_untouched_base",
    "seed_again",
    "state_of",
]

HASH_SEEDS = 3
"""Values of PYTHONHASHSEED that fresh processes are started with; each costs seconds, once."""
NOWHERE = "no_such_module"

COME_AND_GO = (
    "first = run()",
    f"model.add_adapter({SECOND!r}, config)",
    f"model.set_adapter({SECOND!r})",
    "fill(1)",
    "run()",
    f"model.set_adapter({FIRST!r})",
    "print('after the second:', (run() - first).abs().max())",
    f"model.delete_adapter({SECOND!r})",
    "print('after deleting it:', (run() - first).abs().max())",
)
"""What a script shows of a second adapter that comes, is used, and goes."""


# ------------------------------------------------------------------------------ what is needed


def require_peft(it: Experiment, why: str = "it is about PEFT's settings and calls") -> Peft:
    """PEFT's dialect.

    Raises:
        NotApplicable: a class of one's own is tried.
    """
    if not isinstance(it.dialect, Peft):
        raise NotApplicable(why)
    return it.dialect


def require_untouched_base(it: Experiment) -> None:
    """Raise ``NotApplicable`` where attaching changes the base by design."""
    if it.dialect.rewrites:
        raise NotApplicable(rewriting(it.dialect))


def require_unmerged(it: Experiment) -> None:
    """Raise ``NotApplicable`` where a class merges in eval mode, and rounds whenever it does."""
    if it.is_peft:
        return
    kept = {name: tensor.detach().clone() for name, tensor in it.own.items()}
    it.trial.run("model.train()")
    moved = any(not same_bits(it.own[name].detach(), tensor) for name, tensor in kept.items())
    it.trial.run("model.eval()")
    if moved:
        raise NotApplicable("it merges in eval mode, which rounds each time: see train_and_eval")


def require_effect(it: Experiment, output: torch.Tensor) -> None:
    """Raise ``NotApplicable`` if ``output`` is the base's, bit for bit."""
    if same_bits(output, it.base):
        raise NotApplicable("the adapter does not change the output of these inputs")


def known(it: Experiment, code: str) -> None:
    """Import what not every PEFT has.

    Raises:
        NotApplicable: this one has not.
    """
    try:
        it.trial.run(code)
    except Refused as refusal:
        raise NotApplicable(f"this PEFT has no such thing: {refusal}") from None


def is_plain(it: Experiment) -> bool:
    """Whether the output is known to be ``W x + s B A x``."""
    return it.dialect.plain and it.reference is not None


# ------------------------------------------------------------------------------ what is built again


def configure(it: Experiment, **options: str) -> None:
    """Give the configuration further settings."""
    if not isinstance(it.dialect, Peft):
        raise NotApplicable("a class of one's own is told which modules to adapt by name")
    for option in options:
        if not it.dialect.method.accepts(option):
            raise NotApplicable(f"its configuration has no {option}")
    it.case = replace(it.case, options={**it.case.options, **options})


def attach_layers(it: Experiment, **options: str) -> dict[str, Any]:
    """Attach with further settings; the adapted modules by name."""
    configure(it, **options)
    it.attach(fill=False)
    return adapted_modules(it)


def anew(it: Experiment, **changes: Any) -> None:
    """The bare network once more, for a case with ``changes``."""
    it.case = replace(it.case, **changes)
    it.dialect.build(it.trial, it.case)


def renew(it: Experiment, dialect: Peft, case: Case, name: str, *, seed: int | None = None) -> None:
    """Another base model of the same weights (or of those of ``seed``), with an adapter.

    What an adapter draws at random and does not save is another number there.
    """
    dialect.build(it.trial, replace(case, seed=it.case.seed if seed is None else seed))
    it.trial.run(dialect.seeded(case.seed + 1))
    try:
        dialect.attach(it.trial, case, name)
    except Refused as refusal:
        raise it.outcome(refusal) from None


def seed_again(it: Experiment) -> None:
    """What is initialised next at random is the same each time."""
    it.trial.run(it.dialect.seeded(it.case.seed))


# ------------------------------------------------------------------------------ what is read off


def own_terms(it: Experiment) -> dict[str, Any]:
    """The first adapter's terms, with the base weights they are added to as they are now."""
    terms = it.terms()
    if it.dialect.rewrites and it.reference is not None:
        it.reference.rebase(it.own)
    return terms


def layers_of(it: Experiment) -> list[tuple[str, Any]]:
    """PEFT's layers by name.

    Raises:
        NotApplicable: it wraps none, so that a law about each of them would say nothing.
    """
    layers = list(tuner_layers(it.model))
    if not layers:
        raise NotApplicable("it wraps no layer")
    return layers


def adapted_modules(it: Experiment) -> dict[str, Any]:
    """PEFT's layers by name, ``adapted`` in the script."""
    it.trial.run("from peft.tuners.tuners_utils import BaseTunerLayer")
    it.trial.run(
        "adapted = {n: m for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)}"
    )
    adapted: dict[str, Any] = it.trial.names["adapted"]
    return adapted


def state_of(name: str) -> str:
    """The expression for copies of the tensors that are saved of an adapter."""
    read = f"peft.get_peft_model_state_dict(model, adapter_name={name!r}"
    return f"{{key: value.clone() for key, value in {read}, save_embedding_layers=False).items()}}"
