"""The contract: sound code passes it, classic mistakes do not, its scripts run by themselves."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import torch
from example import ROOT
from hypothesis import Phase, settings
from stack import since

from pytest_lora import fresh
from pytest_lora.contract import IN_FRESH_PROCESSES
from pytest_lora.contract.cells import (
    Cell,
    Result,
    Verdict,
    assert_contract,
    contract_cells,
    law_ids,
    sample_of,
    try_cell,
)
from pytest_lora.contract.dialects import FIRST, Case, OwnClass, Peft, load_implementation
from pytest_lora.contract.experiment import Experiment, is_refusal, lacks_library, says_refusal
from pytest_lora.contract.known import Known, known_deviations
from pytest_lora.contract.laws import LAWS
from pytest_lora.contract.methods import Method, discover
from pytest_lora.contract.reference import Reference, Term
from pytest_lora.contract.table import markdown, summary, table_lines
from pytest_lora.contract.trial import ContractBroken, Refused, Trial
from pytest_lora.errors import CannotRun, NotApplicable, UsageError
from pytest_lora.loading import one_line, quiet

PAGE = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
PAPER, *_ = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)
LORA = Peft(Method("LORA", "LoraConfig", {"r": "{r}", "lora_alpha": "{alpha}"}, plain=True))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a module with the layer of the documentation, changed, and imports its class."""
    names: list[str] = []

    def make(*changes: tuple[str, str], more: str = "") -> str:
        text = PAPER
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        name = f"layer{len(names)}_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text.replace("if __name__", more + "\n\nif __name__"))
        names.append(name)
        importlib.invalidate_caches()
        return f"{name}:MyLora"

    monkeypatch.syspath_prepend(str(tmp_path))
    yield make
    for name in names:
        sys.modules.pop(name, None)


def test_the_layer_of_the_documentation_keeps_the_contract(module: Any) -> None:
    verdicts = assert_contract(module(), examples=10)
    results = {verdict.law: verdict.result for verdict in verdicts}
    assert set(results.values()) == {Result.PASS, Result.NOT_APPLICABLE}
    for law in ("forward", "merge_equivalence", "idempotent_merge", "requires_grad", "sequences"):
        assert results[law] is Result.PASS
    [scaled] = [v for v in verdicts if v.law == "linear_in_scaling"]
    assert scaled.reason == "MyLora has no scale"


