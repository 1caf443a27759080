from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from adapter_maker import lora_tensors, write_adapter, write_safetensors
from raw_safetensors import one, write

from pytest_lora.adapter import read_adapter
from pytest_lora.checks.config import measure_config_matches_weights
from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.records import Measurement

SHARED = Path(__file__).parents[3] / "shared" / "data" / "adapters"
P = "base_model.model."
Tensors = dict[str, tuple[tuple[int, ...], float]]


def measure(folder: Path, tensors: Tensors | None = None, **config: Any) -> Measurement:
    scaling = config.pop("expected_scaling", None)
    adapter = read_adapter(write_adapter(folder, tensors=tensors, **config))
    return measure_config_matches_weights(adapter, expected_scaling=scaling)


def problems(folder: Path, tensors: Tensors | None = None, **config: Any) -> list[str]:
    found = measure(folder, tensors, **config)
    assert found.value == len(found.problems)
    return [str(problem) for problem in found.problems]


def pair(module: str, r: int = 2, size: int = 6) -> Tensors:
    return {
        f"{P}{module}.lora_A.weight": ((r, size), 0.5),
        f"{P}{module}.lora_B.weight": ((size, r), 0.25),
    }


def renamed(rename: Any, tensors: Tensors | None = None) -> Tensors:
    return {rename(name): value for name, value in (tensors or lora_tensors()).items()}


def without(*parts: str, layers: int = 2) -> Tensors:
    tensors = lora_tensors(layers=layers)
    return {n: v for n, v in tensors.items() if not any(part in n for part in parts)}


def test_a_sound_adapter_has_no_problems_and_shows_its_scaling(tmp_path: Path) -> None:
    found = measure(tmp_path / "a", alpha_pattern={"v_proj": 3})
    assert (found.value, found.problems, found.count) == (0, (), 8)
    assert found.details["method"] == "LORA"
    assert found.details["scaling"] == {"4.0": 2, "1.5": 2}
    assert found.details["roles"] == {"factor": 8}
    rows = found.details["modules"]
    assert isinstance(rows, list)
    assert rows[0] == {
        "module": "model.layers.0.self_attn.q_proj",
        "kind": "linear",
        "rank": 2,
        "alpha": 8.0,
        "scaling": 4.0,
    }
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_nothing_to_compare_is_no_verdict(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", tensors={})
    with pytest.raises(CannotRun, match="no readable weights") as caught:
        measure_config_matches_weights(read_adapter(folder))
    assert not caught.value.missing
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CannotRun, match="no readable adapter_config"):
        measure_config_matches_weights(read_adapter(folder))
    with pytest.raises(NotApplicable, match="no rules for the method 'LORAX'"):
        measure(tmp_path / "b", peft_type="LORAX")


# --------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda n: f"_orig_mod.{n}", "torch.compile's '_orig_mod.' in the key"),
        (lambda n: n.replace("model.layers", "model._orig_mod.layers"), "'_orig_mod.' in the key"),
        (lambda n: n.replace("self_attn", "_fsdp_wrapped_module.self_attn"), "FSDP's"),
        (lambda n: n.replace("self_attn", "_checkpoint_wrapped_module.self_attn"), "checkpoint"),
        (lambda n: f"module.{n}", "'module.' before the key"),
        (lambda n: f"foo.{n}", "'foo.' before the key"),
        (lambda n: n.removeprefix(P), "no 'base_model.model.' at the beginning of the key"),
        (lambda n: P + n, "PEFT's prefix twice"),
        (lambda n: n.replace(".weight", ".default.weight"), "the adapter's name 'default'"),
    ],
)
def test_a_flawed_naming_is_one_problem_for_all_tensors(
    tmp_path: Path, rename: Any, words: str
) -> None:
    [problem] = problems(tmp_path / "a", renamed(rename))
    assert words in problem
    assert "and 7 more" in problem
    assert "PEFT loads none of it" in problem


