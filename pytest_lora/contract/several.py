"""Laws about adapters of different settings: side by side, in one another's place, combined.

What an adapter computes follows from its own settings and numbers.  Which other adapters there are,
or were, must not show.
"""

from __future__ import annotations

import random
from dataclasses import replace

from pytest_lora.contract.dialects import FIRST, Case, Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.handling import SECOND, known, renew, require_peft, state_of
from pytest_lora.errors import NotApplicable

__all__ = [
    "hold_hot_swap",
    "hold_mixed_generation",
    "hold_own_settings",
    "hold_random_combinations",
]

DRAWS = 32
"""Random combinations: that all of them fall on one side of a mean they lie on either side of with
the same probability happens once in 2 ** 31 times."""


# ------------------------------------------------------------------------------ side by side


def hold_own_settings(it: Experiment) -> None:
    """Beside an adapter of other settings it computes what it computes alone.

    Of two the second has a trained module in the network that has one, and comes to the first.
    """
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


_GENERATE = """
def generate(**more):
    ones = torch.ones_like(x)
    return model.generate(input_ids=x, attention_mask=ones, do_sample=False, num_beams={beams},
                          min_new_tokens={new}, max_new_tokens={new}, **more)
"""
NEW_TOKENS = 4


def hold_mixed_generation(it: Experiment) -> None:
    """In one batch each row gets the tokens that its adapter generates alone, with beams and not.

    The model computes in float64: what the order of a sum moves is nothing to the gap between two
    logits of random numbers.
    """
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


# ------------------------------------------------------------------------------ in its place

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


def hold_hot_swap(it: Experiment) -> None:
    """Swapped into the place of another, an adapter computes what it computes when loaded.

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


# ------------------------------------------------------------------------------ combined


def hold_random_combinations(it: Experiment) -> None:
    """A combination that leaves out numbers at random has the mean of the one that leaves out none.

    All factors are positive and half of their numbers are left out.  As likely as any choice is the
    opposite one, and what both give adds up to twice the plain combination, if their mean is that.
    So the sum of a factor's numbers is as often above that of the plain one as below it.
    """
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
