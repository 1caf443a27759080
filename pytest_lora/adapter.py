"""An adapter as its files tell it: configuration, tensors, and what is wrong with either.

Nothing here needs torch, a model or a network, and nothing raises for broken content: whatever
could not be read is among :attr:`Adapter.problems`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.locate import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, AdapterLocation
from pytest_lora.patterns import PatternError, names_match, resolver
from pytest_lora.records import Problem
from pytest_lora.safetensors_header import (
    Header,
    HeaderError,
    TensorInfo,
    read_header,
    read_sharded,
)
from pytest_lora.strict_json import JsonError, read_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "BASE_PREFIX",
    "Adapter",
    "LoraModule",
    "lora_modules",
    "pattern_names",
    "read_adapter",
    "split_key",
]

BASE_PREFIX = "base_model.model."
"""What PEFT puts before every module path in a saved adapter."""

_FACTORS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter directory, read once.

    Attributes:
        location: where it is and what it is called.
        config: ``adapter_config.json``; empty where it could not be read.
        tensors: every tensor of the weights by its key; empty where they could not be read.
        weights_files: the safetensors files the tensors lie in.
        metadata: the weights' own notes (``__metadata__``), merged over shards.
        problems: what was wrong while reading.
    """

    location: AdapterLocation
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    weights_files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def path(self) -> Path:
        """The adapter's directory."""
        return self.location.path

    @property
    def name(self) -> str:
        """The name it goes by in reports."""
        return self.location.name

    @property
    def peft_type(self) -> str:
        """PEFT method in upper case (``LORA``, ``IA3``, ...); empty where unknown."""
        value = self.config.get("peft_type")
        return value.upper() if isinstance(value, str) else ""

    @property
    def task_type(self) -> str | None:
        """PEFT task type (``CAUSAL_LM``, ...), if the configuration names one."""
        return self._text("task_type")

    @property
    def base_model(self) -> str | None:
        """``base_model_name_or_path``: the base model's hub id or path."""
        return self._text("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        """The base model's revision, if it was recorded."""
        return self._text("revision")

    @property
    def peft_version(self) -> str | None:
        """Version of PEFT that wrote the configuration (recorded since PEFT 0.18)."""
        return self._text("peft_version")

    @property
    def r(self) -> int:
        """The default rank; 0 where the configuration has no usable one."""
        return _whole(self.config.get("r", 8 if self.config else 0))

    @property
    def lora_alpha(self) -> float:
        """The default ``lora_alpha``; NaN where the configuration has no usable one."""
        return _number(self.config.get("lora_alpha", 8 if self.config else None))

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is ``alpha / sqrt(r)``."""
        return self.config.get("use_rslora") is True

    @property
    def use_dora(self) -> bool:
        """Whether every linear module also has a magnitude vector."""
        return self.config.get("use_dora") is True

    @property
    def bias(self) -> str:
        """``none``, ``all`` or ``lora_only``: which biases of the base were trained."""
        return self._text("bias") or "none"

    @property
    def target_modules(self) -> str | tuple[str, ...] | None:
        """A regular expression, names, or None."""
        value = self.config.get("target_modules")
        return value if isinstance(value, str) else self.names("target_modules") or None

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules that were trained whole and are stored whole."""
        return self.names("modules_to_save")

    @property
    def rank_pattern(self) -> Mapping[str, Any]:
        """Ranks that differ from :attr:`r`, by pattern."""
        return self._table("rank_pattern")

    @property
    def alpha_pattern(self) -> Mapping[str, Any]:
        """``lora_alpha`` that differs from the default, by pattern."""
        return self._table("alpha_pattern")

    def names(self, key: str) -> tuple[str, ...]:
        """The configuration's list of strings under ``key``; a lone string counts as one."""
        value = self.config.get(key)
        if isinstance(value, str):
            return (value,)
        return (
            tuple(item for item in value if isinstance(item, str))
            if isinstance(value, list)
            else ()
        )

    def _text(self, key: str) -> str | None:
        value = self.config.get(key)
        return value if isinstance(value, str) and value else None

    def _table(self, key: str) -> Mapping[str, Any]:
        value = self.config.get(key)
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What an adapter does to one module of the base model.

    Attributes:
        name: the module's path in the base model (no ``base_model.model.``).
        kind: ``linear`` (also Conv1D), ``conv``, ``embedding`` or ``parameter`` (a bare parameter,
            as of fused experts, reached through ``target_parameters``).
        rank: the rank the configuration promises; 0 where it promises none that makes sense.
        alpha: its ``lora_alpha``; NaN likewise.
        scaling: the factor before ``B @ A``: ``alpha / rank``, or ``alpha / sqrt(rank)`` with
            rsLoRA.
        rslora, dora: the variants in force.
        a: factor A, ``(rank, in)``; ``(rank, in, k...)`` for a convolution; ``(rank, vocabulary)``
            for an embedding; ``(rank * experts, in)`` for a parameter.
        b: factor B, ``(out, rank)``, likewise.
        magnitude: DoRA's magnitude vector, ``(out,)``.
        bias: B's own bias (``lora_bias``), ``(out,)``.
        path: the module's path in the adapter's file; differs from ``name`` inside wrapped modules.
    """

    name: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    rslora: bool
    dora: bool
    a: TensorInfo | None = None
    b: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None
    path: str = ""


def read_adapter(where: AdapterLocation | Path | str) -> Adapter:
    """Read an adapter's configuration and the headers of its weights.

    Opens ``adapter_config.json`` and safetensors files only.  Broken content does not raise; it is
    listed in :attr:`Adapter.problems`.
    """
    location = where if isinstance(where, AdapterLocation) else AdapterLocation.at(Path(where))
    problems: list[Problem] = []
    config = _read_config(location.path / CONFIG_NAME, problems)
    headers = _read_weights(location, problems)
    return Adapter(
        location,
        config,
        {key: info for header in headers for key, info in header.tensors.items()},
        tuple(header.path for header in headers),
        {key: value for header in headers for key, value in header.metadata.items()},
        tuple(problems),
    )


def _read_config(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        return read_object(path)
    except JsonError as error:
        problems.append(Problem(path.name, str(error), "a JSON object", "save the adapter again"))
        return {}


def _read_weights(location: AdapterLocation, problems: list[Problem]) -> Sequence[Header]:
    chosen = location.weights or location.path / WEIGHTS_NAME
    index = location.path / INDEX_NAME
    if location.weights is None and not _exists(chosen) and _exists(index):
        sharded = read_sharded(index)
        problems.extend(sharded.problems)
        return sharded.headers
    if not _exists(chosen) or chosen.suffix != ".safetensors":
        return ()  # which other weights there are is for the file check to say
    try:
        return (read_header(chosen),)
    except HeaderError as error:
        problems.append(error.problem)
        return ()


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def split_key(key: str) -> tuple[str, str]:
    """``(module, factor)`` of a LoRA tensor's key: ``("model.fc", "lora_A.weight")``.

    The factor is empty for keys that belong to no LoRA module.
    """
    for factor in _FACTORS:
        if key.endswith("." + factor):
            return key[: -len(factor) - 1].removeprefix(BASE_PREFIX), factor
    return key.removeprefix(BASE_PREFIX), ""


def lora_modules(adapter: Adapter) -> tuple[LoraModule, ...]:
    """Every module the tensors of a LoRA adapter touch, in the file's order.

    Ranks, alphas and scalings are the configuration's promise, resolved as PEFT resolves it;
    whether the tensors keep it is not judged here.  Empty for other methods than LoRA.
    """
    if adapter.peft_type != "LORA":
        return ()
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, info in adapter.tensors.items():
        module, factor = split_key(key)
        if factor:
            found.setdefault(module, {})[_FACTORS[factor]] = info
    rank_of, alpha_of = resolver(adapter.rank_pattern), resolver(adapter.alpha_pattern)
    return tuple(
        _lora_module(adapter, path, parts, rank_of, alpha_of) for path, parts in found.items()
    )


def _lora_module(
    adapter: Adapter,
    path: str,
    parts: Mapping[str, TensorInfo],
    rank_of: Callable[[str], str | None],
    alpha_of: Callable[[str], str | None],
) -> LoraModule:
    kind = _kind(adapter, path, parts)
    keys = pattern_names(adapter, path, kind)
    rank = _agreed([_rank(adapter, rank_of(key)) for key in keys], 0)
    alpha = _agreed([_alpha(adapter, alpha_of(key)) for key in keys], math.nan)
    divisor = math.sqrt(rank) if adapter.use_rslora else rank
    return LoraModule(
        path.replace(".base_layer.", "."),
        kind,
        rank,
        alpha,
        alpha / divisor if divisor else math.nan,
        adapter.use_rslora,
        adapter.use_dora,
        **parts,
        path=path,
    )


def _kind(adapter: Adapter, path: str, parts: Mapping[str, TensorInfo]) -> str:
    factor = parts.get("a") or parts.get("b")
    if factor and "lora_embedding" in factor.name:
        return "embedding"
    if factor and len(factor.shape) > 2:
        return "conv"
    return "parameter" if _parameters(adapter, path) else "linear"


def _parameters(adapter: Adapter, path: str) -> list[str]:
    """Full names of the ``target_parameters`` that factors at ``path`` can stand for.

    PEFT nests one wrapper per parameter of a module, so a second parameter's factors lie under
    ``base_layer``; which parameter is the outer one follows from the base model's own order.
    """
    entries = adapter.names("target_parameters")
    module = path.replace(".base_layer", "")
    if not entries or _is_target(adapter, module):
        return []
    found: list[str] = []
    for owner, _, parameter in (entry.rpartition(".") for entry in entries):
        if not owner or f".{module}".endswith(f".{owner}"):
            found.append(f"{module}.{parameter}")
    return found


def _is_target(adapter: Adapter, module: str) -> bool:
    try:
        return names_match(adapter.target_modules or (), module)
    except PatternError:
        return False


def pattern_names(adapter: Adapter, path: str, kind: str) -> list[str]:
    """The names PEFT looks up in ``rank_pattern`` and ``alpha_pattern`` for factors at ``path``."""
    if kind == "parameter":
        return _parameters(adapter, path)
    owner, inside, _ = path.partition(".base_layer.")
    name = path.replace(".base_layer.", ".")
    # An attention block wrapped whole hands its own rank on to the projection inside it.
    return [owner if inside and not _is_target(adapter, name) else name]


def _rank(adapter: Adapter, key: str | None) -> int:
    return adapter.r if key is None else _whole(adapter.rank_pattern[key])


def _alpha(adapter: Adapter, key: str | None) -> float:
    return adapter.lora_alpha if key is None else _number(adapter.alpha_pattern[key])


def _agreed(values: list[Any], otherwise: Any) -> Any:
    """The one value all candidates share, or ``otherwise``."""
    return values[0] if len(set(values)) == 1 else otherwise


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def _number(value: Any) -> float:
    # type() and not isinstance(): JSON's true is an int to Python.
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan
