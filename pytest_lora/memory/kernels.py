"""The operators a device would run, on tensors that have none: patches for the time of a trace.

On the meta device torch takes the paths of the CPU, or of no device at all.  What allocates
differently is sent to the device's own operators, whose shapes and derivatives every build of torch
knows:

* attention to the kernel that ``scaled_dot_product_attention`` would choose there
  (``sdp_utils.cpp`` and ``sdp_utils_cpp.cpp``);
* on CUDA, dropout to ``native_dropout``, which keeps a mask of one byte an element where the CPU
  keeps one in the activations' format, and ``rms_norm`` to its fused operator.

``torch.nn.functional`` is patched, and not a mode used: autograd runs a checkpointed block again
with no mode active.  Everything here changes the process for as long as it is entered, and must not
be shared between threads.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F

from pytest_lora.memory.allocator import round_up
from pytest_lora.memory.patching import replaced

__all__ = [
    "CpuKernels",
    "CudaKernels",
    "adapters_on_meta",
    "cuda_workspaces",
    "optimizers_on_meta",
]

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
Tensor = torch.Tensor


class _Patches:
    """Functions of ``torch.nn.functional`` replaced while entered; counts what was chosen."""

    def __init__(self) -> None:
        self.chosen: Counter[str] = Counter()
        self._originals: dict[str, Callable[..., Any]] = {}
        self._stack = contextlib.ExitStack()

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """New functions by name."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        for name, function in self.replacements().items():
            self._originals[name] = getattr(F, name)
            self._stack.enter_context(replaced(F, name, function))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


class CpuKernels(_Patches):
    """Attention as the CPU computes it."""

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """Attention only."""
        return {"scaled_dot_product_attention": self._attention}

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        one_size = query.shape[-1] == key.shape[-1] == value.shape[-1]
        masked_by_learning = attn_mask is not None and attn_mask.requires_grad
        if query.dim() == 4 and one_size and not dropout_p and not masked_by_learning:
            self.chosen["cpu flash"] += 1
            mask = attn_mask
            if mask is not None and mask.dtype == torch.bool:
                mask = _additive(mask, query.dtype)
            out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
            )[0]
            return out
        self.chosen["math"] += 1
        return _math(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


class CudaKernels(_Patches):
    """Attention, dropout and RMS norm as CUDA computes them in eager mode.

    Args:
        order: attention kernels in the order they are tried: flash, cudnn, efficient, math.
        efficient_groups: whether the memory-efficient kernel takes fewer key heads than query
            heads, as newer torch lets it; older falls through to math.
    """

    def __init__(self, order: Sequence[str], *, efficient_groups: bool = False) -> None:
        super().__init__()
        self.order, self.efficient_groups = tuple(order), efficient_groups

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """Attention, dropout, RMS norm."""
        return {
            "scaled_dot_product_attention": self._attention,
            "dropout": self._dropout,
            **({"rms_norm": self._rms_norm} if hasattr(aten, "_fused_rms_norm") else {}),
        }

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        mask, causal = attn_mask, is_causal
        for kernel in self.order:
            if kernel == "flash" and _flash_takes(query, key, value, mask, causal):
                run = _flash
            elif kernel == "cudnn" and _cudnn_takes(query):
                run = _cudnn
            elif kernel == "efficient" and self._efficient_takes(query, key, mask, enable_gqa):
                run = _efficient
            else:
                continue
            self.chosen[kernel] += 1
            return run(query, key, value, mask, dropout_p, causal, scale)
        self.chosen["math"] += 1
        return _math(query, key, value, mask, dropout_p, causal, scale, enable_gqa)

    def _efficient_takes(
        self, query: Tensor, key: Tensor, mask: Tensor | None, grouped: bool
    ) -> bool:
        width = query.shape[-1]
        aligned = width % (8 if query.dtype in HALF else 4) == 0
        plain = mask is None or not mask.requires_grad
        fitting = query.dtype in (*HALF, torch.float32) and width == key.shape[-1]
        return fitting and aligned and plain and (self.efficient_groups or not grouped)

    def _dropout(
        self,
        input: Tensor,  # noqa: A002
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if 0 < p < 1 and training and not inplace:
            self.chosen["native dropout"] += 1
            return torch.native_dropout(input, p, True)[0]
        original: Tensor = self._originals["dropout"](input, p, training, inplace)
        return original

    def _rms_norm(
        self,
        input: Tensor,  # noqa: A002
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        self.chosen["fused RMS norm"] += 1
        out: Tensor = aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]
        return out


# ------------------------------------------------------------------------------- attention


def _flash_takes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> bool:
    width = query.shape[-1]
    one_size = width == key.shape[-1] == value.shape[-1] and width <= 256
    square = query.shape[-2] == key.shape[-2]
    return query.dtype in HALF and mask is None and one_size and (square or not causal)


def _cudnn_takes(query: Tensor) -> bool:
    width = query.shape[-1]
    return query.dtype in HALF and width <= 128 and width % 8 == 0


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    width = query.shape[-1]
    if width % 8:
        query, key, value = (F.pad(part, (0, -width % 8)) for part in (query, key, value))
    factor = width**-0.5 if scale is None else scale
    out: Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, causal, False, scale=factor
    )[0]
    return out[..., :width] if width % 8 else out


def _cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    if mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    out: Tensor = aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, _learns(query, key, value), dropout, causal, False, scale=scale
    )[0]
    return out


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    if mask is not None:
        mask = _additive(mask, query.dtype) if mask.dtype == torch.bool else mask
        keys = key.shape[2]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], keys)
        if keys % 16:  # the kernel wants rows of 16 elements: padded, and a view taken
            mask = F.pad(mask, (0, -keys % 16))[..., :keys]
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, _learns(query, key, value), dropout, causal, scale=scale
    )[0]
    return out


