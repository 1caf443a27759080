"""Whether the adapter fits its base model, from the base's configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import assert_base_compatibility

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_lora import Adapter


def test_base_compatibility(lora_adapter: Adapter, lora_base_source: Path) -> None:
    assert_base_compatibility(lora_adapter, lora_base_source)
