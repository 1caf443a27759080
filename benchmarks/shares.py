"""Sequential verdicts on 0/1 scores: the exact error rate and the items they take.

    python benchmarks/shares.py --sizes 164 1319 --floor 0.5

All orders of a set with so many passing items are weighed at once: what counts after ``n`` items is
how many of them passed, and the chance of every such state follows from that of the states before.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pytest_lora.stats.proportions import SequentialProportion
from pytest_lora.stats.sequential import Verdict

MARGINS = (0.02, 0.05, 0.1, 0.2)


def stops(size: int, floor: float, alpha: float, passing: int) -> Iterator[tuple[int, str, float]]:
    """Items used, verdict, and the chance of stopping there, over all orders of the set."""
    states = {0: 1.0}
    for used in range(1, size + 1):
        ahead: dict[int, float] = {}
        for successes, chance in states.items():
            share = (passing - successes) / (size - used + 1)
            for item, part in ((1, share), (0, 1 - share)):
                if part > 0:
                    ahead[successes + item] = ahead.get(successes + item, 0.0) + chance * part
        states = {}
        for successes, chance in ahead.items():
            gate = SequentialProportion(size, floor, alpha=alpha)
            gate.used, gate.successes = used - 1, successes
            gate.add(0)
            if gate.verdict is None:
                states[successes] = chance
            else:
                yield used, gate.verdict, chance


def judged(size: int, floor: float, alpha: float, passing: int) -> tuple[float, int]:
    """Chance of a wrong verdict, and the median of the items used."""
    right = Verdict.AT_LEAST if passing / size >= floor else Verdict.BELOW
    wrong = total = 0.0
    median = 0
    for used, verdict, chance in stops(size, floor, alpha, passing):
        wrong += chance * (verdict != right)
        if total < 0.5 <= total + chance:
            median = used
        total += chance
    return wrong, median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[164, 1319])
    parser.add_argument("--floor", type=float, default=0.5)
    parser.add_argument("--alpha", type=float, default=0.001)
    options = parser.parse_args()
    floor, alpha = options.floor, options.alpha
    names = "".join(f" {m:+.0%} / {-m:+.0%} |" for m in MARGINS)
    print(f"| items | wrong: one item short / just enough |{names}")
    print("| --: | --: |" + " --: |" * len(MARGINS))
    for size in options.sizes:
        needed = SequentialProportion(size, floor, alpha=alpha).needed
        errors = (judged(size, floor, alpha, needed - short)[0] for short in (1, 0))
        cells = [" / ".join(f"{error:.4%}" for error in errors)]
        for margin in MARGINS:
            passing = (round(size * (floor + m)) for m in (margin, -margin))
            used = (judged(size, floor, alpha, p)[1] / size for p in passing)
            cells.append(" / ".join(f"{share:.0%}" for share in used))
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
