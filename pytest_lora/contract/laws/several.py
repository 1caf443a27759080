"""Laws about several adapters of one model: side by side, in one another's place, come and gone.

What an adapter computes follows from its own settings and numbers.  Which other adapters there are,
or were, must not show.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import pytest_lora as lora
from pytest_lora.checks.bits import same_bits
from pytest_lora.contract.dialects import FIRST, SECOND, Case, OwnClass, Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.law import LawTable, not_mixed, not_usual_lora, rewriting
from pytest_lora.contract.laws.steps import (
    COME_AND_GO,
    is_plain,
    known,
    own_terms,
    renew,
    require_peft,
    require_unmerged,
    require_untouched_base,
    state_of,
)
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable

__all__ = ["LAWS"]

_law = LawTable()
LAWS = _law.laws


# ------------------------------------------------------------------------------ side by side


@_law("linear", "saved", "llama")
def isolation(it: Experiment) -> None:
    """Adding, using, swapping in and deleting another adapter leaves the first as it was."""
    require_untouched_base(it)
    it.attach()
    if it.is_peft:
        it.check(lora.assert_adapter_isolation, *COME_AND_GO)
        return
    require_unmerged(it)
    it.trial.run("first = run()")
    first, other = it.trial.names["first"], it.case.other()
    terms = it.terms()
    it.add(SECOND, other)
    it.expect([it.terms(SECOND, other)], "the second adapter")
    it.say("activate", FIRST)
    it.expect_bits(first, "first", "the first again, after the second")
    it.expect([terms], "the first again")
    it.say("delete", SECOND)
    it.expect_bits(first, "first", "after the second was deleted")


@_law("linear", "llama", sampled=True)
def mixed_batch(it: Experiment) -> None:
    """A batch whose rows use different adapters gives each row what its adapter alone gives."""
    if it.is_peft and not is_plain(it):
        _nearest_is_meant(it)
        return
    it.require_plain()
    it.attach()
    terms = own_terms(it)
    other = it.case.other()
    it.add(SECOND, other)
    bare = it.dialect.bare
    rows: dict[Any, list[Any]] = {FIRST: [terms], SECOND: [it.terms(SECOND, other)], bare: []}
    names = list(rows)[: len(it.x)]
    it.say("mixed", names)
    found, reference = it.trial.names["y"], it.require_plain()
    for row, name in enumerate(names):
        if name == bare and it.dialect.rewrites:
            continue
        expected = reference.output(rows[name])
        bound = reference.bound(rows[name])
        gap = (found.cpu().double() - expected).abs()[row]
        worst = int((gap / bound[row]).argmax())
        if not gap[worst] <= bound[row, worst]:
            raise it.trial.broken(
                f"row {row} with {name or 'none'}: output {worst} is off by "
                f"{float(gap[worst]):.3g}; rounding allows {float(bound[row, worst]):.3g}",
                f"assert abs(y[{row}, {worst}].item() - {float(expected[row, worst])!r}) <= "
                f"{float(bound[row, worst])!r}",
            )


def _nearest_is_meant(it: Experiment) -> None:
    """Whatever its layers compute: each row is what its adapter gives, rather than another's.

    How rows in parts of a batch are rounded is not known here, which of two outputs is nearer is.
    """
    it.attach()
    it.trial.run("alone = {'__base__': base, 'one': run()}")
    it.add(SECOND, it.case.other())
    it.trial.run(f"alone[{SECOND!r}] = run()")
    alone = it.trial.names["alone"]
    if same_bits(alone[FIRST], it.base) or it.dialect.rewrites:
        raise NotApplicable("the adapter's output cannot be told from the base's")
    rows = list(alone)[: len(it.x)]
    if it.case.net.reads_tokens:
        _mixed_tokens(it, rows)
    else:
        it.say("mixed", rows)
    found = it.trial.names["y"]
    for row, name in enumerate(rows):
        gaps = {other: float((found - y)[row].norm()) for other, y in alone.items()}
        nearest = min(gaps, key=lambda other: gaps[other])
        if nearest != name:
            raise it.trial.broken(
                f"row {row} asks for {name} and is nearest to what {nearest} gives: it is"
                f" {gaps[nearest]:.3g} away from that, {gaps[name]:.3g} from what was asked for",
                f"print({{name: (y - other)[{row}].norm() for name, other in alone.items()}})",
                f"assert (y - alone[{name!r}])[{row}].norm() <= (y - alone[{nearest!r}])[{row}]"
                ".norm()",
            )


def _mixed_tokens(it: Experiment, rows: Sequence[str]) -> None:
    """The logits; and what gives logits can be generated from, with several beams as well."""
    given = f"input_ids=x, adapter_names={list(rows)!r}"
    it.output(f"model({given}).logits")
    try:
        it.trial.run(f"model.generate({given}, num_beams=2, max_new_tokens=2)")
    except Refused as refusal:
        raise it.outcome(refusal, always=it.has_to_run) from None


@_law("llama", excludes=not_mixed)
def mixed_generation(it: Experiment) -> None:
    """A batch of different adapters generates for each row what its adapter generates alone.

    The model computes in float64: what the order of a sum moves is nothing to the gap between two
    logits of random numbers.
    """
    it.attach()
    require_peft(it, "a class of one's own generates nothing")
    it.trial.run("model.double()\nx = x.repeat(2, 1)[:3]")
    it.add(SECOND, it.case.other())
    it.trial.run("model.double()")
    beams = 1 + (it.case.seed + 1) % 2
    it.trial.run(_GENERATE.format(beams=beams, new=NEW_TOKENS))
    names = [FIRST, "__base__", SECOND]
    for name in (FIRST, SECOND):
        it.say("activate", name)
        it.must(f"alone_{name} = generate()")
    it.must("with model.disable_adapter():\n    alone___base__ = generate()")
    if it.trial.value(f"torch.equal(alone_{FIRST}, alone___base__)"):
        raise NotApplicable("the adapter does not change what is generated")
    it.must(f"mixed = generate(adapter_names={names!r})")
    for row, name in enumerate(names):
        if not it.trial.value(f"torch.equal(mixed[{row}], alone_{name}[{row}])"):
            raise it.trial.broken(
                f"row {row} with {name}, {beams} beam(s): other tokens than it generates alone",
                f"assert torch.equal(mixed[{row}], alone_{name}[{row}]), (mixed, alone_{name})",
            )


_GENERATE = """
def generate(**more):
    ones = torch.ones_like(x)
    return model.generate(input_ids=x, attention_mask=ones, do_sample=False, num_beams={beams},
                          min_new_tokens={new}, max_new_tokens={new}, **more)
