"""Writes small adapter folders with nothing but the standard library."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tensors = Mapping[str, tuple[tuple[int, ...], float]]
"""Shape and fill value by key; all float32."""

HIDDEN = 6


def write_safetensors(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (shape, value) in tensors.items():
        count = 1
        for side in shape:
            count *= side
        data = struct.pack(f"<{count}f", *[value] * count)
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def lora_tensors(*, layers: int = 2, r: int = 2) -> dict[str, tuple[tuple[int, ...], float]]:
    tensors: dict[str, tuple[tuple[int, ...], float]] = {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = ((r, HIDDEN), 0.5)
            tensors[f"{stem}.lora_B.weight"] = ((HIDDEN, r), 0.25)
    return tensors


def lora_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "nowhere/base",
        "revision": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    return {**config, **changes}


def write_adapter(folder: Path, *, tensors: Tensors | None = None, **config: Any) -> Path:
    """A sound LoRA adapter (r=2 on q_proj and v_proj of two layers) unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(lora_config(**config)))
    write_safetensors(
        folder / "adapter_model.safetensors", lora_tensors() if tensors is None else tensors
    )
    return folder
