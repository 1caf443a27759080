"""Laws about the names of adapters: any will do, one that is taken or unknown is refused."""

from __future__ import annotations

import re
import warnings

from pytest_lora.contract.dialects import FIRST, SECOND
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.law import LawTable
from pytest_lora.contract.laws.steps import anew, require_peft, seed_again
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable

__all__ = ["LAWS"]

ABSENT = "no_such_adapter"
_law = LawTable()
LAWS = _law.laws


@_law(sampled=True)
def any_name(it: Experiment) -> None:
    """However an adapter is called, it computes the same and the same is saved of it."""
    dialect = require_peft(it)
    if dialect.rewrites:
        raise NotApplicable("by design it moves part of the base weight into the adapter")
    _second(it, SECOND)
    it.trial.run("usual, expected = saved, run()")
    name = _odd_name(it)
    anew(it)
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
    seed_again(it)
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


@_law(sampled=True)
def unknown_names(it: Experiment) -> None:
    """A call that names an adapter there is not is refused, or somebody is told."""
    require_peft(it)
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


@_law("linear", "saved", sampled=True)
def taken_names(it: Experiment) -> None:
    """An adapter of a name that is taken changes nothing: it is refused."""
    it.attach()
    dialect = require_peft(it, "what a name that is taken means is up to a class of one's own")
    settings = f"model.peft_config[{FIRST!r}].to_dict()"
    it.trial.run(f"first, settings = run(), {settings}")
    done = it.may("add", FIRST, it.case.other())
    when = f"an adapter of the same name was {'added' if done else 'refused'}"
    it.expect_bits(it.trial.names["first"], "first", when)
    if it.trial.value(settings) != it.trial.names["settings"]:
        raise it.trial.broken(
            f"{when}: the configuration of {dialect.name} is the new one's now",
            f"assert {settings} == settings",
        )
