"""Sequential verdicts on simulated sets: how often they are wrong, and how much they need.

    python benchmarks/sequential.py --sets 2000 --sizes 50 500 5000

Every set is drawn anew and judged against a limit that lies a margin from its own mean.  A verdict
counts as wrong if it was given before the last item and contradicts the set.  Margins are in
standard deviations of the set; "declared" caps and floors lie half a range beyond the set's
extremes, "screened" ones are found by the rule.  Bounds are exact (Clopper-Pearson, 95%).
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pytest_lora.stats.distributions import most_marked
from pytest_lora.stats.proportions import exact_interval
from pytest_lora.stats.sequential import unseen_level
from pytest_lora.stats.wealth import SCREENED, log_wealth, screened_caps

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]
TABLES = ("power", "catastrophes", "errors")
CAPS = ("screened", "declared")
ITEMS = 250_000
"""Values worked on at once: about 2 MB an array."""


def near_constant(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Values that differ in the sixth digit only, most of them tied."""
    return 0.05 + np.round(rng.normal(0, 1e-6, shape), 6)


LIGHT: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "t, 3 degrees": lambda rng, shape: rng.standard_t(3, shape),
    "lognormal": lambda rng, shape: rng.lognormal(0, 1, shape),
    "-lognormal": lambda rng, shape: -rng.lognormal(0, 1, shape),
    "near-constant": near_constant,
}


