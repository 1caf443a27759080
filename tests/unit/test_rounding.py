# ruff: noqa: E402 -- torch may be absent, so everything after it comes after the question
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from pytest_lora.numerics.rounding import (
    Ball,
    gamma,
    half_ulp,
    holds_exactly,
    is_floating_format,
    precision,
    smallest,
    ulp,
    unit,
)

FORMATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NARROW = FORMATS[:3]


def bits_of(dtype: torch.dtype) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def next_up(x: torch.Tensor) -> torch.Tensor:
    return (x.view(bits_of(x.dtype)) + 1).view(x.dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_constants_are_those_of_the_format(dtype):
    info = torch.finfo(dtype)
    assert unit(dtype) == info.eps / 2
    assert smallest(dtype) == info.smallest_normal * info.eps
    assert precision(dtype) == 1 - int(math.log2(unit(dtype))) - 1
    assert is_floating_format(dtype)
    assert not is_floating_format(torch.int8)
    assert not is_floating_format(torch.float8_e4m3fn)


def test_formats_that_hold_others():
    pairs = {(a, b) for a in FORMATS for b in FORMATS if holds_exactly(a, b)}
    bfloat16, float16, float32, float64 = FORMATS
    assert pairs == {(a, a) for a in FORMATS} | {
        (float32, bfloat16), (float32, float16), (float64, bfloat16), (float64, float16),
        (float64, float32),
    }  # fmt: skip


def test_gamma():
    assert gamma(0, torch.float32) == 0
    assert gamma(1000, torch.float32) == pytest.approx(1000 * 2.0**-24, rel=1e-4)
    assert gamma(1000, torch.float32) > 1000 * 2.0**-24
    assert gamma(256, torch.bfloat16) == math.inf


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    exact = [0.0, info.smallest_normal, info.smallest_normal / 2, info.max / 2, 1.0, 0.75, 2.0]
    drawn = torch.randn(2000, generator=torch.Generator().manual_seed(0)).mul(
        2.0 ** torch.randint(-30, 14, (2000,), generator=torch.Generator().manual_seed(1))
    )
    x = torch.cat([torch.tensor(exact, dtype=torch.float64), drawn.double()]).to(dtype).abs()
    assert torch.equal(ulp(x, dtype), next_up(x).double() - x.double())
    assert torch.equal(ulp(-x, dtype), ulp(x, dtype))
    assert torch.equal(half_ulp(x, dtype), ulp(x, dtype) / 2)


def test_ulp_of_float64():
    x = torch.tensor([1.0, 0.7, 3e300, 1e-200], dtype=torch.float64)
    assert torch.equal(ulp(x, torch.float64), next_up(x) - x)
    assert (ulp(torch.tensor([0.0, 5e-324]).double(), torch.float64) == 2.0**-1022).all()


def ball(*mids: float, radius: float = 0.0) -> Ball:
    mid = torch.tensor(mids, dtype=torch.float64)
    return Ball(mid, torch.full_like(mid, radius))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_each_operation_holds_what_the_format_computes(dtype):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(5000, generator=generator).mul(3).to(dtype) for _ in range(2))
    a, b = Ball.exact(x), Ball.exact(y)
    for computed, expected in [
        (x + y, a.plus(b, dtype)),
        (x - y, a.minus(b, dtype)),
        (x * y, a.times(b, dtype)),
        (x / y, a.over(b, dtype)),
        (x * 0.7, a.scaled(0.7, torch.promote_types(dtype, torch.float32)).rounded(dtype)),
    ]:
        assert (expected.excess(computed) <= 1).all()


def test_one_rounding_is_all_the_room_there_is():
    """The bound is attained: half an ulp, and one unit more is outside."""
    x, y = torch.tensor([1.0]), torch.tensor([2.0**-24])  # a tie
    allowed = Ball.exact(x).plus(Ball.exact(y), torch.float32)
    assert 0.99 < float(allowed.excess(x)) <= 1
    assert float(allowed.excess(next_up(next_up(x)))) > 1


@pytest.mark.parametrize("n", [1, 7, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_hold_what_a_matrix_product_computes(n, dtype):
    generator = torch.Generator().manual_seed(n)
    a, b = torch.randn(40, n, generator=generator), torch.randn(n, 50, generator=generator)
    a, b = a.to(dtype), b.to(dtype)
    whole = Ball.product(a, b, dtype)
    assert (whole.excess(a @ b) <= 1).all()
    i, j = torch.tensor([0, 3, 39]), torch.tensor([49, 0, 7])
    single = Ball.product(a, b, dtype, at=(i, j))
    torch.testing.assert_close(single.mid, whole.mid[i, j])
    torch.testing.assert_close(single.radius, whole.radius[i, j])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("k", [1, 33, 3000])
def test_norms_hold_what_torch_computes(dtype, k):
    x = torch.randn(20, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    norms = torch.linalg.norm(x, dim=1)
    assert (Ball.exact(x).row_norms(dtype).excess(norms) <= 1).all()


def test_radii_travel_through_operations():
    a, b = ball(10.0, radius=1.0), ball(4.0, radius=0.5)
    wide = torch.float64
    assert float(a.plus(b, wide).radius) == pytest.approx(1.5)
    assert float(a.minus(b, wide).mid) == 6
    assert float(a.times(b, wide).radius) == pytest.approx(11 * 4.5 - 40)
    assert float(a.over(b, wide).radius) >= 11 / 3.5 - 10 / 4
    assert float(a.scaled(-3.0, wide).radius) == pytest.approx(3)
    assert a.reach == 11
    assert float(ball(1.0).over(ball(0.1, radius=0.2), wide).radius) == math.inf


def test_nothing_that_is_not_a_number_is_inside():
    values = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    ratios = ball(1.0, 1.0, 1.0, 1.0, radius=1.0).excess(values)
    assert ratios.tolist() == [0, math.inf, math.inf, math.inf]
    assert ball(0.0).excess(torch.tensor([0.0])) == 0
    assert ball(0.0).excess(torch.tensor([1.0])) == math.inf
