"""The laws: what must hold for every implementation, whatever is drawn.

A law takes an :class:`~pytest_lora.contract.experiment.Experiment` and does with it what a user
might; it raises :class:`~pytest_lora.contract.trial.ContractBroken` if the law does not hold and
``NotApplicable`` if it has no meaning.  Where the project has a check that states the law for an
adapter (merging, isolation, frozen weights, ...), that check is the law for PEFT; what is written
out here is for implementations that know nothing of PEFT, and what needs no adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import pytest_lora as lora
from pytest_lora.adapter import read_adapter
from pytest_lora.checks.bits import how_different, same_bits
from pytest_lora.checks.merge_layers import NotMergeable, describe, tuner_layers
from pytest_lora.checks.merge_outputs import wide_distance
from pytest_lora.contract.dialects import FIRST, Peft
from pytest_lora.contract.experiment import Experiment, is_refusal
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable
from pytest_lora.fresh import scratch
from pytest_lora.loading import quiet
from pytest_lora.numerics.fingerprint import fingerprint
from pytest_lora.numerics.merge_bound import judge_cycle
from pytest_lora.subject import Subject, load_base

__all__ = ["LAWS", "Law"]

SECOND = "one2"
CYCLES = 5
HASH_SEEDS = 3
"""Values of PYTHONHASHSEED that fresh processes are started with; each costs seconds, once."""
_WEIGHTS = "for name, p in net.named_parameters(): print(name, p)"
_TRAINABLE = "print([name for name, p in model.named_parameters() if p.requires_grad])"


@dataclass(frozen=True, slots=True)
class Law:
    """One row of the table.

    Attributes:
        id: its name.
        says: the law in one line.
        hold: tries it once.
        networks: networks it is tried on, where it matters which.
        half: whether half precision is drawn as well.
        needs: operations a class has to have for it.
    """

    id: str
    says: str
    hold: Callable[[Experiment], None]
    networks: tuple[str, ...] = ()
    half: bool = False


_TABLE: dict[str, Law] = {}


def _law(*networks: str, half: bool = False) -> Callable[[Callable[[Experiment], None]], Any]:
    def enter(hold: Callable[[Experiment], None]) -> Callable[[Experiment], None]:
        name = hold.__name__
        says = (hold.__doc__ or "").strip().partition("\n")[0]
        _TABLE[name] = Law(name, says, hold, networks, half)
        return hold

    return enter


# ------------------------------------------------------------------------------ what is computed


@_law("linear", "conv1d", "embedding", "convolution", "grouped", "experts", "llama", half=True)
def identity_at_initialisation(it: Experiment) -> None:
    """A fresh adapter changes nothing: the output is the base's, bit for bit."""
    it.attach(fill=False)
    if it.dialect.rewrites:
        # By design part of W is now in the adapter; W - s B A was rounded once.
        it.expect([], "the freshly initialised model against the base model", merges=1)
        return
    it.expect_bits(it.base, "base", "a fresh adapter has to leave the output as it was")


@_law("linear", "conv1d", half=True)
def forward(it: Experiment) -> None:
    """The output is W x + b + alpha/r B A x, in eval mode without any dropout."""
    it.require_plain()
    it.attach()
    terms = _own_terms(it)
    it.expect([terms], "the adapted model")
    it.expect([terms], "the same model, run again")


@_law("linear", "conv1d")
def linear_in_scaling(it: Experiment) -> None:
    """Three times the scaling is three times the change, and once again the change as before."""
    it.require_plain()
    it.attach()
    terms = _own_terms(it)
    for factor in (3.0, 1.0):
        it.say("scale", FIRST, factor)
        scaled = {name: term.scaled(factor) for name, term in terms.items()}
        it.expect([scaled], f"the scaling times {factor:g}")


def _require_untouched_base(it: Experiment) -> None:
    if it.dialect.rewrites:
        raise NotApplicable("by design it moves part of the base weight into the adapter")


def _own_terms(it: Experiment) -> dict[str, Any]:
    """The first adapter's terms, with the base weights they are added to as they are now."""
    terms = it.terms()
    if it.dialect.rewrites and it.reference is not None:
        it.reference.rebase(it.own)
    return terms


@_law("linear", "conv1d", "llama")
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


@_law("linear", "conv1d", "embedding", "convolution", "grouped", "experts", "llama", half=True)
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


@_law("linear", half=True)
def unmerge_without_growth(it: Experiment) -> None:
    """Many cycles lose no more than what a single one may."""
    it.require_plain()
    it.attach()
    if not it.is_peft:
        raise NotApplicable("the weights of a class of one's own are not known by name")
    for name, layer in tuner_layers(it.model):
        known = describe(layer, FIRST, safe_merge=False)
        if known is None:
            continue
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
    other = it.case.other()
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
            _merged_together(it)


