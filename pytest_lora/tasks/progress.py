"""How far a long evaluation has come; whoever shows it need not know what is evaluated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Pace", "Progress"]


class Progress(Protocol):
    """Told after every batch."""

    def __call__(
        self, done: int, total: int, estimate: float | None, seconds_left: float | None
    ) -> None:
        """Take the news.

        Args:
            done: steps behind; a document is one for each model that is asked about it.
            total: steps in all.
            estimate: what is measured, as far as it is known; None as long as nothing is.
            seconds_left: until the last step, which an early verdict may spare; None as long as
                nothing was computed.
        """


class Pace:
    """Counts steps and extrapolates; what came from a cache tells nothing about the speed."""

    def __init__(
        self, total: int, progress: Progress | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.done = total, 0
        self._progress, self._clock, self._last = progress, clock, clock()
        self._computed, self._seconds = 0, 0.0

    def step(self, count: int, *, computed: bool, estimate: float | None = None) -> None:
        """``count`` more steps are done."""
        now = self._clock()
        if computed:
            self._computed += count
            self._seconds += now - self._last
        self._last = now
        self.done += count
        if self._progress is not None:
            self._progress(self.done, self.total, estimate, self._left())

    def skip(self, count: int) -> None:
        """``count`` steps will not be needed."""
        self.total -= count

    def _left(self) -> float | None:
        if not self._computed:
            return None
        return (self.total - self.done) * self._seconds / self._computed
