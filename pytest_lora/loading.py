"""Finding a base model and loading it: the class the task calls for, safetensors only.

Nothing a base model or an adapter ships is executed: remote code is never trusted and weights in
any format but safetensors are never opened.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.locate import is_there
from pytest_lora.offload import Placing
from pytest_lora.safetensors_header import (
    Header,
    HeaderError,
    TensorInfo,
    read_header,
    read_sharded,
)

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter

with warnings.catch_warnings():
    # What libraries warn of while they import each other (bitsandbytes compiles something, torch
    # deprecates what that takes) is not the adapter's doing.  Everything below needs PEFT anyway.
    warnings.simplefilter("ignore")
    import peft  # noqa: F401

__all__ = [
    "FORMATS",
    "BaseSpec",
    "Checkpoint",
    "Loaded",
    "as_stored",
    "base_class",
    "base_config",
    "load_tokenizer",
    "load_weights",
    "meta_model",
    "one_line",
    "parse_device",
    "parse_dtype",
    "quiet",
    "read_tensor",
    "resolve_base",
    "spec_for",
    "weight_headers",
]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
FORMATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes as safetensors spells them."""
_HINT = "give it with --lora-base-model=PATH or limit the run with --lora-checks=files"
_SENTINEL_LABELS = 1013
"""A number of labels no real model dimension has, to tell which tensors grow with it."""


