"""Writes a report in one step: readers see the old file or the whole new one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pytest_lora.errors import UsageError

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` (UTF-8), folders made as needed.

    Raises:
        UsageError: the file cannot be written (no permission, no space left, a file for a folder).
    """
    # A name that is no valid Unicode (an undecodable path) becomes an escape.
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
