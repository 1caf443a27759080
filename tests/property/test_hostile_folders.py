"""Whatever lies in an adapter's folder, the file checks give a verdict or one clear error."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pytest_lora as lora
from pytest_lora.errors import LoraError
from pytest_lora.folders import AdapterFolder
from pytest_lora.strategies import adapter_folders

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


def judge(path: Path) -> None:
    """Every file check; anything but a verdict or an error of ours is a defect of ours."""
    before = sorted(str(item) for item in path.parent.rglob("*"))
    for check in CHECKS:
        try:
            getattr(lora, f"assert_{check}")(path)
        except LoraError as error:
            text = str(error)
            assert text
            assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text), text
            text.encode("utf-8")
    assert sorted(str(item) for item in path.parent.rglob("*")) == before


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
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    path = AdapterFolder(config, {}).write(tmp_path / "adapter")
    put(path, file)
    judge(path)
    with pytest.raises(LoraError):
        lora.assert_adapter_files(path)
