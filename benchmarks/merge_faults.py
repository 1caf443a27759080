"""What the rounding bound of a merge flags, against the comparisons people use instead.

    python benchmarks/merge_faults.py --cases 600

Real PEFT merges of random linear layers, sound and with one fault each, judged by

* the rounding bound (``judge_merge``): any element outside;
* ``torch.testing.assert_close`` with its own tolerances for the dtype;
* ``torch.allclose`` with its defaults.

The last two compare with ``W + s B A`` computed in float64 and rounded once.
"""

from __future__ import annotations

import argparse
import collections
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import peft
import torch

from pytest_lora.checks.merge_layers import describe
from pytest_lora.numerics.merge_bound import LowRankUpdate, judge_merge

SIZES = (64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def layer_of(rng: random.Random, seed: int) -> Any:
    """A LoRA layer with weights of size 0.02 and a delta of a drawn size."""
    torch.manual_seed(seed)
    dtype, size = rng.choice(DTYPES), rng.choice([1e-5, 1e-4, 1e-3, 1e-2])
    linear = torch.nn.Linear(rng.choice(SIZES), rng.choice(SIZES), bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    module = torch.nn.Sequential(linear).to(dtype)
    config = peft.LoraConfig(
        r=rng.choice([2, 4, 8, 16, 32]),
        lora_alpha=rng.choice([8, 16, 32, 64]),
        use_rslora=rng.random() < 0.3,
        target_modules=["0"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(module, config, autocast_adapter_dtype=rng.random() < 0.5)
    layer = model.base_model.model[0]
    with torch.no_grad():
        delta = layer.get_delta_weight("default").float()
        layer.lora_B["default"].weight.mul_(size / delta.square().mean().sqrt())
    return layer


def merged(weight: torch.Tensor, update: LowRankUpdate) -> torch.Tensor:
    result = weight.clone()
    delta = update.delta(slice(None), slice(None))
    result += delta.to(weight.dtype) if update.rounds_delta else delta
    return result


def faults(
    weight: torch.Tensor, good: torch.Tensor, update: LowRankUpdate, layer: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    rank, times = update.A.shape[0], {}
    times["alpha instead of alpha / r"] = float(rank)
    times["alpha / sqrt(r) instead of alpha / r"] = rank**0.5
    times["scaling 1% too large"] = 1.01
    times["scaling 0.1% too large"] = 1.001
    times["sign flipped"] = -1.0
    for name, factor in times.items():
        yield name, merged(weight, replace(update, scaling=update.scaling * factor))
    yield "not merged", weight.clone()
    yield "merged twice", merged(good, update)
    yield (
        "last rank dropped",
        merged(weight, replace(update, A=update.A[:-1], B=update.B[:, :-1])),
    )
    if weight.shape[0] == weight.shape[1]:
        yield "delta transposed", merged(weight, replace(update, A=update.B.T, B=update.A.T))
    wrong = good.clone()
    wrong.view(-1)[wrong.numel() // 2] += 8 * wrong.abs().max() * torch.finfo(wrong.dtype).eps
    yield "one element off by some ulps", wrong


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        torch.testing.assert_close(a, b)
    except AssertionError:
        return False
    return True


def judge(
    counts: collections.Counter[str],
    weight: torch.Tensor,
    after: torch.Tensor,
    update: LowRankUpdate,
) -> None:
    delta = (update.B.double() @ update.A.double()) * update.scaling
    reference = (weight.double() + delta).to(weight.dtype)
    counts["cases"] += 1
    counts["bound"] += judge_merge(weight, after, update).outside > 0
    counts["assert_close"] += not close(after, reference)
    counts["allclose"] += not torch.allclose(after, reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=600)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for seed in range(options.cases):
        layer, safe = layer_of(rng, seed), rng.random() < 0.5
        weight = layer.base_layer.weight.detach().clone()
        known = describe(layer, "default", safe_merge=safe)
        if known is None:
            raise RuntimeError("a linear LoRA layer has a formula")
        layer.merge(safe_merge=safe)
        good = layer.base_layer.weight.detach()
        judge(table["sound"], weight, good, known.update)
        for name, wrong in faults(weight, good, known.update, layer):
            if not torch.equal(wrong, good):  # a fault that rounding hides is none
                judge(table[name], weight, wrong, known.update)
    print(f"{'':38s} cases  flagged by: bound  assert_close  allclose")
    for name, counts in table.items():
        shares = [counts[key] / counts["cases"] for key in ("bound", "assert_close", "allclose")]
        print(f"{name:38s} {counts['cases']:5d}" + "".join(f"{share:13.1%}" for share in shares))


if __name__ == "__main__":
    main()
