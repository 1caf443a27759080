"""Disabling, switching and batching."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import (
    assert_adapter_isolation,
    assert_disable_equals_base,
    assert_padding_invariance,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora import Bound, Subject


def test_disable_equals_base(lora_subject: Subject) -> None:
    assert_disable_equals_base(lora_subject)


def test_adapter_isolation(lora_subject: Subject) -> None:
    assert_adapter_isolation(lora_subject)


def test_padding_invariance(lora_subject: Subject, lora_bounds: Mapping[str, Bound]) -> None:
    assert_padding_invariance(lora_subject, bound=lora_bounds.get("padding_invariance"))
