"""What the steps of a workflow tell each other and the job's page."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

__all__ = ["append", "error", "lines_of", "notice", "shown", "write_outputs"]


def lines_of(variable: str) -> list[str]:
    """The lines of an environment variable that are not blank."""
    return [line for line in os.environ.get(variable, "").splitlines() if line.strip()]


def write_outputs(values: Mapping[str, str]) -> None:
    """Make ``values`` outputs of this step, and print them.

    A value is framed by a delimiter drawn anew, so that no value can end itself and begin another.
    """
    for name, value in values.items():
        print(f"{name}: {', '.join(map(shown, value.splitlines()))}")
        frame = uuid.uuid4().hex
        append("GITHUB_OUTPUT", f"{name}<<{frame}\n{value}\n{frame}\n")


def append(variable: str, text: str) -> None:
    """Add ``text`` to the file that an environment variable names; nothing outside of GitHub."""
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(text)


def shown(text: str) -> str:
    """``text`` on one line that commands nothing: a fork chooses the names of its adapters.

    GitHub obeys ``##[`` wherever a line has it, and ``::`` at its beginning, which is for whoever
    prints to avoid.  As ``clean`` of pytest_lora does it, which is not installed for every script.
    """
    line = " ".join(text.split()).replace("##[", "# #[")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def notice(text: str) -> None:
    """Show one line on the job's page."""
    print(f"::notice title=pytest-lora::{_data(text)}")


def error(text: str) -> None:
    """The same, as what made the step fail."""
    print(f"::error::{_data(text)}")


def _data(text: str) -> str:
    return shown(text).replace("%", "%25")
