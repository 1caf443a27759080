"""What a model is shown where only its arithmetic matters, and which part of the answer counts.

Probe inputs are the same in every process and on every machine: they follow from the base model's
configuration and the adapter's files alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.errors import CannotRun
from pytest_lora.loading import one_line, read_tensor
from pytest_lora.numerics.precision import accurate_products
from pytest_lora.numerics.streaming import computing_in

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter

__all__ = ["computing_wide", "output_of", "plain_experts", "probe_inputs", "trained_tokens"]

BATCH = 2
LENGTH = 24
SEED = 20231
MOST_TRAINED = 12
"""Probe positions per row given to tokens the adapter trains; half of the row stays random."""


# ------------------------------------------------------------------------------ inputs


def probe_inputs(
    module: torch.nn.Module, adapter: Adapter, device: torch.device
) -> dict[str, torch.Tensor]:
    """Inputs for ``module``: 2 rows of 24 token ids (int64) without padding, or 2 images.

    Ids avoid the special ones of the configuration; up to 12 ids per row are ones the adapter
    trains by row.  Encoder-decoder models also get ``decoder_input_ids``.

    Raises:
        CannotRun: the model takes something else; the caller has to bring inputs.
    """
    wanted = getattr(module, "main_input_name", "input_ids")
    config = getattr(module, "config", None)
    if config is not None and wanted == "pixel_values":
        return {"pixel_values": _pixels(config).to(device, _float_dtype(module))}
    size = _vocabulary(module)
    if wanted != "input_ids" or size is None:
        raise CannotRun(
            f"{type(module).__name__} takes no token ids, so there is no input to try it on; pass"
            " Subject(..., inputs={...}), or override the fixture lora_subject",
            missing=True,
        )
    text = {"input_ids": _token_ids(config, size, trained_tokens(adapter, module))}
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    if getattr(config, "is_encoder_decoder", False):
        text["decoder_input_ids"] = text["input_ids"].flip(0)[:, : LENGTH // 2].contiguous()
    return {name: tensor.to(device) for name, tensor in text.items()}


def _vocabulary(module: torch.nn.Module) -> int | None:
    """Rows of the input embedding, no more than the configured vocabulary."""
    config = getattr(module, "config", None)
    nested = getattr(config, "get_text_config", None)
    text = config if nested is None else nested()
    configured = getattr(text, "vocab_size", None)
    try:
        embedding = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return configured
    rows = getattr(embedding, "num_embeddings", None)
    known = [size for size in (configured, rows) if isinstance(size, int)]
    return min(known) if known else None


def _special_ids(config: Any) -> set[int]:
    special: set[int] = set()
    for name, value in vars(config).items() if config is not None else ():
        if name.endswith("token_id"):
            ids = value if isinstance(value, list) else [value]
            special.update(item for item in ids if isinstance(item, int))
    return special


def _token_ids(config: Any, size: int, trained: Sequence[int]) -> torch.Tensor:
    plain = [token for token in _sample(size) if token not in _special_ids(config)]
    if not plain:
        plain = list(range(size))
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    rows = torch.tensor([plain[i % len(plain)] for i in range(BATCH * length)]).view(BATCH, length)
    chosen = [token for token in trained if token < size][: BATCH * min(MOST_TRAINED, length // 2)]
    for place, token in enumerate(chosen):
        rows[place % BATCH, 1 + 2 * (place // BATCH)] = token
    return rows


def _sample(size: int) -> list[int]:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(size, (4 * BATCH * LENGTH,), generator=generator).tolist()


def _pixels(config: Any) -> torch.Tensor:
    side = getattr(config, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    shape = (BATCH, getattr(config, "num_channels", 3), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def _float_dtype(module: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def trained_tokens(adapter: Adapter, module: torch.nn.Module) -> list[int]:
    """Token ids whose embedding rows the adapter trains one by one, the most certain first.

    From ``trainable_token_indices``, from the rows of a saved embedding that are not the base's,
    and from the columns of ``lora_embedding_A`` that are not zero.
    """
    found: dict[int, None] = dict.fromkeys(_declared_tokens(adapter))
    found.update(dict.fromkeys(_changed_rows(adapter, module)))
    found.update(dict.fromkeys(_embedding_columns(adapter)))
    return list(found)


def _declared_tokens(adapter: Adapter) -> list[int]:
    declared = adapter.config.get("trainable_token_indices") or adapter.config.get("token_indices")
    groups = declared.values() if isinstance(declared, Mapping) else [declared]
    lists = [group for group in groups if isinstance(group, list)]
    return [token for group in lists for token in group if isinstance(token, int) and token >= 0]


def _changed_rows(adapter: Adapter, module: torch.nn.Module) -> list[int]:
    """Rows of a saved embedding that are not the base's own, at most as many as can be shown."""
    for name, embedding in module.named_modules():
        if not isinstance(embedding, torch.nn.Embedding):
            continue
        info = adapter.tensors.get(f"base_model.model.{name}.weight")
        if info is None or len(info.shape) != 2 or info.shape[1] != embedding.weight.shape[1]:
            continue
        saved = read_tensor(info)
        rows = min(len(saved), len(embedding.weight))
        weight = embedding.weight.detach()[:rows].cpu()
        changed = (saved[:rows].to(weight.dtype) != weight).any(1).nonzero().flatten()
        return [int(row) for row in changed[: BATCH * MOST_TRAINED]]
    return []


