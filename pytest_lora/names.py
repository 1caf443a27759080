"""The nearest valid name, for messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["meant"]

_LONGEST = 200


def meant(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`` (did you mean 'x'?)`` for the closest of ``known``; where none is close, `` (otherwise)``.

    Names may be anyone's: both sides are cut to 200 characters, for the comparison is quadratic.
    """
    import difflib  # only for a message

    close = difflib.get_close_matches(
        name[:_LONGEST], [str(item)[:_LONGEST] for item in known], n=1
    )
    said = f"did you mean {close[0]!r}?" if close else otherwise
    return f" ({said})" if said else ""
