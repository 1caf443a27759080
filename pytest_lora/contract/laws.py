"""The laws: what must hold for every implementation, whatever is drawn.

A law takes an :class:`~pytest_lora.contract.experiment.Experiment` and does with it what a user
might; it raises :class:`~pytest_lora.contract.trial.ContractBroken` if the law does not hold and
``NotApplicable`` if it has no meaning.  Where the project has a check that states the law for an
adapter (merging, isolation, frozen weights, ...), that check is the law for PEFT; what is written
out here is for implementations that know nothing of PEFT, and what needs no adapter.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import pytest_lora as lora
from pytest_lora import fresh
from pytest_lora.adapter import read_adapter
from pytest_lora.checks.bits import how_different, same_bits
from pytest_lora.checks.merge_layers import NotMergeable, describe, tuner_layers
from pytest_lora.checks.merge_outputs import wide_distance
from pytest_lora.contract import declared
from pytest_lora.contract.derivatives import hold_gradients
from pytest_lora.contract.dialects import FIRST, Case, OwnClass, Peft
from pytest_lora.contract.experiment import NOT_PLAIN, Experiment, is_refusal, says_refusal
from pytest_lora.contract.handling import (
    hold_deleted,
    hold_parameters,
    hold_rates,
    hold_round_trip,
    hold_taken_names,
    hold_told_of_nothing,
    hold_unload,
    refused_in_turn,
)
from pytest_lora.contract.law import (
    Law,
    LawTable,
    not_combined,
    not_mixed,
    not_plain,
    not_usual_lora,
    rewriting,
)
from pytest_lora.contract.several import (
    hold_hot_swap,
    hold_mixed_generation,
    hold_own_settings,
    hold_random_combinations,
)
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import quiet
from pytest_lora.numerics.fingerprint import fingerprint
from pytest_lora.numerics.merge_bound import judge_cycle
from pytest_lora.subject import Subject, load_base

__all__ = ["HASH_SEEDS", "LAWS", "Law"]

SECOND = "one2"
CYCLES = 5
HASH_SEEDS = 3
"""Values of PYTHONHASHSEED that fresh processes are started with; each costs seconds, once."""
_WEIGHTS = "for name, p in net.named_parameters(): print(name, p)"
_TRAINABLE = "print([name for name, p in model.named_parameters() if p.requires_grad])"


_law = LawTable()


# ------------------------------------------------------------------------------ what is computed


@_law("linear", "conv1d", "embedding", "scaled embedding", "convolution", "grouped", "experts",
      "attention", "llama", half=True)  # fmt: skip
def identity_at_initialisation(it: Experiment) -> None:
    """A fresh adapter changes nothing: the output is the base's, bit for bit."""
    it.attach(fill=False)
    if it.dialect.rewrites:
        # By design part of W is now in the adapter; W - s B A was rounded once.
        it.expect([], "the freshly initialised model against the base model", merges=1)
        return
    it.expect_bits(it.base, "base", "a fresh adapter has to leave the output as it was")


@_law(otherwise="many")
def seeded_initialisation(it: Experiment) -> None:
    """One seed gives one adapter, bit for bit, in processes that hash strings differently."""
    it.trial.run(f"from transformers import set_seed\nset_seed({it.case.seed})")
    it.attach(fill=False)
    everything = "{**dict(model.named_parameters()), **dict(model.named_buffers())}"
    shown = (f"for name, t in {everything}.items(): print(name, t.double().sum().item())",)
    other = 1 + it.case.seed % (HASH_SEEDS - 1)
    first = it.in_fresh_process(it.trial.script, everything, hash_seed=0)
    found = it.in_fresh_process(it.trial.script, everything, hash_seed=other)
    where = _other_tensor(found, first)
    if where:
        again = it.in_fresh_process(it.trial.script, everything, hash_seed=0)
        seeds = "0 each time" if _other_tensor(again, first) else f"0 and {other}"
        raise it.trial.broken(f"in two processes with PYTHONHASHSEED={seeds}: {where}", *shown)


