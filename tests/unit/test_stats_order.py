"""The seeded order is a permutation, the same for ever, and another one for every name."""

from __future__ import annotations

from hashlib import sha256

import pytest

from pytest_lora.stats.order import seeded_order


def test_the_order_is_the_documented_one() -> None:
    keys = [sha256(f"3/6/wiki/{i}".encode()).digest() for i in range(6)]
    assert seeded_order(6, 3, "wiki") == sorted(range(6), key=keys.__getitem__)


def test_the_order_never_changes() -> None:
    assert seeded_order(5, 0, "a") == [1, 0, 4, 2, 3]


def test_every_item_comes_once() -> None:
    assert sorted(seeded_order(1000, 7)) == list(range(1000))


def test_seeds_and_names_give_different_orders() -> None:
    orders = [seeded_order(50, seed, name) for seed in (0, 1) for name in ("wiki", "code", "")]
    assert len({tuple(order) for order in orders}) == 6


def test_every_position_is_as_likely() -> None:
    """2,000 orders of 4 items: each of the 24 comes up 83 times; 5 standard deviations are 45."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2000):
        order = tuple(seeded_order(4, seed))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert all(abs(count - 2000 / 24) < 45 for count in counts.values())


def test_no_items_and_fewer() -> None:
    assert seeded_order(0, 1) == []
    with pytest.raises(ValueError, match="-1 items"):
        seeded_order(-1, 1)
