"""The contract: sound code passes it, classic mistakes do not, its scripts run by themselves."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import torch
from example import ROOT
from hypothesis import Phase, settings
from stack import since

from pytest_lora.contract.cells import (
    Cell,
    Result,
    Verdict,
    assert_contract,
    contract_cells,
    law_ids,
    try_cell,
)
from pytest_lora.contract.dialects import FIRST, Case, Peft, load_implementation
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.known import Known, known_deviations
from pytest_lora.contract.methods import Method, discover
from pytest_lora.contract.reference import Reference, Term
from pytest_lora.contract.table import markdown, summary, table_lines
from pytest_lora.contract.trial import ContractBroken, Refused, Trial
from pytest_lora.errors import NotApplicable, UsageError
from pytest_lora.loading import quiet

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


MORE = """
class Several(MyLora):
    def attach(self, model, targets, r, alpha, dropout):
        model.requires_grad_(False)
        for name in targets:
            setattr(model, name, Switched(getattr(model, name), r, alpha, dropout))
        return model

    def factors(self, model, name="one"):
        return {key: (m.held[name].A, m.held[name].B) for key, m in switched(model).items()}

    def merge(self, model):
        [m.now().merge() for m in switched(model).values() if m.on]

    def unmerge(self, model):
        [m.now().unmerge() for m in switched(model).values()]

    def disable(self, model):
        self.unmerge(model)  # before it is off
        for m in switched(model).values():
            m.on = False

    def enable(self, model):
        for m in switched(model).values():
            m.on = True

    def add(self, model, name, targets, r, alpha):
        for m in switched(model).values():
            m.held[name] = LoraLinear(m.base, r, alpha, 0.0)

    def activate(self, model, name):
        self.unmerge(model)  # before another
        for m in switched(model).values():
            m.active = name

    def delete(self, model, name):
        for m in switched(model).values():
            del m.held[name]

    def scale(self, model, factor):
        for m in switched(model).values():
            layer = m.now()
            layer.scaling = factor * layer.first


class Switched(nn.Module):
    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base, self.on, self.active = base, True, "one"
        self.held = nn.ModuleDict({"one": LoraLinear(base, r, alpha, dropout)})

    def now(self):
        return self.held[self.active]

    def forward(self, x):
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
    for law in ("linear_in_scaling", "base_output_when_disabled", "isolation", "sequences"):
        assert results[law] is Result.PASS


FAULTS = {
    "not activated": ("isolation", "m.active = name", "m.active = m.active"),
    "delete takes all": ("isolation", "del m.held[name]", "m.held['one'].B.data.zero_()"),
    "off while merged": ("sequences", "self.unmerge(model)  # before it is off", "pass"),
    "another while merged": ("sequences", "self.unmerge(model)  # before another", "pass"),
    "scales add up": ("linear_in_scaling", "layer.scaling = factor * layer.first",
                      "layer.scaling *= factor"),
    "not enabled": ("base_output_when_disabled", "m.on = True", "pass"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_handling_adapters_is_caught(fault: str, module: Any) -> None:
    law, *change = FAULTS[fault]
    [tried] = [c for c in contract_cells(several(module, (change[0], change[1]))) if c.law == law]
    verdict = try_cell(tried, examples=200, shrink=False)
    assert verdict.result is Result.FAIL, verdict


# ------------------------------------------------------------------------------ PEFT


def cell(law: str, dialect: Peft = LORA) -> Cell:
    return Cell(dialect, law)


@since("has faults that the contract finds", peft=(0, 21))
@pytest.mark.parametrize("law", law_ids())
def test_plain_lora_of_the_installed_peft_keeps_each_law_or_deviates_in_a_known_way(
    law: str,
) -> None:
    verdict = try_cell(cell(law), examples=1 if law == "save_reload" else 3)
    assert verdict.result in (Result.PASS, Result.KNOWN), verdict


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


def test_a_fresh_adapter_off_the_identity_is_caught() -> None:
    off = Method("off", "LoraConfig", {"r": "{r}", "init_lora_weights": "False"}, plain=True)
    verdict = try_cell(cell("identity_at_initialisation", Peft(off)), examples=2, shrink=False)
    assert verdict.result is Result.FAIL


def test_a_method_that_peft_refuses_does_not_apply_and_says_why() -> None:
    odd = Method("odd", "LoraConfig", {"r": "0"}, plain=True)
    verdict = try_cell(cell("forward", Peft(odd)), examples=1)
    assert verdict.result is Result.NOT_APPLICABLE
    assert "cannot be attached here" in verdict.reason
    assert try_cell(cell("sequences", Peft(odd)), examples=1).result is Result.NOT_APPLICABLE


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


# ------------------------------------------------------------------------------ known deviations


def test_known_deviations_are_about_laws_that_exist() -> None:
    for item in known_deviations():
        assert item.law in law_ids()
        assert item.why
        re.compile(item.shows)


def test_a_known_deviation_is_known_only_for_its_versions_and_its_failure() -> None:
    item = Known("forward", ("LORA+*",), "off by", "why", since="0.16", until="0.20")
    assert item.concerns("forward", "LORA+dora", "0.19.1")
    assert not item.concerns("forward", "LORA+dora", "0.20.0")
    assert not item.concerns("forward", "LORA+dora", "0.15.2")
    assert not item.concerns("forward", "IA3", "0.19.1")
    assert not item.concerns("merge", "LORA+dora", "0.19.1")
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
