"""base_compatibility: what fits passes, and each way not to fit is named once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny
import torch
import transformers
from peft.tuners import tuners_utils
from safetensors.torch import load_file, save_file
from torch import nn

from pytest_lora.adapter import Adapter, read_adapter
from pytest_lora.checks import base as base_check
from pytest_lora.checks.base import measure_base_compatibility
from pytest_lora.checks.base_injection import inject
from pytest_lora.checks.base_shapes import BaseShapes, on_meta
from pytest_lora.errors import CannotRun
from pytest_lora.locate import AdapterLocation

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of which only the configuration is there."""
    path = tmp_path_factory.mktemp("base")
    tiny.llama().config.save_pretrained(path)
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return make(tmp_path / "a")


def make(home: Path, model: Any = None, **config: Any) -> Adapter:
    options = {"task_type": "CAUSAL_LM", **config}
    return tiny.save_adapter(model or tiny.llama(), home, **options)


def other_base(home: Path, **changes: Any) -> Path:
    tiny.llama(**changes).config.save_pretrained(home)
    return home


# ---------------------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ({}, 4),
        ({"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}}, 14),
        ({"use_dora": True, "lora_bias": False}, 4),
        ({"lora_bias": True, "target_modules": ["lm_head"]}, 2),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, 6),
        ({"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, 4),
        ({"trainable_token_indices": [5, 63]}, 5),
        ({"layers_to_transform": [1]}, 2),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, 2),
        ({"target_modules": r".*layers\.[01]\.self_attn\.(q|k)_proj"}, 4),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, 3),
        ({"exclude_modules": r".*\.0\..*q_proj"}, 3),
        ({"init_lora_weights": "pissa"}, 4),
        ({"cls": "IA3Config", "target_modules": ["k_proj"], "feedforward_modules": []}, 2),
        ({"cls": "LoHaConfig", "target_modules": ["v_proj"]}, 2),
        ({"cls": "VeraConfig", "target_modules": ["v_proj"], "r": 4}, 2),
        ({"cls": "AdaLoraConfig", "target_modules": ["v_proj"], "total_step": 9}, 2),
        ({"cls": "PromptTuningConfig", "num_virtual_tokens": 4}, 0),
        ({"cls": "PrefixTuningConfig", "num_virtual_tokens": 4}, 0),
        ({"cls": "AdaptionPromptConfig", "adapter_len": 4, "adapter_layers": 2}, 2),
    ],
)
def test_sound_adapters_land(
    folder: Path, tmp_path: Path, config: dict[str, Any], modules: int
) -> None:
    if tiny.PEFT < (0, 15) and config.get("cls") == "AdaptionPromptConfig":
        pytest.skip("that PEFT does not know these transformers")
    measured = measure_base_compatibility(make(tmp_path, **config), folder)
    assert measured.problems == ()
    assert measured.value == 0
    assert measured.details["modules"] == modules
    assert measured.count >= 1
    recorded = [note for note in measured.notes if "recorded" not in note]
    assert recorded == []


def test_the_base_the_adapter_names(folder: Path, tmp_path: Path) -> None:
    adapter = tiny.rewrite_config(make(tmp_path), base_model_name_or_path=str(folder))
    measured = measure_base_compatibility(adapter)
    assert measured.value == 0
    assert measured.details["base"] == f"LlamaForCausalLM in {folder}"
    assert measured.notes == ()


def test_gpt2_convolutions_and_classifiers(tmp_path: Path) -> None:
    tiny.gpt2().config.save_pretrained(tmp_path / "gpt2")
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter = make(tmp_path / "g", tiny.gpt2(), **options)
    assert measure_base_compatibility(adapter, tmp_path / "gpt2").problems == ()
    config = transformers.GPT2Config(**{**tiny.gpt2().config.to_dict(), "num_labels": 5})
    model = transformers.GPT2ForSequenceClassification(config)
    adapter = make(tmp_path / "s", model, **{**options, "task_type": "SEQ_CLS"})
    assert "score" in adapter.config["modules_to_save"]
    measured = measure_base_compatibility(adapter, tmp_path / "gpt2")
    assert measured.problems == ()
    assert str(measured.details["base"]).startswith("GPT2ForSequenceClassification")


def classifier_on(base: Path) -> Any:
    model = transformers.GPT2ForSequenceClassification(tiny.gpt2().config)
    model.save_pretrained(base)
    return model


