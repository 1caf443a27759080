"""Linear layers in 4 bits (bitsandbytes), on the meta device with shapes alone, or really.

bitsandbytes describes all its operators to torch for tensors without data, so that what they make
is traced like everything else; only the quantised weights have to be put in place by hand, since
quantising needs values.  A weight of n elements in blocks of 64 takes n/2 bytes of packed values
and an absolute maximum per block: float32, or with double quantisation one byte, a float32 for each
256 of them and an offset (T. Dettmers et al., "QLoRA", 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import quiet
from pytest_lora.memory.patching import replaced

if TYPE_CHECKING:
    from pytest_lora.memory.livebytes import LiveBytes
    from pytest_lora.memory.workload import Workload

__all__ = ["KINDS", "merges_on_meta", "quantise"]

KINDS = {
    "nf4": ("nf4", True),
    "nf4-single": ("nf4", False),
    "fp4": ("fp4", True),
    "fp4-single": ("fp4", False),
}
"""Format of the values, and whether the blocks' maxima are quantised too."""
BLOCK, OUTER_BLOCK = 64, 256
KEPT = ("lm_head", "score", "classifier", "qa_outputs")
"""Output layers, which transformers leaves as they are."""


def quantise(model: Any, workload: Workload, device: str) -> Any:
    """``model`` with its linear layers in 4 bits, for training prepared as PEFT recommends.

    ``prepare_model_for_kbit_training`` casts what is left in half precision to float32, which the
    prediction shows as part of the frozen base.

    Raises:
        UsageError: no such quantisation.
        CannotRun: bitsandbytes is not installed.
    """
    if workload.quantisation not in KINDS:
        known = ", ".join(repr(name) for name in KINDS)
        raise UsageError(f"quantisation {workload.quantisation!r} is none of {known}")
    try:
        with quiet():
            import bitsandbytes
    except ImportError:
        raise CannotRun(
            "quantisation needs bitsandbytes: pip install 'pytest-lora[quantised]'", missing=True
        ) from None
    kind, double = KINDS[workload.quantisation]
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and name not in KEPT:
                swap = _empty if device == "meta" else _real
                quantised = swap(bitsandbytes, layer, kind, double, workload.dtype)
                setattr(module, name, quantised.requires_grad_(False))
    return _prepared(model, workload)


@contextmanager
def merges_on_meta(counter: LiveBytes, *, through_host: bool) -> Iterator[None]:
    """PEFT's merge of layers in 4 bits, where they have shapes alone.

    It takes the sum of the weight and its update to the host and from there to the layer's device
    again, which quantises it.  bitsandbytes leaves weights on the meta device as they are, and
    torch cannot bring one to the host.

    Args:
        counter: what counts.
        through_host: the device is not the host: the second journey ends in another storage.
    """
    import bitsandbytes

    hosted: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.device.type == "meta" and args == ("cpu",):
            return host(tensor)
        if tensor.untyped_storage() in hosted:
            return tensor.clone()
        return torch._C.TensorBase.to(tensor, *args, **kwargs)

    def host(tensor: torch.Tensor) -> torch.Tensor:
        if not through_host:
            return tensor
        with _disable_current_modes():
            copy = torch.empty_like(tensor)
        counter.pass_over(copy)
        hosted[copy.untyped_storage()] = True
        return copy

    def quantised(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if weight.bnb_quantized:
            return original(weight, *args, **kwargs)
        return weight._quantize(*args)

    kind: Any = bitsandbytes.nn.Params4bit
    original = kind.to
    codes = {**bitsandbytes.functional.name2qmap, "dynamic": torch.empty(256, device="meta")}
    with (
        replaced(torch.Tensor, "to", to),
        replaced(kind, "to", quantised),
        replaced(bitsandbytes.functional, "name2qmap", codes),
    ):
        yield


def _prepared(model: Any, workload: Workload) -> Any:
    from peft import prepare_model_for_kbit_training
    from transformers.utils.quantization_config import QuantizationMethod

    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    if workload.job != "train_step":
        return model
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=bool(workload.checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": workload.checkpointing == "reentrant"},
    )


def _linear(bnb: Any, layer: nn.Linear, kind: str, double: bool, dtype: torch.dtype) -> Any:
    return bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=double,
        quant_type=kind,
    )


def _real(bnb: Any, layer: nn.Linear, kind: str, double: bool, dtype: torch.dtype) -> Any:
    made = _linear(bnb, layer, kind, double, dtype)
    made.weight = bnb.nn.Params4bit(
        layer.weight.data,
        requires_grad=False,
        quant_type=kind,
        compress_statistics=double,
        module=made,
    )
    made.bias = layer.bias
    return made.to(layer.weight.device)


def _empty(bnb: Any, layer: nn.Linear, kind: str, double: bool, dtype: torch.dtype) -> Any:
    made = _linear(bnb, layer, kind, double, dtype)
    count = layer.weight.numel()
    state = _state(bnb, layer, kind, double, dtype)
    made.weight = bnb.nn.Params4bit(
        torch.empty((count + 1) // 2, 1, dtype=torch.uint8),
        requires_grad=False,
        quant_state=state,
        quant_type=kind,
        compress_statistics=double,
        module=made,
        bnb_quantized=True,
    )
    made.quant_state = state
    made.bias = layer.bias
    return made


def _state(bnb: Any, layer: nn.Linear, kind: str, double: bool, dtype: torch.dtype) -> Any:
    """A ``QuantState`` with the shapes it would have; each layer has code tables of its own."""
    blocks = -(-layer.weight.numel() // BLOCK)
    outer: dict[str, Any] = {}
    if double:
        outer["offset"] = torch.empty(())
        outer["state2"] = bnb.functional.QuantState(
            absmax=torch.empty(-(-blocks // OUTER_BLOCK)),
            blocksize=OUTER_BLOCK,
            code=torch.empty(256),
            dtype=torch.float32,
        )
    return bnb.functional.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
        shape=layer.weight.shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=torch.empty(16),
        quant_type=kind,
        **outer,
    )
