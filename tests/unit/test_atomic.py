"""Files survive what happens to their writers: kills, Ctrl-C, full disks, other writers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_lora.atomic import alone_in, write_whole
from pytest_lora.errors import UsageError
from pytest_lora.memory.golden import read_baseline, record
from pytest_lora.nll_cache import NllCache

resource = pytest.importorskip("resource", reason="limits and signals are those of POSIX")

SIZE = 300_000
# A shell's background jobs are born deaf to SIGINT, and so is all that they start.
WRITER = f"""
import signal
import sys
from pathlib import Path
from pytest_lora.atomic import write_whole
signal.signal(signal.SIGINT, signal.default_int_handler)
path, letter = Path(sys.argv[1]), sys.argv[2]
while True:
    write_whole(path, letter * {SIZE})
"""
RECORDER = """
import sys
from pathlib import Path
from pytest_lora.memory.golden import record
for number in range(20):
    record(Path(sys.argv[1]), f"{sys.argv[2]}{number}", {"live_bytes": number})
"""
LEDGER = """
import sys
from pytest_lora.nll_cache import NllCache
ledger = NllCache(sys.argv[1]).ledger({"of": "all"})
for batch in range(10**9):
    ledger.put(batch, [[float(batch), 0.1]] * 50)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def whole(path: Path) -> bool:
    """Nothing but one letter, as often as it was written; true before the first write, too."""
    text = path.read_text() if path.exists() else ""
    return not text or text == text[0] * SIZE


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_two_write_at_once_is_always_one_of_the_two(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    writers = [start(WRITER, path, letter) for letter in "ab"]
    try:
        wait_for(path.exists)
        for _ in range(100):
            assert whole(path)
            time.sleep(0.001)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert whole(path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_writer_that_is_ended_leaves_a_whole_file(number: int, tmp_path: Path) -> None:
    path, draws = tmp_path / "report.json", random.Random(0)
    for letter in "abcd":
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), letter], stderr=subprocess.DEVNULL
        )
        wait_for(lambda now=letter: path.exists() and path.read_text()[:1] == now)
        time.sleep(draws.uniform(0, 0.05))
        writer.send_signal(number)
        writer.wait(timeout=30)
        assert whole(path)


def limited(size: int) -> Callable[[], None]:
    """No file of the process grows beyond ``size``: to a program the same as a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_one_message_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "old")
    writer = subprocess.run(
        [sys.executable, "-c", WRITER, str(path), "a"],
        preexec_fn=limited(SIZE // 2),
        capture_output=True,
        text=True,
        check=False,
    )
    told = writer.stderr.strip().splitlines()[-1]
    assert told.endswith(f"{path}: cannot write the report: File too large")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_results_on_a_full_disk_are_kept_up_to_the_last_whole_one(tmp_path: Path) -> None:
    pytest.importorskip("filelock")
    code = LEDGER.replace("range(10**9)", "range(200)") + "print(ledger._notes)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        preexec_fn=limited(30_000),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("cannot write") == 1
    assert "File too large" in done.stdout
    cache = NllCache(tmp_path)
    found = cache.ledger({"of": "all"})
    assert 10 < len(found) < 200
    assert all(found.get(batch, 50) for batch in range(len(found)))
    found.put(777, [[1.0]])
    assert NllCache(tmp_path).ledger({"of": "all"}).get(777, 1) == [[1.0]]
    assert not cache.notes


def test_a_ledger_is_mended_without_losing_what_others_add_meanwhile(tmp_path: Path) -> None:
    pytest.importorskip("filelock")
    first = NllCache(tmp_path).ledger({"of": "all"})
    for batch in range(3):
        first.put(batch, [[float(batch)]])
    [file] = tmp_path.glob("*.nll")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"0" + lines[2][1:], *lines[3:]]))
    late = NllCache(tmp_path).ledger({"of": "nothing else"})  # has not read the damage
    late._path, late._key = file, first._key
    late.put(9, [[9.0]])
    cache = NllCache(tmp_path)
    mended = cache.ledger({"of": "all"})
    assert "1 damaged" in cache.notes[0]
    again = NllCache(tmp_path)
    found = again.ledger({"of": "all"})
    assert [b for b in range(10) if found.get(b, 1)] == [0, 2, 9] == sorted(mended._batches)
    assert not again.notes
    assert not list(tmp_path.glob(".lora-*"))


def test_workers_that_record_into_one_baseline_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    workers = [start(RECORDER, path, letter) for letter in "abc"]
    assert [worker.wait() for worker in workers] == [0] * 3
    assert set(read_baseline(path)) == {f"{letter}{n}" for letter in "abc" for n in range(20)}
    json.loads(path.read_text())
    assert os.listdir(tmp_path) == ["memory.json"]


def test_a_baseline_in_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        record(tmp_path / "gone" / "memory.json", "a", {"live_bytes": 1})


def test_a_killed_process_holds_no_folder(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from pytest_lora.atomic import alone_in
with alone_in(Path(sys.argv[1])):
    Path(sys.argv[1], "held").touch()
    time.sleep(600)
"""
    holder = start(code, tmp_path)
    wait_for((tmp_path / "held").exists)
    holder.kill()
    holder.wait()
    with alone_in(tmp_path):
        pass
