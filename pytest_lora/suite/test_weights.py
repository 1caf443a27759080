"""What the adapter does to the base model, and what it must not do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import (
    assert_adapter_effect,
    assert_delta_spectrum,
    assert_frozen_weights,
    assert_requires_grad,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora import Bound, Subject


def test_adapter_effect(lora_subject: Subject, lora_bounds: Mapping[str, Bound]) -> None:
    assert_adapter_effect(lora_subject, bound=lora_bounds.get("adapter_effect"))


def test_delta_spectrum(lora_subject: Subject, lora_bounds: Mapping[str, Bound]) -> None:
    assert_delta_spectrum(lora_subject, bound=lora_bounds.get("delta_spectrum"))


def test_requires_grad(lora_subject: Subject) -> None:
    assert_requires_grad(lora_subject)


def test_frozen_weights(lora_subject: Subject) -> None:
    assert_frozen_weights(lora_subject)
