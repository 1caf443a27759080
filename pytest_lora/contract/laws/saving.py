"""Laws about what is saved: loaded again, in another process or model, it is the same."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest_lora as lora
from pytest_lora import fresh
from pytest_lora.adapter import read_adapter
from pytest_lora.checks.bits import how_different, same_bits
from pytest_lora.contract.dialects import FIRST, SECOND, Dialect, OwnClass, Peft
from pytest_lora.contract.experiment import Experiment, is_refusal
from pytest_lora.contract.law import LawTable, without
from pytest_lora.contract.laws.steps import (
    HASH_SEEDS,
    NOWHERE,
    anew,
    configure,
    renew,
    require_peft,
    require_untouched_base,
    state_of,
)
from pytest_lora.contract.trial import Refused
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import quiet
from pytest_lora.subject import Subject, load_base

__all__ = ["LAWS"]

_law = LawTable()
LAWS = _law.laws


@_law("llama", "experts llama", otherwise="many", sampled=True)
def save_reload(it: Experiment) -> None:
    """Saved, and loaded by a process that has never seen it, it computes the same, bit for bit."""
    require_untouched_base(it)
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
        try:
            results = it.in_fresh_processes(code, "{'y': y}", hash_seeds=range(HASH_SEEDS))
        except fresh.Refused as refusal:
            raise it.trial.broken(f"loaded {refusal}", "# loaded in a fresh process") from None
        for seed, found in enumerate(results):
            where = f"loaded in a fresh process with PYTHONHASHSEED={seed}"
            difference = how_different(found["y"], saved)
            if difference:
                raise it.trial.broken(f"{where}: {difference}", f"# {where}")


def _saved(it: Experiment, folder: Path) -> Subject:
    """What was saved, loaded again."""
    _save(it, folder)
    adapter = read_adapter(folder / "adapter" / FIRST)
    base = load_base(folder / "base", adapter=adapter, device=it.dialect.device)
    return Subject(adapter, base, {"input_ids": it.x})


def _save(it: Experiment, folder: Path) -> None:
    """The bare network under ``base``, built again from its seed, and the adapter."""
    bare = Experiment(it.trial.law, it.dialect, it.case)
    bare.trial.names["net"].save_pretrained(folder / "base")
    it.model.save_pretrained(folder / "adapter")


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


@_law("linear", "odd names", "conv1d", "embedding", "convolution", "grouped", "experts",
      "experts llama", sampled=True)  # fmt: skip
def state_round_trip(it: Experiment) -> None:
    """The state read out of a model, read into another one, gives the same output, bit for bit.

    In half of the examples the adapter has a setting that is not the usual one.
    """
    require_untouched_base(it)
    dialect = require_peft(it, "its files are its own affair")
    it.attach()
    switches = dialect.method.switches()
    draw = random.Random(it.case.seed)
    if switches and draw.randrange(2):
        key, code = draw.choice(switches)
        it.case = replace(it.case, options={**it.case.options, key: code})
        _attach_anew(it, dialect)
    it.trial.run(f"{dialect.seeded(0)}\nsaved = run()")
    it.trial.run(f"state = {state_of(FIRST)}")
    renew(it, dialect, it.case, FIRST)
    it.trial.run(f"told = peft.set_peft_model_state_dict(model, state, adapter_name={FIRST!r})")
    unexpected = it.trial.value("getattr(told, 'unexpected_keys', [])")
    if unexpected:
        raise it.trial.broken(
            f"{unexpected[0]} and {len(unexpected) - 1} more that were saved belong nowhere",
            "assert not told.unexpected_keys, told.unexpected_keys",
        )
    it.trial.run(dialect.seeded(0))
    it.expect_bits(it.trial.names["saved"], "saved", "read into another model")


@_law("linear", excludes=without("bias"), sampled=True)
def trained_biases(it: Experiment) -> None:
    """Biases of the base that train with an adapter are saved with it, and loaded with it."""
    require_untouched_base(it)
    dialect = require_peft(it, "it is PEFT that trains the base's biases")
    for word in dialect.method.biases():
        anew(it, bias=True)
        configure(it, bias=repr(word))
        it.attach()
        it.trial.run(f"saved = run()\nstate = {state_of(FIRST)}")
        renew(it, dialect, it.case, FIRST)
        it.trial.run(f"peft.set_peft_model_state_dict(model, state, adapter_name={FIRST!r})")
        it.expect_bits(it.trial.names["saved"], "saved", f"bias={word!r}, read into another model")


def _attach_anew(it: Experiment, dialect: Peft) -> None:
    """With other settings; what keeps them from working is none of this law's business."""
    try:
        dialect.build(it.trial, it.case)
        dialect.attach(it.trial, it.case)
        it.trial.value("run()")
    except Exception as error:
        raise NotApplicable(f"not with these settings: {error}") from None
    dialect.fill(it.trial, FIRST, it.case.seed + 7)


