"""Results on disk: shared, bounded, and never trusted when damaged."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_lora import nll_cache
from pytest_lora.errors import UsageError
from pytest_lora.nll_cache import NllCache, default_folder

pytest.importorskip("filelock")
KEY = {"base": "abc", "texts": ["x"], "versions": {"torch": "2.13.0"}}
ROWS = [[0.1 + 0.2, 3.0], [1e-300, 5e-324]]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.nll"))


def test_what_was_put_is_there_bit_for_bit_for_the_next_run(tmp_path: Path) -> None:
    NllCache(tmp_path).ledger(KEY).put(7, ROWS)
    found = NllCache(tmp_path).ledger(KEY)
    assert found.get(7, 2) == ROWS
    assert len(found) == 1
    assert found.get(7, 3) is None
    assert found.get(8, 2) is None


@pytest.mark.parametrize("change", [{"base": "abd"}, {"more": 1}, {"texts": ["y"]}])
def test_results_of_anything_else_are_not_found(change: dict[str, object], tmp_path: Path) -> None:
    NllCache(tmp_path).ledger(KEY).put(0, ROWS)
    assert NllCache(tmp_path).ledger(KEY | change).get(0, 2) is None  # type: ignore[arg-type]


def test_without_a_folder_results_live_as_long_as_the_run() -> None:
    ledger = NllCache(None).ledger(KEY)
    ledger.put(0, ROWS)
    assert ledger.get(0, 2) == ROWS
    ledger.refresh()
    assert NllCache(None).ledger(KEY).get(0, 2) is None


def test_numbers_that_are_none_are_not_kept(tmp_path: Path) -> None:
    NllCache(tmp_path).ledger(KEY).put(0, [[math.nan], [math.inf]])
    assert NllCache(tmp_path).ledger(KEY).get(0, 2) is None


@pytest.mark.parametrize("cut", [1, 10, 30, 80])
def test_half_a_line_of_a_killed_run_counts_as_nothing(cut: int, tmp_path: Path) -> None:
    ledger = NllCache(tmp_path).ledger(KEY)
    ledger.put(0, ROWS)
    ledger.put(1, ROWS)
    [path] = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    cache = NllCache(tmp_path)
    resumed = cache.ledger(KEY)
    assert (resumed.get(0, 2), resumed.get(1, 2)) == (ROWS, None)
    resumed.put(1, ROWS)
    assert NllCache(tmp_path).ledger(KEY).get(1, 2) == ROWS
    assert not cache.notes


def test_a_file_cut_within_its_first_line_is_begun_again(tmp_path: Path) -> None:
    NllCache(tmp_path).ledger(KEY).put(0, ROWS)
    [path] = files(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    NllCache(tmp_path).ledger(KEY).put(0, ROWS)
    assert NllCache(tmp_path).ledger(KEY).get(0, 2) == ROWS


def test_a_damaged_line_is_left_out_said_once_and_gone(tmp_path: Path) -> None:
    ledger = NllCache(tmp_path).ledger(KEY)
    for batch in range(3):
        ledger.put(batch, ROWS)
    [path] = files(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"3.0", b"3.5")
    path.write_bytes(b"".join(lines))
    cache = NllCache(tmp_path)
    found = cache.ledger(KEY)
    assert [found.get(batch, 2) for batch in range(3)] == [ROWS, None, ROWS]
    assert cache.notes == [f"{path}: left out 1 damaged lines, to be computed again"]
    again = NllCache(tmp_path)
    assert len(again.ledger(KEY)) == 2
    assert not again.notes


@pytest.mark.parametrize(
    "line",
    [b"[]", b'{"batch": "x", "values": [[1]]}', b'{"batch": 1}', b'{"batch": 1, "values": 3}'],
)
def test_a_line_with_a_right_checksum_may_still_be_nonsense(line: bytes, tmp_path: Path) -> None:
    NllCache(tmp_path).ledger(KEY).put(0, ROWS)
    [path] = files(tmp_path)
    with path.open("ab") as stream:
        stream.write(nll_cache._line(line.decode()).encode())
    cache = NllCache(tmp_path)
    assert len(cache.ledger(KEY)) == 1
    assert len(cache.notes) == 1


def test_a_file_that_is_another_ledger_is_not_believed(tmp_path: Path) -> None:
    """Digests of 128 bits do not collide, but people copy files."""
    NllCache(tmp_path).ledger(KEY).put(0, ROWS)
    [path] = files(tmp_path)
    other = NllCache(tmp_path / "other")
    other.ledger({"base": "other"}).put(0, [[9.0], [9.0]])
    [strange] = files(tmp_path / "other")
    path.write_bytes(strange.read_bytes())
    cache = NllCache(tmp_path)
    assert cache.ledger(KEY).get(0, 2) is None
    assert len(cache.notes) == 1


def test_a_run_sees_what_another_adds_meanwhile(tmp_path: Path) -> None:
    mine, theirs = NllCache(tmp_path).ledger(KEY), NllCache(tmp_path).ledger(KEY)
    theirs.put(0, ROWS)
    assert mine.get(0, 2) is None
    mine.refresh()
    assert mine.get(0, 2) == ROWS
    theirs.put(1, ROWS)
    mine.refresh()
    assert mine.get(1, 2) == ROWS


WRITER = """
import sys
from pytest_lora.nll_cache import NllCache
ledger = NllCache(sys.argv[1]).ledger({"shared": True})
for batch in range(int(sys.argv[2]), 200, 4):
    ledger.put(batch, [[float(batch), 0.1]] * 50)
