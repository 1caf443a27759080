"""Laws about what a model with one adapter computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest_lora as lora
from pytest_lora.checks.bits import how_different
from pytest_lora.contract.derivatives import hold_gradients
from pytest_lora.contract.dialects import FIRST, SECOND
from pytest_lora.contract.experiment import NOT_PLAIN, Experiment
from pytest_lora.contract.law import LawTable, not_plain, not_usual_lora
from pytest_lora.contract.laws.steps import (
    HASH_SEEDS,
    own_terms,
    require_unmerged,
    require_untouched_base,
)
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import quiet

if TYPE_CHECKING:
    import torch

__all__ = ["LAWS"]

TURNS = 3
_law = LawTable()
LAWS = _law.laws


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


@_law(otherwise="many", sampled=True)
def seeded_initialisation(it: Experiment) -> None:
    """One seed gives one adapter, bit for bit, in processes that hash strings differently."""
    it.trial.run(f"from transformers import set_seed\nset_seed({it.case.seed})")
    it.attach(fill=False)
    everything = "{**dict(model.named_parameters()), **dict(model.named_buffers())}"
    shown = (f"for name, t in {everything}.items(): print(name, t.double().sum().item())",)
    other = 1 + it.case.seed % (HASH_SEEDS - 1)
    first, found = it.in_fresh_processes(it.trial.script, everything, hash_seeds=(0, other))
    where = _other_tensor(found, first)
    if where:
        [again] = it.in_fresh_processes(it.trial.script, everything, hash_seeds=(0,))
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
    terms = own_terms(it)
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


@_law("linear", "conv1d", "convolution", "experts, inputs first", "experts, outputs first",
      excludes=not_usual_lora)  # fmt: skip
def reads_inputs(it: Experiment) -> None:
    """A reads what the layer reads: an input that no A reads has no part in the adapter's output.

    A product transposed on both ways is a product as well, which only another one's file shows.
    """
    it.attach()
    it.trial.run(_ALONE)
    place = it.case.seed % it.x.shape[1]
    for name, A in it.trial.names["read"].items():
        if A.shape[1] != it.x.shape[1]:
            raise it.trial.broken(
                f"A of {name} has {A.shape[1]} columns, the layer {it.x.shape[1]} inputs",
                f"assert read[{name!r}].shape[1] == x.shape[1], read[{name!r}].shape",
            )
    it.trial.run(f"for A in read.values():\n    A.data[:, {place}] = 0\nalone = run()")
    it.trial.run(f"x[:, {place}] += 1")
    it.expect_bits(it.trial.names["alone"], "alone", f"no A reads input {place}, which is another")


_ALONE = f"""
read = {{name: layer.lora_A[{FIRST!r}].weight for name, layer in net.named_modules()
        if {FIRST!r} in getattr(layer, 'lora_A', ())}}
for name, p in net.named_parameters():
    if 'lora_' not in name:
        p.data.zero_()  # what is left is the adapter's
"""


@_law("linear", "conv1d", excludes=not_plain)
def linear_in_scaling(it: Experiment) -> None:
    """Three times the scaling is three times the change, none is none, once is as before."""
    it.require_plain()
    it.attach()
    terms = own_terms(it)
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
    hold_gradients(it, reference, own_terms(it))


@_law("linear", "conv1d", "saved", "saved, by keyword", "llama")
def base_output_when_disabled(it: Experiment) -> None:
    """Switched off, the output is the base's, switched on again the adapter's, bit for bit."""
    require_untouched_base(it)
    it.attach()
    if it.is_peft:
        shown = "with model.disable_adapter():", "    assert torch.equal(run(), base)"
        it.check(lora.assert_disable_equals_base, *shown)
        return
    require_unmerged(it)
    it.trial.run("adapted = run()")
    it.say("disable")
    it.expect_bits(it.base, "base", "the disabled adapter has to leave the base's output")
    it.say("enable")
    it.expect_bits(it.trial.names["adapted"], "adapted", "enabled again")


@_law("linear", "saved", "llama", otherwise="linear", half=True, sampled=True)
def train_and_eval(it: Experiment) -> None:
    """Training and evaluation may take turns: what is done for one mode is undone for the other.

    A trainer evaluates after every epoch.  A class that merges in eval mode may round once for each
    turn; of PEFT, which does not, each bit is asked.
    """
    it.attach()
    it.trial.run("before = run()")
    it.trial.run(f"for _ in range({TURNS}):\n    model.train()\n    run()\n    model.eval()")
    when = f"evaluated after {TURNS} turns of training and evaluation"
    if it.is_peft:
        it.expect_bits(it.trial.names["before"], "before", when)
    else:
        it.expect([it.terms()], when, merges=2 * TURNS)


@_law(any_half=True)
def dtypes_kept(it: Experiment) -> None:
    """Attaching, running, merging and unmerging leave the dtypes of base and output alone.

    A second adapter has those of the first.
    """
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
    _second_alike(it)


def _second_alike(it: Experiment) -> None:
    """What is added trains in the format in which what was attached trains."""
    try:
        it.say("add", SECOND, it.case.other())
    except NotApplicable:
        return  # one adapter is all there can be
    now = "{name: p.dtype for name, p in model.named_parameters()}"
    found: dict[str, torch.dtype] = it.trial.value(now)
    for name, dtype in found.items():
        first = name.replace(f".{SECOND}", f".{FIRST}")
        if found.get(first, dtype) != dtype:
            raise it.trial.broken(
                f"added: {name} is {dtype}, that of the first adapter is {found[first]}",
                f"dtypes = {now}",
                f"assert dtypes[{name!r}] == dtypes[{first!r}]",
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