def test_tensors_of_a_second_adapter_are_told_apart(tmp_path: Path) -> None:
    other = renamed(lambda n: n.replace(".weight", ".other.weight"))
    [problem] = problems(tmp_path / "a", {**lora_tensors(), **other})
    assert "a tensor of another adapter, 'other'" in problem
    assert "save each adapter by itself" in problem
    named = renamed(lambda n: n.replace(".weight", ".mine.weight"))
    del other[next(iter(other))]
    texts = problems(tmp_path / "b", {**named, **other})
    assert "the adapter's name 'mine'" in texts[0]
    assert "another adapter, 'other'" in texts[1]
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{P}model.norm.weight", "nothing in the configuration accounts for it"),
        (f"{P}model.layers.0.self_attn.q_proj.hada_w1_a", "a tensor of LOHA, not of LORA"),
        (f"{P}model.layers.0.self_attn.q_proj.base_layer.bias", "a bias of the base although"),
        (f"{P}model.layers.0.self_attn.q_proj.lora_diag", "variant's tensor without kasa_config"),
        (f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta", "trained token rows"),
        (f"{P}lm_head.weight", "nothing in the configuration accounts for it"),
        (f"{P}lm_head.base_layer.weight", "nothing in the configuration accounts for it"),
        ("prompt_embeddings", "nothing in the configuration accounts for it"),
    ],
)
def test_a_tensor_nothing_accounts_for_is_named(tmp_path: Path, name: str, words: str) -> None:
    [problem] = problems(tmp_path / "a", {**lora_tensors(), name: ((2,), 1.0)})
    assert words in problem
    assert name in problem


def test_embeddings_stored_whole_are_remarked(tmp_path: Path) -> None:
    resized = {f"{P}model.embed_tokens.weight": ((9, 6), 1.0), f"{P}lm_head.weight": ((9, 6), 1.0)}
    found = measure(tmp_path / "a", {**lora_tensors(), **resized})
    assert found.value == 0
    assert "whole embeddings are stored" in " ".join(found.notes)
    adapted = {**pair("lm_head"), f"{P}lm_head.base_layer.weight": ((6, 6), 1.0)}
    targets = ["q_proj", "v_proj", "lm_head"]
    assert problems(tmp_path / "b", {**lora_tensors(), **adapted}, target_modules=targets) == []


# --------------------------------------------------------------------------------- LoRA factors


def test_half_a_module_is_named(tmp_path: Path) -> None:
    q = "layers.0.self_attn.q_proj"
    [problem] = problems(tmp_path / "a", without(f"{q}.lora_B"))
    assert f"module 'model.{q}': lora_A without lora_B" in problem
    [problem] = problems(tmp_path / "b", without(f"{q}.lora_A"))
    assert "lora_B without lora_A" in problem
    lone = {f"{P}model.{q}.lora_magnitude_vector": ((6,), 1.0)}
    texts = problems(tmp_path / "c", {**without(q), **lone}, use_dora=False)
    assert "a magnitude or bias without lora_A" in texts[0]


@pytest.mark.parametrize(
    ("a", "b", "config", "words"),
    [
        ((6, 2), (2, 6), {}, "A and B are swapped or transposed: A [6, 2], B [2, 6]"),
        ((9, 2), (2, 5), {}, "A and B are swapped or transposed"),
        ((3, 6), (6, 3), {}, "rank 3 (expected 2, promised by r in adapter_config.json)"),
        ((3, 6), (6, 2), {}, "A has rank 3 and B has rank 2"),
        ((2, 6), (6, 3), {}, "A has rank 2 and B has rank 3"),
        ((2, 6), (6, 2), {"rank_pattern": {"q_proj": 4}}, "4, promised by rank_pattern 'q_proj'"),
        ((0,), (6, 2), {}, "a factor of shape [0]"),
        ((2, 6), (0, 2), {}, "a factor of shape [0, 2]"),
        ((12,), (12,), {}, "a factor of shape [12]"),
    ],
)
def test_shapes_have_to_keep_the_promised_rank(
    tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...], config: dict[str, Any], words: str
) -> None:
    tensors = {f"{P}q_proj.lora_A.weight": (a, 1.0), f"{P}q_proj.lora_B.weight": (b, 1.0)}
    [problem] = problems(tmp_path / "a", tensors, target_modules=["q_proj"], **config)
    assert words in problem


def test_one_fault_of_many_modules_is_one_problem(tmp_path: Path) -> None:
    [problem] = problems(tmp_path / "a", r=4)
    assert "'model.layers.0.self_attn.q_proj' and 3 more modules: rank 2 (expected 4" in problem
    zero = dict.fromkeys(lora_tensors(), ((0,), 1.0))
    [problem] = problems(tmp_path / "b", zero)
    assert "and 3 more modules: a factor of shape [0]" in problem
    assert "GatheredParameters" in problem


