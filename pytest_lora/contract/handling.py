"""Laws about handling adapters: what an operation may not touch, and what has to be refused.

All of them are comparisons, bit for bit, of what is there before with what is there after, so that
nothing is known here of any method, and no rounding is allowed for.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pytest_lora.checks.bits import how_different, same_bits
from pytest_lora.contract.dialects import FIRST, Case, Peft
from pytest_lora.contract.experiment import Experiment, is_refusal
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable

__all__ = [
    "hold_deleted",
    "hold_parameters",
    "hold_rates",
    "hold_round_trip",
    "hold_taken_names",
    "hold_told_of_nothing",
    "hold_unload",
    "known",
    "refused_in_turn",
    "renew",
    "require_peft",
    "state_of",
]

Before = Mapping[str, tuple[Any, Any, bool]]
"""Parameters by name: the object, a copy of its numbers, its flag."""
SECOND = "one2"
NOWHERE = "no_such_module"

_PARTS = """
def parts(net):
    kinds = ("_parameters", "_buffers", "_modules")
    return {(name, part) for name, module in net.named_modules()
            for part in (*vars(module), *(p for kind in kinds for p in getattr(module, kind)))}
"""


def require_peft(it: Experiment, why: str) -> Peft:
    """The dialect.

    Raises:
        NotApplicable: a class of one's own is tried.
    """
    if not isinstance(it.dialect, Peft):
        raise NotApplicable(why)
    return it.dialect


# ------------------------------------------------------------------------------ what is kept


def hold_parameters(it: Experiment) -> None:
    """Merging, unmerging and switching leave every parameter the object it was.

    An optimizer holds the objects, a training loop relies on the flags.  LoRA is tried in half
    precision, factors included: a merge may have to compute in another format there.
    """
    if isinstance(it.dialect, Peft) and it.dialect.method.is_lora:
        it.trial.run("model.bfloat16()\nx = x.bfloat16() if x.is_floating_point() else x")
    it.trial.run("before = {name: (p, p.detach().clone(), p.requires_grad)"
                 " for name, p in model.named_parameters()}")  # fmt: skip
    own = {id(tensor) for tensor in it.own.values()}
    before: Before = it.trial.names["before"]
    adapter = {name for name, (parameter, *_) in before.items() if id(parameter) not in own}
    for operation in ("merge", "unmerge", "disable", "enable"):
        if _done(it, operation):
            _same_parameters(it, before, adapter, operation)


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


def hold_unload(it: Experiment) -> None:
    """What comes out of ``unload`` is the model that went in: its output, its parts, its names."""
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


_RATES = """
optimizer = create_loraplus_optimizer(
    model, torch.optim.SGD, lr=2.0, loraplus_lr_ratio=8.0, loraplus_lr_embedding=0.5)
names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
pairs = [(names.get(id(p)), group["lr"]) for group in optimizer.param_groups
         for p in group["params"]]
rates = dict(pairs)
"""


def hold_rates(it: Experiment) -> None:
    """The optimizer of LoRA+ holds what trains, once, at the rates that were declared."""
    require_peft(it, "only PEFT makes an optimizer of LoRA+")
    known(it, "from peft.optimizers import create_loraplus_optimizer")
    it.must(_RATES)
    pairs: list[tuple[str, float]] = it.trial.names["pairs"]
    embedding = it.case.network == "embedding"
    for name in it.trial.names["names"].values():
        usual = 16.0 if ".lora_B." in name else 2.0
        declared = 0.5 if embedding else usual
        found = [rate for other, rate in pairs if other == name]
        if found != [declared]:
            raise it.trial.broken(
                f"{name} is in the optimizer with the rates {found}; declared is {declared}",
                f"assert rates.get({name!r}) == {declared}, rates",
                f"assert len(pairs) == {len(it.trial.names['names'])}, pairs",
            )


_LEFT = """
def left(name):
    kinds = ("_modules", "_parameters", "_buffers")
    return sorted({{
        f"{{where}}.{{key}}".lstrip(".")
        for where, module in model.named_modules()
        for key, value in {{**vars(module), **module._modules}}.items()
        if key not in kinds and hasattr(value, "keys") and name in value.keys()
    }})
