"""Memory that a block of code really took: on CUDA devices, or in live tensor bytes on the CPU."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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
        operators: how many ran in the block, where that was counted; None elsewhere.
        unseen: bytes of tensors that the block left and no operator of its thread made, as from a
            file that was mapped or another thread; counted on the CPU as there all the time.
    """

    devices: tuple[DeviceMemory, ...] = ()
    peak: MemoryPeak | None = None
    operators: int | None = None
    unseen: int = 0
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
        return [
            *map(str, self.devices),
            *(_unseen_lines(self.unseen)),
            *(self.peak.lines() if self.peak else ()),
        ]


def _unseen_lines(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{format_bytes(count)} of it in tensors that no operator of the block's thread made: of a "
        "mapped file, another thread or another library"
    ]


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
        if counter:
            measured.peak, measured.operators = counter.peak, counter.operators
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

    Operators are seen on the block's own thread.  What other threads make, or a library that maps a
    file, is found where it is still there when the block ends, and then counts as if it had been
    there throughout; where it is gone by then, nobody knows of it.
    """
    measured = MeasuredMemory()
    counter = _shown_what_is_there()
    try:
        with counter:
            yield measured
    finally:
        peak, unseen = counter.peak, _unseen(counter)
        total, after = peak.live + unseen, counter.live + unseen
        measured.devices = (DeviceMemory("cpu", total, total, 0, 0, after),)
        measured.peak, measured.operators, measured.unseen = peak, counter.operators, unseen
        measured._open = False


def _shown_what_is_there() -> LiveBytes:
    """A counter that knows all tensors of the process as not its own."""
    counter = LiveBytes(adopt=True)
    for tensor in _tensors():
        with suppress(CannotRun):  # a kind that has no storage cannot be taken for a new one either
            counter.pass_over(tensor)
    return counter


def _unseen(counter: LiveBytes) -> int:
    """Bytes of the process's tensors that the counter knows nothing of."""
    total = 0
    for tensor in _tensors():
        with suppress(CannotRun):
            total += counter.unseen(tensor)
            counter.pass_over(tensor)  # others may share its storage
    return total


def _tensors() -> Iterator[torch.Tensor]:
    """All tensors that Python holds, their gradients included.

    The type is asked, not the object: to ask some objects for their class is to load a library.
    """
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            yield item
            if item.requires_grad and item.is_leaf and item.grad is not None:
                yield item.grad


def measure_memory_left(cycle: Callable[[], object], *, cycles: int = 3) -> Measurement:
    """Bytes by which the tensors that something holds grow over ``cycles`` runs of ``cycle()``.

    It is run once before, since what is made once and kept, such as a table of a library's, is no
    leak; nor is what takes the place of something as large, such as the last answer. Garbage is
    collected after each run, so that what is left has an owner.

    Returns:
        Bytes, exactly, on whatever devices, between the run after which there were fewest and the
        last one; its notes name the largest tensors (of 64 KiB and more) with the operators and
        modules that made them.

    Raises:
        CannotRun: the cycle has nothing to do with tensors.
        UsageError: ``cycles`` is not a positive whole number.
    """
    if not isinstance(cycles, int) or isinstance(cycles, bool) or cycles < 1:
        raise UsageError(f"cycles {cycles!r} is not a positive whole number")
    cycle()
    gc.collect()
    counter = _shown_what_is_there()
    held, unseen = [counter.passed_over], 0
    for _ in range(cycles):
        with counter:
            cycle()
            gc.collect()
        unseen += _unseen(counter)  # and passed over from now on
        held.append(counter.live + counter.passed_over)
    if not counter.operators and not unseen:
        raise CannotRun(
            "no operator of torch ran in the cycle on this thread and no tensor came of it, so "
            "there was nothing to watch"
        )
    return _left(counter, held[-1] - min(held), unseen, cycles)


def _left(counter: LiveBytes, grown: int, unseen: int, cycles: int) -> Measurement:
    """By how much what is held has grown; what of it is to be named, if anything."""
    tensors = counter.left() if grown else ()
    lines = _unseen_lines(min(unseen, grown))
    return Measurement(
        value=grown,
        unit=f"bytes of tensors left by {cycles} cycles",
        count=cycles,
        details={
            "left": [asdict(tensor) for tensor in tensors],
            "notes": [*lines, *(f"left: {tensor}" for tensor in tensors)],
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
