"""delta_spectrum: every kind of layer against the dense product, and adapters gone wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from tiny import PEFT, cnn, gpt2, llama, rewrite_config, rewrite_weights, save_adapter

from pytest_lora import CheckFailed, assert_delta_spectrum, measure_delta_spectrum
from pytest_lora.errors import NotApplicable, UsageError
from pytest_lora.loading import quiet
from pytest_lora.records import Bound, Outcome
from pytest_lora.subject import BaseModel, Subject


def rows(found: Any) -> dict[str, dict[str, float]]:
    modules: dict[str, dict[str, float]] = found.details["modules"]
    return modules


def merged_change(make: Any, path: Path) -> dict[str, torch.Tensor]:
    """What merging the adapter in float64 adds to each weight, dense."""
    from peft import PeftModel

    before = {name: p.detach().double().clone() for name, p in make().named_parameters()}
    with quiet():
        merged = PeftModel.from_pretrained(make().double(), path).merge_and_unload()
    return {name: p.detach() - before[name] for name, p in merged.named_parameters()}


@pytest.mark.parametrize(("make", "changes"), [
    (llama, {}),
    (llama, {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    (cnn, {"target_modules": ["conv", "head"]}),
], ids=["linear", "embedding", "conv1d", "convolution"])  # fmt: skip
def test_every_module_against_its_dense_change(
    make: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    adapter = save_adapter(make(), tmp_path / "a", **changes)
    subject = Subject(adapter, BaseModel.from_module(make()))
    found = measure_delta_spectrum(subject, find_intruders=True)
    change = merged_change(make, tmp_path / "a")
    weights = dict(make().named_parameters())
    assert rows(found)
    for name, row in rows(found).items():
        dense = torch.linalg.svdvals(change[f"{name}.weight"].flatten(1))
        norm = float(dense.norm())
        assert row["spectral"] == pytest.approx(float(dense[0]), rel=1e-6)
        assert row["frobenius"] == pytest.approx(norm, rel=1e-6)
        assert row["rank"] == row["of"] == 4
        share = norm / float(weights[f"{name}.weight"].detach().double().norm())
        assert row["relative"] == pytest.approx(share, rel=1e-6)
        assert isinstance(row["intruders"], int)
    assert found.value == max(row["relative"] for row in rows(found).values())
    assert found.unit == "of the weight's norm"


def test_files_alone_give_norms_that_are_not_relative(tmp_path: Path) -> None:
    adapter = save_adapter(llama(), tmp_path / "a")
    found = measure_delta_spectrum(adapter)
    assert found.unit == "Frobenius norm"
    assert found.value == max(row["frobenius"] for row in rows(found).values())
    assert found.count == 4
    with pytest.raises(UsageError, match="give a subject"):
        measure_delta_spectrum(adapter, find_intruders=True)


def test_an_adapter_whose_rank_has_collapsed(tmp_path: Path) -> None:
    adapter = save_adapter(llama(), tmp_path / "a")
    sound = measure_delta_spectrum(adapter, least_effective_rank=2)
    assert not sound.problems
    assert not sound.notes

    def collapse(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.0.self_attn.q_proj.lora_B" in name:
                tensor[:, 1:] = tensor[:, :1]

    rewrite_weights(adapter, collapse)
    found = measure_delta_spectrum(adapter)
    assert found.notes == ("model.layers.0.self_attn.q_proj: rank 1 of 4",)
    found = measure_delta_spectrum(adapter, least_effective_rank=2)
    assert found.value == math.inf
    assert [problem.where for problem in found.problems] == ["model.layers.0.self_attn.q_proj"]
    assert "effective rank 1 of 4" in str(found.problems[0])


def test_an_update_that_exploded(tmp_path: Path) -> None:
    adapter = save_adapter(llama(), tmp_path / "a")
    base = BaseModel.from_module(llama())
    bound = Bound.at_most(1.0, "the user")
    assert bound.judge(measure_delta_spectrum(Subject(adapter, base))) is Outcome.PASSED
    adapter = rewrite_config(adapter, lora_alpha=800)
    found = measure_delta_spectrum(Subject(adapter, base))
    assert bound.judge(found) is Outcome.FAILED
    assert "Frobenius norm" in str(found.where)


def test_what_is_not_finite_passes_no_bound(tmp_path: Path) -> None:
    adapter = save_adapter(llama(), tmp_path / "a")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = math.nan

    found = measure_delta_spectrum(rewrite_weights(adapter, spoil))
    assert Bound.at_most(math.inf, "no limit").judge(found) is Outcome.FAILED
    assert "not finite" in str(found.problems[0])


def test_dora_is_named_and_has_no_intruders(tmp_path: Path) -> None:
    adapter = save_adapter(llama(), tmp_path / "a", use_dora=True)
    found = measure_delta_spectrum(
        Subject(adapter, BaseModel.from_module(llama())), find_intruders=True
    )
    assert any("magnitudes rescale" in note for note in found.notes)
    assert any("DoRA's weight is not W + s B A" in note for note in found.notes)
    assert all("intruders" not in row for row in rows(found).values())


class Grouped(torch.nn.Module):
    """A grouped convolution and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3, groups=2)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.conv(x).mean((2, 3)))
        return found


