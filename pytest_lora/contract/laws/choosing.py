"""Laws about the modules that are chosen: these are adapted, as is said, and no others.

What is named and does not exist is refused, or somebody is told.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pytest_lora.contract.dialects import FIRST, SECOND
from pytest_lora.contract.experiment import Experiment, is_refusal
from pytest_lora.contract.law import LawTable, without
from pytest_lora.contract.laws.steps import (
    NOWHERE,
    adapted_modules,
    anew,
    attach_layers,
    configure,
    require_peft,
)
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable

__all__ = ["LAWS"]

_SAVED = f"peft.get_peft_model_state_dict(model, adapter_name={FIRST!r})"
_law = LawTable()
LAWS = _law.laws


@_law("look-alikes", "layers", "bare layers", sampled=True)
def chosen_layers(it: Experiment) -> None:
    """Exactly what is chosen is adapted: by full names; by layers; once saved and read again.

    The layer of a module is the first number in its path.
    """
    if it.case.network == "look-alikes":
        _named_modules(it)
        _once_saved(it)
        return
    chosen, options = _ways_to_choose(it.case.seed)
    names = [name for name, m in it.trial.names["net"].named_modules() if hasattr(m, "weight")]
    expected = {name for name in names if int(name.split("layers.")[1][0]) in chosen}
    found = set(attach_layers(it, **options))
    if found != expected:
        raise it.trial.broken(
            f"layers {chosen}: adapted are {', '.join(sorted(found - expected)) or 'none'} of"
            f" other layers; left out are {', '.join(sorted(expected - found)) or 'none'}",
            f"assert set(adapted) == {expected!r}, set(adapted)",
        )
    _once_saved(it)


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
    found = set(attach_layers(it))
    extra, left = sorted(found - set(chosen)), sorted(set(chosen) - found)
    if extra or left:
        raise it.trial.broken(
            f"{len(chosen)} modules named in full: adapted as well are"
            f" {', '.join(extra) or 'none'}; left out are {', '.join(left) or 'none'}",
            f"assert set(adapted) == set({chosen!r}), set(adapted)",
        )


def _once_saved(it: Experiment) -> None:
    """What is saved of the configuration can be read again, and adapts the same modules."""
    if require_peft(it).method.before:
        return  # what comes before is about this configuration, the very object
    adapted = set(adapted_modules(it))
    code = f"""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config[{FIRST!r}].save_pretrained(folder)
        config = peft.PeftConfig.from_pretrained(folder)
    """
    try:
        it.trial.run(code)
        anew(it)
        it.trial.run(f"model = peft.get_peft_model(net, config, adapter_name={FIRST!r})")
    except Refused as refusal:
        raise it.trial.broken(f"what is saved of its configuration is refused: {refusal}") from None
    again = set(adapted_modules(it))
    if again != adapted:
        raise it.trial.broken(
            "read again, its configuration does not adapt the same modules: only once are"
            f" {', '.join(sorted(again ^ adapted))}",
            f"assert set(adapted) == {adapted!r}",
        )


@_law("kinds", "llama", sampled=True)
def ways_to_choose(it: Experiment) -> None:
    """A list, a regular expression, 'all-linear': the same modules, adapted again and again."""
    if it.case.network == "llama" and require_peft(it).method.is_lora:
        # With an embedding there is more to save, if it is noticed that it is adapted.
        it.case = replace(it.case, chosen=("embed_tokens",))
    attach_layers(it)
    listed, saved = set(it.trial.names["adapted"]), set(it.trial.value(_SAVED))
    for said in _other_ways(it):
        anew(it)
        attach_layers(it, target_modules=said)
        _agree(it, f"target_modules={said}", "adapted", listed)
        _agree(it, f"saved with target_modules={said}", _SAVED, saved)
    for said in (repr(list(it.case.targets)), *_other_ways(it)):
        anew(it)
        attach_layers(it, target_modules=said)
        _once_more(it, said, listed)


def _once_more(it: Experiment, said: str, listed: set[str]) -> None:
    """A second adapter of the same configuration, which may only be refused if the list is."""
    try:
        it.trial.run(f"model.add_adapter({SECOND!r}, {require_peft(it).config(it.case)})")
    except Refused as refusal:
        raise it.outcome(refusal, always=not said.startswith("[")) from None
    adapted_modules(it)
    _agree(it, f"target_modules={said} once more", "adapted", listed)


def _other_ways(it: Experiment) -> list[str]:
    """Other values of target_modules that choose what the network's targets do, as source."""
    # None of the names stands in it as it is, and what is below such a module fits as well.
    names = "|".join(f"{re.escape(name[:-1])}[{name[-1]}]" for name in it.case.targets)
    pattern = repr(rf"(.*\.)?({names})(\..*)?")
    return [repr("all-linear"), pattern] if it.case.net.all_linear else [pattern]


