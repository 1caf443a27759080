"""A hook of mkdocs: roles in docstrings, ``:class:`~pytest_lora.records.Bound```, become links."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Replace every role by a reference, which stays plain code if no page has its target."""
    return ROLE.sub(_reference, html)


def _reference(role: re.Match[str]) -> str:
    target = role[2]
    shown = target.rpartition(".")[2] if role[1] else target
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
