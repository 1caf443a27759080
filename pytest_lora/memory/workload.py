"""A workload as it was asked for, and the model, batches and optimizer it takes.

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

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import _dtype_keyword, base_config, one_line, quiet
from pytest_lora.memory import paged
from pytest_lora.memory.autocast import HALF, region
from pytest_lora.memory.livebytes import vocabulary_of
from pytest_lora.memory.records import NotPredictable
from pytest_lora.records import Json
from pytest_lora.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

    Step = Callable[[Any, torch.optim.Optimizer, Sequence["Batch"]], object]
    MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

__all__ = [
    "JOBS",
    "PADDINGS",
    "Batch",
    "Workload",
    "add_adapter",
    "checkpoint",
    "make_base",
    "make_batches",
    "make_model",
    "make_optimizer",
    "read_adapter_config",
    "read_config",
    "training_step",
]

Batch = dict[str, torch.Tensor]
JOBS = ("train_step", "inference", "load", "merge")
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
    job: str = "train_step"
    batch: int = 1
    sequence: int = 1
    new_tokens: int = 0
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
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
    file: Mapping[str, TensorInfo] | None = None
    """Tensors of the adapter's file, where there is one; a load has them beside the weights."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the optimizer."""

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "accumulation"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise UsageError(f"{name} {count!r} is not a positive whole number")
        if not isinstance(self.new_tokens, int) or self.new_tokens < 0:
            raise UsageError(f"new_tokens {self.new_tokens!r} is not a whole number, 0 or more")
        if self.clip is not None and not _is_positive(self.clip):
            raise UsageError(f"clip {self.clip!r} is not a positive number")
        if self.autocast not in (None, *HALF):
            raise UsageError(f"autocast {_name(self.autocast)!r} is neither bfloat16 nor float16")
        _one_of("job", self.job, JOBS)
        _one_of("padding", self.padding, PADDINGS)
        _one_of("checkpointing", self.checkpointing, CHECKPOINTING)
        if self.task:
            _one_of("task", self.task, (*_TASKS, "FEATURE_EXTRACTION"))
        if isinstance(self.optimizer, str):
            _one_of("optimizer", self.optimizer, (*OPTIMIZERS, *paged.OPTIMIZERS))
        elif not callable(self.optimizer):
            raise UsageError(f"optimizer {self.optimizer!r} is neither a name nor a function")
        if self.inputs is not None:
            _require_tensors(self.inputs)

    @property
    def model_task(self) -> str:
        """The task: the one given, else the adapter's, else that of the model's architecture."""
        given = self.task or getattr(self.adapter, "task_type", None) or ""
        return str(getattr(given, "value", given))

    @property
    def method(self) -> str:
        """PEFT's name of the adapter's method, for messages."""
        kind = getattr(self.adapter, "peft_type", "no adapter")
        return str(getattr(kind, "value", kind))

    @property
    def vocabulary(self) -> int | None:
        """Last dimension of the logits; None where they are not one number per token."""
        return vocabulary_of(self.config)

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
            "autocast": _name(self.autocast) if self.autocast else "off",
            "attention": self.attention,
            "checkpointing": self.checkpointing or "off",
            "quantisation": self.quantisation or "none",
            "optimizer": str(self.optimizer) if named else "custom",
            "padding": self.padding,
            "accumulation": self.accumulation,
            "clip": self.clip,
            "job": self.job,
            "new_tokens": self.new_tokens,
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


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number > 0


def _require_tensors(inputs: object) -> None:
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        raise UsageError("inputs= takes a batch as the model does: a mapping from names to tensors")


