"""Which GPUs and how many cores a process may use, found without torch, and each worker's share.

A process that has imported torch may have looked at the devices already, and a device that another
worker was given would be taken; so this is settled in the environment before a worker starts.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_lora.installed import installed_version

__all__ = ["VISIBLE", "cores", "share_of", "visible_devices"]

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"

_LISTED = re.compile(r"\s*(?P<kind>GPU|MIG)\b.*\(UUID: (?P<uuid>(?:GPU|MIG)-[^)\s]+)\)")
_UUIDS = ("GPU-", "MIG-")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_NODES = Path("/dev")


def visible_devices(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The CUDA devices a process with this environment sees, by names CUDA_VISIBLE_DEVICES takes.

    Within an outer CUDA_VISIBLE_DEVICES its own entries, indices, UUIDs and MIG names as they
    stand, by CUDA's rules: what follows an entry that is no device is not seen, and of a list that
    names one twice nothing is.  Without it every GPU by its UUID; a GPU that is split into MIG
    instances is these.  Empty where there is no GPU, no driver, or torch was built without CUDA.
    """
    if _torch_is_for_cpus():
        return ()
    if VISIBLE not in environ:
        return tuple(uuid for split in _gpus() for uuid in split)
    count, named = len(_gpus()), []
    for entry in map(str.strip, environ[VISIBLE].split(",")):
        is_index = entry.isdecimal() and int(entry) < count
        if not is_index and not entry.startswith(_UUIDS):
            break
        named.append(entry)
    return tuple(named) if count and len(set(named)) == len(named) else ()


def _torch_is_for_cpus() -> bool:
    version = installed_version("torch")
    return version is None or version.endswith("+cpu")


def _gpus() -> list[tuple[str, ...]]:
    """Of each GPU the names CUDA knows it by: its UUID, or those of its MIG instances."""
    command = ["nvidia-smi", "-L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        # Some containers have the driver and not the tool; indices then count the device files.
        files = [path for path in _NODES.glob("nvidia*") if path.name[6:].isdecimal()]
        return [(str(index),) for index in range(len(files))]
    return _listed(done.stdout) if done.returncode == 0 else []


def _listed(text: str) -> list[tuple[str, ...]]:
    """What ``nvidia-smi -L`` prints: a line per GPU, with indented lines for MIG instances."""
    whole: list[str] = []
    parts: list[list[str]] = []
    for found in filter(None, map(_LISTED.match, text.splitlines())):
        if found["kind"] == "GPU":
            whole.append(found["uuid"])
            parts.append([])
        elif parts:
            parts[-1].append(found["uuid"])
    return [tuple(split or [gpu]) for gpu, split in zip(whole, parts, strict=True)]


def cores() -> int:
    """How many cores this process may use: by its affinity, and by the quota of its container."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # neither macOS nor Windows
        allowed = os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return allowed
    return min(allowed, max(1, int(quota) // int(period))) if quota != "max" else allowed


def share_of(
    worker: int, workers: int, devices: Sequence[str], environ: Mapping[str, str]
) -> dict[str, str]:
    """What to set in the environment of one of several workers.

    Its own one of ``devices``, the next one in turn where there are more workers than these; and as
    many threads as leave a core to each worker, unless ``OMP_NUM_THREADS`` says how many: every
    worker would otherwise start a thread per core.
    """
    share = {VISIBLE: devices[worker % len(devices)]} if devices else {}
    if THREADS not in environ:
        share[THREADS] = str(max(1, cores() // workers))
    return share
