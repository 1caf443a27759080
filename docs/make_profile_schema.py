"""Writes the JSON Schema of profiles, for editors, from the settings and the keys themselves.

python docs/make_profile_schema.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest_lora
from pytest_lora.init_profile import SCHEMA_URL
from pytest_lora.profile import KINDS, Key
from pytest_lora.settings import table

FILE = Path(pytest_lora.__file__).with_name("lora.schema.json")


def schema() -> dict[str, Any]:
    """The schema; what a table may not hold is marked by an editor while it is typed."""
    settings = {
        name: {"description": setting.help, **setting.schema}
        for name, setting in table()
        if setting.per_adapter
    }
    entries = {kind: _entries(keys) for kind, keys in KINDS.items()}
    section = {**settings, **{kind: _optional(entry) for kind, entry in entries.items()}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_URL,
        "title": "pytest-lora profile",
        "description": "What adapters have to keep before they ship: read by pytest-lora.",
        **_object(
            {
                "defaults": {"description": "Settings of every adapter.", **_object(settings)},
                **entries,
                "adapters": {
                    "description": "Settings of the adapters whose name matches a shell pattern.",
                    "type": "object",
                    "additionalProperties": _object(section),
                },
            }
        ),
    }


def _entries(keys: Mapping[str, Key]) -> dict[str, Any]:
    properties = {name: {"description": key.help, **key.schema} for name, key in keys.items()}
    required = [name for name, key in keys.items() if key.required]
    entry = {**_object(properties), **({"required": required} if required else {})}
    if "lm_eval" in keys:
        entry["oneOf"] = [{"required": ["path"]}, {"required": ["lm_eval"]}]
    return {
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]*$"},
        "additionalProperties": entry,
    }


def _optional(entries: dict[str, Any]) -> dict[str, Any]:
    """The same where another table may hold the rest."""
    entry = dict(entries["additionalProperties"])
    entry.pop("required", None)
    entry.pop("oneOf", None)
    return {**entries, "additionalProperties": entry}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def text() -> str:
    """The file's contents."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
