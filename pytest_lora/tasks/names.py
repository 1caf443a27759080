"""The nearest valid name, for messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["meant"]


def meant(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``known``; nothing where none is close."""
    import difflib  # only for a message

    close = difflib.get_close_matches(name, [str(item)[:200] for item in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
