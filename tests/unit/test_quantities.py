"""Quantities as people write them: what each means, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

from pytest_lora.quantities import (
    Floor,
    Margin,
    parse_drift,
    parse_floor,
    parse_limit,
    parse_share,
)


@pytest.mark.parametrize(
    ("written", "nats"),
    [
        (0.05, 0.05),
        (0, 0.0),
        (-0.01, -0.01),
        ("0.05", 0.05),
        ("0.05 nats", 0.05),
        ("0.05nats", 0.05),
        (" 1 nat ", 1.0),
        ("5e-2 nats per token", 0.05),
        ("0.05 nats/token", 0.05),
        ("5%", math.log(1.05)),
        ("-2 %", math.log(0.98)),
    ],
)
def test_a_drift_is_nats_per_token_or_growth_of_the_perplexity(written: Any, nats: float) -> None:
    assert parse_drift(written) == pytest.approx(nats, rel=1e-15)


@pytest.mark.parametrize(
    "written", ["", "5 bits", "five", "nan", math.inf, True, None, [1], "-100%", "1e999", "0.05 %%"]
)
def test_what_is_no_drift_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match=r'nats per token.*"5%"'):
        parse_drift(written)


@pytest.mark.parametrize(
    ("written", "nats"),
    [
        ("baseline", 0.0),
        ("baseline + 0.01", 0.01),
        ("Baseline-0.01 nats", -0.01),
        ("baseline + 5%", math.log(1.05)),
        ("baseline - 5%", math.log(0.95)),
    ],
)
def test_a_drift_may_be_relative_to_a_recorded_one(written: str, nats: float) -> None:
    found = parse_drift(written)
    assert isinstance(found, Margin)
    assert found.value == pytest.approx(nats, rel=1e-15)
    assert parse_drift(str(found)) == found


@pytest.mark.parametrize("written", ["base + 0.01", "baseline +", "baseline + x", "baseline 1"])
def test_what_is_no_margin_of_a_drift_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="on top of a recorded baseline"):
        parse_drift(written)


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        (2, 2.0),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("baseline", Margin(0.0)),
        ("baseline - 2", Margin(-2.0)),
        ("baseline+0.5", Margin(0.5)),
    ],
)
def test_a_limit_is_a_number_or_relative_to_a_recorded_one(
    written: Any, limit: float | Margin
) -> None:
    assert parse_limit(written) == limit


@pytest.mark.parametrize(
    "written", [-1, "-1", "2%", "baseline + 2%", "base + 1", True, None, "nan", math.inf, [], "x"]
)
def test_what_is_no_limit_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="a finite number, 0 or more"):
        parse_limit(written)


@pytest.mark.parametrize(("written", "share"), [(0.5, 0.5), ("50%", 0.5), (1, 1.0), ("0", 0.0)])
def test_a_share_is_a_number_or_a_percentage(written: Any, share: float) -> None:
    assert parse_share(written) == share


def test_percentages_are_rounded_once() -> None:
    for thousandths in range(1001):
        percent = f"{thousandths // 10}.{thousandths % 10}%"
        assert parse_share(percent) == thousandths / 1000
        assert parse_floor(f"baseline - {percent}").exact == Fraction(-thousandths, 1000)


@pytest.mark.parametrize("written", [50, "101%", -0.1, "half", False])
def test_what_is_no_share_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        parse_share(written)


@pytest.mark.parametrize(
    ("written", "floor"),
    [
        (0.5, Floor(0.5)),
        ("50%", Floor(0.5)),
        ("base", Floor(0.0, to="base")),
        ("base + 10%", Floor(0.1, to="base")),
        ("Base-0.02", Floor(-0.02, to="base")),
        ("baseline", Floor(0.0, to="baseline")),
        ("baseline - 2%", Floor(-0.02, to="baseline")),
    ],
)
def test_a_floor_is_absolute_or_relative(written: Any, floor: Floor) -> None:
    assert parse_floor(written) == floor
    assert parse_floor(str(floor)) == floor


@pytest.mark.parametrize("written", ["base * 2", "base -", "base - 3 points", 2, "bass - 1%"])
def test_what_is_no_floor_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="relative to the base model"):
        parse_floor(written)