def without_head(file: Path) -> None:
    kept = {key: tensor for key, tensor in load_file(file).items() if "score" not in key}
    save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize(
    "options",
    [
        {"cls": "PromptTuningConfig", "num_virtual_tokens": 4},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    ],
)
def test_a_head_saved_with_the_adapter_lands(options: dict[str, Any], tmp_path: Path) -> None:
    """Whichever prefix it has: without wrapped modules there is one ``model.`` less."""
    model = classifier_on(tmp_path / "base")
    adapter = make(tmp_path / "a", model, task_type="SEQ_CLS", **options)
    without_head(tmp_path / "base" / "model.safetensors")
    assert any("score" in key for key in adapter.tensors)
    assert measure_base_compatibility(adapter, tmp_path / "base").problems == ()


def test_a_head_that_nobody_has_values_for(tmp_path: Path) -> None:
    base, options = tmp_path / "base", {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = make(tmp_path / "a", classifier_on(base), task_type=None, **options)
    assert measure_base_compatibility(adapter, base).problems == ()
    without_head(base / "model.safetensors")
    [problem] = measure_base_compatibility(adapter, base).problems
    assert problem.where == "score"
    assert "modules_to_save=['score']" in problem.fix
    on_it = make(tmp_path / "b", classifier_on(tmp_path / "c"), task_type=None,
                 target_modules=["score"])  # fmt: skip
    [problem] = measure_base_compatibility(on_it, base).problems
    assert problem.where == "score"


def test_a_module_passed_in(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(
        tiny.cnn(), tmp_path, target_modules=["conv", "head"], use_dora=True
    )
    module = tiny.cnn()
    weight = module.conv.weight.detach().clone()
    measured = measure_base_compatibility(adapter, module)
    assert measured.problems == ()
    assert measured.details["base"] == "the Cnn passed in"
    assert torch.equal(module.conv.weight, weight)
    assert not any("lora" in name for name, _ in module.named_modules())


def test_a_twin_on_meta_shares_nothing() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    twin: Any = on_meta(model)
    assert all(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers()))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in model.parameters())


# ---------------------------------------------------------------------------- the wrong base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "lora_A takes 32 inputs, the base's has 64"),
        ({"num_hidden_layers": 1}, "layers.1.self_attn.q_proj.lora_A: the base has no such module"),
        ({"num_key_value_heads": 4}, "v_proj.lora_B gives 16 outputs, the base's has 32"),
    ],
)
def test_a_wrong_base_is_one_problem(
    tmp_path: Path, adapter: Adapter, changes: dict[str, int], message: str
) -> None:
    measured = measure_base_compatibility(adapter, other_base(tmp_path / "b", **changes))
    [problem] = measured.problems
    assert message in problem.found
    assert "of 8 tensors" in problem.found
    assert "--lora-base-model=PATH" in problem.fix


def test_another_architecture_is_one_problem(tmp_path: Path, adapter: Adapter) -> None:
    tiny.gpt2().config.save_pretrained(tmp_path / "gpt2")
    [problem] = measure_base_compatibility(adapter, tmp_path / "gpt2").problems
    assert problem.found.startswith("8 of 8 tensors do not fit: model.layers.0.self_attn.q_proj")
    assert problem.found.endswith("...")


def test_a_deeper_base_has_modules_without_tensors(tmp_path: Path, adapter: Adapter) -> None:
    base = other_base(tmp_path / "b", num_hidden_layers=3)
    [problem] = measure_base_compatibility(adapter, base).problems
    assert "4 tensors not in the file" in problem.found
    assert "model.layers.2.self_attn.q_proj.lora_A.weight (1)" in problem.found


