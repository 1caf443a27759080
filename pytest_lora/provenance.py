"""What results depend on, for whoever reads them elsewhere: versions, settings, digests, command.

Only what is the same in a second run is written down: no times, no folder of this machine beyond
what the user named.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.catalog import find_check
from pytest_lora.locate import CONFIG_NAME
from pytest_lora.quantities import Margin
from pytest_lora.records import Json
from pytest_lora.run import versions
from pytest_lora.settings import Settings, option_name, table

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter
    from pytest_lora.run import Run

__all__ = ["command_of", "digests_of", "environment_of", "settings_of"]

# Where results go has no part in what they are.
_OUTPUTS = frozenset({"report", "pr_comment"})
_CHUNK = 1 << 20


def environment_of(run: Run, about: Mapping[str, str], exit_status: int) -> dict[str, Json]:
    """The ``environment`` of a report: what its results were made with, from and by."""
    names = run.locate()
    return {
        "versions": dict(versions()),
        "platform": platform.platform(),
        "adapters": dict(about),
        "exit_status": exit_status,
        "command": command_of(run.settings, run.start),
        "settings": {name: settings_of(run.settings_for(name), run.start) for name in names},
        "digests": {name: digests_of(run.adapter(name)) for name in names},
    }


def settings_of(settings: Settings, start: Path) -> dict[str, Json]:
    """Every setting that is not at its default: its value and who set it.

    Paths below ``start`` are relative to it.
    """
    return {
        name: {"value": _plain(_value(settings, name, start)), "origin": origin}
        for name, origin in sorted(settings.origins.items())
        if name not in _OUTPUTS
    }


def _value(settings: Settings, name: str, start: Path) -> Any:
    if name not in {item.name for item in fields(settings)}:
        return settings.bounds[name]
    value = getattr(settings, name)
    if not dict(table())[name].path:
        return value
    if isinstance(value, tuple):
        return tuple(_from(start, item) for item in value)
    return _from(start, value)


def _from(start: Path, path: str) -> str:
    """An absolute path (the plugin makes them of those in an ini file) as seen from ``start``."""
    return os.path.relpath(path, start) if Path(path).is_relative_to(start) else path


def _plain(value: Any) -> Json:
    plain: Json = list(value) if isinstance(value, tuple) else value
    return str(value) if isinstance(value, Margin) else plain


def command_of(settings: Settings, start: Path) -> str:
    """A command line that runs the same checks with the same settings.

    Settings per adapter come from the profile again, which it names.
    """
    words = ["python", "-m", "pytest", "-m", "lora"]
    for name, setting in table():
        if name not in settings.origins or name in _OUTPUTS:
            continue
        value, option = _value(settings, name, start), option_name(name)
        if setting.flag:
            words += [option] if value else []
        elif isinstance(value, tuple) and setting.many:
            words += [f"{option}={_pair(item)}" for item in value]
        elif name in settings.bounds and find_check(name).opt_in:
            words.append(f"{option}={Decimal(value):f} GiB")  # to the byte, as a size is read
        else:
            words.append(f"{option}={_word(value)}")
    return shlex.join(words)


def _pair(item: Any) -> str:
    """One of several values; those of ``memory_workload`` are a word and what it says."""
    return "=".join(map(str, item)) if isinstance(item, tuple) else str(item)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value!r}" if isinstance(value, float) else str(value)


def digests_of(adapter: Adapter) -> dict[str, Json]:
    """SHA-256 of the configuration and of each file of weights that was read."""
    paths = [adapter.path / CONFIG_NAME, *adapter.weights_files]
    found: dict[str, Json] = {}
    for path in paths:
        digest = _digest(path)
        if digest is not None:
            found[path.name] = digest
    return found


def _digest(path: Path) -> str | None:
    """None for what is no regular file: a report must not wait for a pipe."""
    try:
        if not path.is_file():
            return None
        total = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_CHUNK):
                total.update(block)
    except OSError:
        return None
    return f"sha256:{total.hexdigest()}"
