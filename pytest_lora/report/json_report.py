"""The JSON report: versioned, in a stable order, never half-written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pytest_lora.atomic import write_whole
from pytest_lora.errors import UsageError
from pytest_lora.records import CheckResult, Json

__all__ = [
    "SCHEMA_ID",
    "build_report",
    "json_text",
    "load_report",
    "read_report",
    "report_schema",
    "write_report",
]

SCHEMA_ID = "pytest-lora/report/1"


def build_report(
    results: Iterable[CheckResult], environment: Mapping[str, Json]
) -> dict[str, Json]:
    """The report as a JSON object; ``results`` are kept in the order given."""
    return {
        "schema": SCHEMA_ID,
        "environment": dict(environment),
        "results": [result.to_dict() for result in results],
    }


_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
"""Those that JSON does not escape by itself."""


def json_text(report: Mapping[str, Json]) -> str:
    """The file's text: the same report is always the same text, so that diffs are small.

    Letters are left readable; control characters, which a terminal would obey, are escaped all.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.translate(_CONTROLS)


def write_report(path: Path, report: Mapping[str, Json]) -> None:
    """Write ``report`` in one step; raises UsageError where that cannot be done."""
    write_whole(path, json_text(report))


def read_report(path: Path) -> Sequence[CheckResult]:
    """The results of a report file; raises UsageError for anything that is not one."""
    return load_report(path)[1]


def load_report(path: Path) -> tuple[Mapping[str, Any], Sequence[CheckResult]]:
    """Environment and results of a report file; raises UsageError for what is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA_ID:
            raise UsageError(f"{path}: found schema {data['schema']!r}, expected {SCHEMA_ID!r}")
        environment = data.get("environment", {})
        if not isinstance(environment, dict):
            raise TypeError(f"environment is of type {type(environment).__name__}, expected dict")
        return environment, [CheckResult.from_dict(item) for item in data["results"]]
    except OSError as error:
        raise UsageError(f"{path}: cannot read the report: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path}: not a {SCHEMA_ID} report: {error!r}") from None


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every report satisfies."""
    text = (resources.files("pytest_lora.report") / "report.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
