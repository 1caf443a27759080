"""Recorded predictions: one integer per configuration, exact, so that any change shows.

The file is JSON with sorted keys, meant to be committed and read in a diff.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_lora.atomic import alone_in, write_whole
from pytest_lora.errors import UsageError
from pytest_lora.memory.records import CATEGORIES, MemoryPrediction
from pytest_lora.records import Json, Problem
from pytest_lora.sizes import format_bytes
from pytest_lora.strict_json import JsonError, read_object

__all__ = ["differences", "entry_of", "read_baseline", "record"]

FORMAT = 1


def entry_of(prediction: MemoryPrediction) -> dict[str, Json]:
    """What is recorded of a prediction: the same on every machine with the same libraries."""
    peak = prediction.peak
    return {
        "live_bytes": peak.live,
        "by_category": dict(peak.by_category),
        "peak_at": f"{peak.phase}: {peak.op}",
        "kernels": dict(prediction.kernels),
        "request": json.loads(json.dumps(dict(prediction.request))),
        "versions": dict(prediction.versions),
    }


def read_baseline(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a baseline file by name; none where there is no file yet.

    Raises:
        UsageError: the file is not such a baseline.
    """
    if not path.exists():
        return {}
    try:
        data = read_object(path)
    except JsonError as error:
        raise UsageError(f"{path}: {error}") from None
    entries = data.get("entries")
    if not isinstance(entries, dict) or data.get("format") != FORMAT:
        raise UsageError(
            f"{path}: not a memory baseline of format {FORMAT}; expected an object with "
            '"format" and "entries", as assert_memory_unchanged(..., update=True) writes it'
        )
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("live_bytes"), int):
            raise UsageError(f'{path}: entry {name!r} has no whole number "live_bytes"')
    return entries


def record(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Put one entry into the file, beside those that other workers put there meanwhile.

    Raises:
        UsageError: the file is no such baseline, or cannot be written.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path}: cannot write the baseline: there is no folder {path.parent}")
    with alone_in(path.parent):
        entries = {**read_baseline(path), name: entry}
        text = json.dumps({"format": FORMAT, "entries": entries}, indent=2, sort_keys=True) + "\n"
        write_whole(path, text, "baseline")


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[Problem]:
    """What changed, the number first, then what it consists of, then what explains it."""
    before, after = recorded["live_bytes"], now["live_bytes"]
    if before == after:
        return []
    change = after - before
    problems = [
        Problem(
            "live bytes at the peak",
            f"{after:,} ({'+' if change > 0 else ''}{format_bytes(change)})",
            f"{before:,}, as recorded",
        )
    ]
    return problems + list(_parts(recorded, now)) + list(_causes(recorded, now))


def _parts(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    was = recorded.get("by_category")
    if not isinstance(was, Mapping):
        return
    for name, size in now["by_category"].items():
        if size != was.get(name, 0):
            yield Problem(CATEGORIES[name], f"{size:,} bytes", f"{was.get(name, 0):,}")


def _causes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    for part in ("request", "versions", "kernels"):
        was = recorded.get(part)
        known = was if isinstance(was, Mapping) else {}
        for key in sorted({*known, *now[part]}):
            old, new = known.get(key), now[part].get(key)
            if old != new:
                yield Problem(f"{part}: {key}", _short(new), _short(old))


def _short(value: Any, limit: int = 120) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= limit else text[: limit - 3] + "..."
