"""Numbers per module, wherever the details of a measurement hold them.

Checks know nothing of reports.  Either a list of objects with a key ``module``, or an object whose
keys are modules, is taken for what it looks like.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from pytest_lora.records import Json

__all__ = ["as_number", "module_maps", "split_module"]

# Sizes of things: they differ by module without saying anything about it.
_SIZES = frozenset({"elements", "outside"})
_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def module_maps(value: Json) -> dict[str, dict[str, float]]:
    """``{name: {module: number}}`` for everything in ``value`` that is a number per module.

    Either a list of objects with a key ``module``, or an object whose keys are modules; the name is
    empty where there is only one number.  Numbers that are the same everywhere show nothing.
    """
    rows = dict(_rows_by_module(value))
    if len(rows) < 2 or not any(split_module(name)[1] for name in rows):
        return {}
    names = dict.fromkeys(name for row in rows.values() for name in row if name not in _SIZES)
    maps = {name: {m: row[name] for m, row in rows.items() if name in row} for name in names}
    return {name: found for name, found in maps.items() if len(set(map(repr, found.values()))) > 1}


def _rows_by_module(value: Json) -> Iterator[tuple[str, dict[str, float]]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield name, _numbers(item if isinstance(item, Mapping) else {"": item})
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            if isinstance(item, Mapping) and isinstance(item.get("module"), str):
                yield str(item["module"]), _numbers(item)


def _numbers(row: Mapping[str, Json]) -> dict[str, float]:
    found = ((name, as_number(item)) for name, item in row.items())
    return {name: item for name, item in found if item is not None}


def as_number(value: Json) -> float | None:
    """A number, or one of the words that stand for those that JSON lacks; None for all else."""
    if isinstance(value, str):
        return _WORDS.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def split_module(module: str) -> tuple[str, str, str]:
    """``("model.layers", "0", "self_attn.q_proj")``: around the first number in a module's path."""
    parts = module.split(".")
    if all(part.isdecimal() for part in parts):
        return module, "", ""  # "2.0", the scaling, is no module
    for place, part in enumerate(parts):
        if part.isdecimal() and part.isascii():
            rest = ["*" if p.isdecimal() else p for p in parts[place + 1 :]]
            return ".".join(parts[:place]), part, ".".join(rest)
    return module, "", ""
