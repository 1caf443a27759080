"""What an adapter's files tell, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import (
    assert_adapter_files,
    assert_config_matches_weights,
    assert_finite_weights,
    assert_serving_profile,
)

if TYPE_CHECKING:
    from pytest_lora import Adapter, Settings


def test_adapter_files(lora_adapter: Adapter, lora_settings: Settings) -> None:
    assert_adapter_files(lora_adapter, newer_writer=lora_settings.newer_writer)


def test_config_matches_weights(lora_adapter: Adapter, lora_settings: Settings) -> None:
    assert_config_matches_weights(lora_adapter, scaling=lora_settings.scaling)


def test_finite_weights(lora_adapter: Adapter) -> None:
    assert_finite_weights(lora_adapter)


def test_serving_profile(lora_adapter: Adapter, lora_settings: Settings) -> None:
    assert_serving_profile(lora_adapter, targets=lora_settings.target)
