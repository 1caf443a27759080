"""The nearest valid name."""

from __future__ import annotations

import pytest

from pytest_lora.names import meant


@pytest.mark.parametrize(
    ("name", "otherwise", "said"),
    [
        ("max_drfit", "", " (did you mean 'max_drift'?)"),
        ("max_drfit", "see the docs", " (did you mean 'max_drift'?)"),
        ("colour", "", ""),
        ("colour", "see the docs", " (see the docs)"),
    ],
)
def test_the_closest_is_named_or_what_else_helps(name: str, otherwise: str, said: str) -> None:
    assert meant(name, ["max_drift", "path"], otherwise) == said


def test_long_names_are_cut_before_they_are_compared() -> None:
    assert meant("a" * 10**6, ["a" * 10**6]) == f" (did you mean {'a' * 200!r}?)"