def _embedding_columns(adapter: Adapter) -> list[int]:
    """Columns of the first ``lora_embedding_A`` with the largest norms; untrained ones are zero."""
    for key, info in adapter.tensors.items():
        if key.endswith("lora_embedding_A") and len(info.shape) == 2:
            norms = read_tensor(info).float().norm(dim=0)
            best = norms.topk(min(BATCH * MOST_TRAINED, len(norms))).indices
            return [int(column) for column in best if norms[column] > 0]
    return []


# ------------------------------------------------------------------------------ output


def output_of(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's primary output on ``inputs``, detached, in the dtype it was produced in.

    Logits; for extractive question answering start and end logits, concatenated along the last
    dimension; else the last hidden state, or the tensor a plain module returns.  Runs in eval and
    inference mode, with accurate products; puts back whatever training flags it found.

    Raises:
        CannotRun: the model fails on these inputs, or returns nothing to compare.
    """
    accepted = _accepted(model, inputs)
    with _evaluating(model), torch.inference_mode(), accurate_products():
        try:
            produced = model(**accepted)
        except Exception as error:  # whatever a model raises on inputs that do not suit it
            what = f"{type(model).__name__} fails on the probe inputs"
            raise CannotRun(f"{what}: {one_line(error)}") from error
    return _primary(produced).detach().clone()


def _accepted(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Without the attention mask, where a module has no use for one."""
    unwrapped = getattr(model, "get_base_model", lambda: model)()
    parameters = inspect.signature(unwrapped.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: tensor for name, tensor in inputs.items()
            if name in parameters or name != "attention_mask"}  # fmt: skip


def _primary(produced: Any) -> torch.Tensor:
    if isinstance(produced, torch.Tensor):
        return produced
    starts, ends = getattr(produced, "start_logits", None), getattr(produced, "end_logits", None)
    if starts is not None and ends is not None:
        return torch.cat((starts, ends), dim=-1)
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(produced, name, None)
        if isinstance(tensor, torch.Tensor):
            return tensor
    items = produced.values() if isinstance(produced, Mapping) else produced
    for item in items if isinstance(items, Sequence) or isinstance(produced, Mapping) else ():
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            return item
    raise CannotRun(f"the model returned {type(produced).__name__}, in which there is no tensor")


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------ wider formats


@contextlib.contextmanager
def computing_wide(model: torch.nn.Module, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """The model, adapted or not, computes in ``dtype``, one module's weights at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def whole(module: torch.nn.Module) -> bool:
        return isinstance(module, BaseTunerLayer)

    with plain_experts(model), computing_in(model, dtype, whole=whole):
        yield


@contextlib.contextmanager
def plain_experts(model: torch.nn.Module) -> Iterator[None]:
    """Plain code for fused experts: their kernels know no float64."""
    kept = "_experts_implementation_internal"
    before = []
    try:
        for part in model.modules():
            config = getattr(part, "config", None)
            if isinstance(getattr(config, kept, None), str):
                before.append((config, getattr(config, kept)))
                setattr(config, kept, "eager")
        yield
    finally:
        for config, chosen in reversed(before):
            setattr(config, kept, chosen)