# ------------------------------------------------------------------------------ by transformers


@_law("llama", otherwise="llama", sampled=True)
def loaded_by_transformers(it: Experiment) -> None:
    """A model of transformers that loads an adapter itself computes what PEFT does, bit for bit.

    It stays in eval mode, and with its adapters switched off it is the base.
    """
    require_peft(it, "transformers loads what PEFT has saved")
    require_untouched_base(it)
    it.attach()
    it.trial.run("saved = run()")
    with _folders(it):
        it.trial.run("model.save_pretrained(folders[0].name)")
        it.dialect.build(it.trial, it.case)
        it.must(f"net.load_adapter(f'{{folders[0].name}}/{FIRST}', adapter_name={FIRST!r})")
        training = it.trial.value("[name for name, m in net.named_modules() if m.training]")
        if training:
            raise it.trial.broken(
                f"loading left {training[0] or 'the model'} in training mode",
                "assert not any(m.training for m in net.modules())",
            )
        it.expect_bits(it.trial.names["saved"], "saved", "loaded by transformers")
        it.must("net.disable_adapters()")
        it.expect_bits(it.base, "base", "loaded by transformers and switched off")


# ------------------------------------------------------------------------------ converted

_CONVERTED = ("pissa", "olora", "corda", "lora_ga")
"""Ways to start that move ``s B A`` of the base into the adapter, to be taken off it again."""
_START = f"""\
import os
own = model.peft_config[{FIRST!r}]
own.init_lora_weights = True  # its numbers, not how they came about
model.save_pretrained(folders[0].name)
start = f'{{folders[0].name}}/{{called}}'
os.rename(f'{{folders[0].name}}/{FIRST}', start)"""
_CONVERT = "model.save_pretrained(folders[1].name, path_initial_model_for_weight_conversion=start)"
_LOAD = f"""\
model = peft.PeftModel.from_pretrained(net, f'{{folders[1].name}}/{FIRST}').eval()"""


def _not_converted(dialect: Dialect) -> str:
    method = dialect.method if isinstance(dialect, Peft) else None
    start = str(method.options.get("init_lora_weights", "")) if method else ""
    return "" if start.strip("'").startswith(_CONVERTED) else "it is about LoRA that starts from W"


@_law("linear", excludes=_not_converted)
def converted(it: Experiment) -> None:
    """Saved as the change since its start, it is LoRA on the untouched base, and stays as it was.

    ``W - s B0 A0 + s B A`` is W with a change of twice the rank.  In some examples modules have
    ranks and scalings of their own, in some one of them is trained whole, and in some the start is
    in the folder that PEFT names after the adapter.
    """
    draw = random.Random(it.case.seed).randrange(4)
    _with_settings(it, draw)
    it.attach(fill=False)
    start = it.terms()
    with _folders(it, 2):
        it.trial.run(f"called = {FIRST if draw == 3 else 'start'!r}\n{_START}")
        it.dialect.fill(it.trial, FIRST, it.case.seed + 7)
        now = it.terms()
        it.trial.run(f"adapted, before = run(), own.to_dict()\nstate = {state_of(FIRST)}")
        it.must(_CONVERT)
        _as_it_was(it)
        _all_that_trained(it)
        it.dialect.build(it.trial, it.case)
        it.must(_LOAD)
        if draw != 2:
            without = {name: term.scaled(-1.0) for name, term in start.items()}
            it.expect([now, without], "loaded on the untouched base")


def _with_settings(it: Experiment, draw: int) -> None:
    """The usual ones, patterns, or a module that is trained whole."""
    first, *others = it.case.targets
    if draw == 1:
        configure(it, rank_pattern=f"{{{first!r}: 3}}", alpha_pattern=f"{{{first!r}: 5}}")
    if draw == 2:
        it.case = replace(it.case, chosen=(first,))
        configure(it, modules_to_save=repr(others))


def _as_it_was(it: Experiment) -> None:
    """Saving has taken nothing away from the adapter in training."""
    if FIRST not in it.trial.value("model.peft_config"):
        raise it.trial.broken(
            "saving it took the adapter away, for its start had its name",
            f"assert {FIRST!r} in model.peft_config",
        )
    it.expect_bits(it.trial.names["adapted"], "adapted", "after it was saved")
    _same_configuration(it)


def _same_configuration(it: Experiment) -> None:
    changed = it.trial.value("[k for k, v in own.to_dict().items() if before.get(k) != v]")
    if changed:
        raise it.trial.broken(
            f"saving it changed the configuration of the adapter in training: {', '.join(changed)}",
            "for key in before: assert own.to_dict()[key] == before[key], key",
        )


