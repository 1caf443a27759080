"""Which releases of PEFT and transformers are installed, for tests of what only some of them do."""

from __future__ import annotations

from importlib import metadata

import pytest

__all__ = ["follows_autocast", "since"]


def _installed(name: str) -> tuple[int, int]:
    try:
        major, minor, *_ = metadata.version(name).split(".")
    except metadata.PackageNotFoundError:
        return (0, 0)
    return (int(major), int(minor))


def follows_autocast() -> pytest.MarkDecorator:
    """Skip where ``torch.library`` takes no fallbacks, which following autocast needs."""
    from torch.library import Library

    old = not hasattr(Library, "fallback")
    return pytest.mark.skipif(old, reason="this torch.library takes no fallbacks")


def since(reason: str, **least: tuple[int, int]) -> pytest.MarkDecorator:
    """Skip with releases older than ``least``: ``since("saves no head", peft=(0, 14))``."""
    found = {name: _installed(name) for name in least}
    old = [
        f"{name} {'.'.join(map(str, found[name]))}" for name in least if found[name] < least[name]
    ]
    return pytest.mark.skipif(bool(old), reason=f"{', '.join(old)}: {reason}")
