from __future__ import annotations

import dataclasses

import pytest

from pytest_lora.peft_tables import METHODS, NEWEST, TASK_TYPES, key_span, minor_version


@pytest.mark.parametrize(
    ("method", "key", "span"),
    [
        ("LORA", "r", ("", "")),
        ("LORA", "use_qalora", ("0.16", "")),
        ("LORA", "peft_version", ("0.18", "")),
        ("OFT", "rank_pattern", ("", "0.15")),
        ("IA3", "revision", ("", "")),
        ("IA3", "r", None),
        ("NOTHING", "r", None),
        ("NOTHING", "revision", ("", "")),
    ],
)
def test_keys_have_their_span(method: str, key: str, span: tuple[str, str] | None) -> None:
    assert key_span(method, key) == span


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.21.2", (0, 21)),
        ("0.18.0.dev0@UNKNOWN", (0, 18)),
        ("1.0", (1, 0)),
        ("UNKNOWN", None),
        ("", None),
        ("9" * 9999 + ".1", None),
    ],
)
def test_versions_are_compared_by_their_minor(text: str, version: tuple[int, int] | None) -> None:
    assert minor_version(text) == version


def test_methods_know_whether_they_have_targets() -> None:
    assert METHODS["LORA"].has_targets
    assert not METHODS["PROMPT_TUNING"].has_targets


def test_the_table_agrees_with_the_installed_peft() -> None:
    """Every field of every configuration class is known, and known to this version."""
    peft = pytest.importorskip("peft")

    installed = minor_version(peft.__version__)
    assert installed is not None
    if installed > NEWEST:
        pytest.skip("a newer PEFT than the table knows")
    assert set(TASK_TYPES) == {task.value for task in peft.TaskType}
    for method, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = getattr(method, "value", method)
        if name not in peft.PeftType.__members__:  # 0.13 lists an optimizer here
            continue
        assert not METHODS[name].gone or minor_version(METHODS[name].gone) > installed
        fields = {item.name for item in dataclasses.fields(config)}
        for field in fields:
            span = key_span(name, field)
            assert span is not None, (name, field)
            since, until = minor_version(span[0]), minor_version(span[1])
            assert since is None or since <= installed, (name, field)
            assert until is None or until > installed, (name, field)
        for word in METHODS[name].keys.split():
            key, _, version = word.partition("@")
            still = version.startswith("-") and minor_version(version[1:]) <= installed
            later = version and not version.startswith("-") and minor_version(version) > installed
            assert key in fields or still or later, (name, key)
