"""What the adapter learned, and how it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import (
    assert_generation_diversity,
    assert_generation_health,
    assert_task_accuracy,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora import Bound, Subject, TargetTask


def test_task_accuracy(lora_subject: Subject, lora_task: TargetTask) -> None:
    assert_task_accuracy(lora_subject, lora_task.task, **lora_task.floor, **lora_task.options)


def test_generation_health(lora_subject: Subject, lora_written_task: TargetTask) -> None:
    assert_generation_health(lora_subject, lora_written_task.task, **lora_written_task.writing)


def test_generation_diversity(
    lora_subject: Subject, lora_written_task: TargetTask, lora_bounds: Mapping[str, Bound]
) -> None:
    assert_generation_diversity(
        lora_subject,
        lora_written_task.task,
        bound=lora_bounds.get("generation_diversity"),
        **lora_written_task.sampling,
    )
