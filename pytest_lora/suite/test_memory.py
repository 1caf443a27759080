"""What loading, using, training and merging the adapter takes on a GPU: measured or predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import (
    assert_memory_inference,
    assert_memory_load,
    assert_memory_merge,
    assert_memory_train_step,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora import Bound, MemoryPlan


def test_memory_load(lora_memory_plan: MemoryPlan, lora_bounds: Mapping[str, Bound]) -> None:
    assert_memory_load(lora_memory_plan, max_memory=lora_bounds.get("memory_load"))


def test_memory_inference(lora_memory_plan: MemoryPlan, lora_bounds: Mapping[str, Bound]) -> None:
    assert_memory_inference(lora_memory_plan, max_memory=lora_bounds.get("memory_inference"))


def test_memory_train_step(lora_memory_plan: MemoryPlan, lora_bounds: Mapping[str, Bound]) -> None:
    assert_memory_train_step(lora_memory_plan, max_memory=lora_bounds.get("memory_train_step"))


def test_memory_merge(lora_memory_plan: MemoryPlan, lora_bounds: Mapping[str, Bound]) -> None:
    assert_memory_merge(lora_memory_plan, max_memory=lora_bounds.get("memory_merge"))
