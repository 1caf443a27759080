"""Fills in the tables of docs/settings.md from the settings and the profile's keys themselves.

python docs/make_settings_table.py
"""

from __future__ import annotations

from pathlib import Path

from pytest_lora.profile import KINDS
from pytest_lora.settings import Setting, ini_name, option_name, table

PAGE = Path(__file__).with_name("settings.md")


def rows() -> str:
    """The table, one setting per row."""
    head = ["| option | ini key | per adapter | what it sets |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(_row(name, setting) for name, setting in table())])


def _row(name: str, setting: Setting) -> str:
    option = option_name(name) + (f"={setting.metavar}" if setting.metavar else "")
    kind = "" if setting.ini == "string" else f" ({setting.ini})"
    adapter = f"`{name}`" if setting.per_adapter else "no"
    said = setting.help.replace("[", "\\[")  # no link
    return f"| `{option}` | `{ini_name(name)}`{kind} | {adapter} | {said} |"


def keys(kind: str) -> str:
    """The keys of one kind of table, one per row."""
    head = ["| key | what it says |", "| --- | --- |"]
    return "\n".join([*head, *(f"| `{name}` | {key.help} |" for name, key in KINDS[kind].items())])


def filled(text: str) -> str:
    """``text`` with the tables in their places."""
    for name, made in {"table": rows(), **{kind: keys(kind) for kind in KINDS}}.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
