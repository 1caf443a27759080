"""How often intervals for a paired difference in accuracy hold the true one, by enumeration.

    python benchmarks/paired.py --sizes 30 100

Every table of gained and lost items is weighed with its probability, over a grid of true chances
of gaining and of losing an item.  Beside Tango's score interval stands the textbook's
``difference -/+ z * standard error``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from pytest_lora.stats.distributions import normal_quantile
from pytest_lora.stats.paired import difference_interval

CHANCES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4)
Interval = Callable[[int, int, int, float], tuple[float, float]]


def textbook(gained: int, lost: int, n: int, confidence: float) -> tuple[float, float]:
    seen = (gained - lost) / n
    half = normal_quantile((1 + confidence) / 2) * math.sqrt(
        ((gained + lost) / n - seen * seen) / n
    )
    return seen - half, seen + half


def coverages(interval: Interval, n: int, confidence: float) -> list[float]:
    """The chance of holding the true difference, for each pair of true chances."""
    factorial = [math.lgamma(k + 1) for k in range(n + 1)]
    tables = [(gained, lost) for gained in range(n + 1) for lost in range(n + 1 - gained)]
    ends = [interval(gained, lost, n, confidence) for gained, lost in tables]
    found = []
    for gain in CHANCES:
        for loss in CHANCES:
            logs = math.log(gain), math.log(loss), math.log(1 - gain - loss)
            total = 0.0
            for (gained, lost), (low, high) in zip(tables, ends, strict=True):
                if low <= gain - loss <= high:
                    counts = gained, lost, n - gained - lost
                    ways = factorial[n] - sum(factorial[k] for k in counts)
                    total += math.exp(
                        ways + sum(k * log for k, log in zip(counts, logs, strict=True))
                    )
            found.append(total)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[30, 100])
    parser.add_argument("--confidence", type=float, default=0.95)
    options = parser.parse_args()
    print("| items | interval | least coverage | mean coverage |")
    print("| --: | --- | --: | --: |")
    for n in options.sizes:
        for name, interval in (("score (Tango)", difference_interval), ("textbook", textbook)):
            found = coverages(interval, n, options.confidence)
            print(f"| {n} | {name} | {min(found):.1%} | {sum(found) / len(found):.1%} |")


if __name__ == "__main__":
    main()