def _one_of(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        names = ", ".join(repr(name) for name in known)
        raise UsageError(f"{what} {given!r} is none of {names}")


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
    """A PEFT configuration: as given, or of an adapter; None stays None (full training).

    Raises:
        UsageError: no such folder, or not a configuration.
    """
    from pytest_lora.adapter import Adapter, read_adapter

    if source is None or (hasattr(source, "peft_type") and not isinstance(source, Adapter)):
        return source
    if not isinstance(source, str | Path | Adapter):
        raise UsageError(f"an adapter is a PEFT config, an adapter or its folder, not {source!r}")
    adapter = source if isinstance(source, Adapter) else read_adapter(source)
    if not adapter.config and adapter.problems:
        raise UsageError(f"{adapter.path}: {adapter.problems[0]}")
    return _from_file(dict(adapter.config), str(adapter.path))


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
    """The adapted model on ``device``, in train mode for training and else in eval mode; on "meta"
    it has shapes and no memory.

    Raises:
        NotPredictable: transformers or PEFT cannot build this model here.
    """
    return _built(workload, device, _model)


def make_base(workload: Workload, device: str) -> torch.nn.Module:
    """The same without its adapter."""
    return _built(workload, device, _base)


def _built(
    workload: Workload, device: str, build: Callable[[Workload, str], Any]
) -> torch.nn.Module:
    try:
        with quiet(), torch.device(device):
            model: torch.nn.Module = build(workload, device)
            model.train(workload.job == "train_step")
            return model
    except (CannotRun, UsageError):  # in our own words already
        raise
    except Exception as error:  # whatever transformers or PEFT raise on a configuration
        raise NotPredictable(f"this model cannot be built: {one_line(error)}") from None


def _model(workload: Workload, device: str) -> Any:
    model = _base(workload, device)
    return model if workload.adapter is None else add_adapter(model, workload)


def _base(workload: Workload, device: str) -> Any:
    model = _plain_base(workload)
    if workload.job != "train_step":
        model.requires_grad_(False)
    if workload.quantisation:
        from pytest_lora.memory.quantised import quantise

        model = quantise(model, workload, device)
    if workload.job == "train_step":
        checkpoint(model, workload)
    return model


def checkpoint(model: Any, workload: Workload) -> None:
    """Have ``model`` recompute its blocks in backward, where the workload says so."""
    if not workload.checkpointing:
        return
    options = {"use_reentrant": workload.checkpointing == "reentrant"}
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()


def _plain_base(workload: Workload) -> Any:
    import transformers

    config = copy.deepcopy(workload.config)
    config.use_cache = workload.job == "inference"
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


def add_adapter(model: Any, workload: Workload) -> Any:
    """``model`` with the workload's adapter, whose weights are on the model's device."""
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
    """The batches of one optimizer step, on the CPU, with contents that are always the same.

    For inference without labels, and for ``generate()`` always with a mask, which it would make.
    """
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
    training = workload.job == "train_step"
    batch = {"input_ids": ids, **(_labels(workload, ids) if training else {})}
    if workload.padding != "none" or workload.new_tokens:
        mask = torch.ones_like(ids)
        if workload.padding == "padded":
            mask[:, : max(1, length // 4)] = 0
        batch["attention_mask"] = mask
    if not training and not workload.new_tokens and workload.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.clone()
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
        CannotRun: it is one of bitsandbytes, which is not installed.
        NotPredictable: nothing is trainable, or this torch lacks the optimizer.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise NotPredictable("nothing in this model is trainable, so there is no training step")
    if not isinstance(workload.optimizer, str):
        return workload.optimizer(parameters)
    if workload.optimizer in paged.OPTIMIZERS:
        return paged.make(workload.optimizer, parameters, lr=1e-4, **workload.options)
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
    autocast: torch.dtype | None = None,
) -> None:
    """One optimizer step over ``batches``, as a plain loop does it: only the graph is kept.

    ``autocast`` is the format of ``torch.autocast`` around the forward pass, None for none.
    """
    for batch in batches:
        with region(batch, autocast):
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                raise UsageError("the model gives no loss on this batch: does it have labels?")
            loss = loss / len(batches)
        loss.backward()
        del loss
    if clip is not None:
        groups = optimizer.param_groups
        torch.nn.utils.clip_grad_norm_([item for group in groups for item in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
