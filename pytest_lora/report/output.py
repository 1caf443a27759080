"""One set of results in the format that a file's suffix names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_lora.atomic import write_whole
from pytest_lora.records import CheckResult, Json
from pytest_lora.report.html import html_report
from pytest_lora.report.json_report import build_report, json_text
from pytest_lora.report.markdown import markdown_report

__all__ = ["SUFFIXES", "render", "write_results"]

SUFFIXES = (".json", ".md", ".html")


def render(suffix: str, results: Sequence[CheckResult], environment: Mapping[str, Json]) -> str:
    """The report as text; ``suffix`` is one of :data:`SUFFIXES`."""
    if suffix == ".json":
        return json_text(build_report(results, environment))
    return {".md": markdown_report, ".html": html_report}[suffix](results, environment)


def write_results(
    path: Path, results: Sequence[CheckResult], environment: Mapping[str, Json]
) -> None:
    """Write the report to ``path`` in one step.

    Raises:
        UsageError: the file cannot be written.
    """
    write_whole(path, render(path.suffix.lower(), results, environment))