def test_a_grouped_convolution_is_left_out_by_name(tmp_path: Path) -> None:
    adapter = save_adapter(Grouped(), tmp_path / "a", target_modules=["conv", "head"])
    found = measure_delta_spectrum(Subject(adapter, BaseModel.from_module(Grouped())))
    assert "relative" not in rows(found).get("conv", {})
    if PEFT < (0, 14):  # which gives B as many columns as A has rows: the product is no weight
        assert any("conv: its weight is of shape [8, 2, 3, 3]" in note for note in found.notes)
        return
    assert list(rows(found)) == ["head"]
    assert any("conv: left out, a grouped convolution" in note for note in found.notes)
    alone = save_adapter(Grouped(), tmp_path / "b", target_modules=["conv"])
    with pytest.raises(NotApplicable, match="no module's update can be judged: conv"):
        measure_delta_spectrum(alone)


def test_other_methods_and_missing_factors(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "feedforward_modules": []}
    other = save_adapter(llama(), tmp_path / "ia3", cls="IA3Config", **options)
    with pytest.raises(NotApplicable, match="IA3 has no low-rank factors"):
        measure_delta_spectrum(other)
    adapter = save_adapter(llama(), tmp_path / "a")
    half = rewrite_weights(
        adapter, lambda tensors: {k: v for k, v in tensors.items() if "0.self_attn.q" not in k
                                  or "lora_A" in k}
    )  # fmt: skip
    found = measure_delta_spectrum(half)
    assert found.count == 3
    assert "one of its factors is missing" in found.notes[0]
    none = rewrite_weights(adapter, lambda tensors: {"x": torch.ones(1)})
    with pytest.raises(NotApplicable, match="is a low-rank factor"):
        measure_delta_spectrum(none)


def test_a_base_without_the_modules_gives_nothing_relative(tmp_path: Path) -> None:
    adapter = save_adapter(llama(), tmp_path / "a")
    with pytest.raises(NotApplicable, match="not found in the base"):
        measure_delta_spectrum(Subject(adapter, BaseModel.from_module(cnn())))


def test_a_large_weight_is_not_decomposed(tmp_path: Path, monkeypatch: Any) -> None:
    from pytest_lora.checks import spectrum

    monkeypatch.setattr(spectrum, "LARGEST", 100)
    adapter = save_adapter(llama(), tmp_path / "a")
    found = measure_delta_spectrum(
        Subject(adapter, BaseModel.from_module(llama())), find_intruders=True
    )
    assert sum("are too many" in note for note in found.notes) == 4


def test_the_assertion_takes_files_models_and_limits(tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = save_adapter(llama(), tmp_path / "a")
    assert assert_delta_spectrum(adapter.path).unit == "Frobenius norm"
    with quiet():
        model = PeftModel.from_pretrained(llama(), adapter.path)
    found = assert_delta_spectrum(model, least_effective_rank=1)
    assert assert_delta_spectrum(model, bound=1.0).value == found.value
    with pytest.raises(CheckFailed, match="scale the adapter down"):
        assert_delta_spectrum(model, bound=0.01)
    with pytest.raises(CheckFailed, match="rsLoRA"):
        assert_delta_spectrum(model, least_effective_rank=3.99)
    with pytest.raises(UsageError, match="give a subject"):
        assert_delta_spectrum(adapter, bound=1.0)
