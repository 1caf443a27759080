"""Parameters and bytes, held to LoRA's formula and to files that PEFT writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

import memory_cases as cases  # noqa: E402
import tiny  # noqa: E402
from stack import since  # noqa: E402

from pytest_lora.memory.accounting import account_adapter, file_size  # noqa: E402


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_a_pair_trains_rank_times_the_sum_of_both_dimensions(rank: int) -> None:
    found = account_adapter(cases.llama(), cases.lora(r=rank))
    assert len(found.weights) == 7
    for kind in found.weights:
        rows, columns = kind.shape
        assert kind.frozen == kind.count * rows * columns
        assert kind.trainable == kind.count * rank * (rows + columns)
    assert found.adapter.parameters == sum(kind.trainable for kind in found.weights)


def test_optimizer_state_and_gradients_follow_from_formats() -> None:
    found = account_adapter(cases.llama(), cases.lora(), dtype="bfloat16")
    adapter, full = found.adapter, found.full
    assert full.parameters == found.base
    assert (full.gradients, adapter.gradients) == (2 * found.base, 4 * adapter.parameters)
    steps = 4 * 42  # one float32 counter for each pair of 21 layers
    assert adapter.optimizer == 8 * adapter.parameters + steps
    assert found.saved == full.gradients + full.optimizer - adapter.gradients - adapter.optimizer
    without = account_adapter(cases.llama(), cases.lora(), optimizer="sgd")
    assert (without.adapter.optimizer, without.full.optimizer) == (0, 0)


def test_dora_and_saved_modules_are_counted_as_they_are() -> None:
    plain = account_adapter(cases.llama(), cases.lora())
    dora = account_adapter(cases.llama(), cases.lora(use_dora=True))
    rows = 3 * (128 * 3 + 2 * 32 + 2 * 344)
    assert dora.adapter.parameters - plain.adapter.parameters == rows
    saved = account_adapter(cases.llama(), cases.lora(modules_to_save=["lm_head"]))
    assert saved.adapter.parameters - plain.adapter.parameters == 2000 * 128


@since("writes other metadata into the file", peft=(0, 20))
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
    ids=str,
)
def test_the_file_is_predicted_to_the_byte(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = tiny.llama()
    config = cases.lora(**changes)
    found = account_adapter(base.config, config, dtype="float32")
    wrapped = tiny.wrap(base, cases.lora(**changes))
    wrapped.save_pretrained(tmp_path)
    assert found.file == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_mixed_formats_stand_widest_first(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"b": torch.zeros(3), "a": torch.zeros(5, dtype=torch.bfloat16),
               "c": torch.zeros(2, 7, dtype=torch.float64)}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert file_size(tensors) == (tmp_path / "x.safetensors").stat().st_size


def test_the_table_names_every_kind_of_layer() -> None:
    found = account_adapter(cases.llama(), cases.lora())
    table = found.table()
    assert "| 3 x model.layers.*.mlp.gate_proj | 344 x 128 |" in table
    assert f"{found.base:,}" in table
    assert found.to_dict()["file"] == found.file
