"""What the memory checks of one adapter are about: its files, its base, a workload, a card."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.adapter import Adapter
from pytest_lora.errors import CannotRun
from pytest_lora.loading import FORMATS, BaseSpec, base_config, meta_model, spec_for, weight_headers
from pytest_lora.memory.predict import make_workload, predict_workload
from pytest_lora.memory.profiles import GpuProfile, find_profile
from pytest_lora.memory.records import MemoryPrediction, NotPredictable
from pytest_lora.memory.workload import Workload
from pytest_lora.subject import resized_rows

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["DEFAULTS", "MemoryPlan"]

DEFAULTS: Mapping[str, Any] = {"batch": 1, "sequence": 1024}
"""What is done where nothing is said.  An example, not advice: say what your jobs do."""
_ONLY = {
    "train_step": (
        "batch", "sequence", "accumulation", "optimizer", "checkpointing", "quantisation",
        "padding", "attention", "autocast"
    ),
    "inference": (
        "batch", "sequence", "new_tokens", "padding", "attention", "quantisation", "autocast"
    ),
    "load": ("attention", "quantisation"),
    "merge": ("attention", "quantisation"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """An adapter, the folder of its base, and what is done with them.

    Attributes:
        adapter: the adapter's files.
        base: the base's folder; without a GPU only its configuration is read.
        dtype: the base is loaded in; "auto" is the checkpoint's own.
        profile: the card that is predicted for.
        workload: words of ``memory_workload``: batch, sequence, optimizer and so on.
        subject: the adapter on its loaded base, where that is on a GPU: then it is measured.
    """

    adapter: Adapter
    base: Path
    dtype: str = "auto"
    profile: str | GpuProfile = "h100-80gb"
    workload: Mapping[str, Any] = field(default_factory=dict)
    subject: Subject | None = None

    def make(self, job: str) -> Workload:
        """The workload of one job.

        Raises:
            CannotRun: the base's configuration cannot be read, or its format is not known.
            UsageError: a word of :attr:`workload` has a value that cannot be meant.
        """
        spec = spec_for(self.base, self.adapter, device="cpu", dtype=self.dtype)
        words = {**DEFAULTS, **self.workload}
        taken = _ONLY[job]
        return make_workload(
            _config(spec, self.adapter),
            self.adapter,
            job=job,
            dtype=spec.dtype or _stored(spec.path),
            **{key: value for key, value in words.items() if key in taken},
        )

    def predict(self, job: str) -> MemoryPrediction:
        """What ``job`` takes on :attr:`profile`, with its timeline.

        Raises:
            NotPredictable: its memory depends on something a trace does not know.
        """
        return predict_workload(self.make(job), find_profile(self.profile), timeline=True)


def _config(spec: BaseSpec, adapter: Adapter) -> Any:
    """The base's configuration with the labels and the vocabulary that the adapter brings."""
    config = base_config(spec.path)
    if spec.num_labels is not None:
        config.num_labels = spec.num_labels
    rows = resized_rows(adapter, meta_model(spec.model_class, config))
    if rows is not None:
        config.get_text_config().vocab_size = rows
    if getattr(config, "quantization_config", None):
        raise NotPredictable(
            f"{spec.path} is stored quantised; what such a base takes is predicted from the plain "
            "base and memory_workload quantisation=nf4"
        )
    return config


def _stored(path: Path) -> torch.dtype:
    """The format ``dtype="auto"`` means: the configuration's, else that of the first weight."""
    config = base_config(path)
    for name in ("dtype", "torch_dtype"):
        found = getattr(config, name, None)
        if isinstance(found, torch.dtype):
            return found
    with contextlib.suppress(CannotRun):
        for header in weight_headers(path):
            for info in header.tensors.values():
                dtype = FORMATS.get(info.dtype)
                if dtype is not None and dtype.is_floating_point:
                    return dtype
    raise CannotRun(
        f"{path}: neither the configuration nor weights there say in which format the base is "
        "loaded; say it with --lora-dtype"
    )
