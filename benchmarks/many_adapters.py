"""Many adapters of one base: cost per adapter and peak memory, in one process and with workers.

    python benchmarks/many_adapters.py --adapters 50 --workers 2

Adapters of several ranks and target modules are generated on the example base and judged in one
run of pytest, first a few of them, then all, then all by workers.  Peak memory is that of the
largest process; were anything kept per adapter, it would grow from the first row to the second.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers

BASE = Path(__file__).parents[1] / "fixtures" / "base"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = (ATTENTION, ["q_proj", "v_proj"], [*ATTENTION, "gate_proj", "up_proj", "down_proj"])
RANKS = (4, 8, 16)
NOTES = """\
import os
import resource
from pathlib import Path

import pytest_lora.loading as loading

load = loading.load_weights
reads = []


def counted(spec, adapter=None):
    reads.append(spec)
    return load(spec, adapter)


loading.load_weights = counted


def pytest_unconfigure():
    used = resource.getrusage(resource.RUSAGE_SELF)
    note = f"{len(reads)} {used.ru_utime + used.ru_stime} {used.ru_maxrss}"
    (Path(__file__).parent / f"process{os.getpid()}").write_text(note)
"""


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    adapters: int
    wall: float
    processor: float
    reads: int
    peak: float
    outcome: str

    def row(self, label: str) -> str:
        """A line of the table."""
        each = (self.wall / self.adapters, self.processor / self.adapters)
        return (
            f"| {label} | {self.adapters} | {self.wall:.0f} s | {each[0]:.2f} s | {each[1]:.2f} s "
            f"| {self.reads} | {self.peak:.0f} MiB |"
        )


def write_adapters(folder: Path, count: int) -> None:
    """Adapters with every factor filled, of nine kinds in turn."""
    kinds = itertools.cycle(itertools.product(RANKS, TARGETS))
    for number, (rank, targets) in zip(range(count), kinds, strict=False):
        torch.manual_seed(number)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets,
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(BASE),
        )
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(BASE), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder / "out" / f"run{number:03d}")


def run(folder: Path, count: int, workers: int, checks: str) -> Cost:
    """Judge the first ``count`` adapters; every process of the run leaves a note of itself."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text(NOTES)
    chosen = [f"--lora-adapter=out/run{number:03d}" for number in range(count)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    command += [f"--lora-checks={checks}"] if checks else []
    command += ["-n", str(workers)] if workers else []
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip
    wall = time.perf_counter() - start
    notes = []
    for file in folder.glob("process*"):
        notes.append([float(word) for word in file.read_text().split()])
        file.unlink()
    reads, processor, peak = zip(*notes, strict=True)
    outcome = done.stdout.splitlines()[-1]
    return Cost(count, wall, sum(processor), int(sum(reads)), max(peak) / 2**10, outcome)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--checks", default="forward", help="as --lora-checks; '' for all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder, options.adapters)
        few = run(folder, options.few, 0, options.checks)
        single = run(folder, options.adapters, 0, options.checks)
        several = run(folder, options.adapters, options.workers, options.checks)
    print("| | adapters | wall time | per adapter | processor time per adapter "
          "| base read | largest process |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(few.row("one process"))
    print(single.row("one process"))
    print(several.row(f"`-n {options.workers}`"))
    for cost in (few, single, several):
        print(cost.outcome, file=sys.stderr)


if __name__ == "__main__":
    main()
