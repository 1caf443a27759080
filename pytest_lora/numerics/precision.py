"""Torch's switches for how products are rounded: read, set, and all set to accurate for a while.

Since 2.9 torch has two sets of them for TF32, and reading one raises as soon as it disagrees with
the other, which is the case after ``torch.backends.fp32_precision = "tf32"``.  Kernels go by the
newer set.  So both are set, the older first, as it writes into the newer; and of the older only
what can be read is put back.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_lora.records import Json

__all__ = ["accurate_products", "set_switches", "switches"]

_MATMUL = "float32_matmul_precision"
_ACCURATE = {
    "cudnn.allow_tf32": False,
    "cuda.matmul.allow_fp16_reduced_precision_reduction": False,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": False,
    "cuda.matmul.allow_fp16_accumulation": False,
    "cuda.matmul.fp32_precision": "ieee",
    "cudnn.conv.fp32_precision": "ieee",
    "cudnn.rnn.fp32_precision": "ieee",
    "mkldnn.matmul.fp32_precision": "ieee",
}
"""Switches below ``torch.backends``, in the order to set them in; not every torch has all."""


def switches() -> dict[str, Json]:
    """The switches that this torch has and lets be read, by name, in the order to set them in."""
    found: dict[str, Json] = {}
    with _quiet():
        with contextlib.suppress(RuntimeError):  # it disagrees with the newer ones
            found[_MATMUL] = torch.get_float32_matmul_precision()
        for name in _ACCURATE:
            place, key = _place(name)
            with contextlib.suppress(AttributeError, RuntimeError):
                found[name] = getattr(place, key)
    return found


def set_switches(state: Mapping[str, Any]) -> None:
    """Set what :func:`switches` found, here or in another process."""
    with _quiet():
        for name, value in state.items():
            if name == _MATMUL:
                torch.set_float32_matmul_precision(value)
            else:
                place, key = _place(name)
                setattr(place, key, value)


@contextlib.contextmanager
def accurate_products() -> Iterator[None]:
    """No TF32 and no reduced-precision sums in matrix products and convolutions for a while.

    The rounding analysis assumes sums in float32 or better, which is what these switches give up;
    with "medium", float32 products are rounded to bfloat16 on CPUs as well.
    """
    before = switches()
    known = {name: value for name, value in _ACCURATE.items() if _exists(name)}
    try:
        set_switches({_MATMUL: "highest", **known})
        yield
    finally:
        set_switches(before)


def _place(name: str) -> tuple[Any, str]:
    *path, key = name.split(".")
    place: Any = torch.backends
    for part in path:
        place = getattr(place, part, None)
    return place, key


def _exists(name: str) -> bool:
    place, key = _place(name)
    try:
        getattr(place, key)
    except AttributeError:
        return False
    except RuntimeError:  # there, and in disagreement
        return True
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch 2.9 and 2.10 warn, once, that the older switches will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
