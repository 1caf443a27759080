"""Tiny models built in code, and adapters for them saved by PEFT itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers

from pytest_lora.adapter import Adapter, read_adapter
from pytest_lora.loading import quiet

if TYPE_CHECKING:
    from pathlib import Path


PEFT = tuple(int(part) for part in peft.__version__.split(".")[:2])
"""Version of the installed PEFT."""


def llama(**changes: Any) -> transformers.PreTrainedModel:
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        **changes,
    }
    return _build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**options))


def gpt2(**changes: Any) -> transformers.PreTrainedModel:
    options = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
               "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}  # fmt: skip
    return _build(transformers.GPT2LMHeadModel, transformers.GPT2Config(**{**options, **changes}))


def bert(**changes: Any) -> transformers.PreTrainedModel:
    options = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
               "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2,
               "max_position_embeddings": 64, **changes}  # fmt: skip
    return _build(transformers.BertForMaskedLM, transformers.BertConfig(**options))


def t5(**changes: Any) -> transformers.PreTrainedModel:
    options = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
               "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
    return _build(
        transformers.T5ForConditionalGeneration, transformers.T5Config(**{**options, **changes})
    )


class Cnn(torch.nn.Module):
    """A convolution, a batch norm (buffers), a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(self.conv(x)).relu().mean((2, 3))
        result: torch.Tensor = self.head(hidden)
        return result


def cnn() -> Cnn:
    torch.manual_seed(0)
    return Cnn().eval()


def image() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))}


def _build(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    with quiet():
        return cls(config).eval()


def save_base(model: Any, path: Path, **options: Any) -> Path:
    with quiet():
        model.save_pretrained(path, **options)
    return path


def save_adapter(model: Any, path: Path, **changes: Any) -> Adapter:
    """An adapter on ``model`` (which gets wrapped) with every tensor filled, none of them zero.

    ``cls`` names the configuration class.  Skips the test where this PEFT has no such class or key.
    """
    name = changes.pop("cls", "LoraConfig")
    cls = getattr(peft, name, None)
    if cls is None or not set(changes) <= {field.name for field in dataclasses.fields(cls)}:
        pytest.skip(f"PEFT {peft.__version__} has no {name} with {sorted(changes)}")
    options: dict[str, Any] = {}
    if name == "LoraConfig":
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    wrapped = wrap(model, cls(**{**options, **changes}))
    fill(wrapped)
    with quiet():
        wrapped.save_pretrained(path)
    return read_adapter(path)


def wrap(model: Any, config: Any, **options: Any) -> Any:
    """``get_peft_model`` without what it makes transformers deprecate."""
    with quiet():
        return peft.get_peft_model(model, config, **options)


def fill(model: torch.nn.Module, scale: float = 0.1, seed: int = 7) -> None:
    """Move every trainable tensor away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((scale * noise).to(parameter.dtype))


def rewrite_config(adapter: Adapter, **changes: Any) -> Adapter:
    """The adapter with other entries in its configuration; None removes one."""
    import json

    file = adapter.path / "adapter_config.json"
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return read_adapter(adapter.path)


def rewrite_weights(adapter: Adapter, change: Any) -> Adapter:
    """The adapter with ``change(tensors)`` for its tensors."""
    from safetensors.torch import load_file, save_file

    file = adapter.path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})
    return read_adapter(adapter.path)
