"""What an adapter is declared to train, of a live model: by PEFT's configuration or by patterns."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pytest_lora.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["Declared", "declare", "matches", "require_busy", "unwrapped"]

_TOKENS = "trainable_tokens_"


@dataclass(frozen=True, slots=True)
class Declared:
    """A model, and which of its parameters a training run is meant to move.

    Attributes:
        model: the model without wrappers of ``torch.compile`` and data parallelism.
        adapter: the name of the adapter, or ``"model"`` where patterns declare what trains.
        trainable: the parameters meant to train, by name.
        frozen: all others, by name; a tied parameter comes under its first name only.
        others: names of the model's other adapters.
    """

    model: torch.nn.Module
    adapter: str
    trainable: dict[str, torch.nn.Parameter]
    frozen: dict[str, torch.nn.Parameter]
    others: tuple[str, ...] = ()

    def other_adapter(self, name: str) -> str | None:
        """Which other adapter the tensor ``name`` belongs to, if any."""
        parts = name.split(".")
        return next((other for other in self.others if other in parts), None)


def declare(
    model: torch.nn.Module, adapter: str | None = None, trainable: Collection[str] = ()
) -> Declared:
    """What is declared to train.

    Args:
        model: a ``peft.PeftModel``, or any module together with ``trainable``.
        adapter: the adapter in training; needed only where the model has several.
        trainable: patterns (:mod:`fnmatch`) of the names of the parameters that train; replaces
            what the configuration says.

    Raises:
        UsageError: it is no model, nothing is declared, a pattern matches nothing, or the adapter
            is not named.
    """
    model = unwrapped(model)
    if not hasattr(model, "named_parameters"):
        raise UsageError(f"expected a model whose parameters are named, not {type(model).__name__}")
    named = dict(model.named_parameters())
    adapters = tuple(getattr(model, "peft_config", ()))
    name = _adapter_name(model, adapters, adapter, bool(trainable))
    if trainable:
        chosen = _by_patterns(named, trainable)
    else:
        chosen = {id(parameter) for parameter in _by_configuration(model, name)}
    picked = {key: value for key, value in named.items() if id(value) in chosen}
    if not picked:
        raise UsageError(f"the configuration of adapter {name!r} declares nothing trainable here")
    return Declared(
        model,
        name,
        picked,
        {key: value for key, value in named.items() if key not in picked},
        tuple(other for other in adapters if other != name),
    )


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside wrappers of ``torch.compile`` and data parallelism, whose names it keeps."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = getattr(model, "module", None)
        if inner is None:
            return model
        model = inner


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a tensor's name fits one of the patterns; a text is one pattern, not its letters."""
    return any(fnmatchcase(name, pattern) for pattern in _each(patterns))


def _each(patterns: Collection[str]) -> Collection[str]:
    return (patterns,) if isinstance(patterns, str) else patterns


def require_busy(declared: Declared, idle: Collection[str]) -> None:
    """Something of the adapter is left to judge.

    Raises:
        UsageError: ``idle`` takes all of it away.
    """
    if all(matches(name, idle) for name in declared.trainable):
        raise UsageError(f"idle={idle!r} names all that trains, so nothing would be judged")


def _adapter_name(
    model: torch.nn.Module, adapters: tuple[str, ...], adapter: str | None, by_pattern: bool
) -> str:
    if adapter is not None:
        if adapters and adapter not in adapters:
            raise UsageError(f"the model has no adapter {adapter!r}; it has {', '.join(adapters)}")
        return adapter
    if len(adapters) == 1:
        return adapters[0]
    if by_pattern:
        return "model"
    if adapters:
        raise UsageError(
            f"the model has several adapters ({', '.join(adapters)}): say which one is in training,"
            " adapter=NAME; the active one may be the mistake that is looked for"
        )
    raise UsageError(
        f"{type(model).__name__} is no PeftModel: say what trains, trainable=[PATTERN, ...]"
    )


def _by_patterns(named: dict[str, torch.nn.Parameter], patterns: Collection[str]) -> set[int]:
    for pattern in _each(patterns):
        if not any(fnmatchcase(name, pattern) for name in named):
            near = ", ".join(list(named)[:3])
            raise UsageError(f"trainable: {pattern!r} matches no parameter (there are {near}, ...)")
    return {id(value) for name, value in named.items() if matches(name, patterns)}


def _by_configuration(model: Any, adapter: str) -> Iterator[torch.nn.Parameter]:
    """The adapter's own tensors, saved modules and token rows, and the biases ``bias`` names.

    An adapter's own are those that PEFT itself trains: a part of the name starts with the method's
    prefix, and a later one is the adapter's name.
    """
    prefixes = [_TOKENS, getattr(model.base_model, "prefix", None) or "lora_"]
    bias = getattr(model.peft_config[adapter], "bias", "none")
    tuned = {id(parameter) for parameter in _biases_of_layers(model)}
    for name, parameter in model.named_parameters():
        named = bias == "all" or (bias.endswith("_only") and id(parameter) in tuned)
        if _own(name.split("."), adapter, prefixes) or (
            named and name.endswith(".bias") and not _foreign(model, name, adapter)
        ):
            yield parameter


def _own(parts: list[str], adapter: str, prefixes: list[str]) -> bool:
    if adapter not in parts:
        return False
    before = parts[: len(parts) - 1 - parts[::-1].index(adapter)]
    if before and before[-1] in ("modules_to_save", "prompt_encoder"):
        return True
    return any(part.startswith(prefix) for part in before for prefix in prefixes)


def _foreign(model: Any, name: str, adapter: str) -> bool:
    """Whether a bias is another adapter's, or one that a saved module stands in for."""
    parts = name.split(".")
    return "original_module" in parts or any(
        other in parts for other in model.peft_config if other != adapter
    )


def _biases_of_layers(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    from pytest_lora.subject import lora_layers

    for _, layer in lora_layers(model):
        bias: Any = getattr(layer.get_base_layer(), "bias", None)
        if bias is not None:
            yield bias
