"""Laws about numbers that are declared: they are applied.

Each is two runs that have to agree, or to differ; no formula of any method is needed to see which.
"""

from __future__ import annotations

import dataclasses

from pytest_lora.checks.bits import same_bits
from pytest_lora.contract.dialects import Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.law import LawTable, not_usual_lora
from pytest_lora.contract.laws.steps import (
    anew,
    configure,
    known,
    require_effect,
    require_peft,
    seed_again,
)
from pytest_lora.errors import NotApplicable

__all__ = ["LAWS"]

_law = LawTable()
LAWS = _law.laws


@_law(sampled=True)
def alpha_applies(it: Experiment) -> None:
    """Another alpha with the same values gives another output: the scaling asked for is applied."""
    if "{alpha}" not in require_peft(it).method.options.values():
        raise NotApplicable("its configuration has no alpha")
    seed_again(it)
    it.attach()
    it.trial.run("once = run()")
    once = it.trial.names["once"]
    require_effect(it, once)
    anew(it, alpha=2 * it.case.alpha)
    seed_again(it)
    it.attach()
    if same_bits(it.output(), once):
        raise it.trial.broken(
            f"alpha {it.case.alpha} computes what alpha {it.case.alpha // 2} does, bit for bit",
            "assert not torch.equal(y, once)",
        )


@_law("linear", "attention", sampled=True)
def dropout_applies(it: Experiment) -> None:
    """A dropout that is asked for drops at random in training, and nothing in eval mode."""
    names = _dropouts(require_peft(it))
    if not names:
        raise NotApplicable("its configuration has no dropout")
    name = names[it.case.seed % len(names)]
    configure(it, **{name: "0.5"})
    it.attach()
    it.trial.run("still = run()")
    require_effect(it, it.trial.names["still"])
    it.expect_bits(it.trial.names["still"], "still", f"{name}: in eval mode, run again")
    it.trial.run(f"model.train()\ntorch.manual_seed({it.case.seed})\nfirst = run()")
    first = it.trial.names["first"]
    if all(same_bits(it.trial.value("run()"), first) for _ in range(_DRAWS)):
        raise it.trial.broken(
            f"{name}=0.5 drops nothing of {it.case.net.targets[0]}: {_DRAWS + 1} runs in training"
            " give the same",
            f"assert not all(torch.equal(run(), first) for _ in range({_DRAWS}))",
        )
    it.trial.run("model.eval()")
    it.expect_bits(it.trial.names["still"], "still", f"{name}: in eval mode, after training")


_DRAWS = 40
"""Runs in training: a coin that is thrown so often does not always fall on one side."""


def _dropouts(dialect: Peft) -> list[str]:
    """The settings of the method that are a share of what is dropped."""
    import peft

    fields = dataclasses.fields(getattr(peft, dialect.method.config))
    return sorted(
        field.name
        for field in fields
        if field.name.endswith("dropout") and isinstance(field.default, float)
    )


@_law("linear", "conv1d", "embedding", "convolution", excludes=not_usual_lora, sampled=True)
def learning_rates(it: Experiment) -> None:
    """LoRA+ trains every B faster than its A, embeddings at a rate of their own, nothing twice."""
    it.attach()
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


_RATES = """
optimizer = create_loraplus_optimizer(
    model, torch.optim.SGD, lr=2.0, loraplus_lr_ratio=8.0, loraplus_lr_embedding=0.5)
names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
pairs = [(names.get(id(p)), group["lr"]) for group in optimizer.param_groups
         for p in group["params"]]
rates = dict(pairs)
"""
