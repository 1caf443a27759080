"""Adapter folders as values: a configuration and tensors, and the one-line faults to put in them.

The faults are those adapters are found with; each names the check that is meant for it.  They work
on the value, so that a property test can draw a sound folder, break it in one way, and shrink.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

__all__ = ["FAULTS", "AdapterFolder", "Fault"]


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter's folder holds.

    Attributes:
        config: adapter_config.json.
        tensors: adapter_model.safetensors.
        cut: bytes taken off the end of the weights file.
        others: further files by name.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    cut: int = 0
    others: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the files into ``folder``, which is made if need be; returns it."""
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        weights = save({name: t.contiguous() for name, t in self.tensors.items()})
        kept = weights[: len(weights) - self.cut]
        (folder / "adapter_model.safetensors").write_bytes(kept)
        for name, content in self.others.items():
            (folder / name).write_bytes(content)
        return folder

    def changed(self, **config: Any) -> AdapterFolder:
        """The same with other entries in its configuration."""
        return replace(self, config={**self.config, **config})

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> AdapterFolder:
        """The same with other tensors."""
        return replace(self, tensors=dict(tensors))

    @property
    def first(self) -> str:
        """Name of the first tensor."""
        return next(iter(self.tensors))


@dataclass(frozen=True)
class Fault:
    """One thing wrong.

    Attributes:
        name: short name.
        check: id of the check that has to fail.
        apply: a sound folder to one with the fault.
    """

    name: str
    check: str
    apply: Callable[[AdapterFolder], AdapterFolder]


def _nan(folder: AdapterFolder) -> AdapterFolder:
    broken = folder.tensors[folder.first].clone()
    broken.view(-1)[0] = torch.nan
    return folder.with_tensors({**folder.tensors, folder.first: broken})


def _lost(folder: AdapterFolder) -> AdapterFolder:
    kept = dict(folder.tensors)
    del kept[folder.first]
    return folder.with_tensors(kept)


def _foreign(folder: AdapterFolder) -> AdapterFolder:
    key = folder.first.replace("lora_A.", "lora_A.other.")
    return folder.with_tensors({**folder.tensors, key: torch.ones(1, 1)})


def _renamed(folder: AdapterFolder) -> AdapterFolder:
    return folder.with_tensors({f"_orig_mod.{name}": t for name, t in folder.tensors.items()})


def _emptied(folder: AdapterFolder) -> AdapterFolder:
    return folder.with_tensors({**folder.tensors, folder.first: torch.zeros(0)})


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("not a number", "finite_weights", _nan),
        Fault("a tensor is missing", "config_matches_weights", _lost),
        Fault("a tensor of another adapter", "config_matches_weights", _foreign),
        Fault("keys of a compiled model", "config_matches_weights", _renamed),
        Fault("an emptied tensor", "config_matches_weights", _emptied),
        Fault(
            "another rank in the configuration",
            "config_matches_weights",
            lambda folder: folder.changed(r=folder.config["r"] + 1),
        ),
        Fault(
            "a pattern that matches nothing",
            "config_matches_weights",
            lambda folder: folder.changed(alpha_pattern={"q_porj": 7}),
        ),
        Fault("a file cut short", "adapter_files", lambda folder: replace(folder, cut=4)),
        Fault(
            "a pickle beside the weights",
            "adapter_files",
            lambda folder: replace(folder, others={"adapter_model.bin": b"\x80\x04N."}),
        ),
    )
}
