"""What the adapter forgot of the domains it was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora import assert_dtype_stability, assert_perplexity_drift

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora import Bound, SourceDomain, Subject


def test_perplexity_drift(lora_subject: Subject, lora_source: SourceDomain) -> None:
    assert_perplexity_drift(
        lora_subject, lora_source.texts, max_drift=lora_source.max_drift, **lora_source.options
    )


def test_dtype_stability(
    lora_subject: Subject, lora_source: SourceDomain, lora_bounds: Mapping[str, Bound]
) -> None:
    assert_dtype_stability(
        lora_subject, lora_source.texts, bound=lora_bounds.get("dtype_stability")
    )