def _is_plain(it: Experiment) -> bool:
    return it.dialect.plain and it.reference is not None


def _merged_together(it: Experiment) -> None:
    """Each layer, with all active adapters, merged against unmerged in float64."""
    if not it.is_peft:
        raise NotApplicable("its layers are not known one by one")
    for name, layer in tuner_layers(it.model):
        try:
            found = wide_distance(layer, layer.forward, ((it.x,), {}), {})
        except NotMergeable as refusal:
            raise NotApplicable(f"{name}: {refusal}") from None
        if found.unknown:
            raise NotApplicable(f"{name}: {found.unknown}")
        if found.output > 1:
            raise it.trial.broken(
                f"{name}: merged and unmerged differ by {found.output:.3g} times what rounding "
                "allows in float64",
                "before = run()", "model.merge_adapter()", "print((run() - before).abs().max())",
            )  # fmt: skip


@_law("tied head", "tied")
def tied_weights(it: Experiment) -> None:
    """Weights that are one stay one, and a merge reaches no module but the adapted ones."""
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


def _head(net: Any) -> Any:
    head = net.head
    return head.get_base_layer() if hasattr(head, "get_base_layer") else head


@_law()
def safe_merge_is_safe(it: Experiment) -> None:
    """A safe merge of numbers that are none is refused and leaves the base's weights alone."""
    it.attach()
    if not it.is_peft:
        raise NotApplicable("only PEFT has safe merges")
    layers = [layer for _, layer in tuner_layers(it.model)]
    before = {name: fingerprint(tensor.detach()) for name, tensor in it.own.items()}
    it.trial.run("before = {n: p.clone() for n, p in net.named_parameters() if 'base' in n}")
    it.trial.run(
        "for p in model.parameters():\n    if p.requires_grad:\n        p.data.fill_(float('nan'))"
    )
    try:
        it.trial.run("model.merge_adapter(safe_merge=True)")
    except Refused as refusal:
        if isinstance(refusal.error, NotImplementedError) or not layers:
            raise NotApplicable(str(refusal)) from None
        it.trial.drop_refused()
        it.trial.run("try:\n    model.merge_adapter(safe_merge=True)\nexcept ValueError:\n    pass")
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


@_law("linear", "llama")
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


@_law("linear")
def mixed_batch(it: Experiment) -> None:
    """A batch whose rows use different adapters gives each row what its adapter alone gives."""
    it.attach()
    if not isinstance(it.dialect, Peft):
        raise NotApplicable("only PEFT has mixed batches")
    it.require_plain()
    terms = _own_terms(it)
    other = it.case.other()
    it.add(SECOND, other)
    rows: dict[str, list[Any]] = {FIRST: [terms], SECOND: [it.terms(SECOND, other)], "__base__": []}
    names = list(rows)[: len(it.x)]
    try:
        it.trial.run(f"with torch.no_grad():\n    y = model(x, adapter_names={names!r})")
    except Refused as refusal:
        raise NotApplicable(f"refused: {refusal}") from None
    found, reference = it.trial.names["y"], it.require_plain()
    for row, name in enumerate(names):
        if name == "__base__" and it.dialect.rewrites:
            continue
        expected = reference.output(rows[name])
        bound = reference.bound(rows[name])
        gap = (found.double() - expected).abs()[row]
        worst = int((gap / bound[row]).argmax())
        if not gap[worst] <= bound[row, worst]:
            raise it.trial.broken(
                f"row {row} with {name}: output {worst} is off by {float(gap[worst]):.3g}; "
                f"rounding allows {float(bound[row, worst]):.3g}",
                f"assert abs(y[{row}, {worst}].item() - {float(expected[row, worst])!r}) <= "
                f"{float(bound[row, worst])!r}",
            )


@_law("linear")
def combination(it: Experiment) -> None:
    """Products add up: combine([a], [1]) is a, [-1] is -a; cat and full-rank svd of two add."""
    if isinstance(it.dialect, Peft) and it.dialect.method.is_lora and not it.dialect.plain:
        _combined_alone(it)
        return
    it.require_plain()
    it.attach()
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
            if it.dialect.rewrites:
                raise NotApplicable(f"refused: {refusal}") from None
            raise it.trial.broken(f"it raises: {refusal}") from None
        _products_equal(it, name, f"combine({names}, {weights}, {kind!r})", parts)


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
        if is_refusal(refusal.error) or it.dialect.rewrites:
            raise NotApplicable(f"refused: {refusal}") from None
        raise it.trial.broken(f"it raises: {refusal}") from None
    it.say("activate", "same")
    it.expect_bits(it.trial.names["first"], "first", "the combination of one adapter, times 1")