"""


NEW_TOKENS = 4


@_law("linear", "saved", "fused experts", excludes=rewriting, sampled=True)
def own_settings(it: Experiment) -> None:
    """Beside an adapter of other settings each computes what it computes alone, bit for bit.

    Of two the second has a trained module in the network that has one, and comes to the first.
    """
    it.attach()
    dialect = require_peft(it, "a class of one's own has no settings but rank and scaling")
    other, setting = _other_settings(it, dialect)
    if it.case.net.saved:
        it.case = replace(it.case, options={**it.case.options, "modules_to_save": "None"})
    _attached_alone(it, dialect, other)
    renew(it, dialect, it.case, FIRST)
    _beside(it, dialect, other)
    it.expect_bits(it.trial.names["alone"], "alone", f"beside an adapter{setting}")


def _other_settings(it: Experiment, dialect: Peft) -> tuple[Case, str]:
    """The case of the second adapter, and in words what the first one has not."""
    draw = random.Random(it.case.seed)
    switches = dialect.method.switches()
    case = it.case.other()
    chosen = draw.choice([case.targets, case.targets[:1], case.targets[-1:]])
    case = replace(case, chosen=chosen)
    if not switches or not draw.randrange(4):
        return case, f" that adapts {', '.join(it.case.targets or it.case.net.parameters)}"
    key, code = draw.choice(switches)
    return replace(case, options={**case.options, key: code}), f" without {key}={code}"


def _attached_alone(it: Experiment, dialect: Peft, other: Case) -> None:
    """The second adapter by itself: its output ``alone`` and its numbers ``state``."""
    try:
        renew(it, dialect, other, SECOND)
        it.trial.value("run()")
    except Exception as error:
        raise NotApplicable(f"not with these settings: {error}") from None
    dialect.fill(it.trial, SECOND, other.seed + 7)
    it.trial.run(f"state = {state_of(SECOND)}")
    _read(it)  # what is saved may be less than what there was
    it.trial.run(f"{it.dialect.seeded(0)}\nalone = run()")


def _read(it: Experiment) -> None:
    it.must(f"peft.set_peft_model_state_dict(model, state, adapter_name={SECOND!r})")


def _beside(it: Experiment, dialect: Peft, other: Case) -> None:
    """The second adapter beside the first, which it leaves alone, and at work."""
    trains = "[n for n, p in model.named_parameters() if p.requires_grad]"
    it.trial.run(f"trains = {trains}\n{it.dialect.seeded(0)}\nfirst = run()")
    it.say("add", SECOND, other)
    it.trial.run(it.dialect.seeded(0))
    it.expect_bits(it.trial.names["first"], "first", "after another adapter was added")
    now = it.trial.value(trains)
    if now != it.trial.names["trains"]:
        extra = sorted(set(now) ^ set(it.trial.names["trains"]))
        raise it.trial.broken(
            f"after another adapter was added, which is not at work: {extra[0]} and"
            f" {len(extra) - 1} more {'train' if extra[0] in now else 'are frozen'}",
            f"now = {trains}",
            "assert now == trains, set(now) ^ set(trains)",
        )
    _read(it)
    it.say("activate", SECOND)
    it.trial.run(it.dialect.seeded(0))


@_law("two heads", sampled=True)
def own_modules_saved(it: Experiment) -> None:
    """Each adapter has the modules that its own configuration names to be saved, and no others."""
    require_peft(it)
    it.attach()
    other = replace(it.case.other(), options={**it.case.options, "modules_to_save": "['tail']"})
    it.add(SECOND, other)
    _saves(it, FIRST, set(it.case.net.saved))
    _saves(it, SECOND, {"tail"})


def _saves(it: Experiment, name: str, modules: set[str]) -> None:
    read = f"peft.get_peft_model_state_dict(model, adapter_name={name!r})"
    whole = {"head", "tail"}  # none of them is adapted otherwise
    found = {part for key in it.trial.value(read) for part in key.split(".") if part in whole}
    if found != modules:
        raise it.trial.broken(
            f"of adapter {name!r} {', '.join(sorted(found)) or 'none'} is saved whole, its"
            f" configuration names {', '.join(sorted(modules)) or 'none'}",
            f"found = {{part for key in {read} for part in key.split('.')}} & {{'head', 'tail'}}",
            f"assert found == {modules!r}, found",
        )


@_law("linear", sampled=True)
def eval_mode_kept(it: Experiment) -> None:
    """What is added to a model in eval mode is in eval mode: nothing is dropped at random."""
    it.attach()
    if not isinstance(it.dialect, Peft):
        raise NotApplicable("a class of one's own has modules of its own")
    try:
        it.trial.run(f"model.add_adapter({SECOND!r}, {it.dialect.config(it.case.other())})")
    except Refused as refusal:
        raise it.outcome(refusal) from None
    dropouts = [(name, module) for name, module in it.model.named_modules()
                if isinstance(module, torch.nn.Dropout) and module.p]  # fmt: skip
    if not dropouts:
        raise NotApplicable("it has no dropout here")
    for name, module in dropouts:
        if module.training:
            raise it.trial.broken(
                f"{name} is in training mode, the model was in eval mode",
                f"assert not model.get_submodule({name!r}).training",
            )


@_law("linear", "embedding", sampled=True)
def stays_where_it_is(it: Experiment) -> None:
    """An adapter that was put on another device stays there while others come, work and go.

    Who keeps many adapters keeps those at rest off the device that the model is on; here they are
    on the meta device, which takes no memory.
    """
    require_peft(it, "where a class of one's own keeps what, it knows itself")
    it.attach()
    it.trial.run(_PUT_AWAY)
    if not it.trial.names["away"]:
        raise NotApplicable("it has no tensors of its own")
    for done in ("add", "activate", "merge", "unmerge", "delete"):
        given = {"add": (SECOND, it.case.other()), "activate": (SECOND,), "delete": (SECOND,)}
        _say_at_rest(it, done, *given.get(done, ()))
        if done == "activate":
            it.output()
        moved = it.trial.value(_MOVED)
        if moved:
            raise it.trial.broken(
                f"{done} of another adapter: {moved[0]} and {len(moved) - 1} more are not where"
                " they were put",
                f"assert not {_MOVED}",
            )


def _say_at_rest(it: Experiment, operation: str, *given: Any) -> None:
    """Carry it out; to copy numbers that are nowhere is to ask for an adapter that is at rest."""
    try:
        it.dialect.say(it.trial, operation, *given)
    except Refused as refusal:
        if "meta tensor" in str(refusal.error):
            raise it.trial.broken(
                f"{operation} of another adapter: it copies what was put away: {refusal}"
            ) from None
        raise it.outcome(refusal) from None


_PUT_AWAY = f"""
away = {{}}
for where, module in model.named_modules():
    for key, p in list(module._parameters.items()):
        name = f"{{where}}.{{key}}"
        if p is not None and {FIRST!r} in name.split(".") and "original_module" not in name:
            away[name] = torch.nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
            module._parameters[key] = away[name]
