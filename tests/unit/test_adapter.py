from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from adapter_maker import lora_tensors, write_adapter, write_safetensors
from raw_safetensors import one, write

from pytest_lora.adapter import (
    Adapter,
    LoraModule,
    lora_modules,
    pattern_names,
    read_adapter,
    split_key,
)
from pytest_lora.locate import AdapterLocation

SHARED = Path(__file__).parents[3] / "shared" / "data" / "adapters"
Q0 = "model.layers.0.self_attn.q_proj"


def modules(folder: Path, **config: Any) -> dict[str, LoraModule]:
    tensors = config.pop("tensors", None)
    adapter = read_adapter(write_adapter(folder, tensors=tensors, **config))
    return {module.name: module for module in lora_modules(adapter)}


def test_a_sound_adapter_is_read(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "sound"))
    assert adapter.problems == ()
    assert adapter.path == tmp_path / "sound"
    assert adapter.weights_files == (tmp_path / "sound" / "adapter_model.safetensors",)
    assert adapter.metadata == {"format": "pt"}
    assert len(adapter.tensors) == 8
    assert (adapter.peft_type, adapter.task_type, adapter.bias) == ("LORA", "CAUSAL_LM", "none")
    assert (adapter.r, adapter.lora_alpha, adapter.base_model) == (2, 8.0, "nowhere/base")
    assert (adapter.revision, adapter.peft_version) == (None, None)
    assert (adapter.use_dora, adapter.use_rslora) == (False, False)
    assert adapter.target_modules == ("q_proj", "v_proj")
    assert adapter.modules_to_save == ()


def test_a_location_keeps_its_name(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x")
    adapter = read_adapter(AdapterLocation(folder, None, "mine"))
    assert adapter.name == "mine"
    assert (
        read_adapter(str(folder)).name
        == folder.as_posix().removeprefix("/").split("/", 0)[0][-len(read_adapter(folder).name) :]
    )


@pytest.mark.parametrize(
    "config",
    [
        {"r": "8", "lora_alpha": None, "target_modules": 3, "rank_pattern": [], "bias": 1},
        {"r": True, "lora_alpha": True, "target_modules": [1], "modules_to_save": {}},
        {"r": -1, "lora_alpha": 10**400, "peft_type": 7, "alpha_pattern": {"q_proj": "x"}},
        {"r": 2.0, "lora_alpha": "x", "peft_type": None, "task_type": 3, "revision": 1},
    ],
)
def test_odd_values_never_raise(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path / "odd")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    adapter = read_adapter(folder)
    assert adapter.r == 0
    assert math.isnan(adapter.lora_alpha)
    assert isinstance(adapter.rank_pattern, dict)
    assert all(math.isnan(m.scaling) for m in lora_modules(adapter))
    assert adapter.names("target_modules") in ((), ("q_proj", "v_proj"))


def test_what_is_missing_takes_pefts_default_only_where_there_is_a_configuration(
    tmp_path: Path,
) -> None:
    folder = write_adapter(tmp_path / "x")
    (folder / "adapter_config.json").write_text('{"peft_type": "lora"}')
    adapter = read_adapter(folder)
    assert (adapter.peft_type, adapter.r, adapter.lora_alpha) == ("LORA", 8, 8.0)
    (folder / "adapter_config.json").unlink()
    adapter = read_adapter(folder)
    assert adapter.r == 0
    assert math.isnan(adapter.lora_alpha)
    assert [problem.where for problem in adapter.problems] == ["adapter_config.json"]
    assert lora_modules(adapter) == ()


def test_broken_content_is_collected_not_raised(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "broken")
    (folder / "adapter_config.json").write_text('{"r": NaN}')
    (folder / "adapter_model.safetensors").write_text("junk")
    adapter = read_adapter(folder)
    assert [problem.where for problem in adapter.problems] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (dict(adapter.config), dict(adapter.tensors)) == ({}, {})
    nowhere = read_adapter(tmp_path / "nowhere")
    assert next(str(p) for p in nowhere.problems).startswith("adapter_config.json: missing")


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x")
    (folder / "adapter_model.safetensors").unlink()
    names = {}
    for number, name in enumerate(lora_tensors()):
        shard = f"adapter_model-{number}.safetensors"
        write_safetensors(folder / shard, {name: lora_tensors()[name]})
        names[name] = shard
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    adapter = read_adapter(folder)
    assert adapter.problems == ()
    assert set(adapter.tensors) == set(lora_tensors())
    assert len(adapter.weights_files) == 8


def test_a_named_weights_file_is_read_in_place_of_the_usual(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x")
    write(folder / "other.safetensors", [one("a")])
    location = AdapterLocation.at(folder / "other.safetensors", start=tmp_path)
    assert list(read_adapter(location).tensors) == ["a"]
    (folder / "other.bin").write_text("x")
    location = AdapterLocation.at(folder / "other.bin", start=tmp_path)
    assert (read_adapter(location).tensors, read_adapter(location).problems) == ({}, ())


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        (f"base_model.model.{Q0}.lora_A.weight", (Q0, "lora_A.weight")),
        (f"base_model.model.{Q0}.lora_B.bias", (Q0, "lora_B.bias")),
        ("base_model.model.embed.lora_embedding_A", ("embed", "lora_embedding_A")),
        (f"base_model.model.{Q0}.lora_magnitude_vector", (Q0, "lora_magnitude_vector")),
        (f"{Q0}.lora_A.weight", (Q0, "lora_A.weight")),
        ("base_model.model.lm_head.weight", ("lm_head.weight", "")),
        (f"base_model.model.{Q0}.lora_A.default.weight", (f"{Q0}.lora_A.default.weight", "")),
    ],
)
def test_keys_are_taken_apart(key: str, parts: tuple[str, str]) -> None:
    assert split_key(key) == parts