def _all_that_trained(it: Experiment) -> None:
    """Whatever is no factor, and so has no start to be taken off, is in the file as it is."""
    file = f"{{folders[1].name}}/{FIRST}/adapter_model.safetensors"
    it.trial.run(f"from safetensors.torch import load_file\nfile = load_file(f'{file}')")
    state, found = it.trial.names["state"], it.trial.names["file"]
    for key in sorted(set(state) - {key for key in state if ".lora_" in key}):
        if key not in found or not same_bits(found[key], state[key]):
            raise it.trial.broken(
                f"{key}, which trained, is {'not' if key not in found else 'another one'} in the"
                " file of the converted adapter",
                f"assert torch.equal(file[{key!r}], state[{key!r}])",
            )


# ------------------------------------------------------------------------------ what is told


@_law(sampled=True)
def incomplete_files_told(it: Experiment) -> None:
    """Who loads a file hears of a tensor that it lacks, and of one that belongs nowhere."""
    dialect = require_peft(it, "its files are its own affair")
    with _written(it):
        key = random.Random(it.case.seed).choice(sorted(it.trial.names["state"]))
        odd = ".".join([*key.split(".")[:2], NOWHERE, *key.split(".")[-2:]])
        less = f"{{key: t for key, t in state.items() if key != {key!r}}}"
        more = f"{{**state, {odd!r}: state[{key!r}].clone()}}"
        found = []
        for way in _WAYS:
            usual = _told(it, dialect, way, "state", SECOND)
            for tensors, name, fault in ((less, key, "lacks"), (more, odd, "has, and none needs,")):
                told = _told(it, dialect, way, tensors, SECOND) - usual
                if not any(_is_of(other, name) for other in told):
                    found.append(f"{way}: the file {fault} {name}, and nobody is told")
    if found:
        raise it.trial.broken(found[0], "assert told, 'nobody is told'", also=found[1:])


def _is_of(told: str, name: str) -> bool:
    """Whether what is told of is the tensor of a file: a model's names have the adapter's in them,
    and DoRA's magnitudes are modules there.
    """
    bare, saved = _bare(told), _bare(name)
    return bare[: len(saved)] == saved


def _bare(name: str) -> tuple[str, ...]:
    """A tensor's name without the adapter's, which a file leaves out."""
    return tuple(part for part in name.split(".") if part not in (FIRST, SECOND))


@_law(sampled=True)
def whole_files_accepted(it: Experiment) -> None:
    """Who loads a file that fits hears of no tensor that is missing, or too much."""
    dialect = require_peft(it, "its files are its own affair")
    name = (SECOND, "b")[it.case.seed % 2]  # the latter is a part of many names
    with _written(it):
        for way in _WAYS:
            told = _told(it, dialect, way, "state", name)
            if told:
                how = f"{way} as {name!r}" if way == "load_adapter" else way
                raise it.trial.broken(
                    f"{how}: the file fits, and {min(told)} and {len(told) - 1} more are said to be"
                    " missing, or too much",
                    "assert not told, told",
                )


_WAYS = ("from_pretrained", "load_adapter")
_LOADING = """
import re, tempfile, warnings
from pathlib import Path
from safetensors.torch import load_file, save_file

def loading(load, tensors):
    save_file(tensors, file, metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = load(file.parent)
    lists = [getattr(result, f"{kind}_keys", ()) for kind in ("missing", "unexpected")]
    said = [*(str(warning.message) for warning in caught), *map(str, lists)]
    return set(re.findall("base_model[.][^ ',]+", " ".join(said)))
"""


@contextlib.contextmanager
def _written(it: Experiment) -> Iterator[None]:
    """The adapter's ``file`` in an empty folder, and its tensors, ``state``."""
    require_untouched_base(it)
    it.attach()
    it.trial.run(_LOADING)
    with _folders(it):
        it.must("model.save_pretrained(folders[0].name)")
        it.trial.run(f"file = Path(folders[0].name, {FIRST!r}, 'adapter_model.safetensors')")
        it.must("state = load_file(file)")
        yield


def _told(it: Experiment, dialect: Peft, way: str, tensors: str, name: str) -> set[str]:
    """Names of tensors in what is said while loading: warnings, lists that are returned, or an
    exception.
    """
    dialect.build(it.trial, it.case)
    load = f"lambda path: peft.PeftModel.from_pretrained(net, path, adapter_name={FIRST!r})"
    if way == "load_adapter":  # beside one that is there already
        dialect.attach(it.trial, it.case)
        load = f"lambda path: model.load_adapter(path, {name!r})"
    try:
        it.trial.run(f"told = loading({load}, {tensors})")
    except Refused as refusal:
        if tensors == "state" or is_refusal(refusal.error):
            raise it.outcome(refusal) from None
        it.trial.drop_refused()
        return set(re.split("[ '\",]+", str(refusal.error)))
    told: set[str] = it.trial.names["told"]
    return told
