"""Fingerprints against keeping a copy and comparing: speed and extra memory.

    python benchmarks/fingerprint.py --mib 512 --repeat 5

Proving that a tensor did not change takes two readings of it.  With a copy: make it before, compare
after.  With fingerprints: take one before, take another after.  One process per side and dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pytest_lora.numerics.fingerprint import fingerprint

SIDES = ("copy and compare", "fingerprint twice", "read once")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def copy_and_compare(tensor: torch.Tensor) -> bool:
    kept = tensor.clone()
    return torch.equal(tensor, kept)


def fingerprint_twice(tensor: torch.Tensor) -> bool:
    return fingerprint(tensor) == fingerprint(tensor)


def read_once(tensor: torch.Tensor) -> bool:
    """The least any method could do: touch every byte (bitwise, so that nothing is converted)."""
    return bool((tensor.view(torch.int32).view(-1) == 0).any())


def peak() -> int:
    line = next(row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    count = options.mib * 2**20 // dtype.itemsize
    tensor = torch.empty(count, dtype=dtype)
    for part in torch.split(tensor, 1 << 20):
        part.normal_()
    run = named()[options.side]
    fingerprint(tensor[:100])  # makes the keys
    CLEAR.write_text("5")
    start = peak()
    wall, work = time.perf_counter(), time.process_time()
    run(tensor)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - wall,
                "cpu": time.process_time() - work,
                "extra": peak() - start,
            }
        )
    )


def named() -> dict[str, Callable[[torch.Tensor], bool]]:
    return dict(zip(SIDES, (copy_and_compare, fingerprint_twice, read_once), strict=True))


def measure(side: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--side", side, "--dtype", dtype, "--mib", str(options.mib)]
    arguments += ["--threads", str(options.threads)]
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.side:
        child(options)
        return
    for dtype in ("float32", "bfloat16"):
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.repeat):
            for side in SIDES:
                runs[side].append(measure(side, dtype, options))
        print(f"{options.mib} MiB of {dtype}")
        first = middle(runs[SIDES[0]], "cpu")
        for side in SIDES:
            cpu, wall = middle(runs[side], "cpu"), middle(runs[side], "seconds")
            speed = options.mib * 2**20 / cpu / 1e9
            extra = middle(runs[side], "extra") / 2**20
            print(
                f"  {side:18s} {wall:6.3f} s, CPU {cpu:6.3f} s ({cpu / first:.2f} x copy and "
                f"compare), {speed:5.2f} GB/s of CPU time, peak +{extra:.0f} MiB"
            )


def middle(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


if __name__ == "__main__":
    main()