def _agree(it: Experiment, what: str, expression: str, expected: set[str]) -> None:
    found = set(it.trial.value(expression))
    extra, missing = sorted(found - expected), sorted(expected - found)
    if extra or missing:
        raise it.trial.broken(
            f"{what}: too many are {', '.join(extra) or 'none'}; {', '.join(missing) or 'none'} are"
            " missing from what a list gives",
            f"# {what}",
            f"expected = {expected!r}",
            f"assert set({expression}) == expected, set({expression}) ^ expected",
        )


# ------------------------------------------------------------------ ranks and scalings of their own


@_law("layers", sampled=True)
def patterns_apply(it: Experiment) -> None:
    """rank_pattern and alpha_pattern give modules a rank and scaling, the others keep theirs."""
    method = require_peft(it).method
    r, alpha = it.case.r, it.case.alpha
    # One module is in both, under keys that are not the same.
    ranks = {"experts.1.up": 2 * r}
    alphas = {"layers.0.experts.2.down": 3 * alpha, "layers.1.experts.1.up": 5 * alpha}
    adapted = attach_layers(it, rank_pattern=repr(ranks), alpha_pattern=repr(alphas))
    for key in (*ranks, *alphas):
        if not any(name.endswith(key) for name in adapted):
            raise it.trial.broken(
                f"{key} is not adapted", f"assert any(n.endswith({key!r}) for n in adapted)"
            )
    asked = {
        name: (
            next((value for key, value in ranks.items() if name.endswith(key)), r),
            next((value for key, value in alphas.items() if name.endswith(key)), alpha),
        )
        for name in adapted
    }
    if method.is_lora:
        _as_declared(it, adapted, asked)
    else:
        _as_if_everywhere(it, adapted, asked)


def _as_declared(
    it: Experiment, adapted: Mapping[str, Any], asked: Mapping[str, tuple[int, int]]
) -> None:
    """LoRA's rank and scaling can be read off its layers."""
    for name, layer in adapted.items():
        rank, alpha = asked[name]
        scale = alpha / (rank**0.5 if it.dialect.name == "LORA+rslora" else rank)
        found = len(layer.lora_A[FIRST].weight), layer.scaling[FIRST]
        if found != (rank, scale):
            raise it.trial.broken(
                f"{name}: rank {found[0]} and scaling {found[1]:g}, declared are {rank} and"
                f" {scale:g}",
                f"layer = adapted[{name!r}]",
                f"found = len(layer.lora_A[{FIRST!r}].weight), layer.scaling[{FIRST!r}]",
                f"assert found == {(rank, scale)!r}, found",
            )


def _as_if_everywhere(
    it: Experiment, adapted: Mapping[str, Any], asked: Mapping[str, tuple[int, int]]
) -> None:
    """Each module has to be what it is in a model where its rank and alpha are everybody's."""
    it.trial.run("patterned = adapted")
    found = {name: _build(layer) for name, layer in adapted.items()}
    plain = {key: code for key, code in it.case.options.items() if not key.endswith("_pattern")}
    for r, alpha in sorted(set(asked.values())):
        anew(it, r=r, alpha=alpha, options=plain)
        it.attach(fill=False)
        uniform = adapted_modules(it)
        for name in (name for name, pair in asked.items() if pair == (r, alpha)):
            expected = _build(uniform[name])
            if found[name] != expected:
                raise it.trial.broken(
                    f"{name}, of rank {r} and alpha {alpha} by its patterns, is {found[name]}; with"
                    f" r={r} and alpha={alpha} for all it is {expected}",
                    f"one, other = patterned[{name!r}], adapted[{name!r}]",
                    "assert [p.shape for p in one.parameters()] == "
                    "[p.shape for p in other.parameters()]",
                    "assert one.scaling == other.scaling, (one.scaling, other.scaling)",
                )