def test_the_layers_that_are_lacking_are_told(tmp_path: Path, adapter: Adapter) -> None:
    base = other_base(tmp_path / "b", num_hidden_layers=5)
    [problem] = measure_base_compatibility(adapter, base).problems
    assert "model.layers.*.self_attn.q_proj.lora_A.weight (3: 2 to 4)" in problem.found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is [32], the base's has 64 outputs"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_B gives 32 features"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is [64, 32], the base's is [64, 64]"),
        ({"trainable_token_indices": [5]}, "token rows of 32 features, the base's 64"),
        ({"cls": "PromptTuningConfig", "num_virtual_tokens": 4}, "the base embeds in 64"),
        ({"cls": "PrefixTuningConfig", "num_virtual_tokens": 4}, "tensor of another shape"),
        ({"cls": "LoHaConfig", "target_modules": ["v_proj"]}, "of another shape than PEFT"),
    ],
)
def test_every_kind_of_tensor_is_measured(
    tmp_path: Path, config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiny.PEFT < (0, 19) and config.get("cls") == "PrefixTuningConfig":
        pytest.skip("that PEFT has no view of it without weights")
    adapter = make(tmp_path / "a", **config)
    monkeypatch.setattr(base_check._Fit, "_summary", lambda self: every(self))
    measured = measure_base_compatibility(adapter, other_base(tmp_path / "b", hidden_size=64))
    assert any(message in problem.found for problem in measured.problems)


def every(fit: Any) -> Any:
    return base_check.Problem("base", "; ".join(fit.misfits))


def test_tensors_without_a_home(tmp_path: Path, folder: Path) -> None:
    adapter = make(tmp_path / "a", modules_to_save=["lm_head"], trainable_token_indices=[5])

    def misplace(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.lm_head.extra"] = torch.zeros(3)
        [rows] = [name for name in tensors if "token_adapter" in name]
        tensors[rows.replace("embed_tokens", "embedding")] = tensors.pop(rows)

    adapter = tiny.rewrite_weights(adapter, misplace)
    [problem] = measure_base_compatibility(adapter, folder).problems
    assert "lm_head.extra: the base has no such parameter" in problem.found
    assert "model.embedding: the base has no such embedding" in problem.found
    adapter = make(
        tmp_path / "i", cls="IA3Config", target_modules=["k_proj"], feedforward_modules=[]
    )
    adapter = tiny.rewrite_weights(
        adapter, lambda t: {k.replace("k_proj", "key_proj"): v for k, v in t.items()}
    )
    [problem] = measure_base_compatibility(adapter, folder).problems
    assert "key_proj.ia3_l: the base has no such module" in problem.found


def test_a_convolution_that_does_not_fit(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tiny.cnn(), tmp_path, target_modules=["conv"])
    module = tiny.cnn()
    module.conv = nn.Conv2d(3, 8, 5)
    [problem] = measure_base_compatibility(adapter, module).problems
    assert "conv.lora_A takes 3 x 3 x 3 inputs, the base's has 3 x 5 x 5" in problem.found


# ---------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("target_modules", ["q_proj", "v_proj", "key_proj"], "'key_proj' matches nothing"),
        ("rank_pattern", {"q_porj": 2}, "'q_porj' matches nothing"),
        ("alpha_pattern", {"q_porj": 2, "^v_porj": 1}, "'q_porj', '^v_porj' match nothing"),
        ("modules_to_save", ["head"], "'head' matches nothing"),
        ("layers_to_transform", [0, 1, 7], "'7' matches nothing"),
    ],
)
def test_dead_patterns(folder: Path, adapter: Adapter, key: str, value: object, found: str) -> None:
    adapter = tiny.rewrite_config(adapter, **{key: value})
    problems = measure_base_compatibility(adapter, folder).problems
    assert problems[0].where == f"adapter_config.json: {key}"
    assert problems[0].found == found


@pytest.mark.skipif(tiny.PEFT < (0, 14), reason="that PEFT refuses the key")
def test_a_dead_exclusion_is_a_note(folder: Path, adapter: Adapter) -> None:
    adapter = tiny.rewrite_config(adapter, exclude_modules=["vision_tower"])
    measured = measure_base_compatibility(adapter, folder)
    assert measured.problems == ()
    assert any("'vision_tower' excludes nothing" in note for note in measured.notes)


def test_broken_patterns_are_left_to_the_file_check(folder: Path, adapter: Adapter) -> None:
    adapter = tiny.rewrite_config(adapter, target_modules="(q_proj")
    [problem] = measure_base_compatibility(adapter, folder).problems
    assert problem.where.startswith("PEFT")
    assert "refuses it" in problem.found


def test_a_dead_target_parameter(folder: Path, adapter: Adapter) -> None:
    adapter = tiny.rewrite_config(adapter, target_parameters=["experts.gate_up_proj"])
    problems = measure_base_compatibility(adapter, folder).problems
    assert any("'experts.gate_up_proj' matches nothing" in problem.found for problem in problems)
    fine = tiny.rewrite_config(adapter, target_parameters=["norm.weight"])
    problems = measure_base_compatibility(fine, folder).problems
    assert not any("norm.weight" in problem.found for problem in problems)


