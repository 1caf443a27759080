"""frozen_weights: sound adapters pass, and every write into the base is laid at the right door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import tiny
import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from pytest_lora.checks.frozen import measure_frozen_weights
from pytest_lora.errors import CannotRun
from pytest_lora.subject import BaseModel, Subject, load_base

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_lora.records import Measurement, Problem


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tiny.llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture
def subject(folder: Path, tmp_path: Path) -> Subject:
    return on(folder, tmp_path)


def on(folder: Path, home: Path, *, dtype: str = "auto", **changes: Any) -> Subject:
    adapter = tiny.save_adapter(tiny.llama(), home / "a", task_type="CAUSAL_LM", **changes)
    return Subject(adapter, load_base(folder, adapter=adapter, device="cpu", dtype=dtype))


def nudge(tensor: torch.Tensor) -> None:
    """One unit in the last place of the first element."""
    with torch.no_grad():
        flat = tensor.view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(float("inf"), dtype=flat.dtype))


def faults(measurement: Measurement) -> list[Problem]:
    """The problems, but for one that every adapter has with PEFT before 0.21."""
    return [
        problem
        for problem in measurement.problems
        if tiny.PEFT >= (0, 21) or not problem.where.startswith("delete while merged")
    ]


def where(measurement: Measurement) -> list[str]:
    return [problem.where for problem in faults(measurement)]


# ---------------------------------------------------------------------------- sound


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True, "target_modules": "all-linear"},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 6]},
        {"cls": "IA3Config", "target_modules": ["k_proj"], "feedforward_modules": []},
        {"cls": "LoHaConfig", "target_modules": ["v_proj"]},
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_sound_adapters_leave_the_base_alone(
    folder: Path, tmp_path: Path, changes: dict[str, Any], dtype: str
) -> None:
    if tiny.PEFT < (0, 15) and changes.get("cls") == "LoHaConfig":
        pytest.skip("that PEFT cannot run it in bfloat16")
    subject = on(folder, tmp_path, dtype=dtype, **changes)
    measured = measure_frozen_weights(subject)
    assert faults(measured) == []
    tensors = len(subject.base.fingerprints)
    assert measured.details["tensors"] == tensors > 21
    assert measured.details["on_disk"] == 21
    assert measured.details["operations"] == [
        "attach", "forward", "merge and unmerge", "disable and enable", "switch", "delete",
        "unload", "delete while merged",
    ]  # fmt: skip
    assert measured.count == 8 * tensors
    assert subject.base.verify() == ()
    assert subject.base.loads == 1


def test_prompt_tuning_says_what_was_left_out(folder: Path, tmp_path: Path) -> None:
    subject = on(folder, tmp_path, cls="PromptTuningConfig", num_virtual_tokens=4)
    measured = measure_frozen_weights(subject)
    assert faults(measured) == []
    assert "delete while merged" not in measured.details["operations"]  # type: ignore[operator]
    assert "merge and unmerge: left out, there is no module to merge" in measured.notes
    assert "unload: left out, nothing is wrapped" in measured.notes


def test_a_module_of_the_callers_own(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(
        tiny.cnn(), tmp_path, target_modules=["conv"], modules_to_save=["head"]
    )
    subject = Subject(adapter, BaseModel.from_module(tiny.cnn()), inputs=tiny.image())
    measured = measure_frozen_weights(subject)
    assert faults(measured) == []
    assert measured.details["on_disk"] == 0
    assert any("no files to compare with" in note for note in measured.notes)


def test_a_resized_vocabulary_is_no_change(folder: Path, tmp_path: Path) -> None:
    model = tiny.llama()
    model.resize_token_embeddings(70, mean_resizing=False)
    adapter = tiny.save_adapter(
        model, tmp_path, task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]
    )
    subject = Subject(adapter, load_base(folder, adapter=adapter, device="cpu"))
    assert faults(measure_frozen_weights(subject)) == []


def test_a_tied_weight_is_one_tensor(tmp_path: Path) -> None:
    folder = tiny.save_base(tiny.llama(tie_word_embeddings=True), tmp_path / "base")
    subject = on(folder, tmp_path, target_modules=["embed_tokens", "q_proj"])
    assert faults(measure_frozen_weights(subject)) == []
    nudge(subject.base.module.lm_head.weight)
    assert [problem.where for problem in subject.base.verify()] == ["model.embed_tokens.weight"]


# ---------------------------------------------------------------------------- adapters that write


@pytest.mark.parametrize(
    ("bias", "written"),
    [("all", 13), ("lora_only", 2)],
)
def test_trained_biases_are_the_bases_own(tmp_path: Path, bias: str, written: int) -> None:
    if tiny.PEFT < (0, 19) and bias == "lora_only":
        pytest.skip("that PEFT loses these biases when it loads")
    folder = tiny.save_base(tiny.gpt2(), tmp_path / "base")
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": bias}
    adapter = tiny.save_adapter(tiny.gpt2(), tmp_path / "a", task_type="CAUSAL_LM", **options)
    subject = Subject(adapter, load_base(folder, adapter=adapter, device="cpu"))
    measured = measure_frozen_weights(subject)
    assert len(where(measured)) == written
    assert all(place.startswith("attach: transformer") for place in where(measured))
    assert all(place.endswith(".bias") for place in where(measured))
    assert "a base model of its own" in measured.problems[0].fix
    assert any("switch: left out, PEFT refuses" in note for note in measured.notes)
    assert subject.base.verify() == ()
    assert subject.base.loads == 1


def test_an_initialisation_that_edits_the_base(folder: Path, tmp_path: Path) -> None:
    subject = on(folder, tmp_path, init_lora_weights="pissa", target_modules=["q_proj"])
    measured = measure_frozen_weights(subject)
    assert where(measured) == [
        "attach: model.layers.0.self_attn.q_proj.weight",
        "attach: model.layers.1.self_attn.q_proj.weight",
    ]
    assert "path_initial_model_for_weight_conversion" in measured.problems[0].fix
    assert "1024 of 1024 elements" in measured.problems[0].found
    assert subject.base.verify() == ()


def test_a_saved_embedding_that_is_not_the_bases(folder: Path, tmp_path: Path) -> None:
    subject = on(folder, tmp_path)
    key = "base_model.model.model.embed_tokens.weight"
    rows = subject.base.module.model.embed_tokens.weight.detach().clone()

    def same(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = rows

    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = rows.clone().index_fill_(0, torch.tensor(9), 0.5)

    subject = Subject(tiny.rewrite_weights(subject.adapter, same), subject.base)
    assert faults(measure_frozen_weights(subject)) == []
    subject = Subject(tiny.rewrite_weights(subject.adapter, other), subject.base)
    measured = measure_frozen_weights(subject)
    assert where(measured) == ["attach: model.embed_tokens.weight"]
    assert "32 of 2048 elements" in measured.problems[0].found
    assert subject.base.verify() == ()


# ---------------------------------------------------------------------------- faults


def test_one_ulp_while_merging(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = subject.base.module.model.norm.weight
    merge = LoraLinear.merge

    def faulty(self: Any, *args: Any, **options: Any) -> None:
        merge(self, *args, **options)
        nudge(norm)

    monkeypatch.setattr(LoraLinear, "merge", faulty)
    measured = measure_frozen_weights(subject)
    assert "merge and unmerge: model.norm.weight" in where(measured)
    assert "1 of 32 elements changed" in measured.problems[0].found
    assert "[0]" in measured.problems[0].found
    assert subject.base.loads == 2
    assert subject.base.verify() == ()


def test_merging_a_layer_may_change_its_own_copy_only(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never_undone(self: Any) -> None:
        self.merged_adapters.clear()

    monkeypatch.setattr(LoraLinear, "unmerge", never_undone)
    assert faults(measure_frozen_weights(subject)) == []


@pytest.mark.parametrize(
    ("method", "operation"),
    [
        ("disable_adapter_layers", "disable and enable"),
        ("enable_adapter_layers", "disable and enable"),
        ("set_adapter", "switch"),
        ("delete_adapter", "delete"),
        ("unload", "unload"),
    ],
)
def test_one_ulp_in_a_buffer(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, method: str, operation: str
) -> None:
    buffer = subject.base.module.model.rotary_emb.inv_freq
    original = getattr(peft.LoraModel, method)

    def faulty(self: Any, *args: Any, **options: Any) -> Any:
        nudge(buffer)
        return original(self, *args, **options)

    monkeypatch.setattr(peft.LoraModel, method, faulty)
    measured = measure_frozen_weights(subject)
    assert f"{operation}: model.rotary_emb.inv_freq" in where(measured)
    assert subject.base.verify() == ()


def test_a_forward_pass_that_updates_a_buffer(tmp_path: Path) -> None:
    class Counting(tiny.Cnn):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.norm.running_mean.add_(0.5)
            return super().forward(x)

    torch.manual_seed(0)
    adapter = tiny.save_adapter(Counting(), tmp_path, target_modules=["conv"])
    base = BaseModel.from_module(Counting())
    measured = measure_frozen_weights(Subject(adapter, base, inputs=tiny.image()))
    assert "forward: norm.running_mean" in where(measured)
    assert "some of its 8 elements changed" in measured.problems[0].found
    assert base.verify() != ()


def test_weights_that_are_not_those_on_disk(folder: Path, subject: Subject) -> None:
    base = subject.base
    nudge(base.module.lm_head.weight)
    base._adopt((base.module, ()))  # type: ignore[arg-type]
    measured = measure_frozen_weights(subject)
    assert where(measured) == ["as loaded: lm_head.weight"]
    assert "1 of 2048 elements changed" in measured.problems[0].found


def test_damage_done_before_is_not_this_adapters(subject: Subject) -> None:
    nudge(subject.base.module.lm_head.weight)
    assert faults(measure_frozen_weights(subject)) == []
    assert subject.base.loads == 2


def test_deleting_a_merged_adapter_has_to_undo_the_merge(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners import tuners_utils

    monkeypatch.setattr(tuners_utils, "_check_adapters_not_merged", lambda *_: None, raising=False)
    measured = measure_frozen_weights(subject)
    [problem] = measured.problems
    assert problem.where.startswith(
        "delete while merged: base_model.model.model.layers.0.self_attn"
    )
    assert problem.where.endswith("v_proj.weight")
    assert "PEFT >= 0.21" in problem.fix
    assert subject.base.verify() == ()


def test_a_layer_that_cannot_be_merged_is_mentioned(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise NotImplementedError("no merging here")

    monkeypatch.setattr(LoraLinear, "merge", refuse)
    measured = measure_frozen_weights(subject)
    assert faults(measured) == []
    assert any("cannot be merged: NotImplementedError" in note for note in measured.notes)


def test_an_adapter_that_cannot_be_attached(folder: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tiny.llama(hidden_size=64), tmp_path, task_type="CAUSAL_LM")
    with pytest.raises(CannotRun, match="PEFT cannot attach"):
        measure_frozen_weights(Subject(adapter, load_base(folder, adapter=adapter, device="cpu")))
