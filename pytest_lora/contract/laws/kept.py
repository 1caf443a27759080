"""Laws about what is left alone: weights of the base, parameters and their flags, the network, and
the room that there is.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest_lora as lora
from pytest_lora.checks.bits import how_different, same_bits
from pytest_lora.contract.dialects import FIRST, SECOND, OwnClass, Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.law import LawTable
from pytest_lora.contract.laws.steps import COME_AND_GO, require_peft, require_untouched_base
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable
from pytest_lora.numerics.fingerprint import fingerprint

__all__ = ["LAWS"]

_TRAINABLE = "print([name for name, p in model.named_parameters() if p.requires_grad])"
Before = Mapping[str, tuple[Any, Any, bool]]
"""Parameters by name: the object, a copy of its numbers, its flag."""
_law = LawTable()
LAWS = _law.laws


@_law("linear", "saved", "llama", "attention")
def frozen_weights(it: Experiment) -> None:
    """No parameter or buffer of the base changes, whatever is done with the adapter."""
    require_untouched_base(it)
    it.attach()
    if it.is_peft:
        it.check(lora.assert_frozen_weights, *COME_AND_GO)
        return
    it.trial.run("model.train()")  # a class that merges in eval mode has its weights apart here
    before = {name: fingerprint(tensor.detach()) for name, tensor in it.own.items()}
    it.trial.run(
        """
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()
        """
    )
    for name, tensor in it.own.items():
        if fingerprint(tensor.detach()) != before[name] and not _is_statistic(name):
            raise it.trial.broken(
                f"a training step changes {name} of the base",
                _TRAINABLE,
            )


def _is_statistic(name: str) -> bool:
    """Running statistics of a batch norm are the training loop's business."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@_law("linear", "conv1d", "embedding", "convolution", sampled=True)
def parameters_kept(it: Experiment) -> None:
    """Merging, unmerging and switching leave each parameter the object, bits and flag it was.

    An optimizer holds the objects, a training loop relies on the flags.  LoRA is tried in half
    precision, factors included: a merge may have to compute in another format there.
    """
    it.attach()
    if isinstance(it.dialect, Peft) and it.dialect.method.is_lora:
        it.trial.run("model.bfloat16()\nx = x.bfloat16() if x.is_floating_point() else x")
    it.trial.run("before = {name: (p, p.detach().clone(), p.requires_grad)"
                 " for name, p in model.named_parameters()}")  # fmt: skip
    own = {id(tensor) for tensor in it.own.values()}
    before: Before = it.trial.names["before"]
    adapter = {name for name, (parameter, *_) in before.items() if id(parameter) not in own}
    for operation in ("merge", "unmerge", "disable", "enable"):
        if operation == "merge" and not _may_unmerge(it):
            continue  # what is merged for good may be gone, or frozen
        if _done(it, operation):
            _same_parameters(it, before, adapter, operation)


def _may_unmerge(it: Experiment) -> bool:
    return not isinstance(it.dialect, OwnClass) or it.dialect.offers("unmerge")


def _done(it: Experiment, operation: str) -> bool:
    try:
        it.say(operation)
    except NotApplicable:
        return False
    it.output()
    return True


def _same_parameters(it: Experiment, before: Before, adapter: set[str], when: str) -> None:
    now: dict[str, Any] = dict(it.model.named_parameters())
    there = {id(parameter) for parameter in now.values()}
    where = f"after {when}"
    for name in sorted(before):
        kept, bits, flag = before[name]
        # Some methods merge by changing places, so that names change places as well.
        if id(kept) not in there or (when != "merge" and now.get(name) is not kept):
            raise it.trial.broken(
                f"{where}: {name} is another object: an optimizer that holds the old one goes on"
                " with numbers that nobody uses",
                f"assert dict(model.named_parameters()).get({name!r}) is before[{name!r}][0]",
            )
        if name in adapter and not same_bits(kept.detach(), bits):
            raise it.trial.broken(
                f"{where}: {name} of the adapter: {how_different(kept.detach(), bits)}",
                f"p, bits, _ = before[{name!r}]",
                "assert torch.equal(p, bits)",
            )
        if when == "enable" and kept.requires_grad is not flag:
            raise it.trial.broken(
                f"{where}: {name} {'is frozen' if flag else 'trains'}, which it did not before",
                f"assert before[{name!r}][0].requires_grad is {flag}",
            )


@_law("linear", "saved", "llama")
def requires_grad(it: Experiment) -> None:
    """What trains is the active adapter, all of it and nothing else, after every call."""
    it.trial.run("own = dict(net.named_parameters())")
    it.attach()
    if it.is_peft:
        it.check(lora.assert_requires_grad, _TRAINABLE)
        return
    if isinstance(it.dialect, OwnClass):
        _own_training(it, it.dialect)


def _own_training(it: Experiment, dialect: OwnClass) -> None:
    """For a class, after each call it offers; of an adapter that is at rest nothing is asked."""
    _trains(it, dialect, FIRST, "attached")
    alone = [(("merge",), ""), (("unmerge",), FIRST), (("disable",), ""), (("enable",), FIRST),
             (("scale", FIRST, 3.0), FIRST)]  # fmt: skip
    several = [(("add", SECOND, it.case.other()), ""), (("activate", SECOND), SECOND),
               (("activate", FIRST), FIRST), (("delete", SECOND), FIRST)]  # fmt: skip
    calls: list[tuple[tuple[Any, ...], str]] = [*alone]
    calls += several if dialect.offers("add") else []
    for (operation, *given), active in calls:
        if operation == "merge" and not _may_unmerge(it):
            continue
        if dialect.offers(operation):
            it.say(operation, *given)
            _trains(it, dialect, active, f"after {operation}")


