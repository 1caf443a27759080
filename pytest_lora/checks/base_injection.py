"""What PEFT itself makes of an adapter on a base model, tried on the meta device.

The second of two opinions: :mod:`pytest_lora.checks.base` resolves the configuration by the rules,
this module asks the installed PEFT.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.adapter import BASE_PREFIX
from pytest_lora.attach import ADAPTER_NAME, own_randomness
from pytest_lora.checks.base_shapes import on_meta
from pytest_lora.loading import FORMATS, quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora.adapter import Adapter

__all__ = ["PeftView", "inject"]

_PLAIN_START = {"init_lora_weights": True, "prompt_tuning_init": "RANDOM"}
"""Initial values that need no data; the file's values replace them anyway."""


@dataclass(frozen=True, slots=True)
class PeftView:
    """What PEFT did.

    Attributes:
        modules: paths of the modules it adapts.
        scalings: the factor before ``B @ A`` by module path (LoRA).
        missing: tensors it has a place for and the file does not hold.
        homeless: tensors of the file it has no place for.
        misshapen: keys of tensors of another shape than their place.
    """

    modules: frozenset[str]
    scalings: Mapping[str, float]
    missing: tuple[str, ...]
    homeless: tuple[str, ...]
    misshapen: tuple[str, ...]


def inject(adapter: Adapter, base: torch.nn.Module, *, rows: int | None = None) -> PeftView:
    """Put ``adapter`` on a copy of ``base`` on the meta device and load shapes without values.

    Args:
        adapter: the adapter.
        base: the base model, on any device.
        rows: the number of tokens the vocabulary is resized to first, if it is.

    Raises:
        Exception: whatever PEFT raises for this configuration on this model.
    """
    import peft

    model: Any = on_meta(base)
    with quiet(), own_randomness(), torch.device("meta"):
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        wrapped = peft.get_peft_model(model, _config(adapter), ADAPTER_NAME)
        expected = {
            key: tensor.to("meta")
            for key, tensor in peft.get_peft_model_state_dict(
                wrapped, adapter_name=ADAPTER_NAME, save_embedding_layers=False
            ).items()
        }
        return _compare(adapter, wrapped, expected)


def _config(adapter: Adapter) -> Any:
    import peft

    config = peft.PeftConfig.from_pretrained(str(adapter.path))
    config.inference_mode = True
    for name, value in _PLAIN_START.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def _compare(adapter: Adapter, wrapped: Any, expected: dict[str, torch.Tensor]) -> PeftView:
    from peft.tuners.tuners_utils import BaseTunerLayer

    held = {key: _empty(info) for key, info in adapter.tensors.items()}
    places = {**wrapped.state_dict(), **expected}
    misshapen = [key for key in held if key in places and held[key].shape != places[key].shape]
    state = {**expected, **{key: held[key] for key in held if key not in misshapen}}
    result = _load(wrapped, state)
    lost = {key.replace(f".{ADAPTER_NAME}", "") for key in result.unexpected_keys}
    layers = {
        name.removeprefix(BASE_PREFIX): layer
        for name, layer in wrapped.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    return PeftView(
        frozenset(name.removesuffix(".token_adapter") for name in layers),
        {name: layer.scaling[ADAPTER_NAME] for name, layer in layers.items()
         if ADAPTER_NAME in getattr(layer, "scaling", {})},
        tuple(key for key in expected if key not in held),
        tuple(key for key in held if key in lost - expected.keys()),
        tuple(misshapen),
    )  # fmt: skip


def _empty(info: Any) -> torch.Tensor:
    dtype = FORMATS.get(info.dtype, torch.float32)
    return torch.empty(info.shape, dtype=dtype, device="meta")


def _load(wrapped: Any, state: dict[str, torch.Tensor]) -> Any:
    import peft

    return peft.set_peft_model_state_dict(wrapped, copy.copy(state), adapter_name=ADAPTER_NAME)
