"""HTML and SVG put together so that data cannot become markup.

Text is escaped where it enters an element; only what :func:`tag` itself returned passes as it is.
There is no template to forget an escape in.
"""

from __future__ import annotations

import html
from typing import TypeAlias

__all__ = ["Child", "Markup", "join", "shown", "tag"]


class Markup(str):
    """Markup that :func:`tag` made, or that stands in this package; never data."""

    __slots__ = ()


Child: TypeAlias = "str | Markup | None"
_VOID = frozenset({"meta", "br"})


def shown(text: str) -> str:
    """``text`` with what cannot be seen (control characters, direction marks) as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def escaped(child: Child) -> str:
    """A child of an element: markup as it is, text escaped, nothing for None."""
    if child is None:
        return ""
    return child if isinstance(child, Markup) else html.escape(shown(child))


def tag(element: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """``<element attributes>children</element>``.

    Attribute names are written ``class_``, ``aria_label``; one that is None or False is left out,
    one that is True stands without a value.
    """
    opened = "".join([element, *_attributes(attributes)])
    if element in _VOID:
        return Markup(f"<{opened}>")
    return Markup(f"<{opened}>{''.join(map(escaped, children))}</{element}>")


def _attributes(attributes: dict[str, str | float | bool | None]) -> list[str]:
    parts = []
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {name}")
        elif value is not None and value is not False:
            parts.append(f' {name}="{html.escape(shown(str(value)))}"')
    return parts


def join(*children: Child) -> Markup:
    """Several children as one, text among them escaped."""
    return Markup("".join(map(escaped, children)))
