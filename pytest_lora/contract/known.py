"""Deviations that are known: read from ``known.json``, reported as such, and missed when gone.

An entry names the law and the methods it holds for, the versions that have it, what the failure
says (so that another failure of the same law is not excused), why it is so, and the thread.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pytest_lora.peft_tables import minor_version

__all__ = ["Known", "known_deviations"]

_FILE = Path(__file__).with_name("known.json")


@dataclass(frozen=True, slots=True)
class Known:
    """One known deviation.

    Attributes:
        law: shell pattern of the law's id; ``*`` for what breaks before any law is tried.
        methods: shell patterns of the methods' names.
        shows: regular expression found in the failure.
        why: one line.
        thread: where it is discussed; empty where it is by design, or not yet reported.
        since, until: first PEFT that has it, first that has not; empty for unknown.
    """

    law: str
    methods: tuple[str, ...]
    shows: str
    why: str
    thread: str = ""
    since: str = ""
    until: str = ""

    def concerns(self, law: str, method: str, version: str) -> bool:
        """Whether it is to be expected there."""
        if not fnmatch.fnmatchcase(law, self.law):
            return False
        if not any(fnmatch.fnmatchcase(method, name) for name in self.methods):
            return False
        here = minor_version(version)
        since, until = minor_version(self.since), minor_version(self.until)
        if here is None:
            return True
        return not (since and here < since) and not (until and here >= until)

    def explains(self, found: str) -> bool:
        """Whether a failure is this one."""
        return re.search(self.shows, found) is not None

    def __str__(self) -> str:
        return f"{self.why} ({self.thread})" if self.thread else self.why


@cache
def known_deviations() -> tuple[Known, ...]:
    """All entries of the file."""
    entries: Sequence[Mapping[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(Known(**{**entry, "methods": tuple(entry["methods"])}) for entry in entries)