before = left({name!r})
"""


def hold_deleted(it: Experiment) -> None:
    """Nothing that modules keep by the names of adapters is kept of a deleted one.

    Who adds another adapter of that name later would find it again.
    """
    require_peft(it, "what a class of one's own keeps, it keeps where it likes")
    it.trial.run(_LEFT.format(name=SECOND))
    it.say("add", SECOND, it.case.other())
    it.output()
    it.say("delete", SECOND)
    left = sorted(set(it.trial.value(f"left({SECOND!r})")) - set(it.trial.names["before"]))
    if left:
        raise it.trial.broken(
            f"deleted, and still a key of {left[0]} and {len(left) - 1} more",
            f"assert not left({SECOND!r}), left({SECOND!r})",
        )


# ------------------------------------------------------------------------------ what is refused


def hold_taken_names(it: Experiment) -> None:
    """An adapter of a name that is taken is refused, or ignored: the one that is there stays."""
    dialect = require_peft(it, "what a name that is taken means is up to a class of one's own")
    settings = f"model.peft_config[{FIRST!r}].to_dict()"
    it.trial.run(f"first, settings = run(), {settings}")
    done = it.may("add", FIRST, it.case.other())
    when = f"an adapter of the same name was {'added' if done else 'refused'}"
    it.expect_bits(it.trial.names["first"], "first", when)
    if it.trial.value(settings) != it.trial.names["settings"]:
        raise it.trial.broken(
            f"{when}: the configuration of {dialect.name} is the new one's now",
            f"assert {settings} == settings",
        )


def hold_told_of_nothing(it: Experiment) -> None:
    """An adapter none of whose targets exists is refused or told, be it the first or not."""
    dialect = require_peft(it, "a class of one's own is told which modules to adapt by name")
    if not dialect.method.accepts("target_modules"):
        raise NotApplicable("its configuration has no target_modules")
    config = dialect.config(replace(it.case.other(), chosen=(NOWHERE,)))
    _told(it, f"peft.get_peft_model(Net(), {config})", "an adapter")
    _told(it, f"model.add_adapter({SECOND!r}, {config})", "a second adapter")
    it.expect_bits(it.trial.names["first"], "first", "after an adapter of no module")


def _told(it: Experiment, code: str, which: str) -> None:
    with warnings.catch_warnings():
        it.trial.run(
            f"import warnings\nwarnings.filterwarnings('error', message='(?s).*{NOWHERE}')"
        )
        try:
            it.trial.run(code)
        except Refused as refusal:
            if NOWHERE not in str(refusal.error) and not is_refusal(refusal.error):
                raise it.outcome(refusal) from None
            it.trial.drop_refused()
            return
    raise it.trial.broken(
        f"{which}: no module is called {NOWHERE!r}, and nobody is told",
        "assert False, 'there was no such warning'",
    )


def known(it: Experiment, code: str) -> None:
    """Import what not every PEFT has.

    Raises:
        NotApplicable: this one has not.
    """
    try:
        it.trial.run(code)
    except Refused as refusal:
        raise NotApplicable(f"this PEFT has no such thing: {refusal}") from None


def refused_in_turn(it: Experiment, names: Sequence[str], reason: NotApplicable) -> None:
    """Adapters that are refused together are not mixed one after the other either.

    The second one's merge is refused, or does nothing, or takes the place of the first one's.
    """
    if not it.is_peft:
        return
    it.say("activate", names[-1])
    it.trial.run("alone = run()")
    it.say("activate", names[0])
    for step, name in enumerate(names):
        try:
            it.trial.run(f"model.merge_adapter(adapter_names=[{name!r}])\nmerged{step} = run()")
        except Refused:
            return
    found = it.trial.value("merged1")
    if all(how_different(found, it.trial.value(sound)) for sound in ("merged0", "alone")):
        raise it.trial.broken(
            f"{' and '.join(names)} are refused together, and merged one after the other they are"
            f" mixed without a word ({reason})",
            "assert torch.equal(merged1, merged0) or torch.equal(merged1, alone)",
        )


# ------------------------------------------------------------------------------ what is read back


def hold_round_trip(it: Experiment) -> None:
    """What is read out of a model can be read into another one, whatever its modules are called.

    In half of the examples the adapter has a setting that is not the usual one.
    """
    dialect = require_peft(it, "its files are its own affair")
    it.attach()
    switches = dialect.method.switches()
    draw = random.Random(it.case.seed)
    if switches and draw.randrange(2):
        key, code = draw.choice(switches)
        it.case = replace(it.case, options={**it.case.options, key: code})
        _attach_anew(it, dialect)
    it.trial.run(f"{dialect.seeded(0)}\nsaved = run()")
    it.trial.run(f"state = {state_of(FIRST)}")
    renew(it, dialect, it.case, FIRST)
    it.trial.run(f"told = peft.set_peft_model_state_dict(model, state, adapter_name={FIRST!r})")
    unexpected = it.trial.value("getattr(told, 'unexpected_keys', [])")
    if unexpected:
        raise it.trial.broken(
            f"{unexpected[0]} and {len(unexpected) - 1} more that were saved belong nowhere",
            "assert not told.unexpected_keys, told.unexpected_keys",
        )
    it.trial.run(dialect.seeded(0))
    it.expect_bits(it.trial.names["saved"], "saved", "read into another model")


def _attach_anew(it: Experiment, dialect: Peft) -> None:
    """With other settings; what keeps them from working is none of this law's business."""
    try:
        dialect.build(it.trial, it.case)
        dialect.attach(it.trial, it.case)
        it.trial.value("run()")
    except Exception as error:
        raise NotApplicable(f"not with these settings: {error}") from None
    dialect.fill(it.trial, FIRST, it.case.seed + 7)


def state_of(name: str) -> str:
    """The expression for copies of the tensors that are saved of an adapter."""
    read = f"peft.get_peft_model_state_dict(model, adapter_name={name!r}"
    return f"{{key: value.clone() for key, value in {read}, save_embedding_layers=False).items()}}"


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
