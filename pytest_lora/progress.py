"""How far a long evaluation has come, on one line of the terminal that is written over.

Nothing is shown where nobody watches: in a pipe, in a CI log, in a worker, or with ``-q``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_lora.report.text import number

if TYPE_CHECKING:
    import pytest

__all__ = ["ProgressLine", "progress_line", "progress_text"]

INTERVAL = 0.5
"""Seconds between two looks of a person at most; writing more often only costs."""


def progress_text(done: int, total: int, estimate: float | None, seconds_left: float | None) -> str:
    """``120 of 512, 0.0312 so far, about 40 s left``."""
    parts = [f"{done:,} of {total:,}"]
    if estimate is not None:
        parts.append(f"{number(estimate)} so far")
    if seconds_left is not None:
        parts.append(f"about {_duration(seconds_left)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class ProgressLine:
    """Shows progress of one test; :meth:`clear` leaves nothing of it on the screen.

    Args:
        reporter: pytest's terminal reporter.
        capture: its capture manager, None with ``-s``.
        label: what is evaluated.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        reporter: Any,
        capture: Any,
        label: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reporter, self._capture, self._label = reporter, capture, label
        self._clock, self._next = clock, clock() + INTERVAL
        self._shown = False

    def __call__(
        self, done: int, total: int, estimate: float | None, seconds_left: float | None
    ) -> None:
        """Show the news, unless the last were shown a moment ago."""
        if self._clock() < self._next:
            return
        self._next = self._clock() + INTERVAL
        text = f"  {self._label}: {progress_text(done, total, estimate, seconds_left)}"
        self._write(text)
        self._shown = True

    def clear(self) -> None:
        """Empty the line, if anything was shown on it."""
        if self._shown:
            self._write("")
            self._shown = False

    def _write(self, text: str) -> None:
        if self._capture is None:
            self._rewrite(text)
            return
        with self._capture.global_and_fixture_disabled():
            self._rewrite(text)

    def _rewrite(self, text: str) -> None:
        if not self._shown:
            self._reporter.ensure_newline()  # the line with the dots stays as it is
        width = self._reporter._tw.fullwidth - 1
        self._reporter.rewrite(text[:width], erase=True)


def progress_line(config: pytest.Config, label: str) -> ProgressLine | None:
    """A line for ``label``, or None where nobody watches."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    watched = reporter is not None and reporter.isatty and config.get_verbosity() >= 0
    if not watched or os.environ.get("CI") or hasattr(config, "workerinput"):
        return None
    if config.pluginmanager.hasplugin("dsession"):
        return None  # the workers evaluate, and have no terminal
    return ProgressLine(reporter, config.pluginmanager.getplugin("capturemanager"), label)
