"""The whole suite on a model of a given size: what each check takes, and how often a base is read.

    python benchmarks/suite.py --hidden 2048 --layers 16 --dtype bfloat16 --adapters 2

A Llama with random weights and LoRA adapters on all of its linear layers are written to a
temporary folder and judged as anyone's would be, in one run of pytest in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import peft
import torch
import transformers

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COUNTER = """\
import pytest_lora.loading as loading

reads = []
load = loading.load_weights


def counted(spec, adapter=None):
    reads.append(spec)
    return load(spec, adapter)


loading.load_weights = counted


def pytest_unconfigure():
    print(f"the run's own process read a base {len(reads)} times")
"""


def build(folder: Path, options: argparse.Namespace) -> int:
    """Write the base and its adapters; returns the number of parameters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        tie_word_embeddings=True,
    )
    base = transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    base.save_pretrained(folder / "base")
    adapter = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=LINEAR, base_model_name_or_path=str(folder / "base")
    )
    model = peft.get_peft_model(base, adapter)
    for number in range(options.adapters):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-3)
        model.save_pretrained(folder / "adapters" / f"a{number}", save_embedding_layers=False)
    return sum(parameter.numel() for parameter in base.parameters())


def run(folder: Path, options: argparse.Namespace) -> tuple[float, str]:
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text(COUNTER)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--lora-adapter=adapters/*", "--lora-report=report.json"]
    command += [f"--lora-base-model={folder / 'base'}"]
    command += [f"--lora-device={options.device}"] if options.device else []
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapters", type=int, default=1)
    parser.add_argument("--device", help="default: what the suite takes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = build(folder, options)
        wall, printed = run(folder, options)
        results = json.loads((folder / "report.json").read_text())["results"]
    print("\n".join(printed.splitlines()[-3:]))
    print(f"{parameters / 1e6:.0f}M parameters, {options.dtype}, {options.adapters} adapters")
    seconds: dict[str, float] = defaultdict(float)
    for result in results:
        seconds[result["check"]] += result["seconds"] or 0.0
    for check, total in seconds.items():
        print(f"{check:24s} {total / options.adapters:8.2f} s per adapter")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{'all':24s} {wall:8.2f} s, largest process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
