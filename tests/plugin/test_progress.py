"""Progress: shown to whoever watches, on one line that is gone afterwards; else nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_lora.progress import INTERVAL, ProgressLine, progress_line, progress_text


class Screen:
    """What pytest's reporter would do to a terminal."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._tw = SimpleNamespace(fullwidth=40)
        self.isatty = True
        self.captured = True

    def ensure_newline(self) -> None:
        self.said.append("\n")

    def rewrite(self, text: str, *, erase: bool) -> None:
        assert erase
        assert not self.captured
        self.said.append(text)

    @contextmanager
    def global_and_fixture_disabled(self) -> Iterator[None]:
        self.captured = False
        yield
        self.captured = True


def line(screen: Screen) -> tuple[ProgressLine, list[float]]:
    now = [0.0]
    return ProgressLine(screen, screen, "drift", lambda: now[0]), now


def test_a_line_is_written_over_and_cleared() -> None:
    screen = Screen()
    shown, now = line(screen)
    for step in range(3):
        now[0] += INTERVAL
        shown(step, 3, None, None)
    shown.clear()
    assert screen.said == ["\n", "  drift: 0 of 3", "  drift: 1 of 3", "  drift: 2 of 3", ""]


def test_what_is_over_soon_shows_nothing() -> None:
    screen = Screen()
    shown, now = line(screen)
    now[0] = INTERVAL / 2
    shown(1, 2, None, None)
    shown.clear()
    assert screen.said == []


def test_a_line_never_wraps() -> None:
    screen = Screen()
    shown, now = line(screen)
    now[0] = INTERVAL
    shown(10**9, 10**9, -1.23456e-5, 4000.0)
    assert len(screen.said[1]) == 39


@pytest.mark.parametrize(
    ("news", "text"),
    [
        ((1, 1000, None, None), "1 of 1,000"),
        ((10, 20, 0.03124, 0.2), "10 of 20, 0.0312 so far, about 1 s left"),
        ((10, 20, None, 89.0), "10 of 20, about 89 s left"),
        ((10, 20, None, 600.0), "10 of 20, about 10 min left"),
        ((10, 20, None, 7500.0), "10 of 20, about 2 h 5 min left"),
    ],
)
def test_the_words(news: Any, text: str) -> None:
    assert progress_text(*news) == text


class _Config:
    def __init__(self, *plugins: str, verbosity: int = 0, reporter: Any = None) -> None:
        self._known = {"terminalreporter": reporter or Screen(), **dict.fromkeys(plugins, "there")}
        self._verbosity = verbosity
        self.pluginmanager = SimpleNamespace(getplugin=self._known.get, hasplugin=self._has)

    def _has(self, name: str) -> bool:
        return name in self._known

    def get_verbosity(self) -> int:
        return self._verbosity


def test_nothing_is_shown_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    pipe = Screen()
    pipe.isatty = False
    assert progress_line(_Config(), "x") is not None  # type: ignore[arg-type]
    assert progress_line(_Config(verbosity=-1), "x") is None  # type: ignore[arg-type]
    assert progress_line(_Config("dsession"), "x") is None  # type: ignore[arg-type]
    assert progress_line(_Config(reporter=pipe), "x") is None  # type: ignore[arg-type]
    monkeypatch.setenv("CI", "true")
    assert progress_line(_Config(), "x") is None  # type: ignore[arg-type]
