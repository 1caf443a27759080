"""Merging and unmerging, judged by what rounding allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import assert_merge_equivalence, assert_unmerge_restoration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora import Bound, Settings, Subject


def test_merge_equivalence(
    lora_subject: Subject, lora_settings: Settings, lora_bounds: Mapping[str, Bound]
) -> None:
    assert_merge_equivalence(
        lora_subject,
        safe_merge=lora_settings.safe_merge,
        bound=lora_bounds.get("merge_equivalence"),
    )


def test_unmerge_restoration(
    lora_subject: Subject, lora_settings: Settings, lora_bounds: Mapping[str, Bound]
) -> None:
    assert_unmerge_restoration(
        lora_subject,
        cycles=lora_settings.cycles,
        bound=lora_bounds.get("unmerge_restoration"),
    )
