"""Predicted live bytes against what was really run on the CPU, and against the profiler.

    python benchmarks/memory_truth.py --profile

Each case (training steps, inference, merges, loads) is predicted on the meta device and really
run, steps twice; "difference" is predicted less counted, in bytes.  With --profile the allocator's
events of a third run of the training steps are the independent witness.  Prints a Markdown table
and ends with status 1 if any prediction is off by a byte.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from memory_cases import CASES, EIGHT_BIT, MERGES_IN_4_BITS, OTHER_JOBS, QUANTISED, Case
from memory_witness import profiled_peak

from pytest_lora.loading import quiet
from pytest_lora.memory.tracing import run_step, trace_on_cpu


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="ask the profiler as well")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    return parser.parse_args()


def compare(case: Case, *, profile: bool) -> tuple[str, int, float | None]:
    """A row of the table, the difference in bytes, and the witness over the count, less one."""
    started = time.process_time()
    predicted = trace_on_cpu(case.workload()).peak.live
    between = time.process_time()
    counted = run_step(case.workload()).peak.live
    ended = time.process_time()
    training = case.workload().job == "train_step"
    witness = profiled_peak(case.workload()) / counted - 1 if profile and training else None
    seen = f" {'-' if witness is None else format(witness, '+.4%')} |" if profile else ""
    row = (
        f"| {case} | {counted:,} | {predicted - counted:+,} |{seen} {between - started:.2f} "
        f"| {ended - between:.2f} |"
    )
    return row, predicted - counted, witness


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = [
        *CASES,
        *OTHER_JOBS,
    ]
    if importlib.util.find_spec("bitsandbytes"):
        cases += [*QUANTISED, *EIGHT_BIT, *MERGES_IN_4_BITS]
    chosen = [case for case in cases if options.only in str(case)]
    witness = " profiler |" if options.profile else ""
    rule = " --: |" if options.profile else ""
    print(f"| step | counted, bytes | difference |{witness} predicted in, CPU s | run in, CPU s |")
    print(f"| --- | --: | --: |{rule} --: | --: |")
    wrong, seen = 0, []
    for case in chosen:
        with quiet():
            row, difference, witnessed = compare(case, profile=options.profile)
        wrong += difference != 0
        seen += [] if witnessed is None else [abs(witnessed)]
        print(row, flush=True)
    print(f"\n{len(chosen) - wrong} of {len(chosen)} to the byte", end="")
    print(f"; the profiler within {max(seen):.3%}" if seen else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
