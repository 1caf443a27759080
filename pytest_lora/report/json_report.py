"""The JSON report: versioned, in a stable order, never half-written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pytest_lora.errors import UsageError
from pytest_lora.records import CheckResult, Json

__all__ = ["SCHEMA_ID", "build_report", "read_report", "report_schema", "write_report"]

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


def write_report(path: Path, report: Mapping[str, Json]) -> None:
    """Write ``report`` in one step: readers see the old file or the whole new one.

    Raises:
        UsageError: the file cannot be written (folder missing, no permission, no space left).
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A name that is no valid Unicode (an undecodable path) becomes a JSON escape.
    data = text.encode("utf-8", errors="backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the report: {error.strerror or error}") from None


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".lora-report-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_report(path: Path) -> Sequence[CheckResult]:
    """The results of a report file; raises UsageError for anything that is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA_ID:
            raise UsageError(f"{path}: found schema {data['schema']!r}, expected {SCHEMA_ID!r}")
        return [CheckResult.from_dict(item) for item in data["results"]]
    except OSError as error:
        raise UsageError(f"{path}: cannot read the report: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path}: not a {SCHEMA_ID} report: {error!r}") from None


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every report satisfies."""
    text = (resources.files("pytest_lora.report") / "report.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
