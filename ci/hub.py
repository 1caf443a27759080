"""The base models of a run: which they are, and having them at hand before the judging begins.

``python hub.py key`` tells what to cache, ``python hub.py warm`` fills the hub's cache and then
takes the network away from the steps that follow.  Variables: ADAPTER, one a line; BASE_MODEL and
CHECKS, as the options; RUNNER_TEMP.

Outputs of ``key``: ``key``, the same for the same base models, empty where none is on the hub;
``path``, the hub's cache; ``ledgers``, the folder for likelihoods.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from outputs import append, error, lines_of, notice, shown, write_outputs

from pytest_lora.adapter import Adapter, read_adapter
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import resolve_base
from pytest_lora.locate import is_there, locate_all

FILES_ONLY = "files"


def adapters() -> list[Adapter]:
    """The adapters of this run; adapters by hub id are fetched."""
    return [read_adapter(where) for where in locate_all(lines_of("ADAPTER"), start=Path.cwd())]


def hub_name(adapter: Adapter) -> str:
    """Hub id and revision of the base, empty for a folder."""
    name = os.environ.get("BASE_MODEL") or adapter.base_model or ""
    starts = (Path.cwd(), *adapter.path.resolve().parents)
    if not name or any(is_there(start / name) for start in starts):
        return ""
    explicit = bool(os.environ.get("BASE_MODEL"))
    return name if explicit else f"{name}@{adapter.revision or ''}"


def tell_key() -> None:
    """Write the outputs."""
    names = sorted({hub_name(adapter) for adapter in adapters()} - {""})
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] if names else ""
    folder = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    ledgers = Path(os.environ.get("RUNNER_TEMP", ".")) / "pytest-lora"
    write_outputs({"key": digest, "path": str(folder), "ledgers": str(ledgers)})


def warm() -> None:
    """Have every base model here; what cannot be had is for the judging to report."""
    for adapter in adapters():
        try:
            base = resolve_base(adapter, explicit=os.environ.get("BASE_MODEL") or None)
        except CannotRun as reason:
            notice(str(reason))
            return
        print(f"base of {shown(adapter.name)}: {shown(str(base))}")
    append("GITHUB_ENV", "HF_HUB_OFFLINE=1\n")


def main() -> int:
    """Run one command; nothing is needed where only files are judged."""
    if os.environ.get("CHECKS") == FILES_ONLY:
        return 0
    try:
        {"key": tell_key, "warm": warm}[sys.argv[1]]()
    except UsageError as wrong:
        error(str(wrong))
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
