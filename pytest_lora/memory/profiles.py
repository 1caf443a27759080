"""What a prediction has to know of a card, and where each number comes from.

``total``
    What ``torch.cuda.mem_get_info()`` calls total, which is less than the name of the card says
    (error correction, the driver's own share).  Taken from the sentence "GPU 0 has a total capacity
    of ... GiB" in out-of-memory messages that users have published; the smallest seen for
    a card of that size.  Many messages do not name their card: it went by the size then.
``context``
    CUDA context and loaded kernels: outside the caching allocator, seen by ``nvidia-smi`` only.
    0.3 to 0.6 GiB are commonly reported; the upper end is kept.
``cublas_workspace``
    Bytes of one cuBLAS workspace as torch configures it (``parseChosenWorkspaceSize`` in
    ``aten/src/ATen/cuda/CublasHandlePool.cpp``): 4096 KiB x 2 + 16 KiB x 8 = 8.125 MiB, and 32 MiB
    on compute capability 9.0.  Each (handle, stream) that multiplies gets one from the caching
    allocator and keeps it; the forward and the backward thread have a handle each.
``attention``
    The order in which ``scaled_dot_product_attention`` tries its kernels
    (``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``).

The numbers of kernels and workspaces are read from source, not measured on these cards.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_lora.errors import UsageError
from pytest_lora.names import meant
from pytest_lora.sizes import GIB

__all__ = ["PROFILES", "GpuProfile", "find_profile"]

MIB = 1 << 20
_WORKSPACE, _HOPPER_WORKSPACE = 8 * MIB + 128 * 1024, 32 * MIB
_FLASH_FIRST = ("flash", "efficient", "math")


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """A card, for predictions; all sizes in bytes.  See the module for the sources.

    Attributes:
        name: what ``--lora-gpu-profile`` and ``find_profile`` call it.
        total: memory that torch sees on the card.
        context: taken outside torch's allocator.
        cublas_workspace: of one handle on one stream.
        attention: kernels of ``scaled_dot_product_attention`` in the order they are tried.
    """

    name: str
    total: int
    context: int
    cublas_workspace: int
    attention: tuple[str, ...] = _FLASH_FIRST

    @property
    def usable(self) -> int:
        """What torch's allocator can hand out."""
        return self.total - self.context


def _card(name: str, gib: float, workspace: int = _WORKSPACE) -> GpuProfile:
    return GpuProfile(name, int(gib * GIB), int(0.6 * GIB), workspace)


PROFILES = {
    card.name: card
    for card in (
        _card("l4-24gb", 22.03),
        _card("rtx4090-24gb", 23.61),
        _card("a100-40gb", 39.25),
        _card("l40s-48gb", 44.34),
        _card("a100-80gb", 79.10),
        _card("h100-80gb", 79.10, _HOPPER_WORKSPACE),
        _card("h200-141gb", 139.72, _HOPPER_WORKSPACE),
    )
}
CLASSES = {
    "24gb": "l4-24gb",
    "40gb": "a100-40gb",
    "48gb": "l40s-48gb",
    "80gb": "h100-80gb",
    "141gb": "h200-141gb",
}
"""A class stands for the card of that class that leaves the least."""


def find_profile(name: str | GpuProfile) -> GpuProfile:
    """The profile of that name; a class such as ``24gb`` means its tightest card.

    Raises:
        UsageError: no such profile; the message names all, and the nearest.
    """
    if isinstance(name, GpuProfile):
        return name
    if not isinstance(name, str):
        raise UsageError(f"a GPU profile is a name or a GpuProfile, not {name!r}")
    wanted = CLASSES.get(name.lower(), name.lower())
    if wanted not in PROFILES:
        known = [*PROFILES, *CLASSES]
        hint = meant(wanted, known)
        raise UsageError(f"GPU profile {name!r} is none of {', '.join(known)}{hint}")
    return PROFILES[wanted]
