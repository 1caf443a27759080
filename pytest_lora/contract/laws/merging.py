"""Laws about merging an adapter into the base, and taking it out again."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest_lora as lora
from pytest_lora.checks.bits import how_different, same_bits
from pytest_lora.checks.merge_layers import NotMergeable, describe
from pytest_lora.checks.merge_outputs import wide_distance
from pytest_lora.contract.dialects import FIRST, SECOND, Case, OwnClass, Peft
from pytest_lora.contract.experiment import Experiment, is_refusal, says_refusal
from pytest_lora.contract.law import LawTable, not_plain
from pytest_lora.contract.laws.steps import configure, is_plain, layers_of, own_terms
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable
from pytest_lora.numerics.fingerprint import fingerprint
from pytest_lora.numerics.merge_bound import judge_cycle

__all__ = ["LAWS"]

CYCLES = 5
_WEIGHTS = "for name, p in net.named_parameters(): print(name, p)"
_law = LawTable()
LAWS = _law.laws


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
                 for name, layer in layers_of(it))  # fmt: skip
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


# ------------------------------------------------------------------------------ several at once


@_law()
def order_of_merges(it: Experiment) -> None:
    """Two adapters merged at once, in either order, are the two adapters at work together."""
    it.attach()
    terms = [own_terms(it)] if is_plain(it) else []
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
                _refused_in_turn(it, names, reason)
                raise
            _merged_together(it, names)


def _with_a_token_in_common(it: Experiment, case: Case) -> Case:
    """One token that both adapters train, and one of the second's own."""
    if isinstance(it.dialect, Peft) and "token_indices" in it.dialect.method.options:
        return replace(case, options={**case.options, "token_indices": "[3, 4]"})
    return case


def _merged_together(it: Experiment, names: Sequence[str] = ()) -> None:
    """Each layer, with all active adapters, merged (in turn) against unmerged in float64."""
    if not it.is_peft:
        raise NotApplicable("its layers are not known one by one")
    if it.case.net.reads_tokens:
        raise NotApplicable("the network's inputs are not those of its layers")
    turns = [f"model.merge_adapter(adapter_names=[{each!r}])" for each in names]
    shown = ("before = run()", *(turns or ["model.merge_adapter()"]),
             "print((run() - before).abs().max())")  # fmt: skip
    for name, layer in layers_of(it):
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


def _refused_in_turn(it: Experiment, names: Sequence[str], reason: NotApplicable) -> None:
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


# ----------------------------------------------------------------------- what a merge may not reach


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
    configure(it, ensure_weight_tying="True")
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
    layers_of(it)
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
