"""The file checks over many adapter folders: time per adapter, and whether memory stays flat.

    python benchmarks/file_checks.py --adapters 1000

Compared in the same process with the least a person would otherwise do to look into an adapter:
parse the configuration, load every tensor with safetensors and ask whether it is finite.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pytest_lora.adapter import read_adapter
from pytest_lora.assertions import (
    assert_adapter_files,
    assert_config_matches_weights,
    assert_finite_weights,
    assert_serving_profile,
)

LAYERS, HIDDEN, RANK = 16, 512, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(folder: Path) -> None:
    """A LoRA adapter of 4 modules in 16 layers, r=8, float32: 4.2 MB."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": list(TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    offset = 0
    for layer in range(LAYERS):
        for target in TARGETS:
            stem = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            for factor, shape in (("lora_A", [RANK, HIDDEN]), ("lora_B", [HIDDEN, RANK])):
                size = RANK * HIDDEN * 4
                header[f"{stem}.{factor}.weight"] = {
                    "dtype": "F32",
                    "shape": shape,
                    "data_offsets": [offset, offset + size],
                }
                offset += size
    text = json.dumps(header).encode()
    values = struct.pack("<256f", *[(i - 128) / 1000 for i in range(256)])
    body = values * (offset // len(values))
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def check(folder: Path) -> None:
    adapter = read_adapter(folder)
    assert_adapter_files(adapter)
    assert_config_matches_weights(adapter)
    assert_finite_weights(adapter)
    assert_serving_profile(adapter)


def by_hand(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    json.loads((folder / "adapter_config.json").read_text())
    for tensor in load_file(folder / "adapter_model.safetensors").values():
        assert torch.isfinite(tensor).all()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(name: str, work: Callable[[Path], None], folders: list[Path]) -> float:
    """Milliseconds per adapter, printed with how peak memory grew after the first tenth."""
    started, middle = time.perf_counter(), 0.0
    for index, folder in enumerate(folders):
        work(folder)
        if index == len(folders) // 10:
            middle = peak_mib()
    per_adapter = (time.perf_counter() - started) / len(folders) * 1000
    growth = peak_mib() - middle
    print(f"{name:<34} {per_adapter:7.2f} ms per adapter; peak memory grew {growth:.1f} MiB")
    return per_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    count = parser.parse_args().adapters
    with tempfile.TemporaryDirectory() as root:
        write_adapter(Path(root) / "0")
        size = (Path(root) / "0" / "adapter_model.safetensors").stat().st_size
        for index in range(1, count):
            # Hard links keep 1,000 folders from needing 4 GB of disk.
            shutil.copytree(Path(root) / "0", Path(root) / str(index), copy_function=_link)
        folders = [Path(root) / str(index) for index in range(count)]
        print(f"{count} adapters of {size / 1e6:.1f} MB")
        ours = run("pytest-lora, four file checks", check, folders)
        by_hand(folders[0])  # imports torch outside the measured time
        theirs = run("load_file and isfinite", by_hand, folders)
        print(f"ratio {ours / theirs:.2f}")


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


if __name__ == "__main__":
    main()