def catastrophes(share: float) -> Draw:
    """Drifts of 0.2 nats around 0, and exactly ``share`` of the items 5 nats higher."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        values = rng.normal(0, 0.2, shape)
        values[:, : max(1, round(share * shape[1]))] += 5
        return rng.permuted(values, axis=1)

    return draw


def first_low(
    values: Array, limit: Array, alpha: float, cap: Array | None, max_unseen: float = 1.0
) -> NDArray[np.int64]:
    """Items until "the mean is at most ``limit``" is known, for each set; the size if not early.

    The same rule as ``SequentialMean``, on arrays of shape (sets, size); ``cap`` has shape (sets,).
    """
    size = values.shape[1]
    paths = log_wealth(values, limit, size, None if cap is None else cap[:, None])
    known = paths >= -np.log(alpha)
    if cap is None:
        known &= unseen_allows(values, limit, alpha, max_unseen)
    else:
        left = size - 1 - np.arange(size)
        most = np.cumsum(values, -1) + left * cap[:, None]
        known |= most <= size * limit[:, None]
    known[:, -1] = True
    return np.asarray(known.argmax(-1) + 1)


def unseen_allows(
    values: Array, limit: Array, alpha: float, max_unseen: float
) -> NDArray[np.bool_]:
    """Whether few enough items can lie unseen beyond the screened cap, after each item."""
    size = values.shape[1]
    if max_unseen >= 1 or size <= SCREENED:
        return np.full(values.shape, max_unseen >= 1)
    above = np.cumsum(values[:, SCREENED:] > first_caps(values, limit)[:, None], -1)
    table = np.array([draws_for(k, size, alpha, max_unseen) for k in range(int(above.max()) + 1)])
    allowed = np.zeros(values.shape, dtype=bool)
    allowed[:, SCREENED:] = np.arange(1, size - SCREENED + 1) >= table[above]
    return allowed


@cache
def draws_for(k: int, size: int, alpha: float, max_unseen: float) -> int:
    """Items after the screening, ``k`` of them beyond the cap, that leave few enough unseen."""

    def enough(drawn: int) -> bool:
        most = most_marked(k, size - SCREENED, drawn, unseen_level(alpha, k))
        return most - k <= max_unseen * size

    return k + bisect_left(range(k, size - SCREENED), True, key=enough)


def first_caps(values: Array, limit: Array) -> Array:
    """The first cap that the screening gives, for each set."""
    return screened_caps(values[:, : SCREENED + 1], limit, values.shape[1])[:, SCREENED]


def first_verdicts(
    values: Array,
    limit: Array,
    alpha: float,
    declared: bool,
    max_unseen: float = 1.0,
    *,
    above: bool = False,
) -> NDArray[np.int64]:
    """Items until "at most", or with ``above`` until "above", is known, for each set."""
    sign = -1 if above else 1
    signed = sign * values
    cap = signed.max(1) + np.ptp(signed, 1) / 2 if declared else None
    return first_low(signed, sign * limit, alpha, cap, max_unseen)


def limits(values: Array, margin: float) -> Array:
    """The mean of each set plus ``margin`` of its standard deviations."""
    return np.asarray(values.mean(1) + margin * values.std(1))


def wrong_at(
    values: Array, margin: float, alpha: float, declared: bool, max_unseen: float = 1.0
) -> NDArray[np.int64]:
    """Where the wrong verdict came first and before the last item: items it took; else 0."""
    options = (alpha, declared, max_unseen)
    limit, above = limits(values, margin), margin > 0  # "above" is wrong where the limit is higher
    taken = first_verdicts(values, limit, *options, above=above)
    early = np.flatnonzero(taken < values.shape[1])
    taken[taken == values.shape[1]] = 0
    if len(early):
        right = first_verdicts(values[early], limit[early], *options, above=not above)
        # At a tie "at most" comes first.
        taken[early] *= taken[early] < right if above else taken[early] <= right
    return taken


def used_at(values: Array, margin: float, alpha: float, declared: bool) -> NDArray[np.int64]:
    """Items until the first verdict, for each set."""
    limit = limits(values, margin)
    low, high = (first_verdicts(values, limit, alpha, declared, above=x) for x in (False, True))
    return np.minimum(low, high)


def chunks(draw: Draw, sets: int, size: int, seed: int) -> Iterator[Array]:
    """``sets`` sets of ``size`` items, a few at a time."""
    rng = np.random.default_rng([seed, size])
    step = max(1, ITEMS // size)
    for start in range(0, sets, step):
        yield draw(rng, (min(step, sets - start), size))


def upper(errors: int, sets: int) -> float:
    return exact_interval(errors, sets, 0.95)[1]


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    row(*("---" if i == 0 else "--:" for i in range(len(cells))))


def errors_table(options: argparse.Namespace, declared: bool) -> None:
    """Wrong verdicts, AT_MOST above the limit / ABOVE below it."""
    margins = options.margins
    kind = "declared" if declared else "screened"
    print(f"\n### Wrong verdicts, caps and floors {kind}, alpha {options.alpha}\n")
    print('Each cell: sets above the limit judged "at most" / sets below it judged "above".\n')
    header("set", "N", "sets", *(f"{m} sd" for m in margins), "rate in the worst cell, 95% bound")
    for name, draw in LIGHT.items():
        for size in options.sizes:
            sets = sets_of(options, size)
            wrong = dict.fromkeys([sign * m for m in margins for sign in (-1, 1)], 0)
            for values in chunks(draw, sets, size, options.seed):
                for margin in wrong:
                    found = wrong_at(values, margin, options.alpha, declared)
                    wrong[margin] += int(np.count_nonzero(found))
            cells = (f"{wrong[-m]} / {wrong[m]}" for m in margins)
            worst = max(wrong.values())
            row(name, size, sets, *cells, f"{worst / sets:.3%}, {upper(worst, sets):.3%}")


def power_table(options: argparse.Namespace) -> None:
    """Median share of the set used, by how far the mean lies from the limit."""
    margins = (0.05, 0.1, 0.2, 0.5, 1.0)
    sets = min(options.sets, 400)
    print(f"\n### Share of the set used, median of {sets}, alpha {options.alpha}\n")
    print("Each cell: the mean below / above the limit.\n")
    header("set", "N", "cap, floor", *(f"{m} sd" for m in margins))
    for name, draw in LIGHT.items():
        for size in options.power_sizes:
            for declared in (False, True):
                used: dict[float, list[NDArray[np.int64]]] = {
                    sign * m: [] for m in margins for sign in (1, -1)
                }
                for values in chunks(draw, sets, size, options.seed):
                    for margin, found in used.items():
                        found.append(used_at(values, margin, options.alpha, declared))
                share = {m: np.median(np.concatenate(u)) / size for m, u in used.items()}
                cells = (f"{share[m]:.1%} / {share[-m]:.1%}" for m in margins)
                row(name, size, "declared" if declared else "screened", *cells)


def catastrophe_table(options: argparse.Namespace) -> None:
    """Sets whose mean is above the limit only for a few items 5 nats up."""
    print(f"\n### A few items 5 nats up, the mean just above the limit, alpha {options.alpha}\n")
    columns = ("wrong", "items it took", "unseen share stated", "promise broken", "more unseen")
    header("5 nats up", "N", "sets", "cap", *columns)
    for share in (0.01, 0.002):
        for size in options.sizes:
            for kind in ("declared", "screened", "screened, 0.5% unseen"):
                _catastrophe_row(options, share, size, kind)


def _catastrophe_row(options: argparse.Namespace, share: float, size: int, kind: str) -> None:
    declared, most = kind == "declared", 0.005 if "unseen" in kind else 1.0
    sets, margin = sets_of(options, size), -0.001
    took: list[int] = []
    stated: list[float] = []
    broken = more = 0
    for values in chunks(catastrophes(share), sets, size, options.seed):
        taken = wrong_at(values, margin, options.alpha, declared, most)
        limit = limits(values, margin)
        caps = first_caps(values, limit)
        for i in np.flatnonzero(taken):
            took.append(int(taken[i]))
            if declared:
                continue
            beyond = values[i] > caps[i]
            k = int(beyond[SCREENED : taken[i]].sum())
            since, level = int(taken[i]) - SCREENED, unseen_level(options.alpha, k)
            unseen = most_marked(k, size - SCREENED, since, level) - k
            stated.append(unseen / size)
            broken += bool(np.minimum(values[i], caps[i]).mean() > limit[i])
            more += bool(beyond[taken[i] :].sum() > unseen)
    cells = [f"{len(took)} ({len(took) / sets:.2%})", f"{np.median(took):.0f}" if took else "-"]
    if stated:
        cells += [f"{np.median(stated):.1%}", str(broken), str(more)]
    count = max(1, round(share * size))
    row(count, size, sets, kind, *cells, *["-"] * (5 - len(cells)))


def sets_of(options: argparse.Namespace, size: int) -> int:
    """More sets where they are small: 10 times as many of 50 items, 5 times of 500."""
    return int(options.sets) * min(10, max(1, 2500 // size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=2000, help="of 2,500 items or more")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 500, 5000])
    parser.add_argument("--power-sizes", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--margins", type=float, nargs="+", default=[0.001, 0.05, 0.2, 0.5])
    parser.add_argument("--caps", nargs="+", default=CAPS, choices=CAPS)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if "power" in options.tables:
        power_table(options)
    if "catastrophes" in options.tables:
        catastrophe_table(options)
    if "errors" in options.tables:
        for kind in options.caps:
            errors_table(options, declared=kind == "declared")


if __name__ == "__main__":
    main()