def _math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    out: Tensor = aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout, causal, None, scale=scale, enable_gqa=grouped
    )[0]
    return out


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as torch turns it into one to be added (``convert_boolean_attn_mask``)."""
    zero = torch.full((), 0.0, dtype=dtype, device=mask.device)
    never = torch.full((), float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, never)


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


# ----------------------------------------------------------------- what kernels take for themselves


def _flash_backward(args: Sequence[Any], _out: Any) -> int:
    """A float32 accumulator of the queries' gradient and the softmax's row sums; with fewer key
    heads than query heads, their gradients for every query head (``flash_api.cpp``, mha_bwd).
    """
    query, key = args[1], args[2]
    batch, heads, rows, width = query.shape
    columns = round_up(width, 32 if width <= 128 else 64)
    padded = round_up(rows, 128)
    total = 4 * batch * heads * padded * (columns + 1)
    if key.shape[1] != heads:
        total += 2 * batch * key.shape[2] * heads * width * query.element_size()
    return int(total)


def _efficient_backward(args: Sequence[Any], _out: Any) -> int:
    """Row sums and, where the kernel accumulates outside its registers, gradients in float32
    (``attention_backward.cu`` and its kernels' ``workspace_size``); an upper bound.
    """
    query, key = args[1], args[2]
    batch, heads, rows, width = query.shape
    total = 4 * batch * heads * round_up(rows, 32)
    if query.dtype in HALF or width > 64:
        total += 4 * batch * heads * round_up(rows, 64) * round_up(width, 64)
        if width > 128:
            total += 8 * batch * heads * round_up(key.shape[2], 64) * round_up(width, 64)
    return int(total)


def _cudnn_backward(args: Sequence[Any], _out: Any) -> int:
    """CuDNN is closed: taken to accumulate the queries' gradient and row sums in float32."""
    batch, heads, rows, width = args[1].shape
    return int(4 * batch * heads * rows * (width + 1))


def _dequantised(args: Sequence[Any], _out: Any) -> int:
    """Bitsandbytes 0.50 dequantises the whole weight inside the product if there are many rows."""
    rows = args[0].numel() // args[0].shape[-1]
    weight = args[2][0] * args[2][1]
    if rows <= 64:
        return 0
    return int(weight * args[0].element_size() + weight // args[4] * 8)


def cuda_workspaces() -> dict[Any, Callable[[Sequence[Any], Any], int]]:
    """What CUDA kernels allocate and give back inside themselves, by operator, in bytes."""
    table: dict[Any, Callable[[Sequence[Any], Any], int]] = {
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
        aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    }
    four_bit = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    if four_bit is not None:
        table[four_bit.default] = _dequantised
    return table


# ------------------------------------------------------------------------------ other patches


@contextlib.contextmanager
def optimizers_on_meta(*, foreach: bool) -> Iterator[None]:
    """Optimizers take meta tensors for fused steps, and for foreach by default, as on CUDA."""
    from torch.utils import _foreach_utils

    names = ["_get_fused_kernels_supported_devices"]
    if foreach:
        names.append("_get_foreach_kernels_supported_devices")
    # torch.optim hides its module "optimizer" behind another name.
    modules = (_foreach_utils, sys.modules[torch.optim.Optimizer.__module__])
    with contextlib.ExitStack() as stack:
        for module, name in itertools.product(modules, names):
            original = getattr(module, name, None)
            if original is not None:
                devices = [*original(), "meta"]
                stack.enter_context(replaced(module, name, lambda devices=devices: devices))
        yield


@contextlib.contextmanager
def adapters_on_meta() -> Iterator[None]:
    """PEFT gives new weights the base's format before it computes with them (DoRA's norms), and
    leaves that out on the meta device.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = "_move_adapter_to_device_of_base_layer"
    original = getattr(BaseTunerLayer, name)

    def move(layer: Any, adapter: str, device: Any = None) -> None:
        original(layer, adapter, device)
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is None or weight.device.type != "meta" or not weight.is_floating_point():
            return
        for kind in layer.adapter_layer_names + layer.other_param_names:
            held = getattr(layer, kind, None)
            if isinstance(held, torch.nn.ModuleDict | torch.nn.ParameterDict) and adapter in held:
                held[adapter] = held[adapter].to(dtype=weight.dtype)

    with replaced(BaseTunerLayer, name, move):
        yield
