"""Which pictures the details of a measurement hold.

Checks know nothing of pictures.  They put numbers per module, per step or per document into their
details, and what has that shape is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pytest_lora.records import Bound, Json, Measurement
from pytest_lora.report.charts import (
    Bins,
    Look,
    heat_table,
    histogram,
    interval_chart,
    line_chart,
    memory_chart,
)
from pytest_lora.report.markup import Markup
from pytest_lora.report.modules import as_number, module_maps, split_module
from pytest_lora.report.text import clean, number

__all__ = ["figures", "readings"]

_MOST_ROWS = 32
_MOST_MAPS = 3
_INDEX = ("step", "cycle")
# What people can read, in lists of objects: documents by their excerpt, items by their prompt.
_TEXTS = ("excerpt", "prompt")
_DEEPEST = 4
_MOST_DRAWN = 12


def figures(measurement: Measurement, bound: Bound | None = None) -> Iterator[Markup]:
    """The pictures of one measurement, in the order of its details; ``bound`` is drawn in them."""
    drawn = (*_by_module(measurement.details), *_anywhere(measurement, bound))
    yield from drawn[:_MOST_DRAWN]


def _by_module(details: Mapping[str, Json]) -> Iterator[Markup]:
    for key, value in details.items():
        maps = module_maps(value)
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


def _heat_map(title: str, numbers: Mapping[str, float]) -> Markup | None:
    """Layers down, kinds of modules across; of several modules in one cell, the largest number."""
    placed = {module: split_module(module) for module in numbers}
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
    xs = [_or(row[index], math.nan) for row in rows]
    for name in rows[0]:
        if name == index or as_number(rows[0][name]) is None:
            continue
        ys = [_or(row.get(name), math.nan) for row in rows]
        label = name.replace("_", " ")
        drawn = line_chart(
            f"{key}: {label}".replace("_", " "), xs, {label: ys}, x_label=index, y_label=label
        )
        if drawn is not None:
            yield drawn


# ------------------------------------------------------------------- what may lie anywhere in them


def readings(measurement: Measurement) -> Iterator[tuple[str, Sequence[Mapping[str, Json]]]]:
    """Lists of documents or answers in the details, each with its name: the evidence in words."""
    for trail, value in _walk(measurement.details):
        rows = _objects(value)
        if rows and all(any(name in row for name in _TEXTS) for row in rows):
            yield _spoken(trail), rows


def _walk(value: Json, trail: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Json]]:
    """Everything in the details by the keys that lead there."""
    if trail:
        yield trail, value
    if isinstance(value, Mapping) and len(trail) < _DEEPEST:
        for key, item in value.items():
            yield from _walk(item, (*trail, key))


def _objects(value: Json) -> list[Mapping[str, Json]]:
    """``value`` where it is a list of objects and nothing else; empty where not."""
    rows = [item for item in _items(value) if isinstance(item, Mapping)]
    return rows if len(rows) == len(_items(value)) else []


def _spoken(trail: Sequence[str]) -> str:
    return clean(": ".join(trail).replace("_", " "))


def _anywhere(measurement: Measurement, bound: Bound | None) -> Iterator[Markup]:
    limits = _limits(bound)
    for trail, value in _walk(measurement.details):
        drawn = (
            _path(trail, value, limits, clean(measurement.unit))
            or _distribution(trail, value, limits, clean(measurement.unit))
            or _memory(trail, value)
        )
        if drawn is not None:
            yield drawn


def _limits(bound: Bound | None) -> dict[str, float]:
    if bound is None:
        return {}
    limits = {"at least": bound.low, "at most": bound.high}
    return {f"{word} {number(at)}": at for word, at in limits.items() if at is not None}


def _path(
    trail: Sequence[str], value: Json, limits: Mapping[str, float], unit: str
) -> Markup | None:
    """How a sequential verdict came about: rows of ``used``, ``estimate``, ``low``, ``high``."""
    rows = _objects(value)
    if not rows or not all("used" in row and "estimate" in row for row in rows):
        return None
    looks = [
        Look(
            _count(row["used"]),
            _or(row["estimate"], math.nan),
            _or(row.get("low"), -math.inf),
            _or(row.get("high"), math.inf),
        )
        for row in rows
    ]
    title = f"How the verdict came about: {_spoken(trail[:-1])}".removesuffix(": ")
    return interval_chart(title, looks, x_label="items seen", y_label=unit, limits=limits)


def _distribution(
    trail: Sequence[str], value: Json, limits: Mapping[str, float], unit: str
) -> Markup | None:
    """Counts in bins of one width between ``least`` and ``most``."""
    if not isinstance(value, Mapping) or not {"least", "most", "counts"} <= value.keys():
        return None
    counts = [_count(count) for count in _items(value["counts"])]
    least, most = _or(value["least"], math.nan), _or(value["most"], math.nan)
    if not counts or not -math.inf < least < most < math.inf or min(counts) < 0:
        return None
    share = [i / len(counts) for i in range(len(counts) + 1)]
    edges = [least * (1 - part) + most * part for part in share]
    title = f"How documents differ: {_spoken(trail[:-1])}".removesuffix(": ")
    return histogram(title, Bins(edges, counts), x_label=unit, y_label="documents", limits=limits)


def _memory(trail: Sequence[str], value: Json) -> Markup | None:
    """Bytes of each of the ``categories`` in ``columns``, so many of them in each of ``phases``."""
    if not isinstance(value, Mapping) or not {"categories", "columns", "phases"} <= value.keys():
        return None
    names = [clean(str(name)) for name in _items(value["categories"])]
    heights = [_list(column) for column in _items(value["columns"])]
    if not all(len(column) == len(names) and _are_sizes(column) for column in heights):
        return None
    parts = [(clean(str(name)), _count(count)) for name, count in _pairs(value["phases"])]
    return memory_chart(f"Memory: {_spoken(trail[:-1])}".removesuffix(": "), names, heights, parts)


def _are_sizes(numbers: Iterable[float]) -> bool:
    return all(math.isfinite(value) and value >= 0 for value in numbers)


def _pairs(value: Json) -> list[tuple[Json, Json]]:
    pairs = [_items(item) for item in _items(value)]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _list(value: Json) -> list[float]:
    return [_or(item, math.nan) for item in _items(value)]


def _count(value: Json) -> int:
    found = _or(value, 0.0)
    return int(found) if math.isfinite(found) else 0


def _items(value: Json) -> Sequence[Json]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _or(value: Json, otherwise: float) -> float:
    found = as_number(value)
    return otherwise if found is None else found