def parse_dtype(name: str | torch.dtype) -> torch.dtype | None:
    """The dtype of that name; None for ``auto``, the checkpoint's own.

    Raises:
        UsageError: no such dtype.
    """
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return None
    if name not in _DTYPES:
        raise UsageError(f"dtype {name!r} is none of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def parse_device(name: str | torch.device) -> torch.device:
    """The device of that name; ``auto`` is a CUDA GPU if there is one, else the CPU.

    Raises:
        UsageError: torch knows no such device.
        CannotRun: the device is not there.
    """
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"device {name!r} is not one torch knows (auto, cpu, cuda, cuda:0)"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise CannotRun(f"device {name!r} asked for, but torch sees {count} CUDA devices")
    return device


# ------------------------------------------------------------------------------ finding the base


def resolve_base(
    adapter: Adapter, *, explicit: str | Path | None = None, root: Path | None = None
) -> Path:
    """The local directory of the base model ``adapter`` is to be tried on.

    An explicit path or hub id wins.  Otherwise the adapter's ``base_model_name_or_path`` is taken
    as a path relative to the working directory, to ``root``, to the adapter's directory and to
    each folder above that; failing these, as a hub id at the adapter's ``revision``, from the
    local cache or, unless ``HF_HUB_OFFLINE`` is set, from the hub.

    Raises:
        UsageError: ``explicit`` is neither a model directory nor a hub id.
        CannotRun: the base model is nowhere to be found.
    """
    if explicit is not None:
        return _explicit_base(str(explicit))
    name = adapter.base_model
    if not name:
        raise CannotRun(f"{adapter.path}: the configuration names no base model; {_HINT}")
    for candidate in _local_candidates(name, adapter.path, root):
        if _holds_model(candidate):
            return candidate.resolve()
    return _from_hub(name, adapter.revision, f"{adapter.path} was trained on {name!r}")


def _explicit_base(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    if _holds_model(path):
        return path.resolve()
    if is_there(path):
        raise UsageError(f"base model {name}: no {CONFIG} there, so it is no model directory")
    if not _is_hub_id(name):
        raise UsageError(f"base model {name}: there is no such directory")
    repo, _, revision = name.partition("@")
    return _from_hub(repo, revision or None, f"base model {name!r} was asked for")


def _local_candidates(name: str, adapter: Path, root: Path | None) -> Iterator[Path]:
    path = os.path.expanduser(name)  # unlike Path's, no error for a user who is not known
    home = Path(adapter).resolve()
    starts = [Path.cwd(), *([root] if root else []), home, *home.parents]
    for start in starts:
        yield start / path


def _holds_model(folder: Path) -> bool:
    try:
        return (folder / CONFIG).is_file()
    except (OSError, ValueError):  # too long a name, a null byte
        return False


def _is_hub_id(name: str) -> bool:
    parts = name.partition("@")[0].split("/")
    return 1 <= len(parts) <= 2 and all(
        part
        and part[0].isalnum()
        and part.replace("-", "").replace("_", "").replace(".", "").isalnum()
        for part in parts
    )


def _from_hub(name: str, revision: str | None, why: str) -> Path:
    if not _is_hub_id(name):
        raise CannotRun(f"{why}, which is not on this machine; {_HINT}")
    try:
        path = _snapshot(name, revision)
    except Exception as error:  # the hub client has a dozen ways to say no, httpx and requests more
        at = f" at revision {revision}" if revision else ""
        raise CannotRun(
            f"{why}{at}, which is neither a local folder, nor in the hub cache, nor to be had from"
            f" the hub ({type(error).__name__}); {_HINT}"
        ) from None
    if not (path / CONFIG).is_file():
        raise CannotRun(f"{why}, whose snapshot {path} holds no {CONFIG}; {_HINT}")
    return path


def _snapshot(name: str, revision: str | None) -> Path:
    """The model's own files from the hub cache or the hub: no code, no pickles, no subfolders."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # Unauthenticated requests and slow disks are not the adapter's doing.
            warnings.simplefilter("ignore")
            found = snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
                ignore_patterns=["*/*", "consolidated*"],
                # Some releases ask the hub for the files of a commit, offline or not.
                local_files_only=constants.HF_HUB_OFFLINE,
            )
    finally:
        if not silent:
            enable_progress_bars()
    return Path(found)


# ------------------------------------------------------------------------------ what to load it as


@dataclass(frozen=True)
class BaseSpec:
    """Everything that decides what loading gives: two equal specs give equal models.

    Attributes:
        path: directory of the base model.
        model_class: name of the transformers class (an Auto class or a concrete one).
        num_labels: number of labels of the head, where the adapter's weights fix it.
        dtype: dtype to load in; None for the checkpoint's own.
        device: where to.
        device_map: how to spread it over devices instead; None for one device.
        max_memory: what of each may be used, as ``device=size``.
    """

    path: Path
    model_class: str
    num_labels: int | None
    dtype: torch.dtype | None
    device: torch.device
    device_map: str | None = None
    max_memory: tuple[str, ...] = ()


def base_config(path: Path) -> Any:
    """The transformers configuration of the model in ``path``.

    Raises:
        CannotRun: it cannot be read, or needs code the model ships.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a malformed file raises inside transformers
        raise CannotRun(f"{path / CONFIG}: {_config_trouble(path, error)}") from None


def _config_trouble(path: Path, error: Exception) -> str:
    try:
        data = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "there is no such file"
    except (OSError, ValueError):
        return "not a JSON file"
    if not isinstance(data, dict):
        return "not a JSON object"
    if data.get("auto_map"):
        return (
            f"model type {data.get('model_type')!r} needs code shipped with the model, which is"
            " never run here; pass the loaded model through your own lora_base_model fixture"
        )
    return f"transformers cannot read it: {one_line(error)}"


def base_class(adapter: Adapter, config: Any) -> str:
    """Name of the transformers class that ``adapter``'s task type calls for.

    Without a task type: the class named in ``auto_mapping`` if it is one of transformers' own,
    else the first of the base's ``architectures`` that transformers has, else ``AutoModel``.
    """
    named = _AUTO_CLASSES.get(adapter.task_type or "")
    if named:
        return named
    mapping = adapter.config.get("auto_mapping")
    wished = [mapping.get("base_model_class")] if isinstance(mapping, Mapping) else []
    candidates = (*wished, *(getattr(config, "architectures", None) or ()))
    return next((name for name in candidates if _is_model_class(name)), "AutoModel")


def _is_model_class(name: object) -> TypeGuard[str]:
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def spec_for(
    path: Path,
    adapter: Adapter,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | None = None,
    max_memory: Sequence[str] = (),
) -> BaseSpec:
    """What to load from ``path`` for ``adapter``.

    Raises:
        UsageError: ``max_memory`` without the ``device_map`` whose shares it gives.
    """
    if max_memory and device_map is None:
        raise UsageError(f"max_memory={list(max_memory)} is for a device_map, and there is none")
    config = base_config(path)
    model_class = base_class(adapter, config)
    labels = None
    if adapter.task_type in _LABELLED:
        labels = _number_of_labels(adapter, config, model_class)
    where = parse_device(device), device_map, tuple(max_memory)
    return BaseSpec(Path(path), model_class, labels, parse_dtype(dtype), *where)


def _number_of_labels(adapter: Adapter, config: Any, model_class: str) -> int | None:
    """Rows of the head tensor in the adapter's weights, if it holds one.

    Which tensors are the head's is not guessed from names: it is those whose first dimension
    follows ``num_labels``, seen on a model without weights.
    """
    probe = copy.deepcopy(config)
    probe.num_labels = _SENTINEL_LABELS
    for name, parameter in meta_model(model_class, probe).named_parameters():
        if parameter.shape[:1] == (_SENTINEL_LABELS,):
            rows = _rows_in_adapter(adapter, name)
            if rows is not None:
                return rows
    return None


def _rows_in_adapter(adapter: Adapter, parameter: str) -> int | None:
    module, _, leaf = parameter.rpartition(".")
    for suffix in (leaf, f"modules_to_save.{leaf}", f"original_module.{leaf}", "lora_B.weight"):
        info = adapter.tensors.get(f"base_model.model.{module}.{suffix}")
        if info is not None and info.shape:
            return int(info.shape[0])
    return None


def meta_model(model_class: str, config: Any) -> torch.nn.Module:
    """The model of that class on the meta device: all shapes, no memory.

    Raises:
        CannotRun: transformers has no such class for this model type.
    """
    import transformers

    cls = getattr(transformers, model_class)
    build = cls.from_config if model_class.startswith("Auto") else cls._from_config
    try:
        with quiet(), torch.device("meta"):
            model: torch.nn.Module = build(copy.deepcopy(config))
    except Exception as error:  # whatever a model class raises on a configuration it cannot take
        raise CannotRun(f"{_type_of(config)} as {model_class}: {one_line(error)}") from None
    return model.eval()


def _type_of(config: Any) -> str:
    return f"model type {getattr(config, 'model_type', '?')!r}"


# ------------------------------------------------------------------------------ loading it


class Loaded(NamedTuple):
    """A model in eval mode with gradients off, and the parameters it had no weights for."""

    module: torch.nn.Module
    untrained: tuple[str, ...]


def load_weights(spec: BaseSpec, adapter: Adapter | None = None) -> Loaded:
    """The model of ``spec`` in eval mode, gradients off, on its device.

    A head the checkpoint has no weights for (a classifier on a plain language model) gets values
    that depend on its parameters' names and shapes only, so that every process sees the same.

    Raises:
        CannotRun: weights missing, damaged or not safetensors; one line says which.
    """
    config = base_config(spec.path)
    weight_headers(spec.path)
    options: dict[str, Any] = {_dtype_keyword(): spec.dtype or "auto"}
    if spec.num_labels is not None and spec.num_labels != config.num_labels:
        options |= {"num_labels": spec.num_labels, "ignore_mismatched_sizes": True}
    if getattr(config, "quantization_config", None) and spec.device_map is None:
        options["device_map"] = {"": spec.device}
    model, info = _placed(spec, options)
    fresh = _untrained(model, info)
    _require_trained(spec, model, fresh, adapter)
    _fill(model, fresh)
    if "device_map" not in options and spec.device_map is None:
        model.to(spec.device)
    _allow_batches(model)
    as_stored(model)
    return Loaded(model.requires_grad_(False).eval(), tuple(fresh))


def _placed(spec: BaseSpec, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The model on its device, or spread over several with all of its weights readable."""
    if spec.device_map is None:
        return _from_pretrained(spec, options)
    placing = Placing(spec.device_map, spec.max_memory, spec.device)
    try:
        model, info = _from_pretrained(spec, {**options, **placing.options})
    except BaseException:
        placing.abandon()
        raise
    placing.finish(model)
    return model, info


def _dtype_keyword() -> str:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _from_pretrained(spec: BaseSpec, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    import transformers

    cls = getattr(transformers, spec.model_class)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, info = cls.from_pretrained(
                spec.path,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # whatever transformers raises on files it cannot take
        raise CannotRun(f"{spec.path} as {spec.model_class}: {one_line(error)}") from None
    return model, info


def weight_headers(path: Path) -> tuple[Header, ...]:
    """The headers of the safetensors files the model directory ``path`` is made of.

    Raises:
        CannotRun: there are none, or one is missing or not whole.
    """
    if (path / SINGLE).is_file():
        try:
            return (read_header(path / SINGLE),)
        except HeaderError as error:
            raise CannotRun(f"{path}: {error}") from None
    if not (path / INDEX).is_file():
        raise CannotRun(f"{path}: {_instead_of_weights(path)}")
    sharded = read_sharded(path / INDEX)
    if sharded.problems:
        raise CannotRun(f"{path}: {sharded.problems[0]}")
    return sharded.headers


def _instead_of_weights(path: Path) -> str:
    pickles = sorted(item.name for item in path.glob("*.bin"))
    if pickles:
        return f"holds only {pickles[0]}, a pickle, which is never opened here; {SINGLE} is needed"
    return f"holds no weights; {SINGLE} or {INDEX} is needed"


def _untrained(model: Any, info: Mapping[str, Any]) -> list[str]:
    """Parameters the checkpoint has nothing (or another shape) for, in the model's order."""
    mismatched = info.get("mismatched_keys", ())
    names = {item if isinstance(item, str) else item[0] for item in mismatched}
    names.update(info.get("missing_keys", ()))
    # Older transformers give a bare body's names the prefix they have in a task model.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [name for name, _ in model.named_parameters() if {name, prefix + name} & names]


def _require_trained(
    spec: BaseSpec, model: Any, fresh: Sequence[str], adapter: Adapter | None
) -> None:
    """Only a task head (or a pooler) may be without weights; a body with holes is no base model."""
    brought = _brought_by(adapter)
    body = _body_prefix(model)
    lacking = [
        name
        for name in fresh
        if name not in brought
        and "pooler" not in name
        and (name.startswith(body) or _is_language_model(model))
    ]
    if lacking:
        more = ", ..." if len(lacking) > 3 else ""
        raise CannotRun(
            f"{spec.path} as {type(model).__name__}: the weights lack {len(lacking)} tensors the"
            f" model needs ({', '.join(lacking[:3])}{more})"
        )


def _body_prefix(model: Any) -> str:
    """What the names of a task model's body begin with; nothing if the model is a bare body."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return prefix if any(name.startswith(prefix) for name, _ in model.named_parameters()) else ""


def _is_language_model(model: Any) -> bool:
    """Whether the output layer was trained with the body, so that it must be in the checkpoint."""
    name = type(model).__name__
    return any(part in name for part in ("CausalLM", "LMHead", "ConditionalGeneration"))


def _brought_by(adapter: Adapter | None) -> set[str]:
    """Names of the base's tensors as the adapter's file may have them, by either prefix."""
    prefixes = ("base_model.model.", "base_model.")
    names = adapter.tensors if adapter else ()
    return {name.removeprefix(prefix) for name in names for prefix in prefixes}


def _fill(model: Any, names: Sequence[str]) -> None:
    """Values for an untrained head: normal, from a generator seeded by each parameter's name."""
    spread = float(getattr(model.config, "initializer_range", None) or 0.02)
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        if parameter.dim() < 2:
            continue  # biases and norms have constant initial values
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data.copy_(values)


def _allow_batches(model: Any) -> None:
    """A sequence classifier refuses a batch without a padding token: let it have one."""
    config = model.config
    lacks = getattr(config, "pad_token_id", None) is None
    if lacks and type(model).__name__.endswith("ForSequenceClassification"):
        end = getattr(config, "eos_token_id", None)
        first = end[0] if isinstance(end, list) and end else end
        config.pad_token_id = first if isinstance(first, int) else 0


def as_stored(model: torch.nn.Module) -> None:
    """Keep 4-bit weights as they are stored.

    On CPUs with bfloat16 instructions bitsandbytes writes a weight anew in a layout of its own the
    first time it is used, and rounds the scales of its blocks: another model than the one on disk.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


# ------------------------------------------------------------------------------ silence


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other libraries' progress bars, load reports and warnings off, and back as they were."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loud = level != logging.CRITICAL  # setting it makes every logger forget what it had looked up
    if loud:
        logging.set_verbosity(logging.CRITICAL)
    if bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # What transformers and its dependencies deprecate is not the adapter's doing.
            warnings.simplefilter("ignore")
            yield
    finally:
        if loud:
            logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException, limit: int = 240) -> str:
    """The gist of another library's exception: its type and the first lines of its message."""
    text = " ".join(str(error).split())
    short = text if len(text) <= limit else text[: limit - 3] + "..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


# ------------------------------------------------------------------------------ reading parts of it


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer in ``path``; None if there is none that loads."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                path, trust_remote_code=False, local_files_only=True
            )
    except Exception:  # a base model without a usable tokenizer is still a base model
        return None


class Checkpoint:
    """The tensors in a model directory, each read when asked for."""

    def __init__(self, path: Path) -> None:
        headers = weight_headers(path)
        self._infos = {key: info for header in headers for key, info in header.tensors.items()}

    def find(self, name: str, module: torch.nn.Module) -> TensorInfo | None:
        """The entry that holds ``name`` of ``module``: that key, or one with its prefix moved.

        A checkpoint of a bare body lacks the prefix a task model gives its names, and the other
        way round.
        """
        prefix = f"{getattr(module, 'base_model_prefix', '')}."
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in self._infos:
                return self._infos[key]
        return None

    def read(self, name: str, module: torch.nn.Module) -> torch.Tensor | None:
        """The tensor ``name`` of ``module`` on the CPU, as stored; None if it is not there."""
        info = self.find(name, module)
        return None if info is None else read_tensor(info)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """One tensor of a safetensors file, on the CPU."""
    from safetensors import safe_open

    with safe_open(info.file, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(info.name)
    return tensor
