"""One training step as it was asked for, and the model, batches and optimizer it takes.

The same code builds them on the meta device for a prediction and on a real one for the truth.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.errors import UsageError
from pytest_lora.loading import _dtype_keyword, base_config, one_line, quiet
from pytest_lora.memory.records import NotPredictable
from pytest_lora.records import Json

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

    Step = Callable[[Any, torch.optim.Optimizer, Sequence["Batch"]], object]
    MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

__all__ = [
    "PADDINGS",
    "Batch",
    "Workload",
    "make_batches",
    "make_model",
    "make_optimizer",
    "read_adapter_config",
    "read_config",
    "training_step",
]

Batch = dict[str, torch.Tensor]
PADDINGS = ("none", "full", "padded")
"""No attention mask; one without padding; one with it, which is what most loaders make."""
CHECKPOINTING = ("", "non-reentrant", "reentrant")
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "adamw_fused": ("AdamW", {"fused": True}),
    "adamw_foreach": ("AdamW", {"foreach": True}),
    "adamw_loop": ("AdamW", {"foreach": False}),
    "adam": ("Adam", {}),
    "sgd": ("SGD", {}),
    "sgd_momentum": ("SGD", {"momentum": 0.9}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "adafactor": ("Adafactor", {}),
}
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_SEED = 20_261


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What to run; see :func:`~pytest_lora.memory.predict.predict_memory` for the arguments."""

    config: PretrainedConfig
    adapter: PeftConfig | None
    batch: int
    sequence: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    attention: str = "sdpa"
    checkpointing: str = ""
    quantisation: str = ""
    optimizer: str | MakeOptimizer = "adamw"
    padding: str = "padded"
    accumulation: int = 1
    clip: float | None = None
    task: str = ""
    inputs: Mapping[str, torch.Tensor] | None = None
    step: Step | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the optimizer."""

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "accumulation"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise UsageError(f"{name} {count!r} is not a positive whole number")
        _one_of("padding", self.padding, PADDINGS)
        _one_of("checkpointing", self.checkpointing, CHECKPOINTING)
        if isinstance(self.optimizer, str):
            _one_of_optimizers(self.optimizer)

    @property
    def model_task(self) -> str:
        """The task: the one given, else the adapter's, else that of the model's architecture."""
        given = self.task or getattr(self.adapter, "task_type", None) or ""
        return str(getattr(given, "value", given))

    @property
    def vocabulary(self) -> int | None:
        """Last dimension of the logits; None where they are not one number per token."""
        text = getattr(self.config, "get_text_config", lambda: self.config)()
        size = getattr(text, "vocab_size", None)
        return size if isinstance(size, int) else None

    def of_depth(self, layers: int) -> Workload:
        """The same for a model of ``layers`` layers."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            config.layer_types = list(kinds[:layers])
        return dataclasses.replace(self, config=config)

    def describe(self) -> dict[str, Json]:
        """What was asked, JSON-plain: all that decides the number."""
        adapter = {} if self.adapter is None else self.adapter.to_dict()
        named = isinstance(self.optimizer, str)
        return {
            "model": str(getattr(self.config, "model_type", type(self.config).__name__)),
            "layers": int(getattr(self.config, "num_hidden_layers", 0)),
            "hidden": int(getattr(self.config, "hidden_size", 0)),
            "adapter": {key: _plain(value) for key, value in sorted(adapter.items()) if value},
            "batch": self.batch,
            "sequence": self.sequence,
            "dtype": _name(self.dtype),
            "adapter_dtype": _name(self.adapter_dtype) if self.adapter_dtype else "auto",
            "attention": self.attention,
            "checkpointing": self.checkpointing or "off",
            "quantisation": self.quantisation or "none",
            "optimizer": str(self.optimizer) if named else "custom",
            "padding": self.padding,
            "accumulation": self.accumulation,
            "clip": self.clip,
            "step": "custom" if self.step else "one optimizer step",
        }