@pytest.mark.parametrize("key", ["score.weight", "model.embed_tokens.weight", "q_proj.bias"])
def test_a_whole_tensor_without_numbers_is_no_tensor(tmp_path: Path, key: str) -> None:
    options: dict[str, Any] = {"modules_to_save": ["score"], "bias": "all"}
    head: Tensors = {f"{P}score.weight": ((3, 6), 1.0)}
    sound: Tensors = {**lora_tensors(), **head, f"{P}{key}": ((3, 6), 1.0)}
    assert problems(tmp_path / "a", sound, **options) == []
    [problem] = problems(tmp_path / "b", {**sound, f"{P}{key}": ((0,), 1.0)}, **options)
    assert f"tensor '{P}{key}': shape [0], not a single number" in problem
    assert "GatheredParameters" in problem


def test_integer_factors_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", target_modules=["q_proj"])
    write(
        folder / "adapter_model.safetensors",
        [
            one(f"{P}q_proj.lora_A.weight", "I8", (2, 6)),
            one(f"{P}q_proj.lora_B.weight", "F16", (6, 2)),
        ],
    )
    found = measure_config_matches_weights(read_adapter(folder))
    assert "factors of type I8 and F16" in str(found.problems[0])
    assert "mixed types: 1 of I8, 1 of F16" in " ".join(found.notes)


def test_convolutions_may_be_grouped_and_embeddings_are_wide(tmp_path: Path) -> None:
    tensors: Tensors = {
        f"{P}conv.lora_A.weight": ((4, 3, 3, 3), 1.0),
        f"{P}conv.lora_B.weight": ((8, 2, 1, 1), 1.0),
        f"{P}embed.lora_embedding_A": ((4, 99), 1.0),
        f"{P}embed.lora_embedding_B": ((6, 4), 1.0),
    }
    assert problems(tmp_path / "a", tensors, r=4, target_modules=["conv", "embed"]) == []
    tensors[f"{P}conv.lora_B.weight"] = ((8, 3, 1, 1), 1.0)
    [problem] = problems(tmp_path / "b", tensors, r=4, target_modules=["conv", "embed"])
    assert "A has rank 4 and B has rank 3" in problem


def test_block_diagonal_factors_may_be_narrow(tmp_path: Path) -> None:
    tensors: Tensors = {f"{P}q.lora_A.weight": ((4, 6), 1.0), f"{P}q.lora_B.weight": ((6, 2), 1.0)}
    options = {"r": 4, "target_modules": ["q"]}
    assert problems(tmp_path / "a", tensors, use_bdlora={"nblocks": 2}, **options) == []
    assert problems(tmp_path / "b", tensors, use_bdlora={"nblocks": 4}, **options)
    assert problems(tmp_path / "c", tensors, use_bdlora={}, **options)


def test_fused_parameters_stack_one_rank_per_expert(tmp_path: Path) -> None:
    options = {"target_modules": ["q"], "target_parameters": ["experts.up"]}
    good = {**pair("q"), **pair("l.experts", r=8)}
    assert problems(tmp_path / "a", good, **options) == []
    bad = {**pair("q"), **pair("l.experts", r=7)}
    assert "rank 7" in problems(tmp_path / "b", bad, **options)[0]
    [problem] = problems(tmp_path / "c", pair("q"), **options)
    assert "target_parameters: no tensor stands for 'experts.up'" in problem
    options["target_parameters"] = ["experts.up", "experts.down"]
    both = {**pair("q"), **pair("l.experts", r=6), **pair("l.experts.base_layer", r=8)}
    undecided = problems(tmp_path / "d", both, rank_pattern={"experts.up": 3}, **options)
    assert undecided == []


def dora(**changes: tuple[int, ...]) -> Tensors:
    shapes = {"q_proj": (6,), "v_proj": (6,), **changes}
    magnitudes = {
        f"{P}model.layers.{layer}.self_attn.{name}.lora_magnitude_vector": (shape, 1.0)
        for layer in (0, 1)
        for name, shape in shapes.items()
        if shape
    }
    return {**lora_tensors(), **magnitudes}


