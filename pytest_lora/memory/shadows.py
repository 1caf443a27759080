"""True values of small tensors beside tensors that have none.

A model asks its batch questions: is every position attended to, are the positions consecutive?  On
the meta device there is no answer, and guessing takes the wrong branch.  So the integers and
booleans of the batch keep a real copy, and every operator that gets nothing but known tensors and
constants, and makes small ones, is run on the copies too.  Weights and what is computed from them
stay unknown, and a question about their values raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from pytest_lora.errors import UsageError
from pytest_lora.memory.patching import replaced
from pytest_lora.memory.records import NotPredictable

__all__ = ["Shadows"]

_LOOK_UP = torch.ops.aten.embedding.default
_ITEM = torch.ops.aten._local_scalar_dense.default
LIMIT = 1 << 20
"""Elements up to which a copy is kept: masks of a batch, not tensors of a model."""
_EMPTY = ("aten.empty", "aten.new_empty")


class Shadows:
    """Executes operators on meta tensors, and on the real copies of those it knows."""

    def __init__(self) -> None:
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def to_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` without its data; the values of integers and booleans are remembered."""
        empty = tensor.to("meta")
        if not _has_fractions(tensor):
            self._values[empty] = tensor
        return empty

    @contextlib.contextmanager
    def constants(self) -> Iterator[None]:
        """``torch.tensor`` on the meta device makes known tensors, and storage that is counted.

        There it drops the value without a word to the dispatcher; on a real device neither happens.
        """
        original = torch.tensor

        def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
            if device is None or torch.device(device).type != "meta":
                return original(data, device=device, **options)
            with _disable_current_modes():
                value = original(data, device="cpu", **options)
            return self.to_meta(value)

        with replaced(torch, "tensor", tensor):
            yield

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``, on the copies as well where all values are known.

        Raises:
            NotPredictable: a value is asked for that nobody knows.
            UsageError: a row of a table is asked for that it has not.
        """
        if func is _LOOK_UP:
            self._in_range(*args[:2])
        given = [item for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)]
        if func is _ITEM:
            return self._answer(func, given[0])
        out = func(*args, **kwargs)
        made = [item for item in tree_iter(out) if isinstance(item, torch.Tensor)]
        if not made or not all(map(_may_be_known, made)):
            return out
        if _repeatable(func) and all(map(self._known, given)):
            for empty, value in zip(made, self._real(func, args, kwargs), strict=True):
                self._values[empty] = value
        else:  # written in place with what nobody knows
            for empty in made:
                self._values.pop(empty, None)
        return out

    def _answer(self, func: Any, tensor: torch.Tensor) -> Any:
        if tensor in self._values:
            return self._values[tensor].item()
        if tensor.device.type != "meta":
            return func(tensor)
        raise NotPredictable(
            f"the step reads the value of a {str(tensor.dtype).removeprefix('torch.')} tensor of "
            f"shape {list(tensor.shape)}, which a prediction does not have; what memory it takes "
            "depends on that value"
        )

    def _in_range(self, table: torch.Tensor, rows: torch.Tensor) -> None:
        """A device stops at an index beyond a table; without one nobody would notice."""
        known = self._values.get(rows)
        if known is None or not known.numel():
            return
        for row in (int(known.min()), int(known.max())):
            if not 0 <= row < table.shape[0]:
                raise UsageError(
                    f"the batch asks for row {row} of a table that has {table.shape[0]}: a longer "
                    "sequence than the model has positions, or token ids beyond its vocabulary"
                )

    def _known(self, tensor: torch.Tensor) -> bool:
        return tensor in self._values or tensor.device.type != "meta"

    def _real(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            out = func(*tree_map(self._value, tuple(args)), **tree_map(self._value, kwargs))
        return [item for item in tree_iter(out) if isinstance(item, torch.Tensor)]

    def _value(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return self._values.get(item, item)
        return torch.device("cpu") if isinstance(item, torch.device) else item


def _has_fractions(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _may_be_known(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta" and tensor.numel() <= LIMIT


def _repeatable(func: Any) -> bool:
    """Whether the operator's result follows from its arguments: no chance, no leftovers."""
    chance = torch.Tag.nondeterministic_seeded in func.tags
    return not chance and not str(func).startswith(_EMPTY)