def _plain(value: Any) -> Json:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_of(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        names = ", ".join(repr(name) for name in known)
        raise UsageError(f"{what} {given!r} is none of {names}")


def _one_of_optimizers(name: str) -> None:
    if "8bit" in name or "paged" in name or "4bit" in name:
        raise NotPredictable(
            f"optimizer {name!r} cannot be predicted: its kernels run on a GPU only, and paged "
            "states move between GPU and host; pass an optimizer of torch"
        )
    _one_of("optimizer", name, tuple(OPTIMIZERS))


# ------------------------------------------------------------------------------- reading


def read_config(source: Any) -> PretrainedConfig:
    """A transformers configuration: as given, of a model directory, or of a model on the hub.

    Raises:
        CannotRun: it cannot be read, or needs code shipped with the model.
        UsageError: not something that names a configuration.
    """
    if hasattr(source, "model_type") and hasattr(source, "to_dict"):
        return source
    if not isinstance(source, str | Path):
        raise UsageError(f"a model is a transformers config, a directory or an id, not {source!r}")
    path = Path(source)
    if path.is_dir():
        return base_config(path)
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # whatever the hub client or a malformed file raises
        raise UsageError(
            f"model {str(source)!r} is no directory here, and its configuration could not be had "
            f"from the hub: {one_line(error)}"
        ) from None


def read_adapter_config(source: Any) -> PeftConfig | None:
    """A PEFT configuration: as given, or of an adapter folder; None stays None (full training).

    Raises:
        UsageError: no such folder, or not a configuration.
    """
    if source is None or hasattr(source, "peft_type"):
        return source
    from pytest_lora.adapter import read_adapter

    if not isinstance(source, str | Path):
        raise UsageError(f"an adapter is a PEFT config or its folder, not {source!r}")
    return _from_file(dict(read_adapter(source).config), str(source))


def _from_file(data: dict[str, Any], name: str) -> PeftConfig:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(data.get("peft_type", "")).upper()
    classes = {
        str(getattr(key, "value", key)): cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if kind not in classes:
        raise UsageError(f"{name}: peft_type {kind!r} is none this PEFT has")
    known = {item.name for item in dataclasses.fields(classes[kind])}
    try:
        config: PeftConfig = classes[kind](
            **{key: value for key, value in data.items() if key in known}
        )
    except Exception as error:  # whatever PEFT raises on values it cannot take
        raise UsageError(f"{name}: PEFT cannot take its configuration: {one_line(error)}") from None
    config.inference_mode = False
    return config


# ------------------------------------------------------------------------------- building


def make_model(workload: Workload, device: str) -> torch.nn.Module:
    """The adapted model in train mode on ``device``; on "meta" it has shapes and no memory.

    Raises:
        NotPredictable: transformers or PEFT cannot build this model here.
    """
    try:
        with quiet(), torch.device(device):
            return _build(workload, device)
    except (NotPredictable, UsageError):
        raise
    except Exception as error:  # whatever transformers or PEFT raise on a configuration
        raise NotPredictable(f"this model cannot be built: {one_line(error)}") from None


def _build(workload: Workload, device: str) -> torch.nn.Module:
    model = _base(workload)
    if workload.quantisation:
        from pytest_lora.memory.quantised import quantise

        model = quantise(model, workload, device)
    if workload.checkpointing:
        options = {"use_reentrant": workload.checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    if workload.adapter is not None:
        model = _adapted(model, workload)
    trained: torch.nn.Module = model.train()
    return trained


def _base(workload: Workload) -> Any:
    import transformers

    config = copy.deepcopy(workload.config)
    config.use_cache = False
    name = _TASKS.get(workload.model_task) or _architecture(config)
    cls = getattr(transformers, name)
    build = cls.from_config if name.startswith("Auto") else cls._from_config
    options = {_dtype_keyword(): workload.dtype, "attn_implementation": workload.attention}
    return build(config, **options)


def _architecture(config: Any) -> str:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return str(name)
    return "AutoModelForCausalLM"


def _adapted(model: Any, workload: Workload) -> Any:
    from peft import get_peft_model

    config = copy.deepcopy(workload.adapter)
    dtype = workload.adapter_dtype
    adapted = get_peft_model(model, config, autocast_adapter_dtype=dtype is None)
    if dtype is None and not getattr(config, "is_prompt_learning", False):
        dtype = torch.float64 if workload.dtype == torch.float64 else None
    if dtype is not None:
        # PEFT leaves adapters on the meta device in float32, whatever they should become.
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
    return adapted


def make_batches(workload: Workload) -> list[Batch]:
    """The batches of one optimizer step, on the CPU, with contents that are always the same."""
    if workload.inputs is not None:
        return [dict(workload.inputs) for _ in range(workload.accumulation)]
    if workload.vocabulary is None:
        raise UsageError(
            f"model type {workload.config.model_type!r} takes no tokens: pass its batch as inputs="
        )
    generator = torch.Generator().manual_seed(_SEED)
    return [_batch(workload, generator) for _ in range(workload.accumulation)]


def _batch(workload: Workload, generator: torch.Generator) -> Batch:
    rows, length = workload.batch, workload.sequence
    vocabulary = workload.vocabulary or 1
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    batch = {"input_ids": ids, **_labels(workload, ids)}
    if workload.padding != "none":
        mask = torch.ones_like(ids)
        if workload.padding == "padded":
            mask[:, : max(1, length // 4)] = 0
        batch["attention_mask"] = mask
    return batch


def _labels(workload: Workload, ids: torch.Tensor) -> Batch:
    task = workload.model_task
    rows = torch.arange(ids.shape[0])
    if task == "SEQ_CLS":
        return {"labels": rows % max(1, int(getattr(workload.config, "num_labels", 2)))}
    if task == "TOKEN_CLS":
        return {"labels": ids % max(1, int(getattr(workload.config, "num_labels", 2)))}
    if task == "QUESTION_ANS":
        return {"start_positions": rows % ids.shape[1], "end_positions": rows % ids.shape[1]}
    return {"labels": ids.clone()}


def make_optimizer(workload: Workload, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over everything trainable.

    Raises:
        NotPredictable: nothing is trainable, or this torch lacks the optimizer.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise NotPredictable("nothing in this model is trainable, so there is no training step")
    if not isinstance(workload.optimizer, str):
        return workload.optimizer(parameters)
    name, options = OPTIMIZERS[workload.optimizer]
    cls = getattr(torch.optim, name, None)
    if cls is None:
        raise NotPredictable(f"torch {torch.__version__} has no optimizer {name}")
    optimizer: torch.optim.Optimizer = cls(
        parameters, **{"lr": 1e-4, **options, **workload.options}
    )
    return optimizer


def training_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    clip: float | None = None,
) -> None:
    """One optimizer step over ``batches``, as a plain loop does it: only the graph is kept."""
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        loss.backward()
        del loss
    if clip is not None:
        groups = optimizer.param_groups
        torch.nn.utils.clip_grad_norm_([item for group in groups for item in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