def test_dora_has_a_magnitude_for_every_module(tmp_path: Path) -> None:
    assert problems(tmp_path / "a", dora(), use_dora=True) == []
    [problem] = problems(tmp_path / "b", dora(v_proj=()), use_dora=True)
    assert "v_proj' and 1 more modules: no DoRA magnitude vector" in problem
    [problem] = problems(tmp_path / "c", dora(), use_dora=False)
    assert "although use_dora is not set" in problem
    [problem] = problems(tmp_path / "d", dora(v_proj=(7,)), use_dora=True)
    assert "a DoRA magnitude vector of shape [7] (expected 6 numbers" in problem


def test_b_has_its_bias_when_configured(tmp_path: Path) -> None:
    def biased(size: int = 6) -> Tensors:
        biases = {
            n.replace(".weight", ".bias"): ((size,), 1.0) for n in lora_tensors() if "_B" in n
        }
        return {**lora_tensors(), **biases}

    assert problems(tmp_path / "a", biased(), lora_bias=True) == []
    assert "no lora_B.bias" in problems(tmp_path / "b", lora_bias=True)[0]
    assert "although lora_bias is not set" in problems(tmp_path / "c", biased())[0]
    assert "a lora_B.bias of 7 numbers" in problems(tmp_path / "d", biased(7), lora_bias=True)[0]


def test_variants_bring_their_tensors(tmp_path: Path) -> None:
    kasa = {
        n.replace("lora_A.weight", "lora_diag"): ((2,), 1.0) for n in lora_tensors() if "_A" in n
    }
    options = {"kasa_config": {"beta": 1}}
    assert problems(tmp_path / "a", {**lora_tensors(), **kasa}, **options) == []
    assert "no lora_diag" in problems(tmp_path / "b", **options)[0]


# ------------------------------------------------------------------------------------- promises


def test_biases_of_the_base(tmp_path: Path) -> None:
    stem = f"{P}model.layers.0.self_attn"
    trained = {f"{stem}.q_proj.base_layer.bias": ((6,), 1.0), f"{stem}.k_proj.bias": ((6,), 1.0)}
    assert problems(tmp_path / "a", {**lora_tensors(), **trained}, bias="all") == []
    found = measure(tmp_path / "b", bias="lora_only")
    assert found.value == 0
    assert "bias is lora_only, but there is no bias in the file" in " ".join(found.notes)


def test_every_saved_module_is_there(tmp_path: Path) -> None:
    head = {f"{P}score.weight": ((2, 6), 1.0)}
    assert problems(tmp_path / "a", {**lora_tensors(), **head}, modules_to_save=["score"]) == []
    [problem] = problems(tmp_path / "b", modules_to_save=["lm_head"])
    assert "'lm_head' is promised, but no tensor of it is in the file" in problem


@pytest.mark.parametrize("saved", [["classifier", "score"], None])
def test_a_classifier_has_one_of_the_usual_heads(tmp_path: Path, saved: list[str] | None) -> None:
    head = {f"{P}score.weight": ((2, 6), 1.0)}
    options = {"task_type": "SEQ_CLS", "modules_to_save": saved}
    assert problems(tmp_path / "a", {**lora_tensors(), **head}, **options) == []
    texts = problems(tmp_path / "b", None, **options)
    assert len(texts) == (2 if saved else 0)


@pytest.mark.parametrize(
    ("indices", "rows", "words"),
    [
        ([1, 2, 3], 3, ""),
        ({"embed_tokens": [1, 2, 3]}, 3, ""),
        ([1, 2], 3, "2 token ids for 3 trained rows"),
        ([1, 2], 0, "2 rows are promised, none is there"),
        ({"lm_head": [1]}, 3, "1 rows of lm_head are promised, none is there"),
    ],
)
def test_token_rows_are_as_many_as_promised(
    tmp_path: Path, indices: Any, rows: int, words: str
) -> None:
    key = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = {**lora_tensors(), **({key: ((rows, 6), 1.0)} if rows else {})}
    found = problems(tmp_path / "a", tensors, trainable_token_indices=indices)
    assert [words in text for text in found] == ([True] if words else [])


@pytest.mark.parametrize(
    ("rows", "config", "words"),
    [
        (5, {}, ""),
        (10, {"num_transformer_submodules": 2}, ""),
        (4, {}, "5 tokens for 4 rows of prompt_embeddings"),
        (None, {}, "5 tokens promised, no prompt_embeddings"),
    ],
)
def test_a_prompt_has_a_row_per_token(
    tmp_path: Path, rows: int | None, config: dict[str, Any], words: str
) -> None:
    tensors = (
        {"prompt_embeddings": ((rows, 6), 1.0)} if rows else {"prefix_task_cols": ((2, 2), 1.0)}
    )
    method = "PROMPT_TUNING" if rows else "MULTITASK_PROMPT_TUNING"
    found = problems(tmp_path / "a", tensors, peft_type=method, num_virtual_tokens=5, **config)
    assert [words in text for text in found] == ([True] if words else [])


