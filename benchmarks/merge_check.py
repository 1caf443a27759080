"""The merge check against the usual way to test a merge: time and peak memory, side by side.

    python benchmarks/merge_check.py --dtype bfloat16 --repeat 3

Both sides work on the same Llama of over 100M parameters, built in code, with a LoRA adapter on all
linear layers; each runs in processes of its own, so that peak memory is its own.

* usual: deep copy, forward, merge, forward, unmerge, forward, compare with ``allclose``;
* ours: ``measure_merge_equivalence``, which judges every weight against its rounding bound, every
  layer's output, and the whole model against a wider reference;
* ours and unmerge: the same and ``measure_unmerge_restoration`` with one cycle.

PEFT's merge of the whole model, in place, is timed alone for scale.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from pytest_lora.checks.merge import measure_merge_equivalence, measure_unmerge_restoration

SIDES = ("usual", "ours", "ours and unmerge", "merge alone")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Case:
    """What the merge checks need of a subject."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.base = model, model.get_base_model()
        generator = torch.Generator().manual_seed(0)
        self.inputs = {"input_ids": torch.randint(3, 1000, (2, tokens), generator=generator)}

    def output(self) -> torch.Tensor:
        """Logits of the adapted model."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(**self.inputs).logits
        return logits

    def base_output(self) -> torch.Tensor:
        """Logits of the base model."""
        with self.model.disable_adapter():
            return self.output()


def build(dtype: torch.dtype, hidden: int, layers: int, tokens: int, dora: bool) -> Case:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    base = transformers.LlamaForCausalLM(config).to(dtype).eval()
    adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, use_dora=dora)
    model = peft.get_peft_model(base, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    return Case(model.eval(), tokens)


def usual(case: Case) -> dict[str, Any]:
    """What tests of a merge do, on a copy so that the model survives."""
    model, kept = case.model, case.model
    case.model = copy.deepcopy(model)
    try:
        before = case.output()
        case.model.merge_adapter()
        merged = case.output()
        case.model.unmerge_adapter()
        after = case.output()
    finally:
        case.model = kept
    return {"close": torch.allclose(before, merged), "back": torch.allclose(before, after)}


def ours(case: Case) -> dict[str, Any]:
    measured = measure_merge_equivalence(case)  # type: ignore[arg-type]
    return {"value": measured.value, "elements": measured.details["elements"]}


def ours_and_unmerge(case: Case) -> dict[str, Any]:
    returned = measure_unmerge_restoration(case, cycles=1)  # type: ignore[arg-type]
    return {**ours(case), "back": returned.value}


def merge_alone(case: Case) -> dict[str, Any]:
    case.model.merge_adapter()
    return {}


def peak() -> int:
    """The largest resident set since :func:`forget_peak`, in bytes."""
    line = next(row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Start measuring the peak anew; returns the resident set now."""
    CLEAR.write_text("5")
    return peak()


def run_side(side: str, case: Case) -> dict[str, Any]:
    run = {"usual": usual, "ours": ours, "ours and unmerge": ours_and_unmerge}
    start = forget_peak()
    wall, work = time.perf_counter(), time.process_time()
    result = run.get(side, merge_alone)(case)
    seconds = time.perf_counter() - wall
    return {
        "seconds": seconds,
        "cpu": time.process_time() - work,
        "extra": peak() - start,
        "result": result,
    }


def child(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    case = build(dtype, options.hidden, options.layers, options.tokens, options.dora)
    case.output()  # libraries make their plans on the first forward
    size = sum(p.numel() * p.element_size() for p in case.base.parameters())
    largest = max(p.numel() * p.element_size() for p in case.base.parameters())
    count = sum(p.numel() for p in case.base.parameters())
    facts = {"size": size, "largest": largest, "parameters": count}
    print(json.dumps(facts | run_side(options.side, case)))


def measure(side: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.side:
        child(options)
        return
    arguments = sys.argv[1:]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.repeat):  # in turn, so that a busy machine hits all sides alike
        for side in SIDES:
            runs[side].append(measure(side, arguments))
    first = runs["ours"][0]
    mib = 2**20
    print(
        f"{first['parameters'] / 1e6:.0f}M parameters, {options.dtype}, "
        f"{first['size'] / mib:.0f} MiB, largest weight {first['largest'] / mib:.0f} MiB, "
        f"2 x {options.tokens} tokens{', DoRA' if options.dora else ''}"
    )
    base = {key: median(runs["usual"], key) for key in ("seconds", "cpu", "extra")}
    for side in SIDES:
        seconds, cpu, extra = (median(runs[side], key) for key in base)
        print(
            f"{side:18s} {seconds:7.2f} s ({seconds / base['seconds']:.2f} x usual), "
            f"CPU {cpu:7.2f} s ({cpu / base['cpu']:.2f} x), "
            f"peak +{extra / mib:6.0f} MiB ({extra / base['extra']:.2f} x), "
            f"{runs[side][0]['result']}"
        )


def median(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


if __name__ == "__main__":
    main()
