"""What a picture of a distribution is drawn from: every value counted once, where it lies."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest

from pytest_lora.stats.histogram import BINS, distribution
from pytest_lora.stats.proportions import SequentialProportion
from pytest_lora.stats.sequential import SequentialMean, milestones


def test_every_value_is_counted_where_it_lies() -> None:
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(500)]
    found: Any = distribution(values)
    assert (found["least"], found["most"]) == (min(values), max(values))
    assert found["median"] == sorted(values)[250]
    width = (max(values) - min(values)) / BINS
    edges = [min(values) + i * width for i in range(BINS)] + [math.inf]
    plain = [sum(low <= v < high for v in values) for low, high in pairwise(edges)]
    assert found["counts"] == pytest.approx(plain, abs=1)  # an edge may be off by its last bit
    assert sum(found["counts"]) == 500


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1e308, 1e308], [0.0, 5e-324]])
def test_corners(values: list[float]) -> None:
    found: Any = distribution([*values, math.nan, -math.inf])
    assert sum(found["counts"]) == len(values)
    assert found["not_finite"] == 2


def test_nothing_finite_is_no_distribution() -> None:
    assert distribution([math.nan]) is None
    assert distribution([]) is None


@pytest.mark.parametrize("used", [0, 1, 2, 5, 30, 100_000])
def test_milestones_are_few_and_end_now(used: int) -> None:
    found = milestones(used, 24)
    assert len(found) <= 24
    assert found == sorted(set(found))
    assert not used or (found[0], found[-1]) == (1, used)


def test_the_path_of_a_mean_closes_in_on_it_and_ends_at_the_interval() -> None:
    pytest.importorskip("numpy")
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(400)]
    gate = SequentialMean(400, 0.5, alpha=0.01)
    gate.extend(values[:300])
    rows: Any = gate.path(0.98)
    assert rows[0] == {"used": 1, "estimate": values[0], "low": None, "high": None}
    assert rows[-1]["used"] == 300
    assert (rows[-1]["low"], rows[-1]["high"]) == gate.interval(0.98)
    assert rows[-1]["estimate"] == pytest.approx(gate.estimate)
    known = [row for row in rows if row["low"] is not None and row["high"] is not None]
    assert len(known) > 5
    assert all(row["low"] <= sum(values) / 400 <= row["high"] for row in known)
    assert all(
        later["high"] <= row["high"] + 0.01 and later["low"] >= row["low"] - 0.01
        for row, later in pairwise(known)
    )


def test_the_path_of_a_share_ends_at_its_interval() -> None:
    gate = SequentialProportion(200, 0.5, alpha=0.01)
    gate.extend(i % 3 > 0 for i in range(60))
    rows = gate.path(0.99)
    assert (rows[-1]["low"], rows[-1]["high"]) == gate.interval(0.99)
    assert (rows[0]["used"], rows[0]["estimate"]) == (1, 0.0)
    assert all(row["low"] <= row["estimate"] <= row["high"] for row in rows)
