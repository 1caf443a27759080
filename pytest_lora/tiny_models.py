"""Tiny models of several families, built in code from a seed: nothing is downloaded or read.

Small enough for hundreds of them a minute, and awkward on purpose: no adapted weight is square
unless the architecture says so, key and value heads are fewer than query heads, embeddings are tied
where the family ties them, convolutions come in groups, and weights are spread widely enough that
every module shows in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pytest_lora.errors import UsageError
from pytest_lora.loading import quiet

__all__ = ["FAMILIES", "Cnn", "adaptable_modules", "build_model", "model_inputs"]

_TOKENS = 48
_DECODER = {
    "vocab_size": _TOKENS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


class Cnn(nn.Module):
    """A plain and a grouped convolution, a batch norm (buffers that train), a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) to (batch, 5); height and width at least 3."""
        hidden = self.grouped(self.norm(self.stem(x)).relu()).relu()
        scores: torch.Tensor = self.head(hidden.mean((2, 3)))
        return scores


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=False))


def _qwen2() -> Any:
    """Biases on query, key and value only; tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_DECODER, tie_word_embeddings=True))


def _gpt2() -> Any:
    """Linear layers stored as (in, out): ``Conv1D``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_TOKENS,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config)


def _gemma() -> Any:
    """Embeddings scaled by the root of the width and tied to the head."""
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_DECODER, head_dim=6, tie_word_embeddings=True))


def _bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=_TOKENS,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return BertForMaskedLM(config)


def _opt() -> Any:
    """Embeddings narrower than the model, with projections in between."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=_TOKENS,
        hidden_size=24,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        ffn_dim=40,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.2,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    return OPTForCausalLM(config)


def _t5() -> Any:
    """Encoder and decoder, no biases, relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=_TOKENS,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def _mixtral() -> Any:
    """A mixture of four experts, their weights fused into parameters since transformers 5."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            **_DECODER, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
        )
    )


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
    "gemma": _gemma,
    "bert": _bert,
    "opt": _opt,
    "t5": _t5,
    "mixtral": _mixtral,
    "cnn": Cnn,
}


def build_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of ``family`` with random weights drawn from ``seed``, in eval mode.

    The random state of the process is left as it was.

    Raises:
        UsageError: there is no such family.
    """
    if family not in FAMILIES:
        raise UsageError(f"no tiny model {family!r}; there are {', '.join(FAMILIES)}")
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        model: nn.Module = FAMILIES[family]()
    return model.to(dtype).eval()


def adaptable_modules(model: nn.Module) -> dict[str, str]:
    """Modules that LoRA can adapt, by full name: ``linear``, ``conv1d``, ``convolution`` or
    ``embedding``.

    The head and the input embedding are left out where they share a weight.
    """
    kinds = {
        name: kind for name, module in model.named_modules() if (kind := _kind_of(module)) and name
    }
    weights: dict[int, list[str]] = {}
    for name in kinds:
        weights.setdefault(id(model.get_submodule(name).weight), []).append(name)
    shared = {name for names in weights.values() if len(names) > 1 for name in names}
    return {name: kind for name, kind in kinds.items() if name not in shared}


def _kind_of(module: nn.Module) -> str:
    if type(module).__name__ == "Conv1D":
        return "conv1d"
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.Conv2d:
        return "convolution"
    return "embedding" if type(module) is nn.Embedding else ""


def model_inputs(model: nn.Module, *, seed: int = 0, rows: int = 2) -> dict[str, torch.Tensor]:
    """Inputs the model takes, of ``rows`` rows, drawn from ``seed``: images, or 7 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = getattr(model, "config", None)
    if config is None:
        dtype = next(model.parameters()).dtype
        return {"x": torch.randn(rows, 3, 5, 6, generator=generator).to(dtype)}
    tokens = torch.randint(3, config.vocab_size, (rows, 7), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens[:, :5]
    return inputs
