"""Files that are replaced in one step: readers see the old one or the whole new one.

Whatever ends a process (Ctrl-C, a full disk, a kill), what was there before stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pytest_lora.errors import UsageError

__all__ = ["alone_in", "replace_file", "usual_mode", "write_whole"]


def write_whole(path: Path, text: str, what: str = "report") -> None:
    """Replace the file ``path`` by ``text`` (UTF-8), folders made as needed.

    Raises:
        UsageError: ``what`` cannot be written (no permission, no space left, a file for a folder).
    """
    # A name that is no valid Unicode (an undecodable path) becomes an escape.
    data = text.encode("utf-8", errors="backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the {what}: {error.strerror or error}") from None


def replace_file(path: Path, data: bytes) -> None:
    """Put a file with ``data`` in the place of ``path``, or raise ``OSError`` and leave it alone.

    Only a process that is killed outright can leave its temporary file, ``.lora-*``, behind.
    """
    handle, temporary = tempfile.mkstemp(prefix=".lora-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, usual_mode())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def usual_mode() -> int:
    """The permissions of a file that is opened for writing; temporary files have fewer."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time, for reading a file of ``folder`` and replacing it.

    The folder itself is locked, so that nothing is left behind and a killed process holds nothing.
    Windows locks no folders: there the last one to write wins.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
