"""Laws about adapters that are made of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pytest_lora.contract.dialects import FIRST, SECOND, OwnClass, Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.law import LawTable, not_combined, not_plain
from pytest_lora.contract.laws.steps import require_peft
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable

__all__ = ["LAWS"]

DRAWS = 32
"""Random combinations: that all of them fall on one side of a mean they lie on either side of with
the same probability happens once in 2 ** 31 times."""
_law = LawTable()
LAWS = _law.laws


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
    """A combination that drops numbers at random is right in the mean.

    All factors are positive and half of their numbers are left out.  As likely as any choice is the
    opposite one, and what both give adds up to twice the plain combination, if their mean is that.
    So the sum of a factor's numbers is as often above that of the plain one as below it.
    """
    it.attach()
    require_peft(it, "how a class of one's own combines adapters is its own affair")
    if not hasattr(getattr(it.model, "base_model", None), "add_weighted_adapter"):
        raise NotApplicable("there is no add_weighted_adapter")
    other = it.case.other()
    it.add(SECOND, other)
    it.trial.run("for p in model.parameters():\n    p.data.abs_()")
    _combine(it, "plain", "linear", "")
    plain = _sums(it, "plain")
    if not all(plain):
        raise NotApplicable("it combines something else than the factors of LoRA")
    it.trial.run(it.dialect.seeded(it.case.seed))
    found = []
    for _ in range(DRAWS):
        _combine(it, "drawn", "dare_linear", ", density=0.5")
        found.append(_sums(it, "drawn"))
        it.say("delete", "drawn")
    for factor, expected, drawn in zip("AB", plain, zip(*found, strict=True), strict=True):
        for side, name in ((max(drawn) < expected, "below"), (min(drawn) > expected, "above")):
            if side:
                mean = sum(drawn) / len(drawn)
                raise it.trial.broken(
                    f"dare_linear: in {DRAWS} random combinations the sum of {factor} is always"
                    f" {name} that of the plain one, {mean / expected:.3g} times it in the mean",
                    f"mean, expected = {mean!r}, {expected!r}  # of {DRAWS} draws",
                    "assert abs(mean - expected) < 0.1 * expected, mean / expected",
                )


def _combine(it: Experiment, name: str, kind: str, more: str) -> None:
    it.must(
        f"model.add_weighted_adapter([{FIRST!r}, {SECOND!r}], [1.0, 0.5], {name!r},"
        f" combination_type={kind!r}{more})",
    )


def _sums(it: Experiment, name: str) -> tuple[float, float]:
    """Of all numbers of A and of B in the adapter, over all modules."""
    layers = [m for m in it.model.modules() if name in getattr(m, "lora_A", ())]
    a = sum(float(layer.lora_A[name].weight.detach().double().sum()) for layer in layers)
    b = sum(float(layer.lora_B[name].weight.detach().double().sum()) for layer in layers)
    return a, b
