"""The spectrum of an update from its factors against that of the dense product.

    python benchmarks/spectrum.py --repeat 3

Both sides in one process, in turns; the dense side in float32, which is half the work of float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pytest_lora.numerics.spectrum import low_rank_spectrum

SHAPES = ((1024, 1024), (1024, 4096), (2048, 2048))
RANKS = (8, 64)
SCALING = 2.0


def dense(B: torch.Tensor, A: torch.Tensor) -> list[float]:
    values: list[float] = torch.linalg.svdvals(SCALING * (B @ A))[: A.shape[0]].tolist()
    return values


def from_factors(B: torch.Tensor, A: torch.Tensor) -> list[float]:
    return list(low_rank_spectrum(B, A, SCALING).values)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def row(d: int, k: int, r: int, repeat: int) -> str:
    generator = torch.Generator().manual_seed(d + k + r)
    B = torch.randn(d, r, generator=generator)
    A = torch.randn(r, k, generator=generator)
    fast, slow = [], []
    for _ in range(repeat):
        fast.append(seconds(lambda: from_factors(B, A)))
        slow.append(seconds(lambda: dense(B, A)))
    ours, theirs = from_factors(B, A), dense(B, A)
    gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / ours[0]
    a, b = statistics.median(fast), statistics.median(slow)
    return f"| {d} x {k} | {r} | {a * 1e3:.1f} ms | {b:.2f} s | {b / a:.0f} | {gap:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| weight | rank | factors | dense svdvals | times as fast | largest difference |")
    print("| --: | --: | --: | --: | --: | --: |")
    for d, k in SHAPES:
        for r in RANKS:
            print(row(d, k, r, options.repeat), flush=True)


if __name__ == "__main__":
    main()
