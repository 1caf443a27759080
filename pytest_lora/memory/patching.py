"""Attributes of other libraries, exchanged for the time of a trace.

What is exchanged is the process's own, so that traces must not run in two threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced"]


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """``holder.name`` is ``value`` meanwhile; an attribute it had inherited, it inherits again."""
    own, original = name in vars(holder), getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if own:
            setattr(holder, name, original)
        else:
            delattr(holder, name)
