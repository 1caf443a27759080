"""Whatever lies in an adapter's folder, the outcome is a verdict or one clear error.

While a folder is judged, an audit hook sees every file that is opened for writing, every process
that is started and every name a pickle asks for, and the process gets half a gigabyte of room: any
of these is a failure.  What the file checks let pass is attached to a model as well.

``LORA_FUZZ_EXAMPLES`` sets how many examples each test tries (``nox -s fuzz``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import torch
from example import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pytest_lora as lora
from pytest_lora.adapter import read_adapter
from pytest_lora.errors import LoraError
from pytest_lora.folders import AdapterFolder
from pytest_lora.records import CheckResult, collecting
from pytest_lora.report.html import html_report
from pytest_lora.report.json_report import build_report, json_text
from pytest_lora.report.markdown import markdown_report
from pytest_lora.report.terminal import summary_lines
from pytest_lora.strategies import adapter_folders
from pytest_lora.subject import Subject, load_base

EXAMPLE = ROOT / "fixtures" / "adapters" / "attention-lora"
SOUND = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
CHECKS = ("adapter_files", "config_matches_weights", "finite_weights", "serving_profile")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
hostile = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
nightly = int(os.environ.get("LORA_FUZZ_EXAMPLES", "0"))
if nightly:
    hostile = settings(hostile, max_examples=nightly)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["LORA", "\x1b[31mred", "a\nb", "../..", "q_proj", "(a+)+$", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern",
        "modules_to_save", "bias", "layers_to_transform", "layers_pattern", "use_rslora",
        "use_dora", "init_lora_weights", "auto_mapping", "base_model_name_or_path", "task_type",
        "exclude_modules", "trainable_token_indices", "fan_in_fan_out", "revision")  # fmt: skip


@contextlib.contextmanager
def written(folder: AdapterFolder) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield folder.write(Path(name) / "adapter")


# ------------------------------------------------------------------------------ what is watched

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DEEDS = frozenset(
    [
        *("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"),
        *("os.truncate", "os.utime", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"),
        *("os.spawn", "os.startfile", "os.system", "subprocess.Popen", "pickle.find_class"),
        *("socket.connect", "socket.bind", "shutil.copyfile", "shutil.move"),
    ]
)
ROOM = 512 << 20
"""Bytes of address space a folder may take while it is judged."""
_watched: list[tuple[str, tuple[Any, ...]]] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hooks stay for good; this one looks only while something is judged."""
    if _watched is None:
        return
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        if flags & _WRITES or (isinstance(mode, str) and set(mode) & set("wax+")):
            _watched.append((event, arguments))
    elif event in _DEEDS:
        _watched.append((event, arguments))


@functools.cache
def _install() -> None:
    """What is imported lazily is imported first: reading a sound folder once is enough."""
    with tempfile.TemporaryDirectory() as name:
        path = AdapterFolder(SOUND, {}).write(Path(name) / "adapter")
        for check in CHECKS:
            with contextlib.suppress(LoraError):
                getattr(lora, f"assert_{check}")(path)
    sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(scratch: str | None = None) -> Iterator[None]:
    """Nothing is written (but below ``scratch``), started, unpickled or sent meanwhile, and memory
    stays within :data:`ROOM`.
    """
    global _watched
    _install()
    _watched = found = []
    try:
        with _little_room():
            yield
    finally:
        _watched = None
    deeds = [f"{event} {given!r}" for event, given in found if not _is_below(given, scratch)]
    assert not deeds, deeds


def _is_below(given: tuple[Any, ...], folder: str | None) -> bool:
    return folder is not None and bool(given) and str(given[0]).startswith(folder + os.sep)


@contextlib.contextmanager
def _little_room() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def printable(text: str) -> None:
    assert text
    assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text), text
    text.encode("utf-8")


def judge(path: Path) -> bool:
    """Every file check; anything but a verdict or an error of ours is a defect of ours.

    Whether all of them passed.
    """
    before = sorted(str(item) for item in path.parent.rglob("*"))
    sound = True
    with watched(), collecting() as results:
        for check in CHECKS:
            try:
                getattr(lora, f"assert_{check}")(path)
            except LoraError as error:
                sound = False
                printable(str(error))
        shown(results)
    assert sorted(str(item) for item in path.parent.rglob("*")) == before
    return sound


ENVIRONMENT = {"versions": {"torch": None}, "platform": "x", "adapters": {}, "exit_status": 0}


def shown(results: list[CheckResult]) -> None:
    """No report holds anything raw: not the terminal, HTML, Markdown or JSON."""
    for line, _ in summary_lines(results, {}, width=100, detail=True):
        assert line.isprintable()
    printable(html_report(results, ENVIRONMENT))
    printable(markdown_report(results, ENVIRONMENT))
    printable(json_text(build_report(results, ENVIRONMENT)))