def _combinations(a: Any, b: Any) -> Iterator[tuple[list[str], list[float], str, Any]]:
    for kind in ("linear", "cat", "svd"):
        yield [FIRST], [1.0], kind, [(a, 1.0)]
        yield [FIRST], [-1.0], kind, [(a, -1.0)]
    for kind in ("cat", "svd"):
        yield [FIRST, SECOND], [0.5, 2.0], kind, [(a, 0.5), (b, 2.0)]


def _products_equal(it: Experiment, name: str, what: str, parts: Any) -> None:
    """The combined product against the sum of the products, in the Frobenius norm.

    The factors are rescaled by roots and stored in float32: each of the few operations rounds every
    factor by at most u, and products of n numbers by gamma_n.  A singular value decomposition is
    backward stable, off by a modest multiple of max(d, k) u times the largest singular value
    (E. Anderson et al., LAPACK Users' Guide, 3rd edition, section 4.9).
    """
    unit = 2.0**-24
    found = it.terms(name)
    for module, term in found.items():
        deltas = [weight * terms[module].delta() for terms, weight in parts]
        exact = torch.stack(deltas).sum(0)
        size = sum(float(delta.norm()) for delta in deltas)
        reach = sum(abs(w) * abs(t[module].scaling) * float(t[module].B.double().norm())
                    * float(t[module].A.double().norm()) for t, w in parts)  # fmt: skip
        allowed = 8 * max(exact.shape) * unit * max(reach, size)
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


@_law("linear")
def eval_mode_kept(it: Experiment) -> None:
    """What is added to a model in eval mode is in eval mode: nothing is dropped at random."""
    it.attach()
    if not isinstance(it.dialect, Peft):
        raise NotApplicable("a class of one's own has modules of its own")
    try:
        it.trial.run(f"model.add_adapter({SECOND!r}, {it.dialect.config(it.case.other())})")
    except Refused as refusal:
        raise NotApplicable(f"refused: {refusal}") from None
    for name, module in it.model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p and module.training:
            raise it.trial.broken(
                f"{name} is in training mode, the model was in eval mode",
                f"assert not model.get_submodule({name!r}).training",
            )


# ------------------------------------------------------------------------------ what is left alone


@_law("linear", "llama")
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


@_law("linear", "llama")
def requires_grad(it: Experiment) -> None:
    """What trains is the active adapter, all of it and nothing else, after every call."""
    it.trial.run("own = dict(net.named_parameters())")
    it.attach()
    if it.is_peft:
        it.check(lora.assert_requires_grad, _TRAINABLE)
        return
    factors = [f for pair in it.trial.value("lora.factors(model)").values() for f in pair]
    frozen = [name for name, tensor in it.own.items() if tensor.requires_grad]
    if frozen:
        raise it.trial.broken(
            f"{frozen[0]} of the base trains",
            f"assert not own[{frozen[0]!r}].requires_grad",
        )
    if not all(factor.requires_grad for factor in factors):
        raise it.trial.broken(
            "a factor of the adapter does not train",
            "assert all(f.requires_grad for pair in lora.factors(model).values() for f in pair)",
        )


@_law(half=True)
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


@_law("llama")
def padding_and_batch(it: Experiment) -> None:
    """Padding, its side and the other rows of a batch do not change a row's output."""
    it.attach()
    if not it.is_peft:
        raise NotApplicable("a layer of one's own has no tokens to pad")
    with quiet():
        it.check(lora.assert_padding_invariance, "# rows of x alone against rows of x padded")


def _save(it: Experiment, folder: Path) -> None:
    """The bare network under ``base``, built again from its seed, and the adapter."""
    bare = Experiment(it.trial.law, it.dialect, it.case)
    bare.trial.names["net"].save_pretrained(folder / "base")
    it.model.save_pretrained(folder / "adapter")


@_law("llama")
def save_reload(it: Experiment) -> None:
    """Saved, and loaded by a process that has never seen it, it computes the same, bit for bit."""
    _require_untouched_base(it)
    it.attach()
    if not it.is_peft:
        raise NotApplicable("how a class of one's own is saved is not known")
    output = it.output()
    with scratch("contract") as folder, quiet():
        _save(it, folder)
        adapter = read_adapter(folder / "adapter" / FIRST)
        subject = Subject(adapter, load_base(folder / "base", adapter=adapter), {"input_ids": it.x})
        seed = it.case.seed % HASH_SEEDS
        shown = (f"model.save_pretrained('saved')  # and load it with PYTHONHASHSEED={seed}",)
        difference = how_different(subject.output(), output)
        if difference:
            raise it.trial.broken(f"loaded in the same process: {difference}", *shown)
        it.judge(subject, lambda s: lora.assert_save_reload(s, hash_seeds=(seed,)), *shown)


LAWS: Mapping[str, Law] = dict(_TABLE)
