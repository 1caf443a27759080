"""Where in the user's files a verdict points: a key of the configuration, a line of the profile."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_lora.locate import CONFIG_NAME
from pytest_lora.records import Bound, CheckResult, Outcome
from pytest_lora.report.github import Annotation
from pytest_lora.report.text import clean, explain
from pytest_lora.strict_json import MAX_JSON_BYTES, key_lines

if TYPE_CHECKING:
    from pytest_lora.run import Run

__all__ = ["MOST", "annotations_of"]

MOST = 10
"""Errors of one step that GitHub shows."""
_TROUBLE = (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)
# How a value from a profile names its place: "key in path/lora.toml:12", the line where known, and
# after that how it came about, as in ": baseline + 0.1".
_ORIGIN = re.compile(r"(?P<key>[^ ]+) in (?P<path>.+?\.toml)(?::(?P<line>\d+))?(?:: .+)?")


def annotations_of(run: Run, results: Sequence[CheckResult], root: Path) -> list[Annotation]:
    """At most :data:`MOST` remarks, one for each verdict that needs attention.

    A remark stands at the key of ``adapter_config.json`` that a problem names, else at the line of
    the profile that set the bound, else at the head of the configuration.  Files outside ``root``,
    the repository's folder, cannot be annotated and get none.
    """
    found = (
        Annotation(
            path.relative_to(root).as_posix(),
            line,
            f"{clean(result.label)}: {clean(result.adapter)}",
            explain(result),
        )
        for result in results
        if result.outcome in _TROUBLE
        for path, line in _place(run, result)
        if path.is_relative_to(root)
    )
    return [annotation for annotation, _ in zip(found, range(MOST), strict=False)]


def _place(run: Run, result: CheckResult) -> Iterator[tuple[Path, int]]:
    """The one place of a verdict, or none where the adapter has no folder here."""
    known = result.adapter in run.locate()
    config = (run.adapter(result.adapter).path / CONFIG_NAME).resolve() if known else None
    line = _line_of_problem(result, config) if config is not None else None
    place = _line_of_bound(result.bound, run.start)
    if config is not None and line is not None:
        yield config, line
    elif place is not None:
        yield place
    elif config is not None:
        yield config, 1


def _line_of_problem(result: CheckResult, config: Path) -> int | None:
    problems = result.measurement.problems if result.measurement else ()
    named = [p.where.partition(": ")[2] for p in problems if p.where.startswith(CONFIG_NAME)]
    if not named:
        return None
    lines = key_lines(_read(config))
    # "rank_pattern['x']" is about the key rank_pattern; the longest key that fits is meant.
    fitting = [key for key in lines if key and named[0].startswith(key)]
    return lines[max(fitting, key=len)] if fitting else 1


def _line_of_bound(bound: Bound | None, start: Path) -> tuple[Path, int] | None:
    match = _ORIGIN.fullmatch(bound.origin) if bound else None
    if match is None:
        return None
    path = (start / match["path"]).resolve()
    if not path.is_file():
        return None
    return path, int(match["line"] or _line_of_key(path, match["key"]))


def _line_of_key(path: Path, key: str) -> int:
    """The first line that sets the key; 1 where none does in so many words."""
    setting = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
    for number, line in enumerate(_read(path).splitlines(), 1):
        if setting.match(line):
            return number
    return 1


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as stream:
            return stream.read(MAX_JSON_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
