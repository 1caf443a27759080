"""Which pictures the details of a measurement hold.

Checks know nothing of pictures.  They put numbers per module, per step or per document into their
details, and what has that shape is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pytest_lora.records import Json, Measurement
from pytest_lora.report.charts import heat_table, line_chart
from pytest_lora.report.markup import Markup

__all__ = ["figures"]

_MOST_ROWS = 32
_MOST_MAPS = 3
# Sizes of things: they differ by module without saying anything about it.
_SIZES = frozenset({"elements", "outside"})
_INDEX = ("step", "cycle")
_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def figures(measurement: Measurement) -> Iterator[Markup]:
    """The pictures of one measurement, in the order of its details."""
    details = measurement.details
    for key, value in details.items():
        maps = _module_maps(value)
        # A list names the worst modules only; where all are told, that is the better picture.
        better = [name for name in maps if isinstance(details.get(name), Mapping)]
        for name in [name for name in maps if name not in better][:_MOST_MAPS]:
            drawn = _heat_map(_title(key, name), maps[name])
            if drawn is not None:
                yield drawn
        if not maps:
            yield from _series(key, value)


def _title(key: str, name: str) -> str:
    return (f"{key}: {name}" if name else key).replace("_", " ")


# ------------------------------------------------------------------------------ numbers by module


def _module_maps(value: Json) -> dict[str, dict[str, float]]:
    """``{name: {module: number}}`` for everything in ``value`` that is a number per module.

    Either a list of objects with a key ``module``, or an object whose keys are modules; the name is
    empty where there is only one number.  Numbers that are the same everywhere show nothing.
    """
    rows = dict(_rows_by_module(value))
    if len(rows) < 2 or not any(_split(name)[1] for name in rows):
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
    found = ((name, _number(item)) for name, item in row.items())
    return {name: item for name, item in found if item is not None}


def _number(value: Json) -> float | None:
    if isinstance(value, str):
        return _WORDS.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _split(module: str) -> tuple[str, str, str]:
    """``("model.layers", "0", "self_attn.q_proj")``: around the first number in a module's path."""
    parts = module.split(".")
    if all(part.isdecimal() for part in parts):
        return module, "", ""  # "2.0", the scaling, is no module
    for place, part in enumerate(parts):
        if part.isdecimal() and part.isascii():
            rest = ["*" if p.isdecimal() else p for p in parts[place + 1 :]]
            return ".".join(parts[:place]), part, ".".join(rest)
    return module, "", ""


def _heat_map(title: str, numbers: Mapping[str, float]) -> Markup | None:
    """Layers down, kinds of modules across; of several modules in one cell, the largest number."""
    placed = {module: _split(module) for module in numbers}
    prefixes = {prefix for prefix, layer, _ in placed.values() if layer}
    cells: dict[tuple[str, str], list[float]] = {}
    for module, (prefix, layer, rest) in placed.items():
        kind = rest if layer and len(prefixes) == 1 else f"{prefix}.{rest}".rstrip(".")
        cells.setdefault((layer, kind), []).append(numbers[module])
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (not layer, int(layer or 0)))
    kinds = sorted({kind for _, kind in cells})
    per_row = math.ceil(len(layers) / _MOST_ROWS)
    rows = {}
    for start in range(0, len(layers), per_row):
        group = layers[start : start + per_row]
        rows[_label(group)] = [_largest(cells.get((g, kind), []) for g in group) for kind in kinds]
    if per_row > 1:
        title += f" (the largest of {per_row} layers in each row)"
    return heat_table(title, kinds, rows) if kinds else None


def _label(layers: Sequence[str]) -> str:
    first, last = layers[0] or "outside", layers[-1] or "outside"
    return first if first == last else f"{first} to {last}"


def _largest(groups: Iterable[Sequence[float]]) -> float | None:
    values = [value for group in groups for value in group]
    return max(values, key=lambda v: math.inf if math.isnan(v) else v) if values else None


# ---------------------------------------------------------------------------------- numbers by step


def _series(key: str, value: Json) -> Iterator[Markup]:
    """Lines over steps, from a list of objects that each name their step."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return
    rows = [item for item in value if isinstance(item, Mapping)]
    index = next((name for name in _INDEX if rows and all(name in row for row in rows)), None)
    if index is None or len(rows) < 2 or len(rows) != len(value):
        return
    xs = [_or_nan(row[index]) for row in rows]
    for name in rows[0]:
        if name == index or _number(rows[0][name]) is None:
            continue
        ys = [_or_nan(row.get(name)) for row in rows]
        label = name.replace("_", " ")
        drawn = line_chart(
            f"{key}: {label}".replace("_", " "), xs, {label: ys}, x_label=index, y_label=label
        )
        if drawn is not None:
            yield drawn


def _or_nan(value: Json) -> float:
    found = _number(value)
    return math.nan if found is None else found
