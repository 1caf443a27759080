"""Optimizers of bitsandbytes: states in 8 bits, and states in memory that GPU and host share.

Their kernels are known to torch without data, so that a step is traced like any other.  A parameter
of n elements, 4096 or more, has two states of n bytes and a float32 for each block of 256, and all
share two tables of 256 float32 (T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
2022); smaller ones have float32 states.  Paged states of 100,000 elements and more are managed
memory: CUDA moves them between GPU and host, and torch's allocator does not count them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pytest_lora.errors import CannotRun
from pytest_lora.loading import quiet

__all__ = ["OPTIMIZERS", "make", "page_states"]

OPTIMIZERS = {
    "adam_8bit": "Adam8bit",
    "adamw_8bit": "AdamW8bit",
    "lion_8bit": "Lion8bit",
    "paged_adamw_32bit": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_lion_32bit": "PagedLion",
    "paged_lion_8bit": "PagedLion8bit",
}
LEAST_PAGED = 100_000
"""Elements from which on bitsandbytes pages a state (``Optimizer8bit.get_state_buffer``)."""


def make(name: str, parameters: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """The optimizer of that name.

    Raises:
        CannotRun: bitsandbytes is not installed.
    """
    try:
        with quiet():
            import bitsandbytes.optim as library
    except ImportError:
        raise CannotRun(
            f"optimizer {name} needs bitsandbytes: pip install 'pytest-lora[quantised]'",
            missing=True,
        ) from None
    made: torch.optim.Optimizer = getattr(library, OPTIMIZERS[name])(parameters, **options)
    return made


def page_states(optimizer: Any, leave_out: Callable[[torch.Tensor], None]) -> None:
    """Have a paged ``optimizer`` on the meta device make its states, and leave those in managed
    memory out of the books as it makes them; no other optimizer is touched.
    """

    def state(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if parameter.numel() < LEAST_PAGED:
            return torch.zeros_like(parameter, dtype=dtype)
        with _disable_current_modes():  # managed memory is not asked of torch's allocator
            made = torch.zeros_like(parameter, dtype=dtype)
        leave_out(made)
        return made

    if getattr(optimizer, "is_paged", False):
        optimizer.get_state_buffer = state