"""
_MOVED = (
    "[name for name, p in away.items() if dict(model.named_parameters()).get(name) is not p"
    " or not p.is_meta]"
)


# ------------------------------------------------------------------------------ come and gone


@_law("linear", "two heads", sampled=True)
def deleted(it: Experiment) -> None:
    """Once an adapter is deleted, nothing is left of it, and all else is as it was."""
    it.attach()
    require_unmerged(it)
    settings = "sorted(model.peft_config)" if it.is_peft else "None"
    copies = f"{{name: t.detach().clone() for name, t in {_TENSORS}.items()}}"
    it.trial.run(f"before, adapters = {copies}, {settings}")
    _come_and_gone(it)
    if isinstance(it.dialect, OwnClass):  # which may keep what is at work in buffers
        it.say("activate", FIRST)
    _same_tensors(it)
    if it.trial.value(settings) != it.trial.names["adapters"]:
        raise it.trial.broken("its configuration is still there", f"assert {settings} == adapters")


def _come_and_gone(it: Experiment) -> None:
    it.add(SECOND, it.case.other())
    it.output()
    it.say("delete", SECOND)


_TENSORS = "{**dict(model.named_parameters()), **dict(model.named_buffers())}"


def _same_tensors(it: Experiment) -> None:
    before, after = it.trial.names["before"], it.trial.value(_TENSORS)
    check = f"after = {_TENSORS}\nassert set(after) == set(before), set(after) ^ set(before)"
    for keys, what in (
        (after.keys() - before, "is still there"),
        (before.keys() - after, "is gone"),
    ):
        if keys:
            raise it.trial.broken(f"after an adapter came and went: {min(keys)} {what}", check)
    changed = [name for name in before if not same_bits(after[name].detach(), before[name])]
    if changed and not it.dialect.rewrites:
        raise it.trial.broken(
            f"after an adapter came and went: {changed[0]} is another",
            f"assert torch.equal({_TENSORS}[{changed[0]!r}], before[{changed[0]!r}])",
        )


@_law("linear", "saved", "embedding", sampled=True)
def name_forgotten(it: Experiment) -> None:
    """Nothing is kept by the name of a deleted adapter, for another of that name to find."""
    require_peft(it, "what a class of one's own keeps, it keeps where it likes")
    it.attach()
    it.trial.run(_LEFT)
    _come_and_gone(it)
    left = sorted(set(it.trial.value("left()")) - set(it.trial.names["kept"]))
    if left:
        raise it.trial.broken(
            f"deleted, and still a key of {left[0]} and {len(left) - 1} more",
            "assert not left(), left()",
        )


_LEFT = f"""
def left():
    kinds = ("_modules", "_parameters", "_buffers")
    return sorted({{
        f"{{where}}.{{key}}".lstrip(".")
        for where, module in model.named_modules()
        for key, value in {{**vars(module), **module._modules}}.items()
        if key not in kinds and hasattr(value, "keys") and {SECOND!r} in value.keys()
    }})
