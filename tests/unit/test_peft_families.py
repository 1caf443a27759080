"""What the installed PEFT writes passes the file checks, and its scalings are ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from torch import nn

from pytest_lora.adapter import lora_modules, read_adapter
from pytest_lora.checks.config import measure_config_matches_weights
from pytest_lora.checks.files import measure_adapter_files, measure_finite_weights
from pytest_lora.checks.serving import measure_serving_profile


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.v_proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.q_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.self_attn = Attention()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.self_attn(self.norm(x)))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.score = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.model(x))


def supported(since: str) -> bool:
    major, minor = peft.__version__.split(".")[:2]
    return (int(major), int(minor)) >= tuple(int(part) for part in since.split("."))


TARGETS = ["q_proj", "v_proj"]
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "convolution and embedding": {"target_modules": [*TARGETS, "conv", "embed_tokens"]},
    "all biases": {"bias": "all"},
    "biases of the adapted": {"bias": "lora_only"},
    "saved modules": {"modules_to_save": ["score", "norm"]},
    "a pattern": {"target_modules": r".*\.(q|v)_proj"},
    "some layers": {"layers_to_transform": [1, 3]},
    "one layer": {"layers_to_transform": 2, "layers_pattern": "layers"},
    "full paths": {"target_modules": ["layers.1.self_attn.q_proj", "layers.2.self_attn.v_proj"]},
}
NEWER: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora with patterns": (
        "0.14",
        {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 5},
            "alpha_pattern": {r".*\.[02]\.self_attn\.q_proj": 6.5},
        },
    ),
    "bias of B": ("0.14", {"lora_bias": True}),
    "without a layer": ("0.14", {"exclude_modules": r".*layers\.1\..*"}),
    "token rows": ("0.15", {"trainable_token_indices": {"embed_tokens": [1, 5, 7]}}),
    "parameters": ("0.17", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
}


def save(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # PEFT advises on some of these settings; what it writes is what matters here.
        warnings.simplefilter("ignore")
        peft.get_peft_model(Model(), config).save_pretrained(folder)
    return folder


def complaints(folder: Path) -> list[str]:
    # PEFT records this very module as the model's library, which the file check rightly refuses.
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))
    adapter = read_adapter(folder)
    measured = [
        measure_adapter_files(adapter),
        measure_config_matches_weights(adapter),
        measure_finite_weights(adapter),
        measure_serving_profile(adapter),
    ]
    return [str(problem) for found in measured for problem in found.problems]


@pytest.mark.parametrize("name", [*LORA, *NEWER])
def test_what_peft_saves_as_lora_is_sound_and_scaled_alike(tmp_path: Path, name: str) -> None:
    since, options = NEWER[name] if name in NEWER else ("0.13", LORA[name])
    if not supported(since):
        pytest.skip(f"PEFT {since} brought this")
    config = peft.LoraConfig(r=4, lora_alpha=10, **{"target_modules": TARGETS, **options})
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        model = peft.get_peft_model(Model(), config)
        model.save_pretrained(tmp_path)
    assert complaints(tmp_path) == []
    theirs = {
        module_name.removeprefix("base_model.model."): module.scaling["default"]
        for module_name, module in model.named_modules()
        if getattr(module, "scaling", None)
    }
    ours = {module.name: module.scaling for module in lora_modules(read_adapter(tmp_path))}
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_a_chosen_layer_without_tensors_is_told(tmp_path: Path) -> None:
    chosen = {"layers_to_transform": [1, 2], "layers_pattern": "layers"}
    folder = save(tmp_path, peft.LoraConfig(target_modules=TARGETS, **chosen))
    path = folder / "adapter_config.json"
    path.write_text(
        path.read_text().replace('"layers_to_transform": [', '"layers_to_transform": [0,')
    )
    assert "no tensor is of layer 0" in " ".join(complaints(folder))


METHODS: dict[str, dict[str, Any]] = {
    "IA3Config": {"target_modules": TARGETS, "feedforward_modules": []},
    "LoHaConfig": {"target_modules": TARGETS, "r": 4, "rank_pattern": {"q_proj": 2}},
    "LoKrConfig": {"target_modules": TARGETS, "r": 4},
    "OFTConfig": {
        "target_modules": TARGETS,
        "r": 4,
        **({"oft_block_size": 0} if supported("0.14") else {}),
    },
    "BOFTConfig": {"target_modules": TARGETS, "boft_block_size": 4},
    "VeraConfig": {"target_modules": TARGETS, "r": 4},
    "HRAConfig": {"target_modules": TARGETS, "r": 4},
    "FourierFTConfig": {"target_modules": TARGETS, "n_frequency": 8},
    "VBLoRAConfig": {"target_modules": TARGETS, "r": 2, "num_vectors": 8, "vector_length": 4},
    "LNTuningConfig": {"target_modules": ["norm"]},
    "AdaLoraConfig": {"target_modules": TARGETS, "init_r": 4, "target_r": 2, "total_step": 9},
    "MissConfig": {"target_modules": TARGETS, "r": 4},
    "RandLoraConfig": {"target_modules": TARGETS, "r": 4},
    "C3AConfig": {"target_modules": TARGETS, "block_size": 8},
    "RoadConfig": {"target_modules": TARGETS, "group_size": 8},
    "DeloraConfig": {"target_modules": TARGETS, "r": 4},
    "TrainableTokensConfig": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
}


@pytest.mark.parametrize("name", METHODS)
def test_what_peft_saves_for_other_methods_is_sound(tmp_path: Path, name: str) -> None:
    if not hasattr(peft, name):
        pytest.skip("not in this PEFT")
    folder = save(tmp_path, getattr(peft, name)(**METHODS[name]))
    assert complaints(folder) == []
