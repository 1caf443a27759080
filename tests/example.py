"""The example adapters of the repository, for tests that judge them as they are."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "fixtures"
EXAMPLE = FIXTURES / "adapters" / "attention-lora"


def _why_unreadable() -> str:
    """PEFT does not promise to read what a newer one wrote, and the check of the files says so."""
    config = json.loads((EXAMPLE / "adapter_config.json").read_text(encoding="utf-8"))
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return ""
    older = _minor(installed) < _minor(config["peft_version"])
    return f"PEFT {config['peft_version']} wrote it, PEFT {installed} is here" if older else ""


def _minor(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


# Its summary imports all of Hypothesis: half of what a run of a few checks of files takes.
QUICK = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
_REASON = _why_unreadable()
NEEDS_EXAMPLE = pytest.mark.skipif(bool(_REASON), reason=_REASON)
