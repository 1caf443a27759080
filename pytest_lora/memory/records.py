"""What was found out about a step's memory: frozen, JSON-plain records, all sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from pytest_lora.errors import CannotRun
from pytest_lora.records import Json
from pytest_lora.sizes import format_bytes

__all__ = [
    "CATEGORIES",
    "Fit",
    "LargeTensor",
    "MemoryPeak",
    "MemoryPrediction",
    "Moment",
    "NotPredictable",
    "grouped",
]

CATEGORIES = {
    "frozen": "frozen base",
    "trainable": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "batch": "batch",
    "logits": "logits",
    "forward": "forward",
    "backward": "backward",
    "workspace": "kernel workspace",
}
"""What live bytes are counted under, and what messages call it.

``optimizer`` is the optimizer's state and what its step makes; ``logits`` every tensor whose last
dimension is the vocabulary; ``forward`` what the forward pass made and something still holds (the
activations saved for backward, above all); ``backward`` what the backward pass made, the recomputed
forward of a checkpointed block included.
"""


class NotPredictable(CannotRun):
    """What was asked cannot be predicted; the message names it.  Never a wrong number instead."""


class Fit(StrEnum):
    """Whether a predicted peak stays below a ceiling."""

    FITS = "fits"
    TOO_CLOSE = "too close to call"
    DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True, slots=True)
class LargeTensor:
    """Storage that was alive at the peak.

    Attributes:
        bytes: its size.
        category: a key of :data:`CATEGORIES`.
        op: the operator that made it; the tensor's own name for one that was there before.
        module: the module that was running, or whose backward was; empty where there is none.
        count: how many like it (same size, op and kind of module) were alive, itself included.
    """

    bytes: int
    category: str
    op: str
    module: str
    count: int = 1

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        place = f" in {self.module}" if self.module else ""
        return f"{times}{format_bytes(self.bytes)} {CATEGORIES[self.category]}: {self.op}{place}"


class Moment(NamedTuple):
    """What was alive right after an operator: bytes in the order of :data:`CATEGORIES`."""

    phase: str
    op: str
    columns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The peak of a step's live tensor bytes and what made it up.

    Attributes:
        live: largest sum of live storages, kernel workspace of the running operator included.
        by_category: what ``live`` is made of; the values add up to it.
        op, module, phase: what ran then.
        phases: the largest sum during each phase.
        largest: the largest storages alive then, largest first, equal ones counted together.
        timeline: what was alive after each operator, where that was asked for.
    """

    live: int
    by_category: Mapping[str, int]
    op: str
    module: str
    phase: str
    phases: Mapping[str, int]
    largest: tuple[LargeTensor, ...] = ()
    timeline: tuple[Moment, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Json]:
        """The peak as a JSON object, without its timeline."""
        return {
            "live": self.live,
            "by_category": dict(self.by_category),
            "op": self.op,
            "module": self.module,
            "phase": self.phase,
            "phases": dict(self.phases),
            "largest": [asdict(tensor) for tensor in self.largest],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryPeak:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "largest": tuple(LargeTensor(**item) for item in data["largest"])})

    def lines(self) -> list[str]:
        """The breakdown in words, one fact a line."""
        shares = sorted(self.by_category.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{CATEGORIES[key]} {format_bytes(size)}" for key, size in shares if size)
        place = f" of {self.module}" if self.module else ""
        return [
            f"at the peak: {parts}",
            f"peak at {self.op}{place}, {self.phase}",
            *(f"alive then: {tensor}" for tensor in self.largest[:5]),
        ]


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """Predicted peak of CUDA tensor memory of one step.  A model of the CUDA path, not a promise.

    It stands for what ``torch.cuda.max_memory_allocated`` would report, less what was allocated
    before: for this configuration, these library versions and these kernels.  The CUDA context and
    fragmentation are left out.

    Attributes:
        peak: live bytes at the peak, sizes rounded up to 512 B as the caching allocator does.
        allocated: the peak of the replayed allocator's blocks; None where depth was extrapolated.
        reserved: the peak of its segments, a hint only; None likewise.
        workspaces: cuBLAS workspaces, allocated once and kept.
        margin: relative error the verdict allows for.
        profile: name of the card's profile.
        usable: what that card's allocator can hand out.
        kernels: attention and other kernels assumed, with the number of calls.
        request: what was asked, JSON-plain.
        versions: of the libraries that were traced.
        method: how the number came about, in words.
        seconds: CPU time it took.
        managed: bytes of paged optimizer states, which GPU and host share and CUDA moves; torch's
            allocator does not count them, nor does the prediction.
    """

    peak: MemoryPeak
    allocated: int | None
    reserved: int | None
    workspaces: int
    margin: float
    profile: str
    usable: int
    kernels: Mapping[str, int]
    request: Mapping[str, Json]
    versions: Mapping[str, str]
    method: str
    seconds: float = 0.0
    managed: int = 0

    @property
    def predicted(self) -> int:
        """The predicted peak: allocator blocks where they were replayed, plus the workspaces."""
        held = self.peak.live if self.allocated is None else self.allocated
        return held + self.workspaces

    @property
    def at_most(self) -> int:
        """The predicted peak with its margin (which the workspaces do not need)."""
        return self.predicted + int((self.predicted - self.workspaces) * self.margin)

    def fit(self, ceiling: int | None = None) -> Fit:
        """Whether the peak stays at or below ``ceiling`` bytes; default: what the card has."""
        limit = self.usable if ceiling is None else ceiling
        if self.predicted > limit:
            return Fit.DOES_NOT_FIT
        return Fit.FITS if self.at_most <= limit else Fit.TOO_CLOSE

    def to_dict(self) -> dict[str, Json]:
        """The prediction as a JSON object."""
        return {
            "peak": self.peak.to_dict(),
            "allocated": self.allocated,
            "reserved": self.reserved,
            "workspaces": self.workspaces,
            "margin": self.margin,
            "profile": self.profile,
            "usable": self.usable,
            "kernels": dict(self.kernels),
            "request": dict(self.request),
            "versions": dict(self.versions),
            "method": self.method,
            "seconds": self.seconds,
            "managed": self.managed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryPrediction:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "peak": MemoryPeak.from_dict(data["peak"])})

    def lines(self) -> list[str]:
        """The prediction in words, one fact a line."""
        kernels = ", ".join(f"{name} x{count}" for name, count in sorted(self.kernels.items()))
        return [
            f"predicted peak {format_bytes(self.predicted)} (with margin {self.margin:.0%}: "
            f"{format_bytes(self.at_most)}) on {self.profile}, {self.method}",
            f"assumed kernels: {kernels or 'none to choose'}; cuBLAS workspaces "
            f"{format_bytes(self.workspaces)}",
            *self._beside(),
            *self.peak.lines(),
        ]

    def _beside(self) -> list[str]:
        if not self.managed:
            return []
        size = format_bytes(self.managed)
        return [f"beside it {size} of paged optimizer states, which move to the host if need be"]


def grouped(tensors: Sequence[LargeTensor], limit: int = 8) -> tuple[LargeTensor, ...]:
    """The ``limit`` heaviest kinds of tensors; the same tensor of other layers is one kind."""
    kinds: dict[tuple[int, str, str, str], LargeTensor] = {}
    for tensor in tensors:
        place = ".".join("*" if part.isdigit() else part for part in tensor.module.split("."))
        op = ".".join("*" if part.isdigit() else part for part in tensor.op.split("."))
        key = (tensor.bytes, tensor.category, op, place)
        count = kinds[key].count + 1 if key in kinds else 1
        name = (tensor.op, tensor.module) if count == 1 else (op, place)
        kinds[key] = LargeTensor(tensor.bytes, tensor.category, *name, count)
    heaviest = sorted(kinds.values(), key=lambda kind: (-kind.bytes * kind.count, kind.op))
    return tuple(heaviest[:limit])
