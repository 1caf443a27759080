"""A replay of the CUDA caching allocator: what the same requests would hold and reserve.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` with default settings (no
``expandable_segments``, no ``roundup_power2_divisions``), not yet held against a device: sizes are
rounded up to 512 bytes; requests up to 1 MiB come out of a pool of 2 MiB segments; larger ones out
of segments of 20 MiB, or from 10 MiB on of their own size rounded up to 2 MiB; the smallest free
block that is large enough is taken, split if what remains is worth it, and merged with its free
neighbours when it comes back.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

__all__ = ["Block", "CachingAllocator", "round_up"]

MIB = 1 << 20
GRAIN = 512
"""``kMinBlockSize``."""
SMALL_REQUEST, SMALL_SEGMENT = MIB, 2 * MIB
"""``kSmallSize``, ``kSmallBuffer``."""
LARGE_SEGMENT, OWN_SEGMENT, SEGMENT_GRAIN = 20 * MIB, 10 * MIB, 2 * MIB
"""``kLargeBuffer``, ``kMinLargeAlloc``, ``kRoundLarge``."""


def round_up(count: int, grain: int = GRAIN) -> int:
    """The least multiple of ``grain`` that is at least ``count``."""
    return -(-count // grain) * grain


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment; ``before`` and ``after`` are its neighbours there.

    ``order`` tells blocks of one size apart: the allocator prefers the lower address.
    """

    size: int
    order: tuple[int, int]
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None

    @property
    def key(self) -> tuple[int, tuple[int, int]]:
        """What free blocks are sorted by."""
        return self.size, self.order


@dataclass(slots=True)
class _Pool:
    """Free blocks in the order in which the best fit is looked for."""

    keys: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def add(self, block: Block) -> None:
        place = bisect.bisect_left(self.keys, block.key)
        self.keys.insert(place, block.key)
        self.blocks.insert(place, block)

    def remove(self, block: Block) -> None:
        place = bisect.bisect_left(self.keys, block.key)
        del self.keys[place], self.blocks[place]

    def take(self, size: int) -> Block | None:
        place = bisect.bisect_left(self.keys, (size, (-1, -1)))
        if place == len(self.keys):
            return None
        del self.keys[place]
        return self.blocks.pop(place)


class CachingAllocator:
    """Counts what is allocated (blocks in use) and reserved (segments), and the peaks of both."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._pools = {True: _Pool(), False: _Pool()}
        self._segments = 0

    def allocate(self, count: int) -> Block | None:
        """A block for ``count`` bytes; None for none, which takes no memory."""
        if count <= 0:
            return None
        size = round_up(count)
        small = size <= SMALL_REQUEST
        block = self._pools[small].take(size) or self._segment(size, small)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block | None) -> None:
        """Give a block back; free neighbours become one."""
        if block is None:
            return
        self.allocated -= block.size
        block.free = True
        if block.after is not None and block.after.free:
            self._pools[block.small].remove(block.after)
            self._absorb(block, block.after)
        if block.before is not None and block.before.free:
            self._pools[block.small].remove(block.before)
            block = self._absorb(block.before, block)
        self._pools[block.small].add(block)

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            room = SMALL_SEGMENT
        else:
            room = LARGE_SEGMENT if size < OWN_SEGMENT else round_up(size, SEGMENT_GRAIN)
        self.reserved += room
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._segments += 1
        return Block(room, (self._segments, 0), small)

    def _split(self, block: Block, size: int) -> None:
        """Leave what exceeds ``size`` to others, if it is worth keeping."""
        rest = block.size - size
        if rest < GRAIN if block.small else rest <= SMALL_REQUEST:
            return
        segment, offset = block.order
        remainder = Block(rest, (segment, offset + size), block.small, True, block, block.after)
        if block.after is not None:
            block.after.before = remainder
        block.after, block.size = remainder, size
        self._pools[block.small].add(remainder)

    @staticmethod
    def _absorb(first: Block, second: Block) -> Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first