@pytest.mark.parametrize(
    ("given", "there"), [("model.language_model.", "model."), ("", "model."), ("body.", "model.")]
)
def test_another_class_of_the_same_model(
    folder: Path, adapter: Adapter, given: str, there: str
) -> None:
    def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old, new = f"base_model.model.{there}", f"base_model.model.{given}"
        return {key.replace(old, new): tensor for key, tensor in tensors.items()}

    [problem, *_] = measure_base_compatibility(
        tiny.rewrite_weights(adapter, moved), folder
    ).problems
    assert "do not fit" in problem.found
    assert f"has all of them under {there!r} in place of {given!r}" in problem.fix


def test_the_same_tensors_under_two_names(folder: Path, adapter: Adapter) -> None:
    def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {key: key.replace("model.layers", "text.layers") for key in tensors}
        return {**tensors, **{names[key]: tensor.clone() for key, tensor in tensors.items()}}

    twice = tiny.rewrite_weights(adapter, doubled)
    [problem, *_] = measure_base_compatibility(twice, folder).problems
    assert "under 'text.' are in the file as 'model.' as well: remove them" in problem.fix


def test_what_is_nowhere_is_not_said_to_be_elsewhere(folder: Path, adapter: Adapter) -> None:
    def beyond(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.replace("layers.1.", "layers.91."): t for key, t in tensors.items()}

    [problem, *_] = measure_base_compatibility(
        tiny.rewrite_weights(adapter, beyond), folder
    ).problems
    assert "--lora-base-model" in problem.fix


def test_two_fused_parameters_of_one_module(tmp_path: Path) -> None:
    """PEFT nests their wrappers, so that the second one's factors lie under ``base_layer``."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    base = transformers.Qwen3MoeForCausalLM(config)
    if not hasattr(base.model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("experts are no fused parameters in this transformers")
    tiny.save_base(base, tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make(tmp_path / "a", base, target_modules=["q_proj"], target_parameters=names)
    assert measure_base_compatibility(adapter, tmp_path / "base").problems == ()
    moved = tiny.rewrite_weights(
        adapter,
        lambda tensors: {key.replace("experts", "expert"): t for key, t in tensors.items()},
    )
    problems = measure_base_compatibility(moved, tmp_path / "base").problems
    assert any("8 of 12 tensors do not fit" in problem.found for problem in problems)


# ---------------------------------------------------------------------------- PEFT's own view


def test_tensors_peft_has_no_place_for(folder: Path, adapter: Adapter) -> None:
    adapter = tiny.rewrite_config(adapter, target_modules=["q_proj"])
    [problem] = measure_base_compatibility(adapter, folder).problems
    assert "4 tensors in the file, but PEFT has no place for them" in problem.found
    assert "model.layers.*.self_attn.v_proj.lora_A.weight (2)" in problem.found


def test_a_layer_lost_while_saving(folder: Path, adapter: Adapter) -> None:
    adapter = tiny.rewrite_weights(
        adapter, lambda tensors: {k: v for k, v in tensors.items() if "layers.1" not in k}
    )
    [problem] = measure_base_compatibility(adapter, folder).problems
    assert "4 tensors not in the file" in problem.found
    assert "model.layers.1.self_attn.q_proj.lora_A.weight (1)" in problem.found


class Experts(nn.Module):
    """Three layers of three experts, as in the report on layers_to_transform and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in "012")}
            )
            for _ in "012"
        )


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Experts()


def greedy(config: Any, key: str) -> bool:
    """Takes the last number of the path for the layer, as PEFT did up to 0.19."""
    import re

    found = re.match(r".*\.[^.]*\.(\d+)\.", key)
    return key.endswith(".up") and found is not None and int(found[1]) in config.layers_to_transform


@pytest.mark.skipif(tiny.PEFT < (0, 20), reason="that PEFT takes experts for layers itself")
def test_a_peft_that_takes_experts_for_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"target_modules": ["up"], "layers_to_transform": [1]}
    sound = tiny.save_adapter(Mixture(), tmp_path / "sound", **config)
    assert measure_base_compatibility(sound, Mixture()).problems == ()
    monkeypatch.setattr(tuners_utils, "check_target_module_exists", greedy)
    faulty = tiny.save_adapter(Mixture(), tmp_path / "faulty", **config)
    left_out, adapted = measure_base_compatibility(faulty, Mixture()).problems
    assert "leaves out what the configuration selects: 2 modules" in left_out.found
    assert "adapts what the configuration does not select: 2 modules" in adapted.found


