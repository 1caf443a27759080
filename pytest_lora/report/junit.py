"""What JUnit files say of adapters: few properties, short, where strict readers accept them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_lora.records import CheckResult, Outcome
from pytest_lora.report.text import allowed, clean, measured
from pytest_lora.report.verdicts import adapter_tables, headline

__all__ = ["case_properties", "suite_properties"]


def suite_properties(results: Sequence[CheckResult]) -> Iterator[tuple[str, str]]:
    """The verdict and how many checks ended how, for the ``<testsuite>``."""
    tables = adapter_tables(results, {})
    yield "lora_verdict", headline(tables)
    yield "lora_adapters", str(len(tables))
    for outcome in Outcome:
        yield f"lora_{outcome}", str(sum(row.outcome is outcome for row in results))


def case_properties(result: CheckResult) -> Iterator[tuple[str, str]]:
    """One verdict in short, for a ``<testcase>`` of the family xunit1; xunit2 knows none there."""
    yield "lora_check", clean(result.label)
    yield "lora_adapter", clean(result.adapter)
    yield "lora_outcome", result.outcome.value
    if result.measurement is not None:
        yield "lora_measured", measured(result.measurement, result.bound)
    if result.bound is not None:
        yield "lora_allowed", allowed(result.bound)