MISTAKES = {
    "scale": ("forward", "= alpha / r,", "= alpha,"),
    "transpose": ("merge_equivalence", "+= self.scaling * self.B @ self.A",
                  "+= self.scaling * self.A.T @ self.B.T"),
    "dropout in eval": ("forward", "self.dropout(x)", "nn.functional.dropout(x, self.dropout.p)"),
    "merged twice": ("idempotent_merge", "if not self.merged:\n            self.base",
                     "if True:\n            self.base"),
    "base not frozen": ("requires_grad", "base.requires_grad_(False)", "base"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_classic_mistake_is_caught_with_a_script_that_shows_it(mistake: str, module: Any) -> None:
    law, *change = MISTAKES[mistake]
    more = [("        model.requires_grad_(False)\n", "")] if law == "requires_grad" else []
    with pytest.raises(ContractBroken) as caught:
        assert_contract(module((change[0], change[1]), *more), laws=[law], examples=25)
    assert (caught.value.law, caught.value.method) == (law, "MyLora")
    assert "pytest_lora" not in caught.value.script
    kind = RuntimeError if mistake == "transpose" else AssertionError
    with pytest.raises(kind):
        exec(compile(caught.value.script, "shown", "exec"), {"__name__": "shown"})


FUSED = """
class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, A, B, s):
        ctx.save_for_backward(x, mask, A, B)
        ctx.s = s
        return s * (mask * x @ A.T) @ B.T

    @staticmethod
    def backward(ctx, g):
        x, mask, A, B = ctx.saved_tensors
        rows, inputs = ctx.s * g.reshape(-1, len(B)), (mask * x).reshape(-1, A.shape[1])
        into = rows @ B
        of_x = (into @ A).reshape(x.shape) * mask
        return of_x, None, into.T @ inputs, rows.T @ (inputs @ A.T), None
"""
"""The adapter's part of the layer with a backward pass of its own."""

RETURNS = "return of_x, None, into.T @ inputs"
REUSED = "{0}\n        " + RETURNS
BACKWARDS = {
    "dropout forgotten": (".reshape(x.shape) * mask", ".reshape(x.shape)", "gradient of the input"),
    "another input": ("into.T @ inputs", "into.T @ x.reshape(inputs.shape)", "gradient of A of"),
    "scaled twice": ("rows.T @ (inputs", "ctx.s * rows.T @ (inputs", "gradient of B of"),
    "none": (RETURNS, "return of_x, None, None", "no gradient reaches A"),
    "a factor reused": (RETURNS, REUSED.format("B.data.mul_(2)"), "a second backward pass"),
    "the input reused": (RETURNS, REUSED.format("x.data.copy_(of_x)"), "into the input"),
}


def fused(module: Any, source: str) -> str:
    old = "self.scaling * (self.dropout(x) @ self.A.T) @ self.B.T"
    new = "Fused.apply(x, self.dropout(torch.ones_like(x)), self.A, self.B, self.scaling)"
    place: str = module((old, new), more=source)
    return place


def test_a_sound_backward_pass_of_ones_own_keeps_the_contract(module: Any) -> None:
    laws = ["forward", "gradients", "merge_equivalence", "requires_grad"]
    verdicts = assert_contract(fused(module, FUSED), laws=laws, examples=15)
    assert {verdict.result for verdict in verdicts} == {Result.PASS}


@pytest.mark.parametrize("fault", BACKWARDS)
def test_a_wrong_backward_pass_is_caught_by_nothing_but_its_gradients(
    fault: str, module: Any
) -> None:
    old, new, says = BACKWARDS[fault]
    assert old in FUSED
    place = fused(module, FUSED.replace(old, new))
    assert_contract(place, laws=["forward", "merge_equivalence"], examples=5)
    with pytest.raises(ContractBroken, match=says) as caught:
        assert_contract(place, laws=["gradients"], examples=15)
    assert "pytest_lora" not in caught.value.script
    with pytest.raises(AssertionError):
        exec(compile(caught.value.script, "shown", "exec"), {"__name__": "shown"})


def test_random_numbers_that_no_seed_repeats_give_no_verdict(module: Any) -> None:
    own = "x * torch.rand(x.shape, generator=DICE).round() if self.training else x"
    place = module(("self.dropout(x)", f"({own})"), more="DICE = torch.Generator()")
    [verdict] = assert_contract(place, laws=["gradients"], examples=5)
    assert verdict.result is Result.NOT_APPLICABLE
    assert "no seed of torch repeats" in verdict.reason


NO_MERGES = {
    "nothing is done": ("        [layer.merge() for layer", "        [None for layer"),
    "a copy is merged": ("self.base.weight += self.scaling * self.B @ self.A",
                         "self.base.weight.clone().add_(self.scaling * self.B @ self.A)"),
}  # fmt: skip


@pytest.mark.parametrize("how", NO_MERGES)
def test_a_merge_that_leaves_the_weights_alone_is_caught(how: str, module: Any) -> None:
    """Its output is right as long as the factors go on being used."""
    changes = [NO_MERGES[how], ("self.merged = True", "self.merged = False")]
    [tried] = [c for c in contract_cells(module(*changes)) if c.law == "merge_equivalence"]
    verdict = try_cell(tried, examples=2, shrink=False)
    assert verdict.result is Result.FAIL
    assert "merged, then other factors" in verdict.reason


MERGES_BY_MODE = """\
    def train(self, mode=True):
        super().train(mode)
        self.unmerge() if mode else self.merge()
        return self

    @torch.no_grad()
    def merge(self):"""
"""What loralib's layers do: merged in eval mode, and apart in training."""


def by_mode(module: Any, *changes: tuple[str, str]) -> str:
    whole = MERGES_BY_MODE
    for old, new in changes:
        assert old in whole
        whole = whole.replace(old, new)
    made: str = module(("    @torch.no_grad()\n    def merge(self):", whole))
    return made


def test_a_layer_that_merges_in_eval_mode_keeps_the_contract(module: Any) -> None:
    verdicts = assert_contract(by_mode(module), examples=3)
    results = {verdict.law: verdict.result for verdict in verdicts}
    assert set(results.values()) == {Result.PASS, Result.NOT_APPLICABLE}
    for law in ("forward", "frozen_weights", "padding_and_batch", "train_and_eval", "sequences"):
        assert results[law] is Result.PASS


def test_a_merge_that_training_does_not_take_back_is_caught(module: Any) -> None:
    """Every evaluation would leave the adapter in the base once more."""
    place = by_mode(module, ("self.unmerge() if mode", "setattr(self, 'merged', False) if mode"))
    assert_contract(place, laws=["forward", "gradients", "merge_equivalence"], examples=3)
    with pytest.raises(ContractBroken, match="after 3 turns of training and evaluation") as caught:
        assert_contract(place, laws=["train_and_eval"], examples=15)
    with pytest.raises(AssertionError):
        exec(compile(caught.value.script, "shown", "exec"), {"__name__": "shown"})


def test_a_layer_that_keeps_something_from_training_is_caught(module: Any) -> None:
    counted = ("        y = self.base(x)\n",
               "        self.calls = getattr(self, 'calls', 0) + self.training\n"
               "        y = self.base(x) * (1 + self.calls / 64)\n")  # fmt: skip
    assert_contract(module(counted), laws=["forward"], examples=3)
    with pytest.raises(ContractBroken, match="after 3 turns of training and evaluation"):
        assert_contract(module(counted), laws=["train_and_eval"], examples=5)


def test_factors_that_are_gone_once_merged_are_no_fault(module: Any) -> None:
    gone = ("return {name: (layer.A, layer.B)", "return {name: (1 / (not layer.merged) * layer.A, "
            "layer.B) if layer.merged else (layer.A, layer.B)")  # fmt: skip
    [tried] = [c for c in contract_cells(module(gone)) if c.law == "merge_equivalence"]
    assert try_cell(tried, examples=2, shrink=False).result is Result.PASS


PARTS = {
    "nothing": ("for name in targets:", "for name in []:", "down is left out"),
    "one of two": ("for name in targets:", "for name in targets[:1]:", "down is left out"),
    "one too many": ("for name in targets:", "for name in (*targets, 'norm'):", "norm is adapted"),
    "another rank": ("getattr(model, name), r,", "getattr(model, name), r + 1,", "A of up is ["),
    "the other way round": ("(layer.A, layer.B)", "(layer.B, layer.A)", "A of up is ["),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_class_has_to_adapt_what_it_was_asked_to(part: str, module: Any) -> None:
    old, new, says = PARTS[part]
    changes = [(old, new)]
    if part == "one too many":  # a batch norm has no matrix to adapt
        changes.append(("base.in_features", "len(base.weight)"))
        changes.append(("base.out_features", "len(base.weight)"))
    cells = {tried.law: tried for tried in contract_cells(module(*changes))}
    for law in ("identity_at_initialisation", "requires_grad", "sequences"):
        verdict = try_cell(cells[law], examples=1, shrink=False)
        assert verdict.result is Result.FAIL
        assert says in verdict.reason


@pytest.mark.parametrize(
    ("raises", "result"),
    [
        ("ValueError('operands cannot be broadcast together')", Result.FAIL),
        ("RuntimeError('cannot merge')", Result.FAIL),
        ("TypeError('Unsupported data type')", Result.FAIL),
        ("NotImplementedError", Result.NOT_APPLICABLE),
    ],
)
def test_of_ones_own_functions_only_one_that_is_not_implemented_is_none(
    raises: str, result: Result, module: Any
) -> None:
    """The words that PEFT refuses with may be those of any fault in another's code."""
    merge = "        [layer.merge() for layer in each(model).values()]"
    cells = {
        tried.law: tried for tried in contract_cells(module((merge, f"        raise {raises}")))
    }
    for law in ("merge_equivalence", "unmerge_restoration", "idempotent_merge"):
        assert try_cell(cells[law], examples=1, shrink=False).result is result


def test_a_class_that_adapts_nothing_is_caught_where_outputs_have_no_reference(module: Any) -> None:
    with pytest.raises(ContractBroken, match="adapter 'one': middle is left out"):
        assert_contract(
            module(("for name in targets:", "for name in []:")), laws=["tied_weights"], examples=1
        )


MORE = """
import json
from pathlib import Path
from safetensors.torch import load_file, save_file


class Several(MyLora):
    def attach(self, model, targets, r, alpha, dropout):
        model.requires_grad_(False)
        for name in targets:
            setattr(model, name, Switched(getattr(model, name), r, alpha, dropout))
        return model

    def factors(self, model, name="one"):
        having = {key: m.held[name] for key, m in switched(model).items() if name in m.held}
        return {key: (layer.A, layer.B) for key, layer in having.items()}

    def merge(self, model):
        [layer.merge() for m in switched(model).values() if m.on for layer in m.together()]

    def unmerge(self, model):
        [layer.unmerge() for m in switched(model).values() for layer in m.together()]

    def disable(self, model):
        self.unmerge(model)  # before it is off
        for m in switched(model).values():
            m.on = False

    def enable(self, model):
        for m in switched(model).values():
            m.on = True

    def add(self, model, name, targets, r, alpha):
        for key, m in switched(model).items():
            if key in targets:
                m.held[name] = LoraLinear(m.base, r, alpha, 0.0)

    def activate(self, model, name):
        self.unmerge(model)  # before another
        for m in switched(model).values():
            m.active = name

    def activate_all(self, model, names):
        self.unmerge(model)
        for m in switched(model).values():
            m.active = list(names)

    def delete(self, model, name):
        for m in switched(model).values():
            if name in m.held:
                del m.held[name]

    def scale(self, model, factor):
        for m in switched(model).values():
            for layer in m.together():
                layer.scaling = factor * layer.first

    def combine(self, model, names, weights, name):
        for m in switched(model).values():
            parts = [m.held[each] for each in names]
            up = [w * part.scaling * part.B.data for w, part in zip(weights, parts)]
            r = sum(len(part.A) for part in parts)
            m.held[name] = new = LoraLinear(m.base, r, r, 0.0)
            new.B.data, new.A.data = torch.cat(up, 1), torch.cat([part.A.data for part in parts])

    def mixed(self, model, x, names):
        for m in switched(model).values():
            m.rows = names
        y = model(x)
        for m in switched(model).values():
            m.rows = None
        return y

    def save(self, model, path):
        layers = {name: m.now() for name, m in switched(model).items()}
        tensors = [tensor for m in layers.values() for tensor in (m.A.data, m.B.data)]
        kept = {"targets": list(layers), "r": len(tensors[0]), "scaling": m_scaling(layers)}
        Path(path, "kept.json").write_text(json.dumps(kept))
        save_file({str(i): tensor for i, tensor in enumerate(tensors)}, f"{path}/kept")

    def load(self, model, path):
        kept = json.loads(Path(path, "kept.json").read_text())
        self.attach(model, kept["targets"], kept["r"], kept["scaling"] * kept["r"], 0.0)
        tensors = load_file(f"{path}/kept")
        for i, name in enumerate(kept["targets"]):
            layer = getattr(model, name).now()
            layer.A.data, layer.B.data = tensors[str(2 * i)], tensors[str(2 * i + 1)]
        return model


def m_scaling(layers):
    return next(iter(layers.values())).scaling


class Switched(nn.Module):
    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base, self.on, self.active, self.rows = base, True, "one", None
        self.held = nn.ModuleDict({"one": LoraLinear(base, r, alpha, dropout)})

    def now(self):
        return self.held[self.active] if self.active in self.held else self.base

    def together(self):
        names = self.active if isinstance(self.active, list) else [self.active]
        return [self.held[name] for name in names if name in self.held]

    def forward(self, x):
        if self.rows:
            each = [self.held[name] if name else self.base for name in self.rows]
            return torch.stack([layer(row) for layer, row in zip(each, x)])
        if self.on and isinstance(self.active, list):
            y = self.base(x)
            for layer in self.together():
                if not layer.merged:
                    y = y + layer.scaling * (x @ layer.A.T) @ layer.B.T
            return y
        return self.now()(x) if self.on else self.base(x)


def switched(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Switched)}
"""
REMEMBERS = (
    "self.merged = False\n\n    def forward",
    "self.merged = False\n        self.first = alpha / r\n\n    def forward",
)


def several(module: Any, *changes: tuple[str, str]) -> str:
    more = MORE
    for old, new in changes:
        assert old in more
        more = more.replace(old, new)
    place: str = module(REMEMBERS, more=more)
    return place.replace("MyLora", "Several")


def test_a_class_with_every_function_is_held_against_every_law_it_can_be(module: Any) -> None:
    verdicts = assert_contract(several(module), examples=8)
    results = {verdict.law: verdict.result for verdict in verdicts}
    assert Result.FAIL not in results.values()
    left = {law for law, result in results.items() if result is Result.NOT_APPLICABLE}
    assert left == {
        "safe_merge_is_safe",
        "eval_mode_kept",
        "merged_reload",
        "chosen_layers",
        "patterns_apply",
        "patterns_that_match_nothing",
        "targets_that_match_nothing",
        "hot_swap",
        "learning_rates",
        "mixed_generation",
        "own_settings",
        "random_combinations",
        "state_round_trip",
        "taken_names",
        "unloaded",
        "names_that_match_nothing",
        "alpha_applies",
        "applied_once",
        "dropout_applies",
        "unknown_names",
        "any_name",
        "ways_to_choose",
        "own_modules_saved",
        "reads_inputs",
        "stays_where_it_is",
        "incomplete_files_told",
        "whole_files_accepted",
        "converted",
        "name_forgotten",
        "trained_biases",
        "loaded_by_transformers",
    }


@pytest.mark.parametrize(
    ("raises", "result"),
    [("NotImplementedError", Result.NOT_APPLICABLE), ("ValueError('cannot')", Result.FAIL)],
)
@pytest.mark.parametrize(
    ("law", "function"),
    [
        ("save_reload", "save(self, model, path)"),
        ("saved_alone", "load(self, model, path)"),
        ("mixed_batch", "mixed(self, model, x, names)"),
    ],
)
def test_a_function_that_is_not_implemented_is_as_good_as_absent(
    law: str, function: str, raises: str, result: Result, module: Any
) -> None:
    head = f"    def {function}:\n"
    place = several(module, (head, f"{head}        raise {raises}\n"))
    [tried] = [found for found in contract_cells(place) if found.law == law]
    assert try_cell(tried, examples=1, shrink=False).result is result


FAULTS = {
    "not activated": ("isolation", "m.active = name", "m.active = m.active"),
    "delete takes all": ("isolation", "del m.held[name]", "m.held['one'].B.data.zero_()"),
    "off while merged": ("sequences", "self.unmerge(model)  # before it is off", "pass"),
    "another while merged": ("sequences", "self.unmerge(model)  # before another", "pass"),
    "several though off": ("sequences", "if self.on and isinstance", "if isinstance"),
    "adds to every module": ("sequences", "if key in targets:", "if True:"),
    "scales add up": ("linear_in_scaling", "layer.scaling = factor * layer.first",
                      "layer.scaling *= factor"),
    "nothing is left of nothing": (
        "linear_in_scaling",
        "layer.scaling = factor * layer.first",
        "layer.A.data.mul_(bool(factor))\n            layer.scaling = factor * layer.first",
    ),
    "not enabled": ("base_output_when_disabled", "m.on = True", "pass"),
    "not all of it taken out": (
        "unmerge_without_growth",
        "[layer.unmerge() for",
        "[layer.unmerge() or m.base.weight.data.mul_(1 + 2**-20) for",
    ),
    "only the first is merged": ("order_of_merges", "if m.on for layer in m.together()]",
                                 "if m.on for layer in m.together()[:1]]",
                                 "if not layer.merged", "if not self.together()[0].merged"),
    "factors of a set": ("seeded_initialisation", "in targets:", "in {*targets}:"),
    "values from a hash": (
        "seeded_initialisation",
        "alpha, dropout))\n        return model\n\n    def factors(self, model, name",
        "alpha, dropout))\n            torch.manual_seed(hash(name))\n        return model\n\n"
        "    def factors(self, model, name",
    ),
    "saved in the order of a set": (
        "save_reload",
        "in layers.values() for",
        "in [layers[n] for n in {*list(layers)}] for",
        'for i, name in enumerate(kept["targets"])',
        'for i, name in enumerate({*kept["targets"]})',
    ),
    "kept in memory": (
        "save_reload",
        "layers = {name: m.now() for",
        "self.kept = getattr(self, 'kept', set()) | {str(path)}\n"
        "        layers = {name: m.now() for",
        "tensors = load_file(",
        "assert str(path) in self.kept\n        tensors = load_file(",
    ),
    "scaling not saved": ("save_reload", '"scaling": m_scaling(layers)', '"scaling": 1.0'),
    "saves the newest": ("saved_alone", "m.now() for name, m in switched(model)",
                         "list(m.held.values())[-1] for name, m in switched(model)"),
    "weights lose their sign": ("combination", "w * part.scaling", "abs(w) * part.scaling"),
    "factors are added": (
        "combination",
        "new.B.data, new.A.data = torch.cat(up, 1), torch.cat([part.A.data for part in parts])",
        "new.B.data, new.A.data = sum(up), sum(part.A.data for part in parts)",
    ),
    "combination in place": ("combination", "r, r, 0.0)", "r, r, 0.0)\n"
                             "            parts[0].scaling *= 1.5"),
    "one adapter for all rows": ("mixed_batch", "zip(each, x)", "zip(each[:1] * len(x), x)"),
    "a row of its own": ("padding_and_batch", "return self.now()(x) if self.on else",
                         "return self.now()(x) if self.on and len(x) > 1 else"),
    "positions are averaged": (
        "padding_and_batch",
        "return self.now()(x) if self.on else",
        "x = x - x.mean(1, keepdim=True) if x.dim() == 3 else x\n"
        "        return self.now()(x) if self.on else",
    ),
    "the deleted are kept": (
        "memory_given_back",
        "del m.held[name]",
        "m.__dict__.setdefault('gone', []).append(m.held.pop(name))",
    ),
    "the merged are kept": (
        "memory_given_back",
        "[layer.merge() for m in",
        "[m.__dict__.setdefault('was', []).append(m.base.weight.clone()) or layer.merge() for m in",
    ),
    "another thaws the base": ("requires_grad", "LoraLinear(m.base, r, alpha, 0.0)",
                               "LoraLinear(m.base, r, alpha, 0.0)\n"
                               "            m.base.requires_grad_(True)"),
    "switching freezes": ("requires_grad", "m.active = name",
                          "m.active = name\n            m.now().A.requires_grad_(name != 'one')"),
}  # fmt: skip


# Of the faults that could show in other ways too: where they have to be seen.
SEEN = {
    "factors of a set": "in two processes with PYTHONHASHSEED=0 and ",
    "saved in the order of a set": "loaded in a fresh process with PYTHONHASHSEED=",
    "kept in memory": "loaded in a fresh process: Attr",
    "combination in place": "combine(['one'], [-1.0])",
    "positions are averaged": "as a sequence padded",
    "another thaws the base": "after add: up.weight of the base trains",
    "switching freezes": "after activate: a factor of the adapter 'one' does not train",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_handling_adapters_is_caught(fault: str, module: Any) -> None:
    law, *texts = FAULTS[fault]
    changes = list(zip(texts[::2], texts[1::2], strict=True))
    [tried] = [c for c in contract_cells(several(module, *changes)) if c.law == law]
    verdict = try_cell(tried, examples=200, shrink=False)
    assert verdict.result is Result.FAIL, verdict
    assert SEEN.get(fault, "") in verdict.reason


def test_no_seed_at_all_is_told_from_a_hash_and_a_class_of_a_program_is_not_looked_for(
    module: Any,
) -> None:
    unseeded = several(module, ("for name in targets:", "for name in targets:\n"
                                "            torch.seed()"))  # fmt: skip
    [tried] = [c for c in contract_cells(unseeded) if c.law == "seeded_initialisation"]
    verdict = try_cell(tried, examples=1, shrink=False)
    assert "in two processes with PYTHONHASHSEED=0 each time" in verdict.reason
    assert isinstance(tried.dialect, OwnClass)
    tried.dialect.place = "__main__:Several"
    with pytest.raises(NotApplicable, match="put it into a module"):
        tried.dialect.paths()


# ------------------------------------------------------------------------------ PEFT


def cell(law: str, dialect: Peft = LORA) -> Cell:
    return Cell(dialect, law)


def fit_for(law: str) -> Peft:
    """LoRA, or where a law has no meaning for it LoRA that starts from the base's weights."""
    if law not in LAWS or not LAWS[law].excludes(LORA):
        return LORA
    return Peft(next(method for method in discover() if method.name == "LORA+pissa"))


@since("has faults that the contract finds", peft=(0, 21))
@pytest.mark.parametrize("law", law_ids())
def test_plain_lora_of_the_installed_peft_keeps_each_law_or_deviates_in_a_known_way(
    law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Path] = []
    serve = fresh._on_server
    monkeypatch.setattr(
        fresh, "_on_server", lambda *given: (jobs.append(given[0]), serve(*given))[1]
    )
    tried = cell(law, fit_for(law))
    verdict = try_cell(tried, examples=1 if law in IN_FRESH_PROCESSES else 3)
    assert verdict.result in (Result.PASS, Result.KNOWN), verdict
    assert bool(jobs) is (law in IN_FRESH_PROCESSES)


def test_a_peft_that_saves_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.peft_model

    original = peft.peft_model.get_peft_model_state_dict
    monkeypatch.setattr(
        peft.peft_model,
        "get_peft_model_state_dict",
        lambda *args, **kwargs: {k: 2 * v for k, v in original(*args, **kwargs).items()},
    )
    verdict = try_cell(cell("save_reload"), examples=1, shrink=False)
    assert verdict.result is Result.FAIL
    assert "loaded in the same process" in verdict.reason


def attached(law: str, **case: Any) -> Experiment:
    it = Experiment(law, LORA, Case(**case))
    with quiet():
        it.attach()
    return it


def test_a_peft_that_forgets_the_scaling_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    original = layer.Linear.get_delta_weight
    monkeypatch.setattr(
        layer.Linear,
        "get_delta_weight",
        lambda self, adapter: original(self, adapter) / self.scaling[adapter],
    )
    for law in ("merge_equivalence", "order_of_merges", "sequences"):
        verdict = try_cell(cell(law), examples=20, shrink=False)
        assert verdict.result is Result.FAIL, law


def test_a_peft_whose_second_adapter_disturbs_the_first_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora import layer

    original = layer.LoraLayer.set_scale

    def everywhere(self: Any, adapter: str, scale: float) -> None:
        for name in self.scaling:
            original(self, name, 2 * scale)

    monkeypatch.setattr(layer.LoraLayer, "set_scale", everywhere)
    assert try_cell(cell("linear_in_scaling"), examples=5, shrink=False).result is Result.FAIL


def test_a_peft_that_adapts_what_only_looks_alike_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners import tuners_utils

    it = Experiment("chosen_layers", LORA, Case(network="look-alikes", seed=3))
    LAWS["chosen_layers"].hold(it)
    monkeypatch.setattr(tuners_utils, "_find_minimal_target_modules", lambda *_: {"up", "down"})
    it = Experiment("chosen_layers", LORA, Case(network="look-alikes", seed=3))
    with pytest.raises(ContractBroken, match=r"adapted as well are .*block\.\d\.(?:up|down)"):
        LAWS["chosen_layers"].hold(it)


def test_a_peft_that_changes_the_settings_of_another_adapter_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora import LoraModel

    original = LoraModel.add_weighted_adapter

    def greedy(self: Any, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        original(self, adapters, *args, **kwargs)
        self.peft_config[adapters[0]].lora_alpha *= 2

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", greedy)
    verdict = try_cell(cell("saved_alone"), examples=1, shrink=False)
    assert verdict.result is Result.FAIL
    assert "its lora_alpha is saved as" in verdict.reason


def test_a_peft_that_scales_one_module_of_a_combination_twice_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora import model

    kept = {"alpha_pattern", "rank_pattern"}
    original = model.replace
    monkeypatch.setattr(model, "replace", lambda config, **changes: original(
        config, **{key: value for key, value in changes.items() if key not in kept}
    ))  # fmt: skip
    law = LAWS["combination"]
    law.hold(Experiment("combination", LORA, Case(seed=2)))
    with pytest.raises(ContractBroken, match="the product in up is off"):
        law.hold(Experiment("combination", LORA, Case(seed=3)))


def test_a_peft_that_goes_on_where_the_next_adapter_has_no_part_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    original = BaseTunerLayer.set_adapter

    def only_its_own(self: Any, names: Any, *args: Any, **kwargs: Any) -> None:
        wanted = [names] if isinstance(names, str) else names
        if not self.lora_A or set(wanted) & set(self.lora_A):
            original(self, names, *args, **kwargs)

    monkeypatch.setattr(BaseTunerLayer, "set_adapter", only_its_own)
    verdict = try_cell(cell("sequences"), examples=40, shrink=False)
    assert verdict.result is Result.FAIL
    assert "adapters at work: one2" in verdict.reason


def test_a_fresh_adapter_off_the_identity_is_caught() -> None:
    off = Method("off", "LoraConfig", {"r": "{r}", "init_lora_weights": "False"}, plain=True)
    verdict = try_cell(cell("identity_at_initialisation", Peft(off)), examples=2, shrink=False)
    assert verdict.result is Result.FAIL


ODD = {"r": "{r}", "use_dora": "True", "megatron_config": "{'any': 1}"}


@pytest.mark.parametrize("law", ["forward", "sequences"])
def test_a_method_that_peft_refuses_does_not_apply_and_says_why(law: str) -> None:
    odd = Method("odd", "LoraConfig", ODD, plain=True)
    verdict = try_cell(cell(law, Peft(odd)), examples=1)
    assert verdict.result is Result.NOT_APPLICABLE
    assert "refused by design" in verdict.reason
    assert "does not support megatron" in verdict.reason


@pytest.mark.parametrize("law", ["forward", "sequences"])
def test_plain_lora_has_to_attach_whatever_peft_says(law: str) -> None:
    lora = Peft(Method("LORA", "LoraConfig", ODD, plain=True))
    verdict = try_cell(cell(law, lora), examples=1, shrink=False)
    assert verdict.result is Result.FAIL
    assert "does not support megatron" in verdict.reason


@pytest.mark.parametrize("error", ["TypeError('odd')", "NotImplementedError('not supported')"])
def test_a_class_has_to_run_whatever_it_says(error: str, module: Any) -> None:
    place = module(("        y = self.base(x)\n", f"        raise {error}\n"))
    with pytest.raises(ContractBroken, match="it raises: y = run"):
        assert_contract(place, laws=["forward"], examples=1)


RSLORA = Peft(
    Method("LORA+rslora", "LoraConfig", {**LORA.method.options, "use_rslora": "True"}, plain=True)
)


@pytest.mark.parametrize("law", law_ids())
def test_a_peft_that_attaches_nothing_fails_every_law(
    law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'foo'")

    monkeypatch.setattr(peft, "get_peft_model", broken)
    only_lora = ("merged_reload", "own_modules_saved", "converted")
    for dialect in (LORA, RSLORA) if law not in only_lora else (fit_for(law),):
        verdict = try_cell(cell(law, dialect), examples=1, shrink=False)
        assert verdict.result is Result.FAIL, verdict
        assert "AttributeError: 'NoneType' object has no attribute 'foo'" in verdict.reason


@pytest.mark.parametrize("when", ["always", "merged"])
def test_a_peft_whose_layers_do_not_run_fails(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    original = layer.Linear.forward

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when == "always" or self.merged:
            raise TypeError("forward() got an unexpected keyword argument 'merge'")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(layer.Linear, "forward", broken)
    anywhere = ("forward", "requires_grad", "isolation", "saved_alone", "mixed_batch")
    merging = ("merge_equivalence", "order_of_merges", "idempotent_merge", "sequences")
    for law in (*merging, *(anywhere if when == "always" else ())):
        for dialect in (LORA, RSLORA):
            # Which operations a sequence has is drawn: few of them may never merge.
            examples = 40 if law == "sequences" else 4
            verdict = try_cell(cell(law, dialect), examples=examples, shrink=False)
            assert verdict.result is Result.FAIL, verdict
            assert "TypeError: forward() got" in verdict.reason


def test_a_peft_whose_merge_takes_other_arguments_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    def merge(self: Any) -> None:
        raise AssertionError("not called")

    monkeypatch.setattr(layer.Linear, "merge", merge)
    for law in ("merge_equivalence", "unmerge_restoration", "safe_merge_is_safe", "dtypes_kept"):
        verdict = try_cell(cell(law), examples=2, shrink=False)
        assert verdict.result is Result.FAIL, verdict


def test_a_peft_that_leaves_a_module_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    original = peft.get_peft_model

    def only_up(net: Any, config: Any, **kwargs: Any) -> Any:
        config.target_modules = {"up"}
        return original(net, config, **kwargs)

    monkeypatch.setattr(peft, "get_peft_model", only_up)
    verdict = try_cell(cell("forward"), examples=1, shrink=False)
    assert verdict.result is Result.FAIL
    assert "adapter 'one': down is left out" in verdict.reason


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (NotImplementedError(), True),
        (ValueError("X supports only 1 trainable adapter."), True),
        (ValueError("At the moment, only one LoRA adapter per model is allowed."), True),
        (TypeError("Target module Conv2d(4, 24) is not supported. Currently, only ..."), True),
        (TypeError("Please initialize PiSSA under float32, float16, or bfloat16."), True),
        (RuntimeError("Impossible to merge LoRA with `lora_bias=True` because ..."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x16 and 24x4)"), False),
        (NotImplementedError("\"addmm\" not implemented for 'Half'"), False),
        (TypeError("unsupported operand type(s) for +: 'int' and 'str'"), False),
        (AttributeError("DoRA does not support that"), False),
        (ValueError("too many values to unpack"), False),
    ],
)
def test_only_what_says_that_it_is_not_supported_is_a_refusal(
    error: Exception, refused: bool
) -> None:
    assert is_refusal(error) is refused
    assert says_refusal(one_line(error)) is refused


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (ModuleNotFoundError("No module named 'nowhere'", name="nowhere"), True),
        (ValueError("nowhere is not available, please install it to use LoftQ."), True),
        (ValueError("torch is not available, please install it to use LoftQ."), False),
        (ModuleNotFoundError("No module named 'torch.nowhere'", name="torch.nowhere"), False),
        (ImportError("cannot import name 'nowhere' from 'torch'"), False),
    ],
)
def test_only_a_library_that_is_not_there_excuses(error: Exception, lacks: bool) -> None:
    assert lacks_library(error) is lacks


def test_a_check_that_cannot_be_carried_out_is_a_failure_unless_the_machine_lacks_something() -> (
    None
):
    it = attached("isolation")

    def lacking(subject: Any) -> None:
        raise CannotRun("no room", missing=True)

    def failing(subject: Any) -> None:
        raise CannotRun("no layer could be judged")

    with pytest.raises(NotApplicable, match="no room"):
        it.judge(cast("Any", None), lacking)
    with pytest.raises(ContractBroken, match="no layer could be judged"):
        it.judge(cast("Any", None), failing)


def test_what_keeps_a_law_from_being_tried_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes that do not start, again and again, would take minutes to shrink."""
    tried = []

    def dying(it: Any) -> None:
        tried.append(it)
        raise CannotRun("a fresh process died")

    laws: Any = LAWS
    monkeypatch.setitem(laws, "forward", replace(laws["forward"], hold=dying))
    verdict = try_cell(cell("forward"), examples=20)
    assert (verdict.result, verdict.reason) == (Result.FAIL, "CannotRun: a fresh process died")
    assert len(tried) == 1


# ------------------------------------------------------------------------------ judging nothing


@since("has MiCA", peft=(0, 21))
def test_a_law_about_merged_weights_says_nothing_where_no_formula_is_known() -> None:
    mica = next(m for m in discover() if m.name == "LORA+mica")
    verdict = try_cell(cell("unmerge_without_growth", Peft(mica)), examples=2)
    assert verdict.result is Result.NOT_APPLICABLE
    assert "no known formula" in verdict.reason


def test_a_law_about_dropout_says_nothing_where_there_is_none() -> None:
    ia3 = next(m for m in discover() if m.name == "IA3")
    verdict = try_cell(cell("eval_mode_kept", Peft(ia3)), examples=1)
    assert (verdict.result, verdict.reason) == (Result.NOT_APPLICABLE, "it has no dropout here")


def test_sequences_in_which_nothing_was_compared_are_no_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(self: Any) -> Any:
        raise NotApplicable("not with the numbers drawn")

    from pytest_lora.contract import machine

    monkeypatch.setattr(machine.Experiment, "expect", lambda *args, **kwargs: refuses(args[0]))
    assert try_cell(cell("sequences"), examples=2).result is Result.NOT_APPLICABLE


def test_an_adapter_of_which_nothing_is_saved_breaks_the_law(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import peft

    monkeypatch.setattr(peft, "get_peft_model_state_dict", lambda *args, **kwargs: {})
    verdict = try_cell(cell("saved_alone"), examples=1, shrink=False)
    assert (verdict.result, verdict.reason) == (Result.FAIL, "nothing is saved of it")


def test_every_registered_method_is_discovered() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    found = {method.name for method in discover()}
    tuners = {
        getattr(kind, "value", kind)
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if isinstance(tuner, type) and issubclass(tuner, BaseTuner)
    }
    assert tuners <= found
    assert {"LORA+rslora", "LORA+dora", "LORA+pissa", "LORA+olora"} <= found


def test_a_newly_registered_method_is_discovered(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft
    import peft.mapping

    lokr = peft.PeftType.LOKR
    monkeypatch.setitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, "BRANDNEW", peft.LoKrConfig)
    monkeypatch.setitem(
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        "BRANDNEW",
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[lokr],
    )
    assert "BRANDNEW" in {method.name for method in discover()}


# ------------------------------------------------------------------------------ the parts


def test_the_reference_agrees_with_pefts_forward_and_sees_a_hair_too_much() -> None:
    it = attached("forward", dtype="float64")
    found, terms = it.output(), it.terms()
    reference = it.require_plain()
    assert reference.miss(found, [terms]) is None
    bound = reference.bound([terms])
    off = found.clone()
    off[1, 2] += 2.01 * float(bound[1, 2])
    miss = reference.miss(off, [terms])
    assert miss is not None
    assert miss.index == (1, 2)
    assert "rounding allows" in str(miss)


def test_each_merge_is_allowed_once_more() -> None:
    it = attached("forward")
    reference, terms = it.require_plain(), it.terms()
    assert torch.equal(3 * reference.bound([terms]), reference.bound([terms], merges=2))


def test_terms_are_copies() -> None:
    it = attached("forward")
    terms = it.terms()
    before = terms["up"].delta()
    it.trial.run("fill(99)")
    assert torch.equal(terms["up"].delta(), before)
    assert isinstance(terms["up"], Term)
    assert isinstance(it.reference, Reference)


def test_a_trial_writes_down_what_it_runs() -> None:
    trial = Trial("law", "method")
    trial.run("a = 1")
    with pytest.raises(Refused, match="ZeroDivisionError"):
        trial.run("b = a / 0")
    assert trial.script == "a = 1\n# raises ZeroDivisionError: division by zero:\nb = a / 0\n"
    trial.drop_refused()
    assert trial.script == "a = 1\n"
    broken = trial.broken("it is odd", "assert a == 2")
    assert broken.script == "a = 1\nassert a == 2\n"
    assert "method breaks law: it is odd" in str(broken)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "package.module:Class"),
        ("no.such.module:A", "cannot import"),
        ("json:NoSuchClass", "json has no NoSuchClass"),
        ("json:JSONDecoder", "attach, factors"),
    ],
)
def test_an_implementation_that_cannot_be_had_is_a_usage_error(place: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_implementation(place)


def test_laws_that_do_not_exist_are_a_usage_error(module: Any) -> None:
    with pytest.raises(UsageError, match="no law 'gravity'"):
        assert_contract(module(), laws=["gravity"])
    with pytest.raises(UsageError, match="laws names no law"):
        assert_contract(module(), laws=[])


def test_a_law_that_cannot_be_tried_on_a_class_has_a_verdict_that_says_so(module: Any) -> None:
    verdicts = assert_contract(module(), laws=["chosen_layers", "save_reload"], examples=1)
    assert [(v.law, v.result, v.reason) for v in verdicts] == [
        ("save_reload", Result.NOT_APPLICABLE, "MyLora has no save"),
        ("chosen_layers", Result.NOT_APPLICABLE,
         "it is about PEFT's models and settings, which a class of one's own has none of"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------ known deviations


def test_known_deviations_are_about_laws_that_exist() -> None:
    for item in known_deviations():
        assert item.law in (*law_ids(), "*")
        assert item.why
        re.compile(item.shows)


def test_a_known_deviation_is_known_only_for_its_versions_and_its_failure() -> None:
    item = Known("forward", ("LORA+*",), "off by", "why", since="0.16", until="0.20")
    assert item.concerns("forward", "LORA+dora", "0.19.1")
    assert not item.concerns("forward", "LORA+dora", "0.20.0")
    assert not item.concerns("forward", "LORA+dora", "0.15.2")
    assert not item.concerns("forward", "IA3", "0.19.1")
    assert not item.concerns("merge", "LORA+dora", "0.19.1")
    assert Known("*", ("LORA+*",), "off", "why").concerns("merge", "LORA+dora", "0.19.1")
    assert item.explains("it is off by 3")
    assert not item.explains("it raises")


def test_a_known_deviation_is_reported_as_such_and_missed_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pytest_lora.contract import cells

    item = Known("identity_at_initialisation", ("off", "LORA"), "leave the output", "it is so")
    monkeypatch.setattr(cells, "known_deviations", lambda: (item,))
    off = Method("off", "LoraConfig", {"r": "{r}", "init_lora_weights": "False"}, plain=True)
    known = try_cell(cell("identity_at_initialisation", Peft(off)), examples=2)
    assert (known.result, known.known, known.missed) == (Result.KNOWN, ("it is so",), ())
    gone = try_cell(cell("identity_at_initialisation"), examples=2)
    assert (gone.result, gone.known, gone.missed) == (Result.PASS, (), ("it is so",))
    assert not any("is it mended" in line for line in summary([known, gone]))
    assert any("is it mended" in line for line in summary([gone]))
    [_, told] = summary([gone], quick=True)
    assert "1 more; ask with --lora-contract-depth=full" in told


def test_a_known_deviation_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_lora.contract import cells

    item = Known("isolation", ("LORA",), "as ever", "it is so")
    monkeypatch.setattr(cells, "known_deviations", lambda: (item,))
    for also, result in ((["as ever, too"], Result.KNOWN), (["news"], Result.FAIL)):
        tried = cell("isolation")
        broken = ContractBroken("isolation", "LORA", "as ever", "script\n", also)

        def attempt(broken: ContractBroken = broken) -> None:
            raise broken

        if result is Result.KNOWN:
            tried._once(attempt)
            assert tried.verdict().known == ("it is so",)
            continue
        with pytest.raises(ContractBroken, match="LORA breaks isolation: news\n\nTo see it"):
            tried._once(attempt)
        assert (tried.verdict(broken).result, tried.verdict(broken).reason) == (result, "news")


# ------------------------------------------------------------------------------ the table

VERDICTS = [
    Verdict("LORA", "forward", Result.PASS),
    Verdict("LORA", "isolation", Result.FAIL, "off"),
    Verdict("IA3", "forward", Result.NOT_APPLICABLE, "other"),
    Verdict("IA3", "isolation", Result.KNOWN, known=("so it is",)),
]


def test_the_table_has_a_sign_for_every_cell() -> None:
    lines = table_lines(VERDICTS)
    assert lines[-2].split() == ["LORA", ".", "F"]
    assert lines[-1].split() == ["IA3", "-", "k"]
    told = "\n".join(summary(VERDICTS))
    assert "1 pass (.), 1 fail (F), 1 n/a (-), 1 known (k)" in told
    assert "known: isolation[IA3]: so it is" in told
    page = markdown(VERDICTS)
    assert "| 1 | `forward` | The output is W x + b + alpha/r B A x, in eval mode" in page
    assert "- `isolation[IA3]`: so it is" in page
    assert "- `forward[IA3]`: other" in page


def test_verdicts_travel_as_text() -> None:
    for verdict in VERDICTS:
        assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


def test_cells_run_under_the_settings_they_are_given() -> None:
    seen = cell("forward")
    seen.function(settings(max_examples=4, database=None, phases=[Phase.generate]))()
    assert seen.decided == 4
    assert contract_cells()[0].method == "LORA"
    assert FIRST == "one"
    with pytest.raises(NotApplicable):
        Experiment("x", LORA, Case(network="embedding")).require_plain()


def test_a_sample_keeps_lora_and_an_eighth_of_the_methods_for_laws_they_share() -> None:
    cells = contract_cells()
    kept = {(tried.method, tried.law) for tried in sample_of(cells)}
    left = [tried for tried in cells if (tried.method, tried.law) not in kept]
    assert left
    assert all(LAWS[tried.law].sampled and tried.method != "LORA" for tried in left)
    shared = {tried.law for tried in left}
    for law in shared - {"own_modules_saved"}:
        methods = [tried.method for tried in cells if tried.law == law]
        assert 4 <= sum((method, law) in kept for method in methods) <= len(methods) // 8 + 4
    assert {tried.method for tried in cells} == {method for method, law in kept if law in shared}
