"""Predicted peaks against a CUDA device: 20 training steps.

    python benchmarks/gpu_memory.py --report gpu_memory.json
    python benchmarks/gpu_memory.py --predict-only

Per step, on the device: the peak of allocated bytes of two real steps, less what was allocated
before the model; and, in a second run, live tensor bytes of the same step, so that "hidden" is what
kernels and the allocator take beyond tensors.  "error" is predicted over measured, less one, the
cuBLAS workspaces left out on both sides.  A step that does not fit the device says so.  Without a
CUDA device nothing is measured, and the run ends with a line that says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from pytest_lora.loading import quiet
from pytest_lora.memory.measured import empty_caches, is_out_of_memory
from pytest_lora.memory.predict import make_workload, predict_memory, versions
from pytest_lora.memory.tracing import run_step
from pytest_lora.memory.workload import (
    Workload,
    make_batches,
    make_model,
    make_optimizer,
    training_step,
)

GIB = 1 << 30
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder(kind: str, vocabulary: int, *shape: int, **others: Any) -> Any:
    hidden, inner, layers, heads, groups = shape
    return getattr(transformers, kind)(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=32768,
        **others,
    )


MODELS = {
    "0.5B": lambda: decoder("Qwen2Config", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "7B": lambda: decoder("Qwen2Config", 152064, 3584, 18944, 28, 28, 4),
    "8B": lambda: decoder("LlamaConfig", 128256, 4096, 14336, 32, 32, 8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=16000, n_embd=320, n_layer=8, n_head=8, n_positions=512
    ),
}


@dataclass(frozen=True)
class Step:
    """A training step: a model, its batch, its adapter and what else differs from the plain one."""

    model: str
    batch: int
    sequence: int
    options: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{self.model} {self.batch} x {self.sequence}"]
        if self.adapter is None:
            words.append("full training")
        words += [
            f"{key}={value}" for key, value in {**(self.adapter or {}), **self.options}.items()
        ]
        return ", ".join(words)

    def arguments(self) -> dict[str, Any]:
        """What ``predict_memory`` takes."""
        adapter = None
        if self.adapter is not None:
            targets = ["c_attn", "c_proj", "c_fc"] if self.model == "gpt2" else TARGETS
            options = {"r": 16, "target_modules": targets, "task_type": "CAUSAL_LM", **self.adapter}
            adapter = peft.LoraConfig(**options)
        shape = {"batch": self.batch, "sequence": self.sequence, "dtype": "bfloat16"}
        return {
            "model": MODELS[self.model](),
            "adapter": adapter,
            **shape,
            "padding": "none",
            **self.options,
        }


CHECKPOINTED = {"checkpointing": True}
STEPS = [
    Step("0.5B", 1, 2048),
    Step("0.5B", 4, 512, {"padding": "padded"}),
    Step("0.5B", 1, 2048, CHECKPOINTED),
    Step("0.5B", 1, 2048, {"checkpointing": "reentrant"}, {"lora_dropout": 0.05}),
    Step("0.5B", 1, 2048, {}, {"use_dora": True, "lora_dropout": 0.05}),
    Step("0.5B", 1, 1024, {"attention": "eager"}),
    Step("0.5B", 1, 1024, {"dtype": "float32"}),
    Step("0.5B", 1, 1024, {"dtype": "float16", "adapter_dtype": "float16"}),
    Step("0.5B", 1, 64, {}, None),
    Step("0.5B", 1, 64, {"optimizer": "adamw_fused"}, None),
    Step("0.5B", 1, 64, {"optimizer": "adamw_loop", "clip": 1.0}, None),
    Step("gpt2", 8, 512, {}, {"lora_dropout": 0.1}),
    Step("7B", 1, 2048, CHECKPOINTED),
    Step("8B", 1, 2048, CHECKPOINTED),
    Step("8B", 1, 2048, {"accumulation": 2}),
    Step("8B", 2, 2048, {**CHECKPOINTED, "padding": "padded"}),
    Step("8B", 1, 8192, CHECKPOINTED, {"use_dora": True}),
    Step("0.5B", 1, 1024, {"dtype": "float32", "autocast": "bfloat16"}),
    Step("0.5B", 4, 512, {"autocast": "bfloat16", "padding": "padded"}),
    Step("8B", 1, 2048, {**CHECKPOINTED, "autocast": "bfloat16"}),
]


def workload(step: Step) -> Workload:
    arguments = step.arguments()
    return make_workload(arguments.pop("model"), arguments.pop("adapter"), **arguments)


def measure(step: Step) -> dict[str, Any]:
    """Allocated peak without a counter, then live bytes and attention operators with one."""
    empty_caches()
    warm_up()
    before = torch.cuda.memory_allocated()
    asked = workload(step)
    model = make_model(asked, "cuda")
    batches = [{name: item.cuda() for name, item in batch.items()} for batch in make_batches(asked)]
    optimizer = make_optimizer(asked, model)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        training_step(model, optimizer, batches, asked.clip, asked.autocast)
    torch.cuda.synchronize()
    found: dict[str, Any] = {
        "allocated": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved(),
    }
    del model, batches, optimizer
    empty_caches()
    counter = run_step(asked, "cuda", timeline=True)
    operators = Counter(moment.op for moment in counter.timeline or () if "attention" in moment.op)
    return {**found, "live": counter.peak.live, "live_op": counter.peak.op, "attention": operators}


def warm_up() -> int:
    """Bytes of the cuBLAS workspaces that one forward and backward pass leaves."""
    before = torch.cuda.memory_allocated()
    layer = torch.nn.Linear(768, 768, device="cuda", dtype=torch.bfloat16)
    layer(torch.randn(8, 768, device="cuda", dtype=torch.bfloat16)).sum().backward()
    del layer
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="h100-80gb", help="the card's profile")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of steps, from 0")
    parser.add_argument("--predict-only", action="store_true", help="needs no GPU")
    parser.add_argument("--report", type=Path, help="write all numbers to this JSON file")
    return parser.parse_args()


def row(number: int, step: Step, options: argparse.Namespace) -> dict[str, Any]:
    arguments = step.arguments()
    model, adapter = arguments.pop("model"), arguments.pop("adapter")
    predicted = predict_memory(model, adapter, profile=options.profile, **arguments)
    found: dict[str, Any] = {"number": number, "step": str(step), "predicted": predicted.to_dict()}
    if options.predict_only:
        return found
    try:
        return {**found, **measure(step)}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {**found, "error": "does not fit this device"}


def shown(found: dict[str, Any]) -> str:
    predicted = found["predicted"]
    text = f"| {found['number']} | {found['step']} | {predicted['allocated'] / GIB:.3f} |"
    if "allocated" not in found:
        return f"{text} {found.get('error', '')} |"
    allocated, live = found["allocated"], found["live"]
    kernels = ", ".join(f"{name} x{count}" for name, count in predicted["kernels"].items())
    ran = ", ".join(f"{name} x{count}" for name, count in found["attention"].items())
    return (
        f"{text} {allocated / GIB:.3f} | {predicted['allocated'] / allocated - 1:+.2%} "
        f"| {live / GIB:.3f} | {(allocated - live) / 2**20:.0f} "
        f"| {predicted['reserved'] / found['reserved'] - 1:+.1%} | {kernels} | {ran} |"
    )


def main() -> None:
    options = parse()
    warnings.simplefilter("ignore")
    if not options.predict_only and not torch.cuda.is_available():
        print("no CUDA device: nothing measured; --predict-only prints the predictions")
        sys.exit(0)
    if options.predict_only:
        print("| # | step | predicted, GiB | |\n| --: | --- | --: | --- |")
    else:
        card = torch.cuda.get_device_properties(0)
        print(f"{card.name}, compute capability {card.major}.{card.minor}, {versions()}")
        print(f"cuDNN {torch.backends.cudnn.version()}, cuBLAS workspaces {warm_up():,} bytes\n")
        print(
            "| # | step | predicted, GiB | measured, GiB | error | live, GiB | hidden, MiB", end=""
        )
        print(" | reserved, error | kernels predicted | kernels run |")
        print("| --: | --- | --: | --: | --: | --: | --: | --: | --- | --- |")
    rows = []
    for number, step in enumerate(STEPS):
        if options.only and number not in options.only:
            continue
        with quiet():
            rows.append(row(number, step, options))
        print(shown(rows[-1]), flush=True)
        if options.report:
            options.report.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