# -------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, ["no tensor stands for 'c_attn'"]),
        ({"target_modules": ["q_proj", "v_proj", *"abcdef"]}, ["for 'a' and 5 more entries"]),
        ({"target_modules": ["q_proj"]}, ["no entry stands for the module 'model.layers.0.self"]),
        ({"target_modules": r".*\.q_proj"}, ["no entry stands for the module"]),
        ({"target_modules": r".*\.(q|v)_proj"}, []),
        ({"target_modules": "all-linear"}, []),
        ({"target_modules": None}, []),
        ({"target_modules": "(q"}, []),
        ({"target_modules": ["q_proj", "v_proj", "score"], "modules_to_save": ["score"]},
         ["'score' is promised"]),
        ({"exclude_modules": ["q_proj"]}, ["excludes 'model.layers.0.self_attn.q_proj'"]),
        ({"exclude_modules": ".*layers.1.*"}, ["excludes 'model.layers.1"]),
        ({"exclude_modules": ["k_proj"]}, []),
        ({"layers_to_transform": [0, 1]}, []),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}, []),
        ({"layers_to_transform": 1}, ["[1] does not reach 'model.layers.0"]),
        ({"layers_to_transform": [0, 1, 2]}, ["no tensor is of layer 2"]),
        ({"layers_to_transform": []}, []),
    ],
)  # fmt: skip
def test_targets_and_tensors_stand_for_each_other(
    tmp_path: Path, config: dict[str, Any], words: list[str]
) -> None:
    found = problems(tmp_path / "a", **config)
    assert [word in text for word, text in zip(words, found, strict=True)] == [True] * len(words)


def test_a_pattern_that_adapts_nothing_is_dead(tmp_path: Path) -> None:
    head = {f"{P}score.weight": ((2, 6), 1.0)}
    options = {"modules_to_save": ["score"], "target_modules": ".*q_proj"}
    assert "no tensor of any target is in the file" in problems(tmp_path / "a", head, **options)[0]
    options["target_modules"] = ["q_proj"]
    assert "no tensor of any target is in the file" in problems(tmp_path / "b", head, **options)[0]


def test_targets_left_open_are_remarked(tmp_path: Path) -> None:
    found = measure(tmp_path / "a", target_modules=None)
    assert "target_modules is not set" in " ".join(found.notes)


def test_a_tied_head_is_adapted_along(tmp_path: Path) -> None:
    tensors = {**pair("embed_tokens"), **pair("lm_head")}
    tied = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    assert problems(tmp_path / "a", tensors, **tied) == []
    assert problems(tmp_path / "b", tensors, target_modules=["embed_tokens"])


def test_a_block_wrapped_whole_answers_for_its_projection(tmp_path: Path) -> None:
    tensors = {**pair("mha"), **pair("mha.base_layer.out_proj")}
    assert problems(tmp_path / "a", tensors, target_modules=["mha"]) == []
    assert problems(tmp_path / "b", tensors, target_modules=["mha", "out_proj"]) == []
    assert problems(tmp_path / "c", tensors, target_modules="(") == []  # adapter_files tells


# ------------------------------------------------------------------------------------- patterns


def test_pattern_keys_have_to_match_something(tmp_path: Path) -> None:
    texts = problems(tmp_path / "a", rank_pattern={"q_porj": 4}, alpha_pattern={"k_proj": 1})
    assert "rank_pattern: 'q_porj' matches no module of the adapter, so r applied" in texts[0]
    assert "alpha_pattern: 'k_proj' matches no module of the adapter, so lora_alpha" in texts[1]
    found = measure(tmp_path / "b", alpha_pattern={"_proj": 9, ".*": 1, "q_proj": 2})
    assert "alpha_pattern: '_proj' matches no module" in str(found.problems[0])
    assert len(found.problems) == 1
    assert "alpha_pattern 'q_proj' never applies: an earlier key wins" in found.notes


