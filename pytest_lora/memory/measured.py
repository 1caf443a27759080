"""Memory that a block of code really took: on CUDA devices, or in live tensor bytes on the CPU."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.memory.allocator import round_up
from pytest_lora.memory.livebytes import LiveBytes
from pytest_lora.memory.records import MemoryPeak
from pytest_lora.records import Json, Measurement
from pytest_lora.sizes import format_bytes

__all__ = [
    "DeviceMemory",
    "MeasuredMemory",
    "empty_caches",
    "is_out_of_memory",
    "measure_cpu_memory",
    "measure_gpu_memory",
    "measure_memory_left",
    "synchronise",
]

_EXHAUSTED = re.compile(r"CUDA (driver )?error: (out of memory|CUBLAS_STATUS_ALLOC_FAILED)")
"""Where a device has no room left for a context, a kernel or a handle: no error of the allocator's.
"""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What one device held during a block, in bytes.

    Attributes:
        device: its name, as in ``cuda:0``; ``cpu`` for live tensor bytes.
        allocated: peak of allocated bytes, less what was allocated before.
        reserved: peak of the allocator's segments, less what was reserved before.
        allocated_before, reserved_before: what was there before.
        allocated_after: what was left, less what was allocated before: a leak, unless kept on
            purpose.
    """

    device: str
    allocated: int
    reserved: int
    allocated_before: int = 0
    reserved_before: int = 0
    allocated_after: int = 0

    def __str__(self) -> str:
        return (
            f"{self.device}: peak {format_bytes(self.allocated)} allocated, "
            f"{format_bytes(self.reserved)} reserved, above {format_bytes(self.allocated_before)} "
            f"allocated and {format_bytes(self.reserved_before)} reserved before"
        )

    def to_dict(self) -> dict[str, Json]:
        """The numbers as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class MeasuredMemory:
    """What a block took; filled in when the block ends, also where it ends in an exception.

    Attributes:
        devices: per device.
        peak: what was live at the peak and made by which operator, where that was counted.
    """

    devices: tuple[DeviceMemory, ...] = ()
    peak: MemoryPeak | None = None
    _open: bool = field(default=True, repr=False)

    @property
    def allocated(self) -> int:
        """Peak of allocated bytes of the fullest device.

        Raises:
            CannotRun: the block has not ended yet.
        """
        return max(device.allocated for device in self._ended())

    @property
    def reserved(self) -> int:
        """Peak of reserved bytes of the fullest device."""
        return max(device.reserved for device in self._ended())

    def _ended(self) -> tuple[DeviceMemory, ...]:
        if self._open:
            raise CannotRun("memory is known when the block has ended; read it after the block")
        return self.devices

    def lines(self) -> list[str]:
        """The measurement in words, one fact a line."""
        return [*map(str, self.devices), *(self.peak.lines() if self.peak else ())]


def empty_caches() -> None:
    """Collect garbage and give cached CUDA memory and cuBLAS workspaces back."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.empty_cache()


def synchronise() -> None:
    """Wait for every device that has a context; waiting for another would make one there, which
    takes hundreds of MiB of a device that may be somebody else's, and full.

    Raises:
        RuntimeError: something that ran there has failed.
    """
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", lambda index: True)
    for index in range(torch.cuda.device_count()):
        if has_context(index):
            torch.cuda.synchronize(index)


@contextmanager
def measure_gpu_memory(
    *, breakdown: bool = True, timeline: bool = False
) -> Iterator[MeasuredMemory]:
    """Peak CUDA memory of the block, on every visible device, above what was there before.

    Args:
        breakdown: count live tensors as well, for what the peak consisted of; costs a few
            microseconds an operator.
        timeline: keep what was alive after every operator, to be drawn.

    Raises:
        CannotRun: there is no CUDA device (a skip, unless ``--lora-strict``).
    """
    if not torch.cuda.is_available():
        raise CannotRun(
            "measuring GPU memory needs a CUDA device, and torch sees none here", missing=True
        )
    torch.cuda.init()  # without it the allocators know no device to reset
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    synchronise()
    empty_caches()
    before = [_start(device) for device in devices]
    measured = MeasuredMemory()
    counter = None
    if breakdown or timeline:
        counter = LiveBytes(device="cuda", rounding=round_up, adopt=True, timeline=timeline)
    try:
        with counter or nullcontext():
            yield measured
    finally:
        measured.devices = tuple(
            _end(device, *start) for device, start in zip(devices, before, strict=True)
        )
        measured.peak = counter.peak if counter else None
        measured._open = False


def _start(device: torch.device) -> tuple[int, int]:
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def _end(device: torch.device, allocated: int, reserved: int) -> DeviceMemory:
    return DeviceMemory(
        device=str(device),
        allocated=torch.cuda.max_memory_allocated(device) - allocated,
        reserved=torch.cuda.max_memory_reserved(device) - reserved,
        allocated_before=allocated,
        reserved_before=reserved,
        allocated_after=torch.cuda.memory_allocated(device) - allocated,
    )


@contextmanager
def measure_cpu_memory() -> Iterator[MeasuredMemory]:
    """Peak of live tensor bytes that the block made, exactly, whatever device its tensors are on.

    Tensors from before the block count nothing, also where views of them are made.  This is not the
    process's resident memory, which allocators and other libraries decide.
    """
    measured = MeasuredMemory()
    counter = LiveBytes(adopt=True)
    try:
        with counter:
            yield measured
    finally:
        peak = counter.peak
        measured.devices = (DeviceMemory("cpu", peak.live, peak.live, 0, 0, counter.live),)
        measured.peak = peak
        measured._open = False


def measure_memory_left(cycle: Callable[[], object], *, cycles: int = 3) -> Measurement:
    """Bytes of tensors that ``cycles`` runs of ``cycle()`` made and something still holds.

    It is run once before, since what is made once and kept, such as a table of a library's, is no
    leak; and garbage is collected after each run, so that what is left has an owner.

    Returns:
        Bytes, exactly, on whatever devices; its notes name the largest tensors (of 64 KiB and
        more) with the operators and modules that made them.

    Raises:
        UsageError: ``cycles`` is not a positive whole number.
    """
    if not isinstance(cycles, int) or cycles < 1:
        raise UsageError(f"cycles {cycles!r} is not a positive whole number")
    cycle()
    gc.collect()
    counter = LiveBytes(adopt=True)
    with counter:
        for _ in range(cycles):
            cycle()
            gc.collect()
    return Measurement(
        value=counter.live,
        unit=f"bytes of tensors left by {cycles} cycles",
        count=cycles,
        details={
            "left": [asdict(tensor) for tensor in counter.left()],
            "notes": [f"left: {tensor}" for tensor in counter.left()],
        },
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or what led to it, is a device running out of memory."""
    kind: Any = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    while error is not None:
        if isinstance(error, kind):
            return True
        if isinstance(error, RuntimeError) and _EXHAUSTED.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
