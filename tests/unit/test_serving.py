from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from adapter_maker import lora_tensors, write_adapter

from pytest_lora.adapter import read_adapter
from pytest_lora.checks.serving import (
    RULES,
    SERVERS,
    Target,
    measure_serving_profile,
    parse_target,
)
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.records import Measurement

P = "base_model.model."
Tensors = dict[str, tuple[tuple[int, ...], float]]


def measure(
    folder: Path, *targets: str, tensors: Tensors | None = None, **config: Any
) -> Measurement:
    adapter = read_adapter(write_adapter(folder, tensors=tensors, **config))
    return measure_serving_profile(adapter, targets=targets)


def rules(found: Measurement, server: str) -> list[str]:
    profile = found.details["profile"]
    assert isinstance(profile, dict)
    return [row["rule"] for row in profile[server]]


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("vllm", Target("vllm", {"max_lora_rank": 16, "reads_patterns": 0})),
        (" vllm:max_lora_rank=64 ", Target("vllm", {"max_lora_rank": 64, "reads_patterns": 0})),
        ("vllm:max_lora_rank=8, reads_patterns=1",
         Target("vllm", {"max_lora_rank": 8, "reads_patterns": 1})),
        ("lorax:tensor_parallel=2", Target("lorax", {"tensor_parallel": 2})),
        ("llama.cpp:", Target("llama.cpp", {})),
    ],
)  # fmt: skip
def test_targets_are_read_with_their_options(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tgi", "unknown server 'tgi' in lora_target; give vllm, sglang, lorax, llama.cpp"),
        ("", "unknown server ''"),
        (
            "vllm:rank=8",
            "unknown option 'rank' of vllm in lora_target; valid: max_lora_rank, reads",
        ),
        ("llama.cpp:x=1", "valid: none"),
        ("vllm:max_lora_rank=many", "vllm:max_lora_rank in lora_target is 'many'; give a whole"),
        ("vllm:max_lora_rank", "is ''; give a whole number"),
        ("vllm:max_lora_rank=-1", "is '-1'"),
    ],
)
def test_other_targets_list_what_is_valid(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_target(text)
    with pytest.raises(UsageError, match=words):
        measure(tmp_path / "a", text)


def test_a_plain_adapter_suits_every_server(tmp_path: Path) -> None:
    found = measure(tmp_path / "a", *SERVERS, tensors=lora_tensors(r=8), r=8)
    assert (found.value, found.problems, found.notes) == (0, (), ())
    assert found.count == len(RULES)
    assert found.details["profile"] == {server: [] for server in SERVERS}
    assert json.dumps(found.to_dict())


def test_without_a_target_it_only_reports(tmp_path: Path) -> None:
    found = measure(tmp_path / "a", use_dora=True, use_rslora=True)
    assert found.value == 0
    notes = " | ".join(found.notes)
    assert "vllm rejects: use_dora" in notes
    assert "sglang scales: 4 of 4 modules" in notes


def test_only_the_target_decides(tmp_path: Path) -> None:
    found = measure(tmp_path / "a", "sglang", use_rslora=True)
    [problem] = found.problems
    assert problem.where == "sglang scales"
    assert f"times {1 / math.sqrt(2):.4g}" in problem.found
    assert "40835" in problem.fix
    assert "llama.cpp scales" in " ".join(found.notes)
    assert "sglang" not in " ".join(found.notes)


def test_nothing_readable_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(CannotRun) as caught:
        measure(tmp_path / "a", tensors={})
    assert not caught.value.missing


def magnitudes() -> Tensors:
    factors = (name for name in lora_tensors() if "lora_A" in name)
    names = [name.replace("lora_A.weight", "lora_magnitude_vector") for name in factors]
    return dict.fromkeys(names, ((8,), 1.0))


HEAD = {f"{P}lm_head.weight": ((9, 6), 1.0)}
SCORE = {f"{P}score.weight": ((2, 6), 1.0)}
BIAS = {f"{P}model.layers.0.self_attn.q_proj.base_layer.bias": ((6,), 1.0)}
LORA_BIAS = {f"{P}model.layers.0.self_attn.q_proj.lora_B.bias": ((6,), 1.0)}
TOKENS = {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": ((1, 6), 1.0)}
NORM = {f"{P}model.norm.weight": ((6,), 1.0)}
BASE = {f"{P}lm_head.base_layer.weight": ((9, 6), 1.0)}
EXPERTS: Tensors = {f"{P}layers.0.experts.lora_{factor}.weight": ((8, 8), 1.0) for factor in "AB"}


@pytest.mark.parametrize(
    ("extra", "config", "expected"),
    [
        ({}, {"peft_type": "IA3"},
         {"vllm": ["method"], "sglang": ["method"], "lorax": ["method"], "llama.cpp": ["method"]}),
        ({}, {"use_dora": True}, {"vllm": ["dora"], "sglang": ["dora"], "lorax": ["dora"]}),
        (magnitudes(), {"use_dora": True},
         {"vllm": ["dora"], "sglang": ["dora"], "lorax": ["dora"], "llama.cpp": ["keys"]}),
        (magnitudes(), {}, {"vllm": ["keys"], "llama.cpp": ["keys"]}),
        (HEAD, {"modules_to_save": ["lm_head"]},
         {"vllm": ["modules_to_save"], "sglang": ["modules_to_save"],
          "lorax": ["modules_to_save"], "llama.cpp": ["keys"]}),
        (SCORE, {"modules_to_save": ["classifier", "score"]},
         {"sglang": ["modules_to_save"], "lorax": ["modules_to_save"], "llama.cpp": ["keys"]}),
        (BIAS, {"bias": "all"},
         {"vllm": ["bias"], "sglang": ["bias"], "lorax": ["bias"], "llama.cpp": ["keys"]}),
        (LORA_BIAS, {"lora_bias": True},
         {"vllm": ["lora_bias"], "sglang": ["lora_bias"], "lorax": ["lora_bias"],
          "llama.cpp": ["keys"]}),
        (TOKENS, {"trainable_token_indices": [1]}, {"vllm": ["keys"], "llama.cpp": ["keys"]}),
        (NORM, {}, {"vllm": ["keys"]}),
        (BASE, {}, {}),
        ({}, {"init_lora_weights": "pissa_niter_4"},
         {server: ["init"] for server in SERVERS}),
        ({}, {"init_lora_weights": "gaussian"}, {}),
        ({}, {"alora_invocation_tokens": [1], "use_qalora": True}, {"vllm": ["variant"]}),
        ({}, {"target_modules": ".*_proj"}, {"sglang": ["targets"]}),
        ({}, {"target_modules": "all-linear"}, {}),
        (EXPERTS, {"target_parameters": ["experts.up"]},
         {"vllm": ["experts"], "sglang": ["experts"], "llama.cpp": ["experts"]}),
    ],
)  # fmt: skip
def test_each_feature_meets_the_rules_meant_for_it(
    tmp_path: Path, extra: Tensors, config: dict[str, Any], expected: dict[str, list[str]]
) -> None:
    tensors = dict.fromkeys(lora_tensors(), ((8, 8), 1.0)) | extra
    found = measure(tmp_path / "a", tensors=tensors, **{"r": 8, **config})
    for server in SERVERS:
        met = [rule.partition("/")[2] for rule in rules(found, server)]
        assert met == expected.get(server, []), server


@pytest.mark.parametrize(
    ("target", "config", "words"),
    [
        ("vllm", {"r": 32}, "rank 32 is over max_lora_rank 16"),
        ("vllm:max_lora_rank=64", {"r": 32}, ""),
        ("vllm", {"rank_pattern": {"v_proj": 99}, "r": 8}, "rank 99 is over"),
        ("sglang", {"r": 512}, ""),
        ("sglang:max_lora_rank=64", {"r": 512}, "rank 512 is over max_lora_rank 64"),
    ],
)
def test_the_rank_has_to_fit(
    tmp_path: Path, target: str, config: dict[str, Any], words: str
) -> None:
    found = measure(tmp_path / "a", target, **config)
    text = " ".join(problem.found for problem in found.problems if "over" in problem.found)
    assert words in text
    assert bool(words) == bool(text)


@pytest.mark.parametrize(
    ("target", "config", "factor"),
    [
        ("vllm", {"use_rslora": True}, 1),
        ("vllm", {"alpha_pattern": {"_proj": 1, ".*": 2}}, 4),
        ("vllm:reads_patterns=1", {"alpha_pattern": {".*": 2}}, 1),
        ("vllm", {"rank_pattern": {".*": 4}}, 2),
        ("sglang", {"use_rslora": True}, 1 / math.sqrt(2)),
        ("sglang", {"alpha_pattern": {".*": 2}}, 4),
        ("lorax", {"r": 8, "use_rslora": True}, 1),
        ("lorax", {"r": 4}, 0.5),
        ("lorax", {"r": 12}, 0.75),
        ("lorax", {"r": 12, "use_rslora": True}, math.sqrt(0.75)),
        ("lorax", {"r": 16}, 1),
        ("lorax:tensor_parallel=2", {"r": 8}, 0.5),
        ("lorax", {"r": 8, "alpha_pattern": {"v_proj": 2}}, 4),
        ("llama.cpp", {"use_rslora": True}, 1 / math.sqrt(2)),
        ("llama.cpp", {"alpha_pattern": {".*": 2}}, 4),
        ("llama.cpp", {"rank_pattern": {"q_proj": 2}}, 1),
    ],
)
def test_wrong_scales_are_computed(
    tmp_path: Path, target: str, config: dict[str, Any], factor: float
) -> None:
    found = measure(tmp_path / "a", target, **config)
    scaled = [p.found for p in found.problems if p.where.endswith("scales")]
    assert [f"times {factor:.4g})" in text for text in scaled] == [True] * (factor != 1)


def test_only_the_first_kind_of_module_keeps_its_scale_on_lorax(tmp_path: Path) -> None:
    [problem] = measure(tmp_path / "a", "lorax").problems
    assert problem.found.startswith("2 of 4 modules: model.layers.0.self_attn.v_proj gets 1 in")


def test_unusable_scalings_are_left_to_the_other_checks(tmp_path: Path) -> None:
    assert measure(tmp_path / "a", "vllm", "llama.cpp", lora_alpha="x").value == 0
    tensors = {**lora_tensors(), f"{P}q_proj.lora_B.weight": ((3,), 1.0)}
    assert measure(tmp_path / "b", "llama.cpp", tensors=tensors, use_rslora=True).value == 1


def test_lorax_skips_what_not_every_layer_has(tmp_path: Path) -> None:
    tensors = {
        n: v for n, v in lora_tensors(layers=4, r=8).items() if "layers.1.self_attn.v" not in n
    }
    found = measure(tmp_path / "a", "lorax", tensors=tensors, r=8)
    [problem] = found.problems
    assert problem.where == "lorax drops"
    assert "model.layers.*.self_attn.v_proj: not in every layer, so skipped in all" in problem.found


def test_lorax_stacks_factors_of_one_rank(tmp_path: Path) -> None:
    found = measure(tmp_path / "a", "lorax", rank_pattern={"layers.0.*": 4}, r=8)
    assert "lorax rejects" in [problem.where for problem in found.problems]


def test_added_tokens_may_be_refused_but_never_fail_the_check(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "added_tokens.json").write_text("{}")
    found = measure(tmp_path / "a", "sglang")
    assert found.value == 0
    assert "sglang may reject: added_tokens.json" in " ".join(found.notes)


def test_shards_suit_neither_vllm_nor_llama_cpp(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", tensors=lora_tensors(r=8), r=8)
    (folder / "adapter_model.safetensors").rename(folder / "s.safetensors")
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(lora_tensors(), "s.safetensors")}))
    found = measure_serving_profile(read_adapter(folder), targets=["vllm", "llama.cpp"])
    assert [problem.where for problem in found.problems] == ["vllm rejects", "llama.cpp rejects"]


def test_rules_are_documented_records() -> None:
    page = Path(__file__).parents[2] / "docs" / "checks" / "serving_profile.md"
    rows = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| `")]
    listed = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if "/" in row]
    assert [(row[0], row[1], row[3], row[4]) for row in listed] == [
        (f"`{rule.id}`", rule.effect, rule.versions, rule.source) for rule in RULES
    ]
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.server in SERVERS
        assert rule.effect in ("rejects", "drops", "scales", "may reject")
        assert rule.versions
        assert rule.source
        assert rule.fix