def test_scaling_is_alpha_over_rank_or_its_root(tmp_path: Path) -> None:
    assert {m.scaling for m in modules(tmp_path / "a").values()} == {4.0}
    found = modules(tmp_path / "b", use_rslora=True, r=9, lora_alpha=6)
    assert {m.scaling for m in found.values()} == {2.0}
    assert {m.rslora for m in found.values()} == {True}


def test_patterns_override_rank_and_alpha_by_module(tmp_path: Path) -> None:
    found = modules(
        tmp_path / "a",
        rank_pattern={"layers.1.self_attn.q_proj": 16, "q_proj": 4},
        alpha_pattern={"v_proj": 1, ".*": 2},
    )
    ranks = {name: (m.rank, m.alpha) for name, m in found.items()}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": (4, 2),
        "model.layers.0.self_attn.v_proj": (2, 1),
        "model.layers.1.self_attn.q_proj": (16, 2),
        "model.layers.1.self_attn.v_proj": (2, 1),
    }


def test_kinds_follow_from_names_and_shapes(tmp_path: Path) -> None:
    prefix = "base_model.model."
    tensors = {
        f"{prefix}fc.lora_A.weight": ((2, 6), 1.0),
        f"{prefix}fc.lora_B.weight": ((6, 2), 1.0),
        f"{prefix}fc.lora_magnitude_vector": ((6,), 1.0),
        f"{prefix}fc.lora_B.bias": ((6,), 1.0),
        f"{prefix}conv.lora_B.weight": ((6, 2, 1), 1.0),
        f"{prefix}embed.lora_embedding_A": ((2, 9), 1.0),
        f"{prefix}embed.lora_embedding_B": ((6, 2), 1.0),
        f"{prefix}lost.lora_magnitude_vector": ((6,), 1.0),
        f"{prefix}head.weight": ((2, 6), 1.0),
    }
    found = modules(tmp_path / "a", tensors=tensors)
    kinds = {name: module.kind for name, module in found.items()}
    assert kinds == {"fc": "linear", "conv": "conv", "embed": "embedding", "lost": "linear"}
    fc = found["fc"]
    assert fc.a
    assert fc.b
    assert fc.magnitude
    assert fc.bias
    assert found["conv"].a is None


