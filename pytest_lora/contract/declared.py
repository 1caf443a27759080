"""Laws about what is declared: what a configuration asks for is done, or somebody is told.

They compare PEFT with itself. A setting that changes nothing, a name that means nothing, the same
modules chosen in another way, an adapter that came and went: each is two runs that have to agree,
or to differ, and no formula of any method is needed to see which.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_lora.checks.bits import same_bits
from pytest_lora.contract.dialects import FIRST, Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.handling import require_peft
from pytest_lora.contract.law import Law, LawTable, without
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable

if TYPE_CHECKING:
    import torch

__all__ = ["LAWS", "attach_layers", "configure", "hold_once_saved"]

SECOND = "one2"
ABSENT = "no_such_adapter"
_law = LawTable()


def configure(it: Experiment, **options: str) -> None:
    """Give the configuration further settings."""
    if not isinstance(it.dialect, Peft):
        raise NotApplicable("a class of one's own is told which modules to adapt by name")
    for option in options:
        if not it.dialect.method.accepts(option):
            raise NotApplicable(f"its configuration has no {option}")
    it.case = dataclasses.replace(it.case, options={**it.case.options, **options})


def attach_layers(it: Experiment, **options: str) -> dict[str, Any]:
    """Attach with further settings; the adapted modules by name."""
    configure(it, **options)
    it.attach(fill=False)
    return _adapted(it)


def _adapted(it: Experiment) -> dict[str, Any]:
    it.trial.run("from peft.tuners.tuners_utils import BaseTunerLayer")
    it.trial.run(
        "adapted = {n: m for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)}"
    )
    adapted: dict[str, Any] = it.trial.names["adapted"]
    return adapted


def hold_once_saved(it: Experiment) -> None:
    """What is saved of the configuration can be read again, and adapts the same modules."""
    if _peft(it).method.before:
        return  # what comes before is about this configuration, the very object
    adapted = set(_adapted(it))
    code = f"""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config[{FIRST!r}].save_pretrained(folder)
        config = peft.PeftConfig.from_pretrained(folder)
    """
    try:
        it.trial.run(code)
        _anew(it)
        it.trial.run(f"model = peft.get_peft_model(net, config, adapter_name={FIRST!r})")
    except Refused as refusal:
        raise it.trial.broken(f"what is saved of its configuration is refused: {refusal}") from None
    again = set(_adapted(it))
    if again != adapted:
        raise it.trial.broken(
            "read again, its configuration does not adapt the same modules: only once are"
            f" {', '.join(sorted(again ^ adapted))}",
            f"assert set(adapted) == {adapted!r}",
        )


def _peft(it: Experiment) -> Peft:
    """PEFT's dialect.

    Raises:
        NotApplicable: it is a class of one's own.
    """
    return require_peft(it, "it is about PEFT's settings and calls")


def _anew(it: Experiment, **changes: Any) -> None:
    """The bare network once more, for a case with ``changes``."""
    it.case = dataclasses.replace(it.case, **changes)
    it.dialect.build(it.trial, it.case)


def _seed(it: Experiment) -> None:
    """What is initialised next at random is the same each time."""
    it.trial.run(it.dialect.seeded(it.case.seed))


# ------------------------------------------------------------------------------ numbers


@_law(sampled=True)
def alpha_applies(it: Experiment) -> None:
    """Another alpha with the same values gives another output: the scaling asked for is applied."""
    if "{alpha}" not in _peft(it).method.options.values():
        raise NotApplicable("its configuration has no alpha")
    _seed(it)
    it.attach()
    it.trial.run("once = run()")
    once = it.trial.names["once"]
    _require_effect(it, once)
    _anew(it, alpha=2 * it.case.alpha)
    _seed(it)
    it.attach()
    if same_bits(it.output(), once):
        raise it.trial.broken(
            f"alpha {it.case.alpha} computes what alpha {it.case.alpha // 2} does, bit for bit",
            "assert not torch.equal(y, once)",
        )


def _require_effect(it: Experiment, output: torch.Tensor) -> None:
    if same_bits(output, it.base):
        raise NotApplicable("the adapter does not change the output of these inputs")


_DRAWS = 40
"""Runs in training: a coin that is thrown so often does not always fall on one side."""


@_law("linear", "attention", sampled=True)
def dropout_applies(it: Experiment) -> None:
    """A dropout that is asked for drops at random in training, and nothing in eval mode."""
    names = _dropouts(_peft(it))
    if not names:
        raise NotApplicable("its configuration has no dropout")
    name = names[it.case.seed % len(names)]
    configure(it, **{name: "0.5"})
    it.attach()
    it.trial.run("still = run()")
    _require_effect(it, it.trial.names["still"])
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


def _dropouts(dialect: Peft) -> list[str]:
    """The settings of the method that are a share of what is dropped."""
    import peft

    fields = dataclasses.fields(getattr(peft, dialect.method.config))
    return sorted(
        field.name
        for field in fields
        if field.name.endswith("dropout") and isinstance(field.default, float)
    )


# ------------------------------------------------------------------------------ patterns


@_law("layers", sampled=True)
def patterns_apply(it: Experiment) -> None:
    """rank_pattern and alpha_pattern give modules a rank and scaling, the others keep theirs."""
    method = _peft(it).method
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
        _anew(it, r=r, alpha=alpha, options=plain)
        it.attach(fill=False)
        uniform = _adapted(it)
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


_NOTHING = "no_such_module"


@_law("layers", excludes=without("rank_pattern"), sampled=True)
def patterns_that_match_nothing(it: Experiment) -> None:
    """A key of rank_pattern or alpha_pattern that matches no module is refused, or told."""
    key = ("rank_pattern", "alpha_pattern")[it.case.seed % 2]
    configure(it, **{key: f"{{{_NOTHING!r}: 7}}"})
    if not _is_told(it, _NOTHING):
        raise it.trial.broken(
            f"{key}: no module is called {_NOTHING!r}, and nobody is told",
            "assert False, 'there was no such warning'",
        )


_CHOICES = {
    "layers_pattern": repr(_NOTHING),
    "exclude_modules": f"[{_NOTHING!r}]",
    "modules_to_save": f"[{_NOTHING!r}]",
}
"""Other settings that choose modules by name, choosing none."""


@_law(sampled=True)
def names_that_match_nothing(it: Experiment) -> None:
    """A name in another setting that matches no module is refused, or somebody is told."""
    keys = [key for key in _CHOICES if _peft(it).method.accepts(key)]
    if not keys:
        raise NotApplicable("its configuration chooses nothing by name but its targets")
    own, silent = it.case.options, []
    for key in keys:
        _anew(it, options=own)
        configure(it, **{key: _CHOICES[key]})
        if not _is_told(it, f"{_NOTHING}|{key}"):
            silent.append(key)
    if silent:
        raise it.trial.broken(
            f"no module is called {_NOTHING!r}, and nobody is told by {', '.join(silent)}",
            "assert False, 'there was no such warning'",
        )


def _is_told(it: Experiment, of: str) -> bool:
    """Attach it; whether an exception or a warning speaks of the setting."""
    with warnings.catch_warnings():
        it.trial.run(f"import warnings\nwarnings.filterwarnings('error', message='(?s).*({of})')")
        try:
            it.dialect.attach(it.trial, it.case)
        except Refused as refusal:
            if not re.search(of, str(refusal.error)):
                raise it.outcome(refusal, always=it.has_to_run) from None
            it.trial.drop_refused()
            return True
    return False


# ------------------------------------------------------------------------------ names


@_law(sampled=True)
def unknown_names(it: Experiment) -> None:
    """A call that names an adapter there is not is refused, or somebody is told."""
    _peft(it)
    it.attach()
    it.trial.run("import tempfile, warnings")
    silent = [call for call in _calls(it) if not _speaks_up(it, call)]
    if silent:
        raise it.trial.broken(
            f"there is no adapter {ABSENT!r}, and nobody is told by:"
            f" {'; '.join(_call(code) for code in silent)}",
            *silent,
            "assert False, 'none of these raised'",
        )


def _calls(it: Experiment) -> list[str]:
    """What takes an adapter's name; what changes the model most comes last."""
    absent, both = repr(ABSENT), f"[{FIRST!r}, {ABSENT!r}]"
    names = [FIRST, *[ABSENT] * (len(it.x) - 1)]
    calls = [
        f"model.delete_adapter({absent})",
        "with tempfile.TemporaryDirectory() as folder:\n"
        f"    model.save_pretrained(folder, selected_adapters={both})",
        f"peft.get_peft_model_state_dict(model, adapter_name={absent})",
    ]
    if not it.case.net.reads_tokens:
        calls.append(f"model(x, adapter_names={names!r})")
    if hasattr(it.model.base_model, "add_weighted_adapter"):
        calls.append(f"model.add_weighted_adapter({both}, [1.0, 1.0], 'sum0')")
    calls.append(f"model.set_adapter({absent})")
    if hasattr(it.model.base_model, "merge_adapter"):
        calls.append(f"model.merge_adapter(adapter_names=[{absent}])")
    calls.append(f"model.base_model.set_adapter({both})")
    return calls


