"""Results on their way: from the test that made them, on its report, to whoever gathers them.

A report may carry any attribute that is plain text, and does so through workers, into report logs
and past a worker's crash.  ``user_properties`` would travel as well, but pytest writes them into
JUnit files as ``<properties>`` of a test case, which strict readers of its default format refuse.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

__all__ = ["arrived", "attach", "hand_on"]

_ATTRIBUTE = "pytest_lora"
_WAITING = pytest.StashKey[dict[tuple[str, str], Any]]()


def hand_on(item: pytest.Item, when: str, data: Any, *, kind: str = "results") -> None:
    """Let ``data``, JSON-plain, leave with the report of the phase ``when`` of this test."""
    item.stash.setdefault(_WAITING, {})[when, kind] = data


def attach(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put what waits for this report on it, as text."""
    waiting = item.stash.get(_WAITING, {})
    mine = {kind: waiting.pop((when, kind)) for when, kind in [*waiting] if when == report.when}
    if mine:
        setattr(report, _ATTRIBUTE, json.dumps(mine))


def arrived(report: pytest.TestReport, kind: str = "results") -> Any:
    """What a report carries; None where that is nothing."""
    text = getattr(report, _ATTRIBUTE, None)
    return None if text is None else json.loads(text).get(kind)
