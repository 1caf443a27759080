"""The replay of the caching allocator: its rules, and laws that hold for every sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.memory.allocator import MIB, Block, CachingAllocator, round_up


def test_small_requests_share_a_segment_of_two_mib() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)
    allocator.allocate(1)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB + 512, 4 * MIB)


def test_requests_below_ten_mib_come_out_of_twenty() -> None:
    allocator = CachingAllocator()
    allocator.allocate(MIB + 1)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(9 * MIB)
    assert allocator.reserved == 20 * MIB


def test_larger_requests_get_a_segment_of_their_own() -> None:
    allocator = CachingAllocator()
    allocator.allocate(11 * MIB)
    assert (allocator.allocated, allocator.reserved) == (12 * MIB, 12 * MIB), "1 MiB is not split"
    allocator.allocate(20 * MIB + 1)
    assert allocator.reserved == 34 * MIB


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(20 * MIB)
    keep = allocator.allocate(12 * MIB)
    allocator.release(large)
    allocator.release(small)
    again = allocator.allocate(18 * MIB)
    assert again is not None
    assert keep is not None
    assert again.order[0] == 2, "the segment of 20 MiB, not the one of 40"
    assert allocator.reserved == 72 * MIB


def test_freed_neighbours_become_one() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    assert allocator.reserved == 20 * MIB
    for place in (0, 2, 4, 1, 3):
        allocator.release(blocks[place])
    whole = allocator.allocate(19 * MIB)
    assert whole is not None
    assert allocator.reserved == 20 * MIB
    assert allocator.allocated == 20 * MIB


def test_nothing_takes_nothing() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(0) is None
    allocator.release(None)
    assert (allocator.allocated, allocator.reserved) == (0, 0)


@given(st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 6)), max_size=60))
def test_whatever_comes_and_goes_the_books_balance(requests: list[tuple[int, int]]) -> None:
    allocator = CachingAllocator()
    live: list[tuple[int, Block]] = []
    asked = peak = 0
    for size, kept in requests:
        block = allocator.allocate(size)
        assert block is not None
        live.append((size, block))
        asked += round_up(size)
        peak = max(peak, asked)
        while len(live) > kept:
            gone, old = live.pop(0)
            allocator.release(old)
            asked -= round_up(gone)
        waste = sum(block.size - round_up(size) for size, block in live)
        assert allocator.allocated == asked + waste
        assert all(0 <= block.size - round_up(size) <= MIB for size, block in live)
        assert allocator.allocated <= allocator.reserved
    assert peak <= allocator.peak_allocated <= allocator.peak_reserved
    for _, block in live:
        allocator.release(block)
    assert allocator.allocated == 0
    # All is free and merged again: what was reserved serves the same requests once more.
    reserved = allocator.reserved
    for size, _ in live:
        allocator.allocate(size)
    assert allocator.reserved == reserved


@given(st.integers(0, 2**40), st.integers(1, 2**21))
def test_rounding_up_is_the_least_multiple(count: int, grain: int) -> None:
    rounded = round_up(count, grain)
    assert rounded % grain == 0
    assert 0 <= rounded - count < grain