def _call(code: str) -> str:
    """A call in one line."""
    return code.strip().splitlines()[-1].strip()


def _speaks_up(it: Experiment, call: str) -> bool:
    """Whether a call raises, whatever it is, or warns of the name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f"(?s).*{ABSENT}")
        try:
            exec(call, it.trial.names)
        except Exception:
            return True
    return False


@_law(sampled=True)
def any_name(it: Experiment) -> None:
    """However an adapter is called, it computes the same and the same is saved of it."""
    dialect = _peft(it)
    if dialect.rewrites:
        raise NotApplicable("by design it moves part of the base weight into the adapter")
    _second(it, SECOND)
    it.trial.run("usual, expected = saved, run()")
    name = _odd_name(it)
    _anew(it)
    try:
        _second(it, name)
    except _Told:
        return
    usual, saved = it.trial.names["usual"], it.trial.names["saved"]
    for keys, what in ((usual.keys() - saved, "lacks"), (saved.keys() - usual, "has")):
        if keys:
            raise it.trial.broken(
                f"saved of an adapter called {name!r}, the file {what} {min(keys)}, which is not so"
                f" with one called {SECOND!r}",
                "assert set(saved) == set(usual), set(saved) ^ set(usual)",
            )
    expected = it.trial.names["expected"]
    it.expect_bits(expected, "expected", f"called {name!r} instead of {SECOND!r}")


class _Told(Exception):
    """Somebody was told."""


def _odd_name(it: Experiment) -> str:
    """A name that is also part of the names of modules and parameters."""
    prefix = str(getattr(it.model.base_model, "prefix", "lora_")).strip("_")
    names = (prefix, "weight", it.case.targets[0] if it.case.targets else "experts", "model")
    return names[it.case.seed % len(names)]


def _second(it: Experiment, name: str) -> None:
    """A second adapter called so, loaded from ``saved``, what is saved of it.

    Raises:
        _Told: PEFT does not take the name, or warns of it.
    """
    case = it.case.other()
    _seed(it)
    it.attach()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=rf"(?is).*\bname\b.*\b{name}\b")
        try:
            it.dialect.say(it.trial, "add", name, case)
        except Refused as refusal:
            if re.search(rf"\b{name}\b", str(refusal.error)):
                raise _Told from None
            raise it.outcome(refusal) from None
    it.say("activate", name)
    it.dialect.fill(it.trial, name, case.seed)
    read = f"peft.get_peft_model_state_dict(model, adapter_name={name!r})"
    it.trial.run(f"saved = {{key: value.clone() for key, value in {read}.items()}}")
    it.dialect.fill(it.trial, name, case.seed + 1)  # whatever is there has to be replaced
    it.trial.run(f"peft.set_peft_model_state_dict(model, saved, adapter_name={name!r})")
    it.output()


# ------------------------------------------------------------------------------ ways to say it


@_law("kinds", "llama", sampled=True)
def ways_to_choose(it: Experiment) -> None:
    """A list, a regular expression, 'all-linear': the same modules, adapted again and again."""
    if it.case.network == "llama" and _peft(it).method.is_lora:
        # With an embedding there is more to save, if it is noticed that it is adapted.
        it.case = dataclasses.replace(it.case, chosen=("embed_tokens",))
    attach_layers(it)
    listed, saved = set(it.trial.names["adapted"]), set(it.trial.value(_SAVED))
    for said in _other_ways(it):
        _anew(it)
        attach_layers(it, target_modules=said)
        _agree(it, f"target_modules={said}", "adapted", listed)
        _agree(it, f"saved with target_modules={said}", _SAVED, saved)
    for said in (repr(list(it.case.targets)), *_other_ways(it)):
        _anew(it)
        attach_layers(it, target_modules=said)
        _once_more(it, said, listed)


_SAVED = f"peft.get_peft_model_state_dict(model, adapter_name={FIRST!r})"


def _once_more(it: Experiment, said: str, listed: set[str]) -> None:
    """A second adapter of the same configuration, which may only be refused if the list is."""
    try:
        it.trial.run(f"model.add_adapter({SECOND!r}, {_peft(it).config(it.case)})")
    except Refused as refusal:
        raise it.outcome(refusal, always=not said.startswith("[")) from None
    _adapted(it)
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


# ------------------------------------------------------------------------------ coming and going


@_law("linear", "two heads", sampled=True)
def deleted_is_gone(it: Experiment) -> None:
    """Once an adapter is deleted, nothing is left of it, and all else is as it was."""
    it.attach()
    names = "{**dict(model.named_parameters()), **dict(model.named_buffers())}"
    settings = "sorted(model.peft_config)" if it.is_peft else "None"
    it.trial.run(f"before = {{name: t.detach().clone() for name, t in {names}.items()}}")
    it.trial.run(f"adapters = {settings}")
    it.add(SECOND, it.case.other())
    it.output()
    it.say("delete", SECOND)
    before, after = it.trial.names["before"], it.trial.value(names)
    check = f"after = {names}\nassert set(after) == set(before), set(after) ^ set(before)"
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
            f"assert torch.equal({names}[{changed[0]!r}], before[{changed[0]!r}])",
        )
    if it.trial.value(settings) != it.trial.names["adapters"]:
        raise it.trial.broken("its configuration is still there", f"assert {settings} == adapters")


@_law("two heads", sampled=True)
def own_modules_saved(it: Experiment) -> None:
    """Each adapter has the modules that its own configuration names to be saved, and no others."""
    _peft(it)
    it.attach()
    other = dataclasses.replace(
        it.case.other(), options={**it.case.options, "modules_to_save": "['tail']"}
    )
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


LAWS: Mapping[str, Law] = dict(_law.laws)
