"""What a run leaves on GitHub: a job's summary, a comment's text, marks at lines of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pytest_lora.atomic import write_whole
from pytest_lora.errors import UsageError
from pytest_lora.records import CheckResult, Json
from pytest_lora.report.markdown import COMMENT_LIMIT, SUMMARY_LIMIT, markdown_report

__all__ = [
    "COMMENT_MARK",
    "Annotation",
    "append_summary",
    "comment_mark",
    "comment_text",
    "workflow_command",
    "write_comment",
]

COMMENT_MARK = "<!-- pytest-lora -->"
"""First line of a comment, by which the next run finds the one to replace; of a report without a
name."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """A remark at a line of a file of the repository.

    Attributes:
        file: the path from the repository's root.
        line: counted from 1.
        title, message: what is shown; may be anything.
    """

    file: str
    line: int
    title: str
    message: str


def append_summary(
    path: Path, results: Sequence[CheckResult], environment: Mapping[str, Json]
) -> None:
    """Add the results to the job's summary, as far as GitHub's limit for a step leaves room.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        used = path.stat().st_size if path.exists() else 0
        text = markdown_report(results, environment, limit=max(SUMMARY_LIMIT - used, 0))
        with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the summary: {error.strerror or error}") from None


def write_comment(
    path: Path, results: Sequence[CheckResult], environment: Mapping[str, Json]
) -> None:
    """Write the text of a comment in one step; raises UsageError where that cannot be done."""
    write_whole(path, comment_text(results, environment))


def comment_mark(name: str) -> str:
    """The mark for the report ``name``: each report has a comment of its own."""
    return f"<!-- pytest-lora {quote(name, safe='')} -->" if name else COMMENT_MARK


def comment_text(
    results: Sequence[CheckResult],
    environment: Mapping[str, Json],
    *,
    name: str = "",
    note: str = "",
) -> str:
    """The text of the comment of the report ``name``, within GitHub's limit.

    ``note``, in Markdown, is a paragraph of its own before the verdict.
    """
    head = f"{comment_mark(name)}\n" + (f"{note}\n\n" if note else "")
    return head + markdown_report(results, environment, limit=COMMENT_LIMIT - len(head))


def workflow_command(annotation: Annotation) -> str:
    """The line that makes GitHub show the annotation as an error."""
    properties = {
        "file": annotation.file,
        "line": str(annotation.line),
        "title": annotation.title,
    }
    written = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::error {written}::{_data(annotation.message)}"


def _data(text: str) -> str:
    """Escaped as GitHub's own toolkit does it, so that a message stays one command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