def _trains(it: Experiment, dialect: OwnClass, active: str, when: str) -> None:
    """Nothing of the base trains, and every factor of the adapter ``active``, if one is named."""
    loose = [name for name, tensor in it.own.items() if tensor.requires_grad]
    if loose:
        raise it.trial.broken(
            f"{when}: {loose[0]} of the base trains",
            f"assert not own[{loose[0]!r}].requires_grad",
        )
    pairs = dialect.live(active) if active else ""
    if pairs and not all(f.requires_grad for pair in it.trial.value(pairs).values() for f in pair):
        raise it.trial.broken(
            f"{when}: a factor of the adapter {active!r} does not train",
            f"assert all(f.requires_grad for pair in {pairs}.values() for f in pair)",
        )


@_law("linear", "saved", "llama", sampled=True)
def unloaded(it: Experiment) -> None:
    """Unloaded, the model is the base again: its output, its modules, its attributes."""
    require_untouched_base(it)
    require_peft(it, "only PEFT has unload")
    it.trial.run(_PARTS)
    it.trial.run("before = parts(net)")
    it.attach()
    if it.case.net.saved:
        # A trained copy that is in use stays in use; an adapter without one leaves the original.
        it.add(SECOND, replace(it.case.other(), options={"modules_to_save": "None"}))
    try:
        it.trial.run("freed = model.unload()")
    except Refused as refusal:
        raise it.outcome(refusal, always=it.has_to_run) from None
    found = it.output(it.case.net.call.replace("model(", "freed("))
    difference = how_different(found, it.base)
    if difference:
        raise it.trial.broken(
            f"what was unloaded is not the base: {difference}",
            "assert torch.equal(y, base), (y - base).abs().max()",
        )
    _same_parts(it)


def _same_parts(it: Experiment) -> None:
    before, after = it.trial.names["before"], it.trial.value("parts(freed)")
    for pairs, what in ((after - before, "is left in"), (before - after, "is missing in")):
        if pairs:
            where, part = min(pairs)
            raise it.trial.broken(
                f"{part!r} {what} {where or 'the model'} after unload",
                "assert parts(freed) == before, parts(freed) ^ before",
            )


_PARTS = """
def parts(net):
    kinds = ("_parameters", "_buffers", "_modules")
    return {(name, part) for name, module in net.named_modules()
            for part in (*vars(module), *(p for kind in kinds for p in getattr(module, kind)))}
"""


# ------------------------------------------------------------------------------ memory


@_law("linear", "saved", sampled=True)
def memory_given_back(it: Experiment) -> None:
    """What comes and goes again and again piles up no memory: adapters, merges, training, wrappers.

    Bytes of the tensors that Python knows; one that takes another's place adds none.
    """
    it.attach()
    it.trial.run(_HELD)
    cycles = {"training": ("train",), "an adapter": ("add", "activate", "train", "back", "delete"),
              "merging": ("merge", "unmerge") if _may_unmerge(it) else (),
              "attaching": ("unload",)}  # fmt: skip
    with _nothing_else_to_look_through():
        tried = [what for what, steps in cycles.items() if _piles_up_nothing(it, what, steps)]
    if tried == ["training"] and not it.is_peft:
        raise NotApplicable("it has no merge, and no adapters that come and go")


@contextlib.contextmanager
def _nothing_else_to_look_through() -> Iterator[None]:
    """What is there already takes no part in collections, which would cost a second and more.

    Where somebody has frozen things before and wants them to stay so, what is there now stays with
    them: a network of a few layers.
    """
    others = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not others:
            gc.unfreeze()


def _piles_up_nothing(it: Experiment, what: str, steps: Sequence[str]) -> bool:
    """Whether the steps can be carried out; the first time may fill caches."""
    if not steps:
        return False
    it.trial.run("bytes_held = []")
    for _ in range(_TIMES):
        try:
            for step in steps:
                _step(it, step)
        except NotApplicable:
            return False
        it.trial.run("bytes_held.append(held())")
    sizes = it.trial.names["bytes_held"]
    grown = [after - before for before, after in itertools.pairwise(sizes)]
    if min(grown) > 0:
        raise it.trial.broken(
            f"{what}, and again: {min(grown)} bytes more are held each time",
            "assert not all(a < b for a, b in zip(bytes_held, bytes_held[1:])), bytes_held",
        )
    return True


_TIMES = 4
_HELD = """
import gc

def held():
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [*model.parameters(), *model.buffers()]  # and what else came since
    found += [t for t in gc.get_objects() if type(t) in kinds and not t.is_meta]
    parts = [t.untyped_storage() for t in found if t.layout == torch.strided]
    return sum({part.data_ptr(): part.nbytes() for part in parts}.values())
"""


def _step(it: Experiment, step: str) -> None:
    if step == "train":
        run = f"model.train()\ny = {it.case.net.call}\n"
        it.must(run + "y.sum().backward() if y.requires_grad else None\ndel y\nmodel.eval()")
        it.must("for p in model.parameters():\n    p.grad = None")
        return
    if step == "unload":
        _attach_again(it)
        return
    given = {"add": (SECOND, it.case.other()), "activate": (SECOND,), "back": (FIRST,),
             "delete": (SECOND,)}  # fmt: skip
    it.say("activate" if step == "back" else step, *given.get(step, ()))


def _attach_again(it: Experiment) -> None:
    """Take the adapter off the network, and put another one on; whether PEFT can is not asked."""
    dialect = require_peft(it)
    try:
        it.trial.run("net = model.unload()")
        dialect.attach(it.trial, it.case)
    except Refused as refusal:
        raise NotApplicable(f"not unloaded: {refusal}") from None
