"""What of an adapter survives a merge into a 4-bit base, and what the bound sees.

    python benchmarks/four_bit.py

Random weights are quantised by bitsandbytes, random deltas of several sizes merged into them as
PEFT does, and the result judged: as it is, and against a delta with a wrong scaling.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from pytest_lora.checks.four_bit import block_format, read_back
from pytest_lora.numerics.four_bit import judge_requantised
from pytest_lora.numerics.merge_bound import LowRankUpdate

SIZES = (1.0, 0.2, 0.1, 0.05, 0.01)


def row(kind: str, nested: bool, size: float, side: int) -> str:
    """One size of delta, as a share of the weight's, in root mean squares."""
    import bitsandbytes as bnb

    def quantised(weight: torch.Tensor) -> torch.Tensor:
        options = {"quant_type": kind, "compress_statistics": nested, "requires_grad": False}
        held: torch.Tensor = bnb.nn.Params4bit(weight, **options).to("cpu")
        return held

    torch.manual_seed(0)
    base = read_back(quantised(torch.randn(side, side) / 50))
    B, A = torch.randn(side, 16), torch.randn(16, side)
    update = LowRankUpdate(B, A, size / 50 / 4)
    merged = quantised(base + (B @ A) * update.scaling)
    after, form = read_back(merged), block_format(merged)
    found = judge_requantised(base, after, update, form)
    wrong = judge_requantised(base, after, replace(update, scaling=update.scaling * 1.02), form)
    return (
        f"| {kind}{', nested' if nested else ''} | {size:g} | {found.applied:.1%} "
        f"| {found.noise_ratio:.1%} | {found.worst:.2f} | {wrong.outside / wrong.elements:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="rows and columns, in whole blocks")
    options = parser.parse_args()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        print("bitsandbytes is not installed: nothing measured")
        sys.exit(0)
    print("| format | delta / weight | delta that arrives | lost to noise | value "
          "| outside if the scaling is 2% off |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for size in SIZES:
                print(row(kind, nested, size, options.side))


if __name__ == "__main__":
    main()
