"""Fills in the table of docs/settings.md from the settings themselves.

python docs/make_settings_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from pytest_lora.settings import Setting, ini_name, option_name, table

PAGE = Path(__file__).with_name("settings.md")
_PLACE = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)


def rows() -> str:
    """The table, one setting per row."""
    head = ["| option | ini key | per adapter | what it sets |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(_row(name, setting) for name, setting in table())])


def _row(name: str, setting: Setting) -> str:
    option = option_name(name) + (f"={setting.metavar}" if setting.metavar else "")
    kind = "" if setting.ini == "string" else f" ({setting.ini})"
    adapter = f"`{name}`" if setting.per_adapter else "no"
    return f"| `{option}` | `{ini_name(name)}`{kind} | {adapter} | {setting.help} |"


def filled(text: str) -> str:
    """``text`` with the table in its place."""
    return _PLACE.sub(lambda match: f"{match[1]}\n{rows()}\n\n{match[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
