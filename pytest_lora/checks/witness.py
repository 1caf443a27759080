"""Who else says what the scaling was: a second opinion on ``lora_alpha`` and ``use_rslora``.

One configuration and one set of weights cannot contradict each other about the scaling, which only
multiplies.  But many trainers leave their own record beside the adapter: ms-swift an ``args.json``,
Axolotl its settings in the model card, others a ``training.json`` or the file's metadata.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_lora.strict_json import JsonError, read_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pytest_lora.adapter import Adapter

__all__ = ["Witness", "scaling_witnesses"]

_LIMIT = 256 * 1024
_NOT_ABOUT_TRAINING = re.compile(
    r"adapter_config|tokenizer|vocab|special_tokens|added_tokens|trainer_state|config\.json|\.index\."
)
_RANKS = ("lora_r", "lora_rank", "rank", "r", "ss_network_dim")
_ALPHAS = ("lora_alpha", "alpha", "ss_network_alpha")
_RSLORA = ("use_rslora", "peft_use_rslora")
_YAML_LINE = re.compile(r"^\s{0,4}(\w+):[ \t]*([\w.]+)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Witness:
    """What one file says about the scaling; ``None`` where it says nothing."""

    where: str
    alpha: float
    rslora: bool | None


def scaling_witnesses(adapter: Adapter) -> Iterator[Witness]:
    """Every record of the training beside the adapter that is about its rank.

    A record with another rank is of another run and is passed over.
    """
    for where, record in _records(adapter):
        rank, alpha = _number(record, _RANKS), _number(record, _ALPHAS)
        if rank == adapter.r and alpha is not None:
            yield Witness(where, alpha, _flag(record))


def _records(adapter: Adapter) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if adapter.metadata and adapter.weights_files:
        yield f"the metadata of {adapter.weights_files[0].name}", adapter.metadata
    try:
        files = sorted(adapter.path.iterdir())
    except OSError:
        return
    for path in files:
        if not path.is_file():  # a pipe would block
            continue
        if path.name == "README.md":
            yield path.name, _card(path)
        elif path.suffix == ".json" and not _NOT_ABOUT_TRAINING.search(path.name):
            yield path.name, _json(path)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path, limit=_LIMIT)
    except JsonError:
        return {}


def _card(path: Path) -> Mapping[str, Any]:
    """Settings a model card states exactly once, as ``key: value`` lines."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_LIMIT).decode("utf-8", "replace")
    except OSError:
        return {}
    found: dict[str, str] = {}
    for key, value in _YAML_LINE.findall(text):
        found[key] = value if found.get(key, value) == value else ""
    return found


def _number(record: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    for name in names:
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
            return float(value)
    return None


def _flag(record: Mapping[str, Any]) -> bool | None:
    for name in _RSLORA:
        value = record.get(name)
        if isinstance(value, bool) or str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    return None
