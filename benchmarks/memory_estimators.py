"""Predicted peaks beside what accelerate estimates for the same models.

    python benchmarks/memory_estimators.py

accelerate's ``estimate-memory`` knows a model's parameters and multiplies them: once for loading,
four times for training with Adam.  It is asked here with the functions its command calls, on the
same configuration, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import peft
import torch
import transformers
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes

from pytest_lora.loading import quiet
from pytest_lora.memory.predict import predict_memory

GIB = 1 << 30
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("LoRA on q and v", {"target_modules": ["q_proj", "v_proj"]}, {}),
    ("LoRA", {}, {}),
    ("LoRA, adapter in bfloat16", {}, {"adapter_dtype": "bfloat16"}),
    ("LoRA, padded batch", {}, {"padding": "padded"}),
    ("LoRA, dropout", {"lora_dropout": 0.05}, {}),
    ("LoRA, eager attention", {}, {"attention": "eager"}),
    ("LoRA, 2 rows", {}, {"batch": 2}),
    ("LoRA, checkpointed", {}, {"checkpointing": True}),
    ("DoRA", {"use_dora": True}, {}),
    ("QLoRA, checkpointed", {}, {"checkpointing": True, "quantisation": "nf4"}),
    ("LoRA, autocast", {}, {"autocast": "bfloat16"}),
    ("LoRA, base in float32", {}, {"dtype": "float32"}),
    ("LoRA, base in float32, autocast", {}, {"dtype": "float32", "autocast": "bfloat16"}),
    (
        "QLoRA, checkpointed, autocast",
        {},
        {"checkpointing": True, "quantisation": "nf4", "autocast": "bfloat16"},
    ),
)


def llama() -> Any:
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


def accelerate_says() -> tuple[float, float]:
    """GiB for loading in bfloat16, and for training with Adam."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(llama(), dtype=torch.float32)
    total, _ = calculate_maximum_sizes(model)
    stages = estimate_training_usage(total, "float16")
    return total / 2 / GIB, max(stages.values()) / GIB


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    warnings.simplefilter("ignore")
    with quiet():
        loading, training = accelerate_says()
        print(f"accelerate: {loading:.1f} GiB to load, {training:.1f} GiB to train\n")
        print("| Llama-3-8B, bfloat16, 1 x 2048 tokens, r=16 | predicted, GiB | at the peak |")
        print("| --- | --: | --- |")
        for name, changes, options in WAYS:
            options = {"batch": 1, "sequence": 2048, "padding": "none", **options}
            settings = {"r": 16, "target_modules": EVERY, "task_type": "CAUSAL_LM", **changes}
            found = predict_memory(llama(), peft.LoraConfig(**settings), **options)
            largest = sorted(found.peak.by_category.items(), key=lambda item: -item[1])[:3]
            parts = ", ".join(f"{key} {size / GIB:.1f}" for key, size in largest)
            print(f"| {name} | {found.predicted / GIB:.1f} | {parts} |", flush=True)


if __name__ == "__main__":
    main()
