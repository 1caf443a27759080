"""The example base and its adapters, and adapters made wrong from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from example import FIXTURES
from safetensors.torch import load_file, save_file

from pytest_lora.adapter import read_adapter
from pytest_lora.subject import BaseModel, Subject, load_base

WEIGHTS = "adapter_model.safetensors"
ADAPTERS = FIXTURES / "adapters"


def example_subject(adapter: Path | str, base: BaseModel | None = None) -> Subject:
    """An example adapter by name, or one in a folder, on the example base."""
    read = read_adapter(ADAPTERS / adapter)
    return Subject(read, base or load_base(FIXTURES / "base", adapter=read, device="cpu"))


def mutated(name: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of an example adapter with other tensors."""
    shutil.copytree(ADAPTERS / name, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def head_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fully trained output layer of ``saved-head``, (tokens, width)."""
    [head] = [tensor for name, tensor in tensors.items() if "lm_head" in name]
    return head
