"""Which release of a library is installed, found without importing it."""

from __future__ import annotations

from importlib import metadata

__all__ = ["installed_version"]


def installed_version(name: str) -> str | None:
    """The installed version of the distribution ``name``; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