def test_an_attention_block_wrapped_whole_hands_its_rank_on(tmp_path: Path) -> None:
    """PEFT saves the projection inside ``nn.MultiheadAttention`` under ``base_layer``."""
    pairs = ("mha", "mha.base_layer.out_proj")
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": ((3, 3), 1.0)
        for name in pairs
        for factor in "AB"
    }
    found = modules(
        tmp_path / "a", tensors=tensors, target_modules=["mha"], rank_pattern={"mha": 3}
    )
    assert {name: m.rank for name, m in found.items()} == {"mha": 3, "mha.out_proj": 3}
    assert found["mha.out_proj"].path == "mha.base_layer.out_proj"


def experts(tmp_path: Path, name: str, **config: Any) -> list[LoraModule]:
    paths = ("layers.0.experts", "layers.0.experts.base_layer")
    tensors = {
        f"base_model.model.{path}.lora_{factor}.weight": ((8, 8), 1.0)
        for path in paths
        for factor in "AB"
    }
    return list(modules(tmp_path / name, tensors=tensors, **config).values())


def test_fused_parameters_look_their_rank_up_by_parameter(tmp_path: Path) -> None:
    both = {"target_modules": ["q_proj"], "target_parameters": ["experts.up", "experts.down"]}
    assert {m.kind for m in experts(tmp_path, "plain", **both)} == {"parameter"}
    assert {m.rank for m in experts(tmp_path, "plain", **both)} == {2}
    undecided = experts(tmp_path, "undecided", rank_pattern={"experts.up": 4}, **both)
    assert {m.rank for m in undecided} == {0}
    assert all(math.isnan(m.scaling) for m in undecided)
    bare = experts(
        tmp_path, "bare", target_modules=None, target_parameters=["up"], rank_pattern={"up": 4}
    )
    assert {(m.kind, m.rank) for m in bare} == {("parameter", 4)}
    elsewhere = experts(
        tmp_path, "elsewhere", target_modules=None, target_parameters=["x.up", "experts.up"]
    )
    assert {(m.kind, m.rank) for m in elsewhere} == {("parameter", 2)}
    listed = experts(tmp_path, "listed", target_modules=["experts"], target_parameters=["x.up"])
    assert listed[0].kind == "linear"
    broken = experts(tmp_path, "broken", target_modules="(", target_parameters=["experts.up"])
    assert broken[0].kind == "parameter"
    adapter = read_adapter(tmp_path / "plain")
    assert pattern_names(adapter, "layers.0.experts.base_layer", "parameter") == [
        "layers.0.experts.up",
        "layers.0.experts.down",
    ]


def test_other_methods_have_no_lora_modules(tmp_path: Path) -> None:
    assert modules(tmp_path / "a", peft_type="ADALORA") == {}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real adapters are not here")
def test_real_adapters_are_read() -> None:
    found: dict[str, Adapter] = {path.name: read_adapter(path) for path in SHARED.iterdir()}
    assert {name: len(adapter.tensors) for name, adapter in found.items()} == {
        "distilbert-sdtrklse": 0,
        "gpt2-deepbiolab": 73,
        "gpt2-gurvineet-2bd9-checkpoint-0": 72,
        "gpt2-gurvineet-75f7-checkpoint-best": 73,
        "gpt2-gurvineet-e3f8-best": 73,
        "gpt2-josasa-lfs-pointer": 0,
        "gpt2-tigrinya-v1": 72,
        "gpt2-tigrinya-v2": 72,
    }
    assert all(adapter.problems == () for adapter in found.values())
    assert {m.scaling for m in lora_modules(found["gpt2-tigrinya-v1"])} == {4.0}
