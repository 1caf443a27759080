"""Fingerprints on a CUDA device: what fraction of the memory's bandwidth they reach.

    python benchmarks/gpu_fingerprint.py --report gpu_fingerprint.json

The memory's bandwidth is that of a copy within the device, which reads and writes every byte.
Beside it a sum, which reads every byte once, and the bound of a merge in the dtype, which proves
more than any comparison and costs more.  Best of several runs, timed by events of the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pytest_lora.numerics.fingerprint import fingerprint
from pytest_lora.numerics.merge_bound import LowRankUpdate, judge_merge
from pytest_lora.numerics.precision import accurate_products

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 4096


def seconds(run: Callable[[], object], device: str, repeat: int) -> float:
    """The shortest of several runs; the first one, which makes keys and workspaces, is left out."""
    run()
    times = []
    for _ in range(repeat):
        if device == "cpu":
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
            continue
        with torch.cuda.device(device):  # an event is recorded on the current one
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    return min(times)


def measure(dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Gigabytes per second of each way of going over the same tensor."""
    rows = options.mib * 2**20 // dtype.itemsize // WIDTH
    tensor = torch.randn(rows, WIDTH, device=options.device).to(dtype)
    size = tensor.numel() * dtype.itemsize / 1e9
    other = torch.empty_like(tensor)
    B, A = (torch.randn(s, device=options.device).to(dtype) / 64 for s in ((rows, 16), (16, WIDTH)))
    update = LowRankUpdate(B, A, 2.0)
    merged = tensor + (B @ A) * 2.0
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: other.copy_(tensor),
        "sum": tensor.sum,
        "fingerprint": lambda: fingerprint(tensor),
        "merge bound": lambda: judge_merge(tensor, merged, update),
    }
    with accurate_products():
        took = {name: seconds(way, options.device, options.repeat) for name, way in ways.items()}
    # A copy moves every byte twice.
    speeds = {name: (2 if name == "copy" else 1) * size / took[name] for name in ways}
    fraction = speeds["fingerprint"] / speeds["copy"]
    return {"dtype": str(dtype).removeprefix("torch."), "gb_per_s": speeds, "fraction": fraction}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--report", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        sys.exit(0)
    card = "CPU" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    rows = [measure(dtype, options) for dtype in DTYPES]
    print(f"{card}, torch {torch.__version__}, {options.mib} MiB, GB/s\n")
    print("| dtype | copy (read and write) | sum | fingerprint | of the bandwidth | merge bound |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        speeds = row["gb_per_s"]
        print(
            f"| {row['dtype']} | {speeds['copy']:.1f} | {speeds['sum']:.1f} "
            f"| {speeds['fingerprint']:.1f} | {row['fraction']:.0%} "
            f"| {speeds['merge bound']:.2f} |"
        )
    if options.report:
        found = {"card": card, "torch": torch.__version__, "mib": options.mib, "rows": rows}
        options.report.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