def _build(layer: Any) -> dict[str, Any]:
    """What of a layer follows from rank and alpha: the shapes it trains, and its scaling."""
    built: dict[str, Any] = {
        name: list(parameter.shape)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    scaling = getattr(layer, "scaling", None)
    if isinstance(scaling, Mapping) and isinstance(scaling.get(FIRST), (int, float)):
        built["scaling"] = scaling[FIRST]
    return built


# ------------------------------------------------------------------------------ names of nothing


@_law("linear", sampled=True)
def targets_that_match_nothing(it: Experiment) -> None:
    """An adapter none of whose targets exists is refused, or told, the first or the second."""
    it.attach()
    it.trial.run("first = run()")
    dialect = require_peft(it, "a class of one's own is told which modules to adapt by name")
    if not dialect.method.accepts("target_modules"):
        raise NotApplicable("its configuration has no target_modules")
    config = dialect.config(replace(it.case.other(), chosen=(NOWHERE,)))
    calls = {
        "an adapter": f"peft.get_peft_model(Net(), {config})",
        "a second adapter": f"model.add_adapter({SECOND!r}, {config})",
    }
    for which, code in calls.items():
        if not _is_told(it, NOWHERE, code):
            raise it.trial.broken(
                f"{which}: no module is called {NOWHERE!r}, and nobody is told",
                "assert False, 'there was no such warning'",
            )
    it.expect_bits(it.trial.names["first"], "first", "after an adapter of no module")


@_law("layers", excludes=without("rank_pattern"), sampled=True)
def patterns_that_match_nothing(it: Experiment) -> None:
    """A key of rank_pattern or alpha_pattern that matches no module is refused, or told."""
    key = ("rank_pattern", "alpha_pattern")[it.case.seed % 2]
    configure(it, **{key: f"{{{NOWHERE!r}: 7}}"})
    if not _is_told(it, NOWHERE):
        raise it.trial.broken(
            f"{key}: no module is called {NOWHERE!r}, and nobody is told",
            "assert False, 'there was no such warning'",
        )


_CHOICES = {
    "layers_pattern": repr(NOWHERE),
    "exclude_modules": f"[{NOWHERE!r}]",
    "modules_to_save": f"[{NOWHERE!r}]",
}
"""Other settings that choose modules by name, choosing none."""


@_law(sampled=True)
def names_that_match_nothing(it: Experiment) -> None:
    """A name in another setting that matches no module is refused, or somebody is told."""
    keys = [key for key in _CHOICES if require_peft(it).method.accepts(key)]
    if not keys:
        raise NotApplicable("its configuration chooses nothing by name but its targets")
    own, silent = it.case.options, []
    for key in keys:
        anew(it, options=own)
        configure(it, **{key: _CHOICES[key]})
        if not _is_told(it, f"{NOWHERE}|{key}"):
            silent.append(key)
    if silent:
        raise it.trial.broken(
            f"no module is called {NOWHERE!r}, and nobody is told by {', '.join(silent)}",
            "assert False, 'there was no such warning'",
        )


def _is_told(it: Experiment, of: str, code: str = "") -> bool:
    """Attach it, or run ``code``; whether an exception or a warning speaks of what ``of`` matches.

    That an adapter adapts nothing is said in many ways: where ``code`` adds one, any refusal will
    do.
    """
    with warnings.catch_warnings():
        it.trial.run(f"import warnings\nwarnings.filterwarnings('error', message='(?s).*({of})')")
        try:
            if code:
                it.trial.run(code)
            else:
                it.dialect.attach(it.trial, it.case)
        except Refused as refusal:
            told = re.search(of, str(refusal.error)) or (code and is_refusal(refusal.error))
            if not told:
                raise it.outcome(refusal, always=it.has_to_run) from None
            it.trial.drop_refused()
            return True
    return False