def _other_tensor(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """The first tensor that differs, and how; empty where every bit agrees."""
    for name in sorted(found.keys() ^ expected.keys()):
        return f"{name} is in one of them only"
    differing = ((name, how_different(found[name], expected[name])) for name in sorted(found))
    return next((f"{name}: {difference}" for name, difference in differing if difference), "")


@_law("linear", "conv1d", half=True, excludes=not_plain)
def forward(it: Experiment) -> None:
    """The output is W x + b + alpha/r B A x, in eval mode without any dropout."""
    it.require_plain()
    it.attach()
    terms = _own_terms(it)
    it.expect([terms], "the adapted model")
    it.expect([terms], "the same model, run again")


@_law("attention", "llama", excludes=not_plain)
def applied_once(it: Experiment) -> None:
    """In each adapted layer the product is applied once: neither left out, nor twice.

    The base is given the products by hand, once everywhere, or not at all or twice in one layer.
    Which of these outputs is the nearest needs no bound of rounding.
    """
    if not it.is_peft or not it.dialect.plain or it.dialect.rewrites:
        raise NotApplicable(NOT_PLAIN)
    it.attach()
    it.trial.run("adapted = run()")
    it.trial.run(_PRODUCTS)
    products = it.trial.names["products"]
    expected = "once in each layer"
    ways = {expected: dict.fromkeys(products, 1)}
    for name in products:
        ways |= {f"{how} in {name}": {**ways[expected], name: times}
                 for times, how in ((0, "not at all"), (2, "twice"))}  # fmt: skip
    adapted, gaps = it.trial.names["adapted"], {}
    for way, times in ways.items():
        it.dialect.build(it.trial, it.case)
        it.trial.run(f"add({times!r})")
        gaps[way] = float((it.output() - adapted).norm())
    nearest = min(gaps, key=lambda way: gaps[way])
    if nearest != expected:
        it.dialect.build(it.trial, it.case)
        raise it.trial.broken(
            f"the output is as if the product was applied {nearest}: it is {gaps[nearest]:.3g} away"
            f" from that, {gaps[expected]:.3g} from the base with each product once",
            f"add({ways[expected]!r})",
            f"assert (run() - adapted).norm() <= {gaps[nearest]!r}",
        )


_PRODUCTS = f"""
products = {{}}
for name, layer in model.named_modules():
    if {FIRST!r} in getattr(layer, 'lora_A', ()):
        B, A = layer.lora_B[{FIRST!r}].weight, layer.lora_A[{FIRST!r}].weight
        bare = name.removeprefix('base_model.model.').replace('.base_layer', '')
        kind = 'in_proj_weight' if hasattr(layer, 'in_proj_weight') else 'weight'
        products[f'{{bare}}.{{kind}}'] = layer.scaling[{FIRST!r}] * (B @ A).detach()

@torch.no_grad()
def add(times):
    for name, product in products.items():
        net.get_parameter(name).add_(times[name] * product)
"""


@_law("linear", "conv1d", excludes=not_plain)
def linear_in_scaling(it: Experiment) -> None:
    """Three times the scaling is three times the change, none is none, once is as before."""
    it.require_plain()
    it.attach()
    terms = _own_terms(it)
    for factor in (3.0, 0.0, 1.0):
        it.say("scale", FIRST, factor)
        scaled = {name: term.scaled(factor) for name, term in terms.items()}
        it.expect([scaled], f"the scaling times {factor:g}")
    if it.is_peft:
        _scaled_and_back(it, terms)


def _scaled_and_back(it: Experiment, terms: Mapping[str, Any]) -> None:
    """Scaled in place, and back by the same factor or to where it began."""
    twice = {name: term.scaled(2.0) for name, term in terms.items()}
    layers = "for layer in model.modules():\n    if hasattr(layer, 'scale_layer'):\n        layer."
    for back in ("unscale_layer(2.0)", "unscale_layer()"):
        it.trial.run(f"{layers}scale_layer(2.0)")
        it.expect([twice], "after scale_layer(2.0)")
        it.trial.run(f"{layers}{back}")
        it.expect([terms], f"after {back}")


@_law("linear", "conv1d", excludes=not_plain)
def gradients(it: Experiment) -> None:
    """In training each gradient is the derivative of the output, dropout included, every time."""
    reference = it.require_plain()
    it.attach()
    hold_gradients(it, reference, _own_terms(it))


def _require_untouched_base(it: Experiment) -> None:
    if it.dialect.rewrites:
        raise NotApplicable(rewriting(it.dialect))


def _own_terms(it: Experiment) -> dict[str, Any]:
    """The first adapter's terms, with the base weights they are added to as they are now."""
    terms = it.terms()
    if it.dialect.rewrites and it.reference is not None:
        it.reference.rebase(it.own)
    return terms


@_law("linear", "conv1d", "saved", "saved, by keyword", "llama")
def base_output_when_disabled(it: Experiment) -> None:
    """Switched off, the output is the base's, switched on again the adapter's, bit for bit."""
    _require_untouched_base(it)
    it.attach()
    if it.is_peft:
        shown = "with model.disable_adapter():", "    assert torch.equal(run(), base)"
        it.check(lora.assert_disable_equals_base, *shown)
        return
    it.trial.run("adapted = run()")
    it.say("disable")
    it.expect_bits(it.base, "base", "the disabled adapter has to leave the base's output")
    it.say("enable")
    it.expect_bits(it.trial.names["adapted"], "adapted", "enabled again")


# ------------------------------------------------------------------------------ merging


@_law("linear", "conv1d", "embedding", "scaled embedding", "convolution", "grouped", "experts",
      "fused experts",
      "attention", "llama", half=True)  # fmt: skip
def merge_equivalence(it: Experiment) -> None:
    """Merged and unmerged compute the same, up to derived rounding."""
    it.attach()
    if it.is_peft:
        it.check(lora.assert_merge_equivalence, "before = run()", "model.merge_adapter()",
                 "print((run() - before).abs().max())")  # fmt: skip
        return
    terms = it.terms()
    it.say("merge")
    it.expect([terms], "the merged model", merges=1)
    if isinstance(it.dialect, OwnClass):
        _merged_for_real(it, it.dialect)


def _merged_for_real(it: Experiment, dialect: OwnClass) -> None:
    """What is merged is in the weights: the factors, whatever they become, play no part.

    A merge that does nothing gives the right output as well, and is told by this alone.
    """
    it.trial.run("merged = run()")
    try:
        it.trial.run(
            f"for A, B in {dialect.live(FIRST)}.values():\n    A.data.mul_(-2)\n    B.data.add_(1)"
        )
    except Refused:
        it.trial.drop_refused()  # they may be gone, now that they are merged
        return
    it.expect_bits(it.trial.names["merged"], "merged", "merged, then other factors")


@_law("linear", "conv1d", "embedding", "convolution", "experts", half=True)
def unmerge_restoration(it: Experiment) -> None:
    """Each merge and unmerge gives back the weights, up to what that one cycle has to round."""
    it.attach()
    if it.is_peft:
        shown = "model.merge_adapter()", "model.unmerge_adapter()", _WEIGHTS
        it.check(lora.assert_unmerge_restoration, *shown)
        return
    terms = it.terms()
    for _ in range(CYCLES):
        it.say("merge")
        it.say("unmerge")
    it.expect([terms], f"after {CYCLES} merges and unmerges", merges=2 * CYCLES)


@_law("linear", half=True, excludes=not_plain)
def unmerge_without_growth(it: Experiment) -> None:
    """Many cycles lose no more than what a single one may."""
    it.require_plain()
    it.attach()
    if not it.is_peft:
        _settled(it)
        return
    described = ((name, layer, describe(layer, FIRST, safe_merge=False))
                 for name, layer in _layers(it))  # fmt: skip
    known_layers = [(name, layer, known) for name, layer, known in described if known is not None]
    if not known_layers:
        raise NotApplicable("what its layers add to a weight has no known formula")
    for name, layer, known in known_layers:
        weight = layer.get_base_layer().weight
        start = weight.detach().clone()
        it.trial.run(f"layer = model.get_submodule({name!r})\nstart = layer.weight.clone()")
        it.trial.run(f"for _ in range({CYCLES}):\n    layer.merge()\n    layer.unmerge()")
        error = judge_cycle(known.matrix(start), known.matrix(weight.detach()), known.update)
        if error.worst > 1:
            raise it.trial.broken(
                f"{name}.weight{list(error.index or ())}: {CYCLES} cycles lose {error.worst:.3g} "
                "times what one can",
                "print((layer.weight - start).abs().max())",
            )


def _settled(it: Experiment) -> None:
    """After one cycle no further one changes a bit, seen in the outputs.

    Adding and subtracting one number, each rounded to nearest even, settles at once:
    ``(((u + v) - v) + v) - v`` is ``(u + v) - v`` in floating point (D. E. Knuth, The Art of
    Computer Programming, volume 2, section 4.2.2, theorem D).
    """
    it.say("merge")
    it.say("unmerge")
    it.trial.run("once = run()")
    once = it.trial.names["once"]
    for _ in range(CYCLES):
        it.say("merge")
        it.say("unmerge")
    it.expect_bits(once, "once", f"after {CYCLES} more merges and unmerges")


@_law()
def idempotent_merge(it: Experiment) -> None:
    """Merging what is merged, and unmerging what is not, changes nothing (or is refused)."""
    it.attach()
    for operation in ("merge", "unmerge"):
        it.say(operation)
        it.trial.run("once = run()")
        once = it.trial.names["once"]
        it.may(operation)
        it.expect_bits(once, "once", f"{operation} a second time")


@_law()
def order_of_merges(it: Experiment) -> None:
    """Two adapters merged at once, in either order, are the two adapters at work together."""
    it.attach()
    terms = [_own_terms(it)] if _is_plain(it) else []
    other = _with_a_token_in_common(it, it.case.other())
    it.add(SECOND, other)
    if terms:
        terms.append(it.terms(SECOND, other))
    for names in itertools.permutations((FIRST, SECOND)):
        it.say("activate", list(names))
        if terms:
            it.expect(terms, "both adapters together", merges=2)
            it.say("merge")
            it.expect(terms, f"merged in the order {', '.join(names)}", merges=4)
            it.say("unmerge")
        else:
            try:
                _merged_together(it)
            except NotApplicable as reason:
                refused_in_turn(it, names, reason)
                raise
            _merged_together(it, names)


def _with_a_token_in_common(it: Experiment, case: Case) -> Case:
    """One token that both adapters train, and one of the second's own."""
    if isinstance(it.dialect, Peft) and "token_indices" in it.dialect.method.options:
        return replace(case, options={**case.options, "token_indices": "[3, 4]"})
    return case


def _is_plain(it: Experiment) -> bool:
    return it.dialect.plain and it.reference is not None


def _merged_together(it: Experiment, names: Sequence[str] = ()) -> None:
    """Each layer, with all active adapters, merged (in turn) against unmerged in float64."""
    if not it.is_peft:
        raise NotApplicable("its layers are not known one by one")
    if it.case.net.reads_tokens:
        raise NotApplicable("the network's inputs are not those of its layers")
    turns = [f"model.merge_adapter(adapter_names=[{each!r}])" for each in names]
    shown = ("before = run()", *(turns or ["model.merge_adapter()"]),
             "print((run() - before).abs().max())")  # fmt: skip
    for name, layer in _layers(it):
        try:
            found = wide_distance(layer, layer.forward, ((it.x,), {}), {}, names=names)
        except NotMergeable as refusal:
            if is_refusal(refusal):
                raise NotApplicable(f"{name}: {refusal}") from None
            raise it.trial.broken(f"{name}: it raises: {refusal}", *shown) from None
        if found.unknown:
            if says_refusal(found.unknown):
                raise NotApplicable(f"{name}: {found.unknown}")
            raise it.trial.broken(f"{name}: it raises: {found.unknown}", *shown)
        if found.output > 1:
            raise it.trial.broken(
                f"{name}: merged {'in turn ' if names else ''}and unmerged differ by "
                f"{found.output:.3g} times what rounding allows in float64",
                *shown,
            )


def _layers(it: Experiment) -> list[tuple[str, Any]]:
    """PEFT's layers by name.

    Raises:
        NotApplicable: it wraps none, so that a law about each of them would say nothing.
    """
    layers = list(tuner_layers(it.model))
    if not layers:
        raise NotApplicable("it wraps no layer")
    return layers


@_law("tied head", "tied", "untied llama")
def tied_weights(it: Experiment) -> None:
    """Weights that are one stay one, others two, and a merge reaches only what is adapted."""
    if it.case.network == "untied llama":
        _nothing_to_tie(it)
        return
    it.attach()
    net = it.trial.names["net"]
    table = net.table.weight
    before = table.detach().clone()
    adapted = it.case.network == "tied head"
    if not adapted and _head(net).weight is not table:
        raise it.trial.broken("attaching unties them", "assert net.head.weight is net.table.weight")
    it.trial.run("before = net.table.weight.clone()")
    it.say("merge")
    if not same_bits(net.table.weight.detach(), before):
        raise it.trial.broken(
            "merging rewrites the embedding, which nobody adapted",
            "assert torch.equal(net.table.weight, before)",
        )
    if not adapted and _head(net).weight is not table:
        raise it.trial.broken("merging unties them", "assert net.head.weight is net.table.weight")


def _nothing_to_tie(it: Experiment) -> None:
    """Ties that are to be kept where there are none: head and embedding have nothing in common."""
    declared.configure(it, ensure_weight_tying="True")
    if it.case.seed % 2:
        saved = "['embed_tokens', 'lm_head']"
        it.case = replace(
            it.case, chosen=("q_proj",), options={**it.case.options, "modules_to_save": saved}
        )
    it.attach(fill=False)
    part = "net.get_submodule(n).state_dict().values()"
    it.trial.run(
        f"pointers = [{{t.data_ptr() for t in {part}}} for n in ('lm_head', 'model.embed_tokens')]"
    )
    if set.intersection(*it.trial.names["pointers"]):
        raise it.trial.broken(
            "head and embedding are not tied, and share a tensor once adapted",
            "assert not pointers[0] & pointers[1]",
        )
    if not it.case.seed % 2 and hasattr(it.trial.names["net"].lm_head, "base_layer"):
        raise it.trial.broken(
            "the head is adapted, which is not tied to the embedding, and nobody asked for it",
            "assert not hasattr(net.lm_head, 'base_layer')",
        )


def _head(net: Any) -> Any:
    head = net.head
    return head.get_base_layer() if hasattr(head, "get_base_layer") else head


@_law()
def safe_merge_is_safe(it: Experiment) -> None:
    """A safe merge of numbers that are none is refused and leaves the base's weights alone."""
    it.attach()
    if not it.is_peft:
        raise NotApplicable("only PEFT has safe merges")
    _layers(it)
    before = {name: fingerprint(tensor.detach()) for name, tensor in it.own.items()}
    it.trial.run("before = {n: p.clone() for n, p in net.named_parameters() if 'base' in n}")
    it.trial.run(
        "for p in model.parameters():\n    if p.requires_grad:\n        p.data.fill_(float('nan'))"
    )
    it.trial.run("from peft.tuners.tuners_utils import BaseTunerLayer")
    merge = (
        "for layer in model.modules():\n"
        "    if isinstance(layer, BaseTunerLayer):\n"
        "        layer.merge(safe_merge=True)"
    )
    try:
        it.trial.run(merge)
    except Refused as refusal:
        if not isinstance(refusal.error, ValueError) or "NaN" not in str(refusal.error):
            raise it.outcome(refusal) from None
        it.trial.drop_refused()
        tried = textwrap.indent(merge, "    ")
        it.trial.run(f"try:\n{tried}\nexcept ValueError:\n    pass")
    trained = {id(p) for p in it.model.parameters() if p.requires_grad}
    changed = [
        name
        for name, tensor in it.own.items()
        if fingerprint(tensor.detach()) != before[name] and id(tensor) not in trained
    ]
    if changed:
        raise it.trial.broken(
            f"{changed[0]} of the base is changed",
            _WEIGHTS,
        )


# ------------------------------------------------------------------------------ several adapters


@_law("linear", "saved", "llama")
def isolation(it: Experiment) -> None:
    """Adding, using, swapping in and deleting another adapter leaves the first as it was."""
    _require_untouched_base(it)
    it.attach()
    if it.is_peft:
        it.check(lora.assert_adapter_isolation, *_COME_AND_GO)
        return
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


_COME_AND_GO = (
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


@_law("linear", "llama", sampled=True)
def mixed_batch(it: Experiment) -> None:
    """A batch whose rows use different adapters gives each row what its adapter alone gives."""
    if it.is_peft and not _is_plain(it):
        _nearest_is_meant(it)
        return
    it.require_plain()
    it.attach()
    terms = _own_terms(it)
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
    """A batch of different adapters generates for each row what its adapter generates alone."""
    it.attach()
    hold_mixed_generation(it)


@_law("linear", excludes=not_combined)
def combination(it: Experiment) -> None:
    """Products add up: combine([a], [1]) is a, [-1] is -a; cat and full-rank svd of two add."""
    if isinstance(it.dialect, Peft) and it.dialect.method.is_lora and not it.dialect.plain:
        _combined_alone(it)
        return
    it.require_plain()
    if isinstance(it.dialect, Peft):
        _own_scaling_of_a_module(it)
    it.attach()
    if isinstance(it.dialect, OwnClass):
        _own_combination(it, it.dialect)
        return
    if not hasattr(getattr(it.model, "base_model", None), "add_weighted_adapter"):
        raise NotApplicable("there is no add_weighted_adapter")
    a = it.terms()
    other = it.case.other()
    it.add(SECOND, other)
    b = it.terms(SECOND, other)
    size = min(it.case.sizes)
    for index, (names, weights, kind, parts) in enumerate(_combinations(a, b)):
        rank = f", svd_rank={size}" if kind == "svd" else ""
        name = f"sum{index}"
        try:
            it.trial.run(
                f"model.add_weighted_adapter({names!r}, {weights!r}, {name!r}, "
                f"combination_type={kind!r}{rank})"
            )
        except Refused as refusal:
            raise it.outcome(refusal) from None
        _products_equal(it, name, f"combine({names}, {weights}, {kind!r})", parts)


def _own_scaling_of_a_module(it: Experiment) -> None:
    """In some examples one module has a scaling, or a larger rank, of its own in both adapters."""
    alpha, rank = ("alpha_pattern", 3 * it.case.alpha), ("rank_pattern", it.case.r)
    key, value = (alpha, ("", 0), ("", 0), alpha, rank)[it.case.seed % 5]
    if key == "rank_pattern":  # no rank is larger than drawn, so that a sum has full rank as well
        it.case = replace(it.case, r=max(it.case.r // 2, 1))
    if key:
        pattern = repr({it.case.targets[0]: value})
        it.case = replace(it.case, options={**it.case.options, key: pattern})


def _combined_alone(it: Experiment) -> None:
    """Whatever else its layers compute: combine([a], [1]) is a, bit for bit.

    With a scaling of 4 the factors are multiplied by 2 each, which is exact.
    """
    it.case = replace(it.case, alpha=4 * it.case.r)
    it.attach()
    it.trial.run("first = run()")
    try:
        it.trial.run(
            f"model.add_weighted_adapter([{FIRST!r}], [1.0], 'same', combination_type='linear')"
            "\nmodel.eval()"
        )
    except Refused as refusal:
        raise it.outcome(refusal) from None
    it.say("activate", "same")
    it.expect_bits(it.trial.names["first"], "first", "the combination of one adapter, times 1")


def _own_combination(it: Experiment, dialect: OwnClass) -> None:
    """For a class: how it divides a product among factors is its own affair, its output is not."""
    dialect.require("combine", "activate")
    a, other = it.terms(), it.case.other()
    it.trial.run("first = run()")
    sums: list[tuple[list[str], list[float], Any]] = [
        ([FIRST], [1.0], [(a, 1.0)]), ([FIRST], [-1.0], [(a, -1.0)])
    ]  # fmt: skip
    if dialect.offers("add"):
        it.add(SECOND, other)
        sums += [([FIRST, SECOND], [0.5, 2.0], [(a, 0.5), (it.terms(SECOND, other), 2.0)])]
    for index, (names, weights, parts) in enumerate(sums):
        name = f"sum{index}"
        it.say("combine", names, weights, name)
        it.say("activate", name)
        scaled = [{key: t.scaled(weight) for key, t in terms.items()} for terms, weight in parts]
        slack = {key: _rescaling(parts, key, sum(t[key].delta() for t in scaled)) for key in a}
        it.expect(scaled, f"combine({names}, {weights})", slack=slack)
    it.say("activate", FIRST)
    it.expect_bits(it.trial.names["first"], "first", "the first again, after its combinations")


def _combinations(a: Any, b: Any) -> Iterator[tuple[list[str], list[float], str, Any]]:
    for kind in ("linear", "cat", "svd"):
        yield [FIRST], [1.0], kind, [(a, 1.0)]
        yield [FIRST], [-1.0], kind, [(a, -1.0)]
    for kind in ("cat", "svd"):
        yield [FIRST, SECOND], [0.5, 2.0], kind, [(a, 0.5), (b, 2.0)]


def _rescaling(parts: Any, module: str, exact: torch.Tensor) -> float:
    """How far a combined product may be from the sum of the products, in the Frobenius norm.

    The factors are rescaled by roots and stored in float32: each of the few operations rounds every
    factor by at most u, and products of n numbers by gamma_n.  A singular value decomposition is
    backward stable, off by a modest multiple of max(d, k) u times the largest singular value
    (E. Anderson et al., LAPACK Users' Guide, 3rd edition, section 4.9).
    """
    unit = 2.0**-24
    terms = [(t[module], abs(weight)) for t, weight in parts]
    reach: float = sum(
        weight * abs(t.scaling) * float(t.B.double().norm()) * float(t.A.double().norm())
        for t, weight in terms
    )
    return 8 * max(exact.shape) * unit * reach


def _products_equal(it: Experiment, name: str, what: str, parts: Any) -> None:
    """The combined product against the sum of the products."""
    found = it.terms(name)
    for module, term in found.items():
        deltas = [weight * terms[module].delta() for terms, weight in parts]
        exact = torch.stack(deltas).sum(0)
        allowed = _rescaling(parts, module, exact)
        gap = float((term.delta() - exact).norm())
        if not gap <= allowed:
            raise it.trial.broken(
                f"{what}: the product in {module} is off by {gap:.3g}, its norm is "
                f"{float(exact.norm()):.3g}; rounding allows {allowed:.3g}",
                f"layer = model.base_model.model.{module}",
                "def product(n): return layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n]"
                ".weight",
                f"print(product({name!r}) / product({FIRST!r}))",
            )


@_law("linear", excludes=not_plain)
def random_combinations(it: Experiment) -> None:
    """A combination that drops numbers at random is right in the mean."""
    it.attach()
    hold_random_combinations(it)


@_law("linear", "conv1d", "embedding", "convolution", "grouped", excludes=not_usual_lora)
def hot_swap(it: Experiment) -> None:
    """An adapter swapped into the place of one of another rank computes what it does loaded."""
    hold_hot_swap(it)


@_law("linear", "saved", "fused experts", excludes=rewriting, sampled=True)
def own_settings(it: Experiment) -> None:
    """Beside an adapter of other settings each computes what it computes alone, bit for bit."""
    it.attach()
    hold_own_settings(it)


@_law("linear", "saved", sampled=True)
def taken_names(it: Experiment) -> None:
    """An adapter of a name that is taken changes nothing: it is refused."""
    it.attach()
    hold_taken_names(it)


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


# ------------------------------------------------------------------------------ what is left alone


@_law("linear", "saved", "llama", "attention")
def frozen_weights(it: Experiment) -> None:
    """No parameter or buffer of the base changes, whatever is done with the adapter."""
    _require_untouched_base(it)
    it.attach()
    if it.is_peft:
        it.check(lora.assert_frozen_weights, *_COME_AND_GO)
        return
    before = {name: fingerprint(tensor.detach()) for name, tensor in it.own.items()}
    it.trial.run(
        """
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()(x).square().mean().backward()
        optimizer.step()
        model.eval()
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
    """Merging, unmerging and switching leave each parameter the object, bits and flag it was."""
    it.attach()
    hold_parameters(it)


@_law("linear", "conv1d", "embedding", "convolution", excludes=not_usual_lora, sampled=True)
def learning_rates(it: Experiment) -> None:
    """LoRA+ trains every B faster than its A, embeddings at a rate of their own, nothing twice."""
    it.attach()
    hold_rates(it)


@_law("linear", "saved", "embedding", sampled=True)
def deleted(it: Experiment) -> None:
    """Of a deleted adapter nothing is kept under its name."""
    it.attach()
    hold_deleted(it)


@_law("linear", "saved", "llama", sampled=True)
def unloaded(it: Experiment) -> None:
    """Unloaded, the model is the base again: its output, its modules, its attributes."""
    _require_untouched_base(it)
    hold_unload(it)


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


@_law(any_half=True)
def dtypes_kept(it: Experiment) -> None:
    """Attaching, running, merging and unmerging leave the dtypes of base and output alone."""
    dtypes = {name: tensor.dtype for name, tensor in it.own.items()}
    net = it.trial.names["net"]
    it.attach()
    steps: list[Callable[[], None]] = [lambda: None]
    steps += [lambda: it.say("merge"), lambda: it.say("unmerge")]
    for step, label in zip(steps, ("attaching", "merging", "unmerging"), strict=True):
        step()
        found = it.output().dtype
        if found != it.base.dtype:
            raise it.trial.broken(
                f"{label}: the output became {found}", f"assert y.dtype == {it.base.dtype}"
            )
        for name, tensor in it.own.items():
            now = _now(net, name, tensor)
            if now.dtype != dtypes[name]:
                raise it.trial.broken(
                    f"{label}: {name} of the base became {now.dtype}",
                    "for name, p in net.named_parameters(): print(name, p.dtype)",
                )


def _now(net: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The base's tensor of that name when loaded, wherever it is now; the object itself if lost."""
    named: dict[str, torch.Tensor] = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    owner, _, leaf = name.rpartition(".")
    return named.get(name, named.get(f"{owner}.base_layer.{leaf}", tensor))


@_law("llama", otherwise="linear")
def padding_and_batch(it: Experiment) -> None:
    """Padding, its side and the other rows of a batch do not change a row's output."""
    it.attach()
    if not it.is_peft:
        _own_padding(it)
        return
    with quiet():
        it.check(lora.assert_padding_invariance, "# rows of x alone against rows of x padded")


def _own_padding(it: Experiment) -> None:
    """The rows of x one by one, and as positions of sequences that are padded on either side."""
    terms = [it.terms()]
    it.expect(terms, "each row alone", code="torch.cat([model(row[None]) for row in x])")
    it.trial.run("batch = torch.randn(2, 5, x.shape[-1], dtype=x.dtype).to(x)")
    for side, place in (("right", "[0, :3]"), ("left", "[0, 2:]")):
        it.trial.run(f"batch[0] = 0\nbatch{place} = x")
        it.expect(terms, f"as a sequence padded on the {side}", code=f"model(batch){place}")


def _save(it: Experiment, folder: Path) -> None:
    """The bare network under ``base``, built again from its seed, and the adapter."""
    bare = Experiment(it.trial.law, it.dialect, it.case)
    bare.trial.names["net"].save_pretrained(folder / "base")
    it.model.save_pretrained(folder / "adapter")


def _saved(it: Experiment, folder: Path) -> Subject:
    """What was saved, loaded again."""
    _save(it, folder)
    adapter = read_adapter(folder / "adapter" / FIRST)
    base = load_base(folder / "base", adapter=adapter, device=it.dialect.device)
    return Subject(adapter, base, {"input_ids": it.x})


@_law("llama", "experts llama", otherwise="many")
def save_reload(it: Experiment) -> None:
    """Saved, and loaded by a process that has never seen it, it computes the same, bit for bit."""
    _require_untouched_base(it)
    it.attach()
    if isinstance(it.dialect, OwnClass):
        _own_reload(it, it.dialect)
        return
    output = it.output()
    with fresh.scratch("contract") as folder, quiet():
        subject = _saved(it, folder)
        seed = it.case.seed % HASH_SEEDS
        shown = (f"model.save_pretrained('saved')  # and load it with PYTHONHASHSEED={seed}",)
        difference = how_different(subject.output(), output)
        if difference:
            raise it.trial.broken(f"loaded in the same process: {difference}", *shown)
        it.judge(subject, lambda s: lora.assert_save_reload(s, hash_seeds=(seed,)), *shown)


def _own_reload(it: Experiment, dialect: OwnClass) -> None:
    """Loaded onto the bare network, which follows from its seed: here, then in fresh processes."""
    bare = Experiment(it.trial.law, dialect, it.case).trial
    it.trial.run("saved = run()")
    saved = it.trial.names["saved"]
    with _folders(it) as [folder]:
        it.must(dialect.save("folders[0].name"))
        _load_own(it, dialect, "folders[0].name")
        it.expect_bits(saved, "saved", "loaded onto the bare network")
        code = f"{bare.script}\n{dialect.load(repr(folder))}\ny = run()"
        for seed in range(HASH_SEEDS):
            where = f"loaded in a fresh process with PYTHONHASHSEED={seed}"
            try:
                found = it.in_fresh_process(code, "{'y': y}", hash_seed=seed)["y"]
            except fresh.Refused as refusal:
                raise it.trial.broken(f"{where}: {refusal}", f"# {where}") from None
            difference = how_different(found, saved)
            if difference:
                raise it.trial.broken(f"{where}: {difference}", f"# {where}")


def _load_own(it: Experiment, dialect: OwnClass, place: str) -> None:
    dialect.build(it.trial, it.case)
    it.must(dialect.load(place))


@contextlib.contextmanager
def _folders(it: Experiment, count: int = 1) -> Iterator[list[str]]:
    """``folders`` of the script, empty ones, removed in the end; their paths."""
    made = f"folders = [tempfile.TemporaryDirectory() for _ in range({count})]"
    it.trial.run(f"import tempfile\n{made}")
    folders = it.trial.names["folders"]
    try:
        yield [folder.name for folder in folders]
    finally:
        for folder in folders:
            folder.cleanup()


@_law("tied llama")
def merged_reload(it: Experiment) -> None:
    """Merged, saved as a model of its own and loaded again, it computes the same."""
    it.attach()
    with fresh.scratch("contract") as folder, quiet():
        subject = _saved(it, folder)
        it.judge(subject, lora.assert_merged_reload, "merged = model.merge_and_unload()",
                 "merged.save_pretrained('merged')  # and load it")  # fmt: skip


@_law(sampled=True)
def saved_alone(it: Experiment) -> None:
    """What is saved of an adapter is the same whether or not there is another one."""
    it.attach()
    if isinstance(it.dialect, OwnClass):
        _own_saved_alone(it, it.dialect)
        return
    read = f"peft.get_peft_model_state_dict(model, adapter_name={FIRST!r})"
    it.trial.run(f"before = {{key: value.clone() for key, value in {read}.items()}}")
    if not it.trial.names["before"]:
        raise it.trial.broken("nothing is saved of it", "assert before")
    settings = f"model.peft_config[{FIRST!r}].to_dict()"
    it.trial.run(f"settings = {settings}")
    it.add(SECOND, it.case.other())
    _may_combine(it)
    it.trial.run(f"after = {read}")
    _same_settings(it, settings)
    before, after = it.trial.names["before"], it.trial.names["after"]
    foreign, lost = sorted(set(after) - set(before)), sorted(set(before) - set(after))
    changed = [key for key in before if key in after and not same_bits(before[key], after[key])]
    for keys, what in (
        (foreign, "is saved with it"),
        (lost, "is not saved any more"),
        (changed, "is saved with other values"),
    ):
        if keys:
            raise it.trial.broken(
                f"with another adapter there, {keys[0]} {what}",
                "assert sorted(before) == sorted(after), set(before) ^ set(after)",
                "assert all(torch.equal(before[key], after[key]) for key in before)",
            )


def _may_combine(it: Experiment) -> None:
    """A third adapter made of the first; whether that can be done is ``combination``'s to say."""
    if hasattr(getattr(it.model, "base_model", None), "add_weighted_adapter"):
        try:
            it.trial.run(f"model.add_weighted_adapter([{FIRST!r}], [0.5], 'sum0')")
        except Refused:
            it.trial.drop_refused()


def _same_settings(it: Experiment, settings: str) -> None:
    """The configuration is saved with the weights, and a scaling may stand in it."""
    before, after = it.trial.names["settings"], it.trial.value(settings)
    changed = sorted(key for key in before if before[key] != after.get(key))
    if changed:
        raise it.trial.broken(
            f"with another adapter there, its {changed[0]} is saved as {after.get(changed[0])!r}, "
            f"not {before[changed[0]]!r}",
            f"assert settings == {settings}, {settings}",
        )


def _own_saved_alone(it: Experiment, dialect: OwnClass) -> None:
    """For a class: loaded again it computes the same, bit for bit; its files are its own affair."""
    dialect.require("save", "load")
    with _folders(it, 2):
        it.must(dialect.save("folders[0].name"))
        it.add(SECOND, it.case.other())
        it.say("activate", FIRST)
        it.must(dialect.save("folders[1].name"))
        _load_own(it, dialect, "folders[0].name")
        it.trial.run("alone = run()")
        _load_own(it, dialect, "folders[1].name")
        it.expect_bits(it.trial.names["alone"], "alone", "saved with another adapter there")


@_law("linear", "odd names", "conv1d", "embedding", "convolution", "grouped", "experts",
      "experts llama", sampled=True)  # fmt: skip
def state_round_trip(it: Experiment) -> None:
    """The state read out of a model, read into another one, gives the same output, bit for bit."""
    _require_untouched_base(it)
    hold_round_trip(it)


# ------------------------------------------------------------------------------ what is declared


@_law("look-alikes", "layers", "bare layers", sampled=True)
def chosen_layers(it: Experiment) -> None:
    """Exactly what is chosen is adapted: by full names; by layers; once saved and read again.

    The layer of a module is the first number in its path.
    """
    if it.case.network == "look-alikes":
        _named_modules(it)
        declared.hold_once_saved(it)
        return
    chosen, options = _ways_to_choose(it.case.seed)
    names = [name for name, m in it.trial.names["net"].named_modules() if hasattr(m, "weight")]
    expected = {name for name in names if int(name.split("layers.")[1][0]) in chosen}
    found = set(declared.attach_layers(it, **options))
    if found != expected:
        raise it.trial.broken(
            f"layers {chosen}: adapted are {', '.join(sorted(found - expected)) or 'none'} of"
            f" other layers; left out are {', '.join(sorted(expected - found)) or 'none'}",
            f"assert set(adapted) == {expected!r}, set(adapted)",
        )
    declared.hold_once_saved(it)


def _ways_to_choose(seed: int) -> tuple[list[int], dict[str, str]]:
    """Layers, and how they are said: listed, or one number, with the name of their list or not."""
    if seed % 3 == 1:
        one = seed // 3 % 3
        return [one], {"layers_to_transform": repr(one), "layers_pattern": "'layers'"}
    chosen = [layer for layer in range(3) if (seed + 1) >> layer & 1] or [1]
    named = {"layers_pattern": "'layers'"} if seed % 3 else {}
    return chosen, {"layers_to_transform": repr(chosen), **named}


_MANY = 24
"""So many names that they may be abbreviated on the way."""


def _named_modules(it: Experiment) -> None:
    """Modules given by their full names, among others whose names end or begin in the same way.

    In some examples one word would say it: all that are called "up".
    """
    names = [name for name, m in it.trial.names["net"].named_modules() if hasattr(m, "weight")]
    if it.case.seed % 3 == 1:
        chosen = [name for name in names if name.endswith(".up")]
    else:
        chosen = sorted(random.Random(it.case.seed).sample(names, _MANY))
    it.case = replace(it.case, chosen=tuple(chosen))
    found = set(declared.attach_layers(it))
    extra, left = sorted(found - set(chosen)), sorted(set(chosen) - found)
    if extra or left:
        raise it.trial.broken(
            f"{len(chosen)} modules named in full: adapted as well are"
            f" {', '.join(extra) or 'none'}; left out are {', '.join(left) or 'none'}",
            f"assert set(adapted) == set({chosen!r}), set(adapted)",
        )


@_law("linear", sampled=True)
def targets_that_match_nothing(it: Experiment) -> None:
    """An adapter none of whose targets exists is refused, or told, the first or the second."""
    it.attach()
    it.trial.run("first = run()")
    hold_told_of_nothing(it)


LAWS: Mapping[str, Law] = {**_law.laws, **declared.LAWS}