kept = left()
"""


# ------------------------------------------------------------------------------ in its place


@_law("linear", "conv1d", "embedding", "convolution", "grouped", excludes=not_usual_lora)
def hot_swap(it: Experiment) -> None:
    """An adapter swapped into the place of one of another rank computes what it does loaded.

    All numbers are multiples of 1/16 and not large, and the scalings are, too, so that in float64
    no sum is rounded in whatever order it is taken: zeros that fill up a rank do not show.
    """
    dialect = require_peft(it, "only PEFT swaps adapters")
    cases = _exact_cases(it)
    it.trial.run(_EXACT)
    it.trial.run("import tempfile\nfolders = {}\noutputs = {}")
    try:
        for name in ("second", "first"):  # the first one stays
            _exact_adapter(it, dialect, cases[name], name)
        _prepare(it)
        it.expect_bits(it.trial.value("outputs['first']"), "outputs['first']", "prepared to swap")
        for name in ("second", "first"):
            _swap(it, name)
            expected = f"outputs[{name!r}]"
            it.expect_bits(it.trial.value(expected), expected, f"the {name} adapter swapped in")
    finally:
        for folder in it.trial.names["folders"].values():
            folder.cleanup()


_EXACT = """
x = x.double() if x.is_floating_point() else x

@torch.no_grad()
def exact():
    for tensor in (*model.parameters(), x):
        if tensor.is_floating_point():
            tensor.copy_((16 * tensor).round().clamp(-64, 64) / 16)