@pytest.mark.skipif(tiny.PEFT < (0, 15), reason="that PEFT resolves patterns elsewhere")
def test_a_peft_that_reads_patterns_differently(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import model as lora_model

    adapter = make(tmp_path, alpha_pattern={"v_proj": 32})
    assert measure_base_compatibility(adapter, folder).problems == ()
    monkeypatch.setattr(lora_model, "get_pattern_key", lambda keys, name: name)
    [problem] = measure_base_compatibility(adapter, folder).problems
    assert problem.where == "model.layers.0.self_attn.v_proj"
    assert "scales it by 2" in problem.found
    assert problem.expected.startswith("8")


def test_what_peft_cannot_do_without_weights_is_a_note(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make(tmp_path, cls="LoHaConfig", target_modules=["v_proj"])

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no meta here")

    monkeypatch.setattr(base_check, "inject", refuse)
    measured = measure_base_compatibility(adapter, folder)
    assert measured.problems == ()
    assert any("no meta here" in note for note in measured.notes)


def test_replicated_layers_are_pefts_to_judge(folder: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path, layer_replication=[[0, 2], [1, 2]])
    measured = measure_base_compatibility(adapter, folder)
    assert measured.problems == ()
    assert any("layer_replication" in note for note in measured.notes)


def test_the_view_of_peft(folder: Path, adapter: Adapter) -> None:
    shapes = BaseShapes.from_directory(folder, adapter)
    assert shapes.model is not None
    view = inject(adapter, shapes.model)
    assert len(view.modules) == 4
    assert set(view.scalings.values()) == {2.0}
    assert view.missing == view.homeless == view.misshapen == ()
    assert all(parameter.is_meta for parameter in shapes.model.parameters())


# ---------------------------------------------------------------------------- vocabulary


def test_a_resized_vocabulary_is_a_note(folder: Path, tmp_path: Path) -> None:
    model = tiny.llama()
    model.resize_token_embeddings(70, mean_resizing=False)
    adapter = make(tmp_path, model, modules_to_save=["lm_head", "embed_tokens"])
    measured = measure_base_compatibility(adapter, folder)
    assert measured.problems == ()
    assert any("resized from 64 to 70" in note for note in measured.notes)


def test_only_one_of_two_embeddings_resized(folder: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path, modules_to_save=["lm_head", "embed_tokens"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(70, 32)
        tensors["base_model.model.lm_head.weight"] = torch.ones(71, 32)

    problems = measure_base_compatibility(tiny.rewrite_weights(adapter, change), folder).problems
    assert any("embeddings of [70, 71] rows" in problem.found for problem in problems)


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head"])
def test_the_rows_of_new_tokens_in_one_embedding_only(
    folder: Path, tmp_path: Path, kept: str
) -> None:
    model = tiny.llama()
    model.resize_token_embeddings(70, mean_resizing=False)
    adapter = make(tmp_path, model, modules_to_save=["lm_head", "embed_tokens"])
    adapter = tiny.rewrite_weights(
        adapter, lambda t: {key: value for key, value in t.items() if kept not in key}
    )
    problems = measure_base_compatibility(adapter, folder).problems
    [problem] = [problem for problem in problems if problem.where == "vocabulary"]
    assert "has 70 rows" in problem.found
    assert f"{kept} keeps the base's 64" in problem.found
    assert "save_embedding_layers" in problem.fix


def test_one_of_two_tied_embeddings_is_enough(tmp_path: Path) -> None:
    model = tiny.llama(tie_word_embeddings=True)
    tiny.save_base(model, tmp_path / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    adapter = make(tmp_path / "a", model, modules_to_save=["embed_tokens"])
    adapter = tiny.rewrite_weights(
        adapter, lambda t: {key: value for key, value in t.items() if "lm_head" not in key}
    )
    measured = measure_base_compatibility(adapter, tmp_path / "base")
    assert measured.problems == ()
    assert any("resized from 64 to 70" in note for note in measured.notes)


def test_an_embedding_factor_for_another_vocabulary(tmp_path: Path) -> None:
    adapter = make(tmp_path / "a", target_modules=["embed_tokens"])
    adapter = tiny.rewrite_weights(
        adapter, lambda t: {k: v for k, v in t.items() if "base_layer" not in k and "lora" in k}
    )
    [problem] = measure_base_compatibility(
        adapter, other_base(tmp_path / "b", vocab_size=80)
    ).problems
    assert "lora_embedding_A is for 64 tokens, the base has 80" in problem.found


@pytest.mark.parametrize("declared", [[5, 64], {"embed_tokens": [64, 3]}])
def test_token_rows_beyond_the_vocabulary(
    folder: Path, tmp_path: Path, declared: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make(tmp_path, trainable_token_indices=[5, 6])
    adapter = tiny.rewrite_config(adapter, trainable_token_indices=declared)
    problems = measure_base_compatibility(adapter, folder).problems
    assert any(problem.found == "token 64" for problem in problems)


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        ({"model": {"vocab": {"a": 0, "b": 63}}}, False),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 64}]}, True),
        ({"model": {"vocab": [["a", 0.1]] * 65}}, True),
        ({"model": {}}, False),
        ([], False),
    ],
)
def test_the_tokenizer_beside_the_adapter(
    folder: Path, adapter: Adapter, tokenizer: object, problem: bool
) -> None:
    (adapter.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = measure_base_compatibility(adapter, folder).problems
    assert bool(found) is problem
    if problem:
        assert found[0].found == "gives ids up to 64"


def test_tied_embeddings_are_pointed_out(tmp_path: Path) -> None:
    base = other_base(tmp_path / "b", tie_word_embeddings=True)
    model = tiny.llama(tie_word_embeddings=True)
    adapter = make(tmp_path / "a", model, modules_to_save=["lm_head"])
    measured = measure_base_compatibility(adapter, base)
    assert any("cannot stay tied" in note for note in measured.notes)
    plain = make(tmp_path / "p", tiny.llama(tie_word_embeddings=True))
    assert not any("tied" in note for note in measure_base_compatibility(plain, base).notes)


# ---------------------------------------------------------------------------- origin


def test_another_commit_than_recorded(tmp_path: Path, folder: Path, adapter: Adapter) -> None:
    import shutil

    commit, other = "a" * 40, "b" * 40
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    named = {"base_model_name_or_path": "org/tiny"}
    same = tiny.rewrite_config(adapter, revision=commit, **named)
    assert measure_base_compatibility(same, snapshot).problems == ()
    assert measure_base_compatibility(same, snapshot).notes == ()
    wrong = tiny.rewrite_config(adapter, revision=other, **named)
    [problem] = measure_base_compatibility(wrong, snapshot).problems
    assert problem.where == "adapter_config.json: revision"
    branch = tiny.rewrite_config(adapter, revision="v2", **named)
    assert measure_base_compatibility(branch, snapshot).problems == ()
    local = measure_base_compatibility(same, folder)
    assert any("the base's cannot be told" in note for note in local.notes)
    assert any("recorded base model: org/tiny" in note for note in local.notes)


# ---------------------------------------------------------------------------- headers alone


def test_a_base_that_needs_code_is_judged_by_its_headers(tmp_path: Path, adapter: Adapter) -> None:
    base = tiny.save_base(tiny.llama(), tmp_path / "b")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    measured = measure_base_compatibility(adapter, base)
    assert measured.problems == ()
    assert measured.details["base"] == f"the weights in {base}"
    assert any("headers alone" in note for note in measured.notes)
    wide = make(tmp_path / "w", tiny.llama(hidden_size=64), modules_to_save=["lm_head"])
    [problem] = measure_base_compatibility(wide, base).problems
    assert "do not fit" in problem.found
    headed = make(tmp_path / "h", modules_to_save=["lm_head"])
    headed = tiny.rewrite_weights(
        headed, lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(64)})
    )
    notes = measure_base_compatibility(headed, base).notes
    assert any("lm_head.bias is not among" in note for note in notes)


def test_a_base_nobody_can_read(tmp_path: Path, adapter: Adapter) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    with pytest.raises(CannotRun, match="transformers cannot read it"):
        measure_base_compatibility(adapter, tmp_path)


def test_an_adapter_without_readable_tensors(folder: Path, tmp_path: Path) -> None:
    empty = Adapter(AdapterLocation(path=tmp_path, weights=None, name="a"), {"peft_type": "LORA"})
    with pytest.raises(CannotRun, match="no tensors that could be read"):
        measure_base_compatibility(empty, folder)


def test_an_unknown_method(folder: Path, adapter: Adapter) -> None:
    strange = tiny.rewrite_config(adapter, peft_type="NOVEL")
    measured = measure_base_compatibility(strange, folder)
    assert measured.problems == ()
    assert any("could not be had" in note for note in measured.notes)
    assert read_adapter(adapter.path).peft_type == "NOVEL"