print("done", flush=True)
"""


def test_processes_write_to_one_ledger_at_the_same_time(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(first)])
        for first in range(4)
    ]
    assert [process.wait() for process in running] == [0] * 4
    cache = NllCache(tmp_path)
    found = cache.ledger({"shared": True})
    assert not cache.notes
    assert [found.get(batch, 50) for batch in range(200)] == [
        [[float(batch), 0.1]] * 50 for batch in range(200)
    ]


ENDLESS = WRITER.replace("range(int(sys.argv[2]), 200, 4)", "range(10**9)")


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed there by other means")
def test_a_killed_writer_damages_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path), "0"])
    deadline = time.monotonic() + 30
    while not files(tmp_path) or files(tmp_path)[0].stat().st_size < 100_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    cache = NllCache(tmp_path)
    found = cache.ledger({"shared": True})
    written = len(found)
    assert written > 50
    assert all(found.get(batch, 50) for batch in range(written))
    found.put(written, [[1.0]])
    assert NllCache(tmp_path).ledger({"shared": True}).get(written, 1) == [[1.0]]
    assert not cache.notes


def test_the_folder_stays_within_its_limit_and_loses_the_unused_first(tmp_path: Path) -> None:
    cache = NllCache(tmp_path, limit=3000)
    for number in range(6):
        cache.ledger({"number": number}).put(0, [[0.123456789]] * 50)
        for path in files(tmp_path):
            os.utime(path, (path.stat().st_mtime - 10,) * 2)
        cache.ledger({"number": 0})  # used all the time
    sizes = [path.stat().st_size for path in files(tmp_path)]
    assert sum(sizes) <= 3000 + max(sizes)
    kept = [n for n in range(6) if NllCache(tmp_path).ledger({"number": n}).get(0, 50)]
    assert kept[0] == 0
    assert kept[-1] == 5
    assert len(kept) < 6


def test_where_nothing_can_be_written_runs_go_on_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = NllCache(blocked / "cache")
    assert cache.folder is None
    assert [note.startswith(f"no cache in {blocked}") for note in cache.notes] == [True]
    cache.ledger(KEY).put(0, ROWS)


def test_a_folder_that_vanishes_is_said_in_one_line(tmp_path: Path) -> None:
    cache = NllCache(tmp_path / "cache")
    ledger = cache.ledger(KEY)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("")
    ledger.put(0, ROWS)
    ledger.put(1, ROWS)
    assert len(cache.notes) == 1
    assert ledger.get(1, 2) == ROWS


def test_a_lock_that_is_never_given_up_does_not_hang_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    monkeypatch.setattr(nll_cache, "_PATIENCE", 0.05)
    cache = NllCache(tmp_path)
    ledger = cache.ledger(KEY)
    with filelock.FileLock(str(tmp_path / ".lock"), is_singleton=False):
        ledger.put(0, ROWS)
    assert len(cache.notes) == 1
    assert "locked for" in cache.notes[0]


def test_the_default_folder_follows_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_LORA_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    assert NllCache.default().folder == tmp_path / "mine"
    monkeypatch.delenv("PYTEST_LORA_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, variable, given, plain in (
        ("linux", "XDG_CACHE_HOME", "x/pytest-lora", ".cache/pytest-lora"),
        ("win32", "LOCALAPPDATA", "x/pytest-lora", "AppData/Local/pytest-lora"),
        ("darwin", "NONE", "Library/Caches/pytest-lora", "Library/Caches/pytest-lora"),
    ):
        monkeypatch.setattr(nll_cache.sys, "platform", platform)
        monkeypatch.setenv(variable, str(tmp_path / "x"))
        assert default_folder() == tmp_path / given
        monkeypatch.delenv(variable)
        assert default_folder() == tmp_path / plain


def test_a_negative_limit_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave it out"):
        NllCache(tmp_path, limit=-1)
