"""Which GPUs a process sees, told without torch: by a made-up ``nvidia-smi`` and environments."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pytest_lora import devices
from pytest_lora.devices import share_of, visible_devices

ONE, TWO = "GPU-5d5ba0d6-4cd9-4c63-a1a2-1e34f03a4d0b", "GPU-b1028956-cfa2-0990-bf4a-5da9abb51763"
MIG = ("MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb")
TWO_GPUS = f"""\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: {ONE})
GPU 1: NVIDIA H100 80GB HBM3 (UUID: {TWO})
"""
SPLIT = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: {ONE})
  MIG 3g.20gb     Device  0: (UUID: {MIG[0]})
  MIG 3g.20gb     Device  1: (UUID: {MIG[1]})
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {TWO})
"""

needs_sh = pytest.mark.skipif(os.name == "nt", reason="the made-up nvidia-smi is a shell script")


@pytest.fixture(autouse=True)
def torch_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "installed_version", lambda name: "2.13.0")


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts an ``nvidia-smi`` on the path that prints a text and ends with a status."""

    def make(text: str, status: int = 0) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(
            f"#!/bin/sh\n[ \"$1\" = -L ] || exit 9\ncat <<'END'\n{text}END\nexit {status}\n"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


@needs_sh
@pytest.mark.parametrize(
    ("outer", "seen"),
    [
        (None, (ONE, TWO)),
        ("0,1", ("0", "1")),
        ("1", ("1",)),
        (" 1 , 0 ", ("1", "0")),
        (TWO, (TWO,)),
        ("GPU-b1028956", ("GPU-b1028956",)),
        (f"{TWO},0", (TWO, "0")),
        (f"MIG-{ONE}/1/0", (f"MIG-{ONE}/1/0",)),
        ("", ()),
        ("-1", ()),
        ("0,-1,1", ("0",)),
        ("0,2,1", ("0",)),
        ("0,x,1", ("0",)),
        ("NoDevFiles", ()),
        ("0,0", ()),
    ],
)
def test_an_outer_list_is_taken_as_cuda_takes_it(smi, outer: str | None, seen: tuple[str, ...]):
    smi(TWO_GPUS)
    assert visible_devices({} if outer is None else {devices.VISIBLE: outer}) == seen


@needs_sh
def test_a_split_gpu_is_its_instances(smi):
    smi(SPLIT)
    assert visible_devices({}) == (*MIG, TWO)
    assert visible_devices({devices.VISIBLE: MIG[1]}) == (MIG[1],)


@needs_sh
def test_a_driver_that_does_not_answer_is_no_gpu(smi):
    smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9)
    assert visible_devices({}) == ()
    assert visible_devices({devices.VISIBLE: "0"}) == ()


def test_without_the_tool_device_files_are_counted(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "_NODES", tmp_path)
    assert visible_devices({}) == ()
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_devices({}) == ("0", "1")
    assert visible_devices({devices.VISIBLE: "1,2"}) == ("1",)


@needs_sh
@pytest.mark.parametrize("version", ["2.13.0+cpu", None])
def test_a_torch_without_cuda_sees_nothing(smi, monkeypatch, version: str | None):
    smi(TWO_GPUS)
    monkeypatch.setattr(devices, "installed_version", lambda name: version)
    assert visible_devices({}) == ()


def test_devices_go_round_and_cores_are_shared(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 16)
    shares = [share_of(number, 3, (ONE, TWO), {}) for number in range(3)]
    assert [share[devices.VISIBLE] for share in shares] == [ONE, TWO, ONE]
    assert {share[devices.THREADS] for share in shares} == {"5"}
    assert share_of(0, 40, (), {}) == {devices.THREADS: "1"}
    assert share_of(0, 2, (), {devices.THREADS: "7"}) == {}


@pytest.mark.parametrize(
    ("quota", "most"),
    [("max 100000", None), ("150000 100000", 1), ("50000 100000", 1), ("9900000 100000", 99),
     ("nonsense", None)],
)  # fmt: skip
def test_cores_obey_affinity_and_quota(tmp_path: Path, monkeypatch, quota: str, most: int | None):
    monkeypatch.setattr(devices, "_QUOTA", tmp_path / "cpu.max")
    unlimited = devices.cores()
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert devices.cores() == (unlimited if most is None else min(unlimited, most))
    if sys.platform == "linux":
        assert unlimited == len(os.sched_getaffinity(0))
