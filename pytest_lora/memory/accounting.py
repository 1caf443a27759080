"""What an adapter costs and what it saves: parameters, gradients, optimizer state, file.

A LoRA pair on a weight of shape (d, k) trains r (d + k) numbers instead of d k (E. J. Hu et al.,
"LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1).  Here nothing is computed
by that formula: the adapted model is built on the meta device and its tensors are counted, so that
every method, pattern and saved module is right, and the formula is what the tests hold it to.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.loading import FORMATS, quiet
from pytest_lora.memory.jobs import fill_state
from pytest_lora.memory.paged import page_states
from pytest_lora.memory.predict import AdapterLike, PretrainedConfigLike, make_workload
from pytest_lora.memory.workload import Workload, make_model, make_optimizer
from pytest_lora.records import Json
from pytest_lora.sizes import format_bytes

if TYPE_CHECKING:
    from pytest_lora.memory.workload import MakeOptimizer

__all__ = ["Accounting", "Training", "Weights", "account_adapter", "file_size"]

_NAMES = {dtype: name for name, dtype in FORMATS.items()}


@dataclass(frozen=True, slots=True)
class Weights:
    """Adapted layers of one kind: the same module of every block.

    Attributes:
        module: its name, ``*`` for the number of the block.
        count: how many there are.
        shape: of one base weight (d, k): output by input features.
        frozen: parameters of the base, all of them together.
        trainable: parameters the adapter adds, all of them together.
    """

    module: str
    count: int
    shape: tuple[int, ...]
    frozen: int
    trainable: int


@dataclass(frozen=True, slots=True)
class Training:
    """What training holds beside the weights, in bytes."""

    parameters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True, slots=True)
class Accounting:
    """An adapter's cost beside training everything.

    Attributes:
        base: parameters of the model without the adapter.
        weights: the adapted layers, heaviest first.
        adapter: training the adapter.
        full: training the whole base instead, in its own format.
        file: bytes of the adapter's safetensors file.
    """

    base: int
    weights: tuple[Weights, ...]
    adapter: Training
    full: Training
    file: int

    @property
    def share(self) -> float:
        """Trainable parameters of the adapter over the parameters of the base."""
        return self.adapter.parameters / self.base

    @property
    def saved(self) -> int:
        """Bytes of gradients and optimizer state that training the adapter does not need."""
        full, adapter = self.full, self.adapter
        return full.gradients + full.optimizer - adapter.gradients - adapter.optimizer

    def to_dict(self) -> dict[str, Json]:
        """The accounting as a JSON object."""
        plain: dict[str, Json] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def table(self) -> str:
        """The accounting as Markdown tables."""
        rows = [
            "| adapted layers | weight d x k | base parameters | adapter parameters |",
            "| --- | --- | --: | --: |",
            *(
                f"| {item.count} x {item.module} | {' x '.join(map(str, item.shape))} "
                f"| {item.frozen:,} | {item.trainable:,} |"
                for item in self.weights
            ),
            "",
            "| training | parameters | gradients | optimizer state |",
            "| --- | --: | --: | --: |",
            *(
                f"| {name} | {side.parameters:,} | {format_bytes(side.gradients)} "
                f"| {format_bytes(side.optimizer)} |"
                for name, side in (("the adapter", self.adapter), ("everything", self.full))
            ),
            "",
            f"The adapter trains {self.share:.3%} of the parameters, saves "
            f"{format_bytes(self.saved)}, and its file has {format_bytes(self.file)}.",
        ]
        return "\n".join(rows)


def account_adapter(
    model: PretrainedConfigLike,
    adapter: AdapterLike,
    *,
    dtype: str | torch.dtype = "bfloat16",
    adapter_dtype: str | torch.dtype = "auto",
    optimizer: str | MakeOptimizer = "adamw",
    task: str = "",
) -> Accounting:
    """Parameters and bytes of an adapter, and of training the whole model instead.

    Args:
        model: a transformers configuration, a model directory, or an id on the hub.
        adapter: a PEFT configuration or an adapter folder.
        dtype: of the base model.
        adapter_dtype: of the adapter; "auto" is PEFT's own rule.
        optimizer: as for :func:`~pytest_lora.memory.predict.predict_memory`.
        task: PEFT's name of the task; default: the adapter's.

    Raises:
        NotPredictable: transformers or PEFT cannot build the model.
        UsageError: an argument cannot be meant.
    """
    options: dict[str, Any] = {"dtype": dtype, "optimizer": optimizer, "batch": 1, "sequence": 1}
    tuned = make_workload(model, adapter, adapter_dtype=adapter_dtype, task=task, **options)
    whole = dataclasses.replace(tuned, adapter=None, task=tuned.model_task)
    adapted, base = make_model(tuned, "meta"), make_model(whole, "meta")
    return Accounting(
        base=sum(parameter.numel() for parameter in base.parameters()),
        weights=tuple(sorted(_weights(adapted), key=lambda kind: -kind.trainable)),
        adapter=_training(tuned, adapted),
        full=_training(whole, base),
        file=file_size(_saved(adapted)),
    )


def _training(workload: Workload, model: torch.nn.Module) -> Training:
    optimizer = make_optimizer(workload, model)
    page_states(optimizer, lambda _state: None)
    fill_state(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Once each: optimizers in 8 bits share their tables.
    values = {id(value): value for state in optimizer.state.values() for value in state.values()}
    return Training(
        parameters=sum(parameter.numel() for parameter in trained),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=sum(value.nbytes for value in values.values() if isinstance(value, torch.Tensor)),
    )


def _weights(model: torch.nn.Module) -> Iterator[Weights]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = getattr(layer.get_base_layer(), "weight", None)
            shape = () if weight is None else tuple(weight.shape)
            place = ".".join("*" if part.isdigit() else part for part in name.split("."))
            sizes = {True: 0, False: 0}
            for parameter in layer.parameters():
                sizes[parameter.requires_grad] += parameter.numel()
            kinds.setdefault((place, shape), []).append((sizes[False], sizes[True]))
    for (place, shape), counts in kinds.items():
        frozen, trainable = (sum(column) for column in zip(*counts, strict=True))
        yield Weights(
            place.removeprefix("base_model.model."), len(counts), shape, frozen, trainable
        )


def _saved(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    with quiet():
        saved: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
    return saved


def file_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the safetensors file PEFT would write for these tensors: header and data.

    The header is compact JSON, padded with spaces to a multiple of 8; tensors stand in it widest
    format first, then by name, as safetensors writes them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in order:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