@hostile
@given(adapter_folders(), st.data())
def test_bytes_of_the_weights_flipped(folder: AdapterFolder, data: st.DataObject) -> None:
    with written(folder) as path:
        content = bytearray((path / WEIGHTS).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            where = data.draw(st.integers(0, min(len(content) - 1, 400)))
            content[where] = data.draw(st.integers(0, 255))
        (path / WEIGHTS).write_bytes(content)
        judge(path)


@hostile
@given(
    adapter_folders(), st.dictionaries(st.sampled_from(KEYS), json_values, min_size=1, max_size=3)
)
def test_configurations_of_every_wrong_shape(
    folder: AdapterFolder, changes: dict[str, Any]
) -> None:
    with written(folder) as path:
        text = json.dumps({**folder.config, **changes})
        (path / CONFIG).write_text(text, encoding="utf-8")
        judge(path)


@hostile
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"a":' * 5_000 + b"1" + b"}" * 5_000)
@example(b'{"r": 1e999}')
@example(b'{"r": ' + b"9" * 10_000 + b"}")
@example(b'\xff\xfe{"r": 1}')
def test_configurations_that_are_none(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = AdapterFolder({}, {}).write(Path(name) / "adapter")
        (path / CONFIG).write_bytes(content)
        judge(path)


headers = st.dictionaries(
    st.text(max_size=12) | st.sampled_from(["__metadata__", "base_model.model.a.lora_A.weight",
                                            "\x1b[2J.lora_A.weight", "a\nb.lora_B.weight"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "X", ""]) | json_values,
            "shape": st.lists(st.integers(-1, 2**64), max_size=3) | json_values,
            "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | json_values,
        },
    )
    | json_values,
    max_size=3,
)  # fmt: skip


@hostile
@given(adapter_folders(), headers, st.integers(-9, 9), st.binary(max_size=40))
def test_headers_that_lie(folder: AdapterFolder, header: Any, off: int, rest: bytes) -> None:
    with written(folder) as path:
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        length = max(len(text) + off, 0).to_bytes(8, "little")
        (path / WEIGHTS).write_bytes(length + text + rest)
        judge(path)


@hostile
@given(adapter_folders(), st.text(min_size=1, max_size=10), st.data())
def test_odd_names_of_tensors_and_files(
    folder: AdapterFolder, odd: str, data: st.DataObject
) -> None:
    safe = odd.encode("utf-8", "ignore").decode().replace("/", "_").replace("\0", "_") or "x"
    renamed = {name.replace("q_proj", safe).replace("v_proj", f"\x1b]0;{safe}\x07"): tensor
               for name, tensor in folder.tensors.items()}  # fmt: skip
    with written(folder.with_tensors(renamed)) as path:
        if data.draw(st.booleans()) and safe not in (".", ".."):
            with contextlib.suppress(OSError):
                (path / f"\x1b[31m{safe}\n.bin").write_bytes(b"\x80\x04N.")
        judge(path)


_base: list[Any] = []


def attach(path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file checks let through works on a model, or is refused in one message."""
    if not _base:
        sound = read_adapter(EXAMPLE)
        _base.append(load_base(ROOT / "fixtures" / "base", adapter=sound))
        lora.assert_disable_equals_base(Subject(sound, _base[0]))  # for what is imported lazily
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with watched(str(scratch)), collecting() as results:
        try:
            subject = Subject(read_adapter(path), _base[0])
            lora.assert_disable_equals_base(subject)
        except LoraError as error:
            printable(str(error))
        shown(results)
    assert not list(scratch.iterdir())


@settings(hostile, max_examples=max(40, nightly // 4))
@given(
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=2),
    st.integers(0, 3),
    st.data(),
)
def test_what_the_file_checks_let_through_is_attached_or_refused(
    changes: dict[str, Any], flips: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        path, scratch = Path(name) / "adapter", Path(name) / "scratch"
        shutil.copytree(EXAMPLE, path)
        scratch.mkdir()
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        (path / CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")
        content = bytearray((path / WEIGHTS).read_bytes())
        for _ in range(flips):
            where = data.draw(st.integers(0, len(content) - 1))
            content[where] = data.draw(st.integers(0, 255))
        (path / WEIGHTS).write_bytes(content)
        if judge(path):
            attach(path, scratch, monkeypatch)


def _fifo(path: Path, file: str) -> None:
    (path / file).unlink()
    os.mkfifo(path / file)


def _link_out(path: Path, file: str) -> None:
    (path / file).unlink()
    (path / file).symlink_to("/etc/hostname")


def _link_to_itself(path: Path, file: str) -> None:
    (path / file).unlink()
    (path / file).symlink_to(file)


def _directory(path: Path, file: str) -> None:
    (path / file).unlink()
    (path / file).mkdir()


def _device(path: Path, file: str) -> None:
    (path / file).unlink()
    (path / file).symlink_to("/dev/zero")


def _empty(path: Path, file: str) -> None:
    (path / file).write_bytes(b"")


def _sparse(path: Path, file: str) -> None:
    """A terabyte that takes no room: reading it whole would not end."""
    with (path / file).open("r+b") as handle:
        handle.truncate(1 << 40)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX files")
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    "put", [_fifo, _link_out, _link_to_itself, _directory, _device, _empty, _sparse]
)
def test_things_that_are_no_plain_file(
    put: Callable[[Path, str], None], file: str, tmp_path: Path
) -> None:
    path = AdapterFolder(SOUND, {}).write(tmp_path / "adapter")
    put(path, file)
    judge(path)
    with pytest.raises(LoraError):
        lora.assert_adapter_files(path)


# ------------------------------------------------------------------------------ the watch itself


class Obeys:
    """A pickle of this calls a function as it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.getcwd, ())


def _write(path: Path) -> None:
    path.write_bytes(b"x")


def _start(path: Path) -> None:
    subprocess.run(["true"], check=True)


def _unpickle(path: Path) -> None:
    pickle.loads(pickle.dumps(Obeys()))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no program named true")
@pytest.mark.parametrize("deed", [_write, _start, _unpickle, _remove])
def test_what_must_not_happen_is_seen(deed: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"open|subprocess|pickle|remove"), watched():
        deed(tmp_path / "x")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_memory_beyond_the_room_is_not_to_be_had() -> None:
    with pytest.raises(RuntimeError, match="allocate memory"), watched():
        torch.zeros(2 * ROOM, dtype=torch.uint8)