def test_what_an_old_peft_makes_of_two_tables_is_remarked(tmp_path: Path) -> None:
    found = measure(
        tmp_path / "a", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 3}
    )
    assert found.value == 0
    assert "PEFT before 0.14 takes lora_alpha for model.layers.0.self_attn.q_proj" in found.notes[0]
    same = measure(tmp_path / "b", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})
    assert same.notes == ()


# -------------------------------------------------------------------------------------- scaling


def test_an_expected_scaling_is_held_outside_the_patterns(tmp_path: Path) -> None:
    assert problems(tmp_path / "a", expected_scaling=4.0) == []
    [problem] = problems(tmp_path / "b", expected_scaling=2.0)
    assert "and 3 more modules: scaling 4 (alpha 8, rank 2) (expected 2, as lora_scaling" in problem
    [problem] = problems(tmp_path / "c", expected_scaling=4.0, use_rslora=True)
    assert "scaling 5.65685425 (alpha 8, rank 2, rsLoRA)" in problem
    assert problems(tmp_path / "d", expected_scaling=4.0, alpha_pattern={"v_proj": 1}) == []


def record(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("args.json", {"lora_rank": 2, "lora_alpha": 16}, ["8 (expected 16 as args.json says)"]),
        ("args.json", {"lora_rank": 2, "lora_alpha": 8, "use_rslora": True},
         ["use_rslora: false (expected true as args.json says)"]),
        ("training.json", {"rank": 2, "alpha": 4.0}, ["8 (expected 4 as training.json says)"]),
        ("args.json", {"lora_rank": 2, "lora_alpha": 8, "use_rslora": False}, []),
        ("args.json", {"lora_rank": 64, "lora_alpha": 16}, []),
        ("args.json", {"lora_alpha": 16}, []),
        ("args.json", {"rank": 0, "alpha": 16}, []),
        ("args.json", {"lora_rank": True, "lora_alpha": "x"}, []),
        ("args.json", "{broken", []),
        ("trainer_state.json", {"lora_rank": 2, "lora_alpha": 16}, []),
        ("README.md", "```yaml\nlora_r: 2\nlora_alpha: 32\n```", ["expected 32 as README.md says"]),
        ("README.md", "lora_r: 2\nlora_alpha: 8\npeft_use_rslora: true\n", ["use_rslora: false"]),
        ("README.md", "lora_r: 2\nlora_alpha: 32\nlora_alpha: 16\n", []),
        ("README.md", "lora_r: 2 and lora_alpha: 32", []),
    ],
)  # fmt: skip
def test_a_record_of_the_training_is_a_witness(
    tmp_path: Path, name: str, content: Any, words: list[str]
) -> None:
    record(tmp_path / "a", name, content)
    found = problems(tmp_path / "a")
    assert [word in text for word, text in zip(words, found, strict=True)] == [True] * len(words)


def test_the_files_own_metadata_is_a_witness(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", target_modules=["q"])
    write(
        folder / "adapter_model.safetensors",
        [one(f"{P}q.lora_A.weight", shape=(2, 6)), one(f"{P}q.lora_B.weight", shape=(6, 2))],
        ss_network_dim="2",
        ss_network_alpha="1.0",
    )
    [problem] = measure_config_matches_weights(read_adapter(folder)).problems
    assert "1 as the metadata of adapter_model.safetensors says" in str(problem)


def test_a_witness_that_cannot_be_read_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "a", "README.md", "lora_r: 2\nlora_alpha: 32\n")
    os.mkfifo(tmp_path / "a" / "args.json")
    adapter = read_adapter(write_adapter(tmp_path / "a"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert measure_config_matches_weights(adapter).value == 0
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert measure_config_matches_weights(adapter).value == 0


# --------------------------------------------------------------------------------------- layers


def test_one_layer_with_less_than_the_others_lost_its_keys(tmp_path: Path) -> None:
    [problem] = problems(tmp_path / "a", without("layers.2.", layers=5))
    assert "layer 2 of model.layers: no tensors for 'self_attn.q_proj' and 1 more" in problem
    [problem] = problems(tmp_path / "b", without("layers.4.self_attn.v_proj", layers=5))
    assert "layer 4 of model.layers: no tensors for 'self_attn.v_proj'," in problem


def test_several_short_layers_are_a_remark(tmp_path: Path) -> None:
    lost = ("layers.1.self_attn.v", "layers.2.self_attn.v")
    found = measure(tmp_path / "a", without(*lost, layers=12))
    assert found.value == 0
    assert "layers 1, 2 of model.layers have fewer adapted modules" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (without("layers.1.", layers=3), {}),
        (without("layers.1.", layers=5), {"layers_to_transform": [0, 2, 3, 4]}),
        (without("layers.1.", layers=5), {"exclude_modules": ".*layers.1.*"}),
        (without("layers.1.", layers=5), {"target_modules": r".*\.[0234]\..*"}),
        ({**without("layers.1.", layers=5), **pair("model.layers.1.mixer.x_proj")},
         {"target_modules": ["q_proj", "v_proj", "x_proj"]}),
    ],
)  # fmt: skip
def test_layers_that_differ_on_purpose_are_left_alone(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any]
) -> None:
    assert problems(tmp_path / "a", tensors, **config) == []


