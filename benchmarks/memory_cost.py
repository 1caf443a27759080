"""What a prediction costs: CPU seconds and memory for models of 8 and 70 billion parameters.

    python benchmarks/memory_cost.py

One process per row, so that the memory is the row's own; imports are timed apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

SHAPES = {
    "0.5B": ("Qwen2Config", 151936, 896, 4864, 24, 14, 2),
    "8B": ("LlamaConfig", 128256, 4096, 14336, 32, 32, 8),
    "70B": ("LlamaConfig", 128256, 8192, 28672, 80, 64, 8),
}
WAYS: tuple[tuple[str, str, list[str]], ...] = (
    ("plain", "whole", []),
    ("checkpointed", "whole", ["--checkpointing"]),
    ("plain", "three depths", ["--extrapolate"]),
)
JOBS: tuple[tuple[str, str, list[str]], ...] = (
    ("load", "whole", ["--job", "load"]),
    ("merge", "whole", ["--job", "merge"]),
    ("one forward pass", "whole", ["--job", "inference"]),
    ("prompt and 16 tokens", "whole", ["--job", "inference", "--new-tokens", "16"]),
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(name: str) -> Any:
    import transformers

    kind, vocabulary, hidden, inner, layers, heads, groups = SHAPES[name]
    return getattr(transformers, kind)(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )


def child(options: argparse.Namespace) -> None:
    started = time.process_time()
    import peft
    import torch

    from pytest_lora.memory.predict import predict_memory

    torch.set_num_threads(1)
    model = config(options.model)
    adapter = peft.LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    loaded = time.process_time() - started
    found = predict_memory(
        model,
        adapter,
        batch=1,
        sequence=2048,
        padding="none",
        job=options.job,
        new_tokens=options.new_tokens,
        checkpointing=options.checkpointing,
        extrapolate=options.extrapolate,
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {"imports": loaded, "seconds": found.seconds, "memory": memory, "peak": found.peak.live}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--extrapolate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--job", default="train_step", help=argparse.SUPPRESS)
    parser.add_argument("--new-tokens", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        child(options)
        return
    print("| model | step | traced | peak, GiB | CPU s | imports, CPU s | process, GiB |")
    print("| --- | --- | --- | --: | --: | --: | --: |")
    rows = [(model, *way) for model in SHAPES for way in WAYS]
    rows += [("8B", *way) for way in JOBS]
    for model, step, how, flags in rows:
        command = [sys.executable, "-W", "ignore", __file__, "--model", model, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {model} | {step} | {how} | {row['peak'] / 2**30:.2f} | {row['seconds']:.1f} "
            f"| {row['imports']:.1f} | {row['memory'] / 2**30:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