"""


ROOM = 8
"""What is prepared for: the ranks that are drawn go into it."""


def _exact_cases(it: Experiment) -> dict[str, Case]:
    """Ranks and scalings of which every product is exact, 1 / sqrt(r) included."""
    draw = random.Random(it.case.seed)
    ranks = [1, 4] if it.dialect.name == "LORA+rslora" else [2, 4]
    draw.shuffle(ranks)
    case = replace(it.case, r=ranks[0], alpha=draw.choice([1, 3, 8]), dtype="float64")
    other = replace(case, r=ranks[1], alpha=draw.choice([5, 6, 16]), seed=case.seed + 1)
    return {"first": case, "second": other}


def _exact_adapter(it: Experiment, dialect: Peft, case: Case, name: str) -> None:
    """On a base of its own: what it computes, and its folder."""
    renew(it, dialect, case, FIRST, seed=it.case.seed)
    dialect.fill(it.trial, FIRST, case.seed + 7)
    it.trial.run(f"exact()\noutputs[{name!r}] = run()")
    it.trial.run(
        f"folders[{name!r}] = tempfile.TemporaryDirectory()\n"
        f"model.save_pretrained(folders[{name!r}].name, save_embedding_layers=False)"
    )


def _prepare(it: Experiment) -> None:
    names = "hotswap_adapter, prepare_model_for_compiled_hotswap"
    known(it, f"from peft.utils.hotswap import {names}")
    it.must(f"prepare_model_for_compiled_hotswap(model, target_rank={ROOM})")


def _swap(it: Experiment, name: str) -> None:
    folder = f"folders[{name!r}].name + '/{FIRST}'"
    it.must(f"hotswap_adapter(model, {folder}, {FIRST!r}, torch_device={it.dialect.device!r})")
