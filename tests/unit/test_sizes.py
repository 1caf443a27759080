from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.errors import UsageError
from pytest_lora.sizes import UNITS, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("14 GiB", 14 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("0.1 GB", 10**8),
        ("  2 kib ", 2048),
        ("1_000 B", 1000),
        ("1.9 B", 1),
        (4096, 4096),
    ],
)
def test_sizes_are_read_exactly(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "wrong",
    ["14", "GiB", "-1 GiB", "1 GiBs", "1,5 GiB", "", "0 MB", 0, -5, True, 1.5, None, "٣ MB"],
)
def test_what_is_no_size_is_named(wrong: Any) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_bytes(wrong)


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_a_whole_number_of_units_is_that_many_times_the_unit(count: int, unit: str) -> None:
    assert parse_bytes(f"{count} {unit}") == count * UNITS[unit]


@given(st.integers(0, 999), st.integers(0, 999))
def test_fractions_carry_no_rounding_error(whole: int, thousandths: int) -> None:
    size = whole * 1000 + thousandths
    if size:
        assert parse_bytes(f"{whole}.{thousandths:03d} GB") == size * 10**6


@pytest.mark.parametrize(
    ("count", "text"),
    [(812, "812 B"), (1024, "1.00 KiB"), (-(3 * 2**19), "-1.50 MiB"), (39 * 2**30, "39.0 GiB"),
     (1000 * 2**20, "1000 MiB"), (2**50, "1024 TiB"), (0, "0 B")],
)  # fmt: skip
def test_sizes_are_shown_in_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text