# -------------------------------------------------------------------------------- other methods


def loha(rank: int = 2, *, lost: str = "", size: int = 6) -> Tensors:
    parts = {"hada_w1_a": (size, rank), "hada_w1_b": (rank, size),
             "hada_w2_a": (size, rank), "hada_w2_b": (rank, size)}  # fmt: skip
    return {
        f"{P}model.layers.{layer}.self_attn.q_proj.{part}": (shape, 1.0)
        for layer in (0, 1)
        for part, shape in parts.items()
        if part != lost
    }


def test_other_methods_have_their_parts_and_ranks(tmp_path: Path) -> None:
    options = {"peft_type": "LOHA", "target_modules": ["q_proj"], "alpha": 8}
    assert problems(tmp_path / "a", loha(), **options) == []
    [problem] = problems(tmp_path / "b", loha(lost="hada_w2_b"), **options)
    assert "no hada_w2_b" in problem
    texts = problems(tmp_path / "c", loha(3), **options)
    assert "hada_w1_b of rank 3 (expected 2" in texts[0]
    assert problems(tmp_path / "d", loha(3), rank_pattern={"q_proj": 3}, **options) == []
    texts = problems(tmp_path / "e", loha(size=0), **options)
    assert "without a single number" in texts[0]
    assert "no tensor stands for 'v_proj'" in str(
        problems(tmp_path / "f", loha(), **{**options, "target_modules": ["q_proj", "v_proj"]})
    )
    [problem] = problems(tmp_path / "g", {**loha(), **pair("model.layers.0.mlp.up")}, **options)
    assert "looks like a tensor of LORA, not of LOHA" in problem


def test_methods_without_shape_rules_say_so(tmp_path: Path) -> None:
    tensors: Tensors = {f"{P}q_proj.oft_R.weight": ((4, 6), 1.0)}
    found = measure(tmp_path / "a", tensors, peft_type="OFT", target_modules=["q_proj"])
    assert found.value == 0
    assert "for OFT only tensor names, targets and layers were checked" in found.notes[0]
    assert found.details["modules"] == []


def test_shared_tensors_belong_to_no_module(tmp_path: Path) -> None:
    tensors: Tensors = {
        "base_model.vera_A": ((2, 6), 1.0),
        f"{P}q_proj.vera_lambda_b": ((6,), 1.0),
        f"{P}q_proj.vera_lambda_d": ((2,), 1.0),
    }
    assert problems(tmp_path / "a", tensors, peft_type="VERA", target_modules=["q_proj"]) == []


def test_scalings_that_cannot_be_known_are_shown_as_such(tmp_path: Path) -> None:
    found = measure(tmp_path / "a", lora_alpha="x")
    rows = found.details["modules"]
    assert isinstance(rows, list)
    assert str(rows[0]["scaling"]) == "nan"


# --------------------------------------------------------------------------------- real adapters


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real adapters are not here")
def test_real_adapters_get_sensible_verdicts() -> None:
    found: dict[str, list[str]] = {}
    for path in SHARED.iterdir():
        adapter = read_adapter(path)
        if adapter.tensors:
            measured = measure_config_matches_weights(adapter)
            found[path.name] = [str(problem) for problem in measured.problems]
            assert measured.details["scaling"] == {"4.0": 36}
    dead = found.pop("gpt2-gurvineet-75f7-checkpoint-best")
    assert ["no tensor stands for 'q_proj'" in dead[0], "'v_proj'" in dead[1]] == [True, True]
    assert len(dead) == 2
    assert set(map(tuple, found.values())) == {()}


def test_the_maker_writes_what_it_says(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", lora_tensors())
    assert (tmp_path / "x.safetensors").stat().st_size > 400
