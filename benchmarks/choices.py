"""What running a shared context once saves, and whether the values stay: a Markdown table.

python benchmarks/choices.py [--items N]
"""

from __future__ import annotations

import argparse
import time

import torch

from pytest_lora import Subject, read_adapter
from pytest_lora.subject import load_base
from pytest_lora.tasks import choices as module
from pytest_lora.tasks.choices import ChoiceScorer
from pytest_lora.tasks.prompting import task_tokenizer


def main() -> None:
    """Measure contexts of several lengths, shared and not, in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--items", type=int, default=32, help="items per length")
    items = parser.parse_args().items
    torch.set_num_threads(1)
    adapter = read_adapter("fixtures/adapters/attention-lora")
    subject = Subject(adapter, load_base("fixtures/base", adapter=adapter, device="cpu"))
    tokens = task_tokenizer(subject)
    print("| context | tokens saved an item | whole rows | shared | ratio | largest difference |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in (32, 64, 96, 128, 192):
        pairs = made(length, items)
        seconds, values = {}, {}
        for worth in (10**9, 0):
            module.WORTH = worth
            scorer = ChoiceScorer(subject.model, tokens)
            scorer.likelihoods(pairs[:8])
            begin = time.perf_counter()
            values[worth] = [found.value for found in scorer.likelihoods(pairs)]
            seconds[worth] = time.perf_counter() - begin
        whole, shared = seconds[10**9], seconds[0]
        apart = max(abs(a - b) for a, b in zip(values[10**9], values[0], strict=True))
        print(
            f"| {length} | {3 * (length - 1)} | {whole:.2f} s | {shared:.2f} s"
            f" | {whole / shared:.2f} | {apart:.1e} |"
        )


def made(length: int, items: int) -> list[module.Pair]:
    """Four choices of eight tokens behind each context."""
    generator = torch.Generator().manual_seed(length)
    draw = torch.randint(10, 700, (items, length + 32), generator=generator).tolist()
    return [
        (row[:length], row[length + 8 * i : length + 8 * i + 8]) for row in draw for i in range(4)
    ]


if __name__ == "__main__":
    main()
