"""Saving and loading in a process that has never seen the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import assert_merged_reload, assert_save_reload

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora import Bound, Settings, Subject


def test_save_reload(lora_subject: Subject, lora_settings: Settings) -> None:
    assert_save_reload(
        lora_subject,
        hash_seeds=lora_settings.hash_seeds,
        timeout=lora_settings.process_timeout,
    )


def test_merged_reload(
    lora_subject: Subject, lora_settings: Settings, lora_bounds: Mapping[str, Bound]
) -> None:
    assert_merged_reload(
        lora_subject,
        timeout=lora_settings.process_timeout,
        bound=lora_bounds.get("merged_reload"),
    )
