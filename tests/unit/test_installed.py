from __future__ import annotations

from importlib import metadata

from pytest_lora.installed import installed_version


def test_the_release_of_what_is_installed_and_none_of_what_is_not() -> None:
    assert installed_version("pytest") == metadata.version("pytest")
    assert installed_version("no-such-distribution") is None
