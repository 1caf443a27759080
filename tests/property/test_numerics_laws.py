"""Laws of the numerics, over drawn numbers, shapes and formats."""
# ruff: noqa: E402 -- torch may be absent, so everything after it comes after the question

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

pytest.importorskip("hypothesis")
torch = pytest.importorskip("torch")

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pytest_lora.numerics.fingerprint import fingerprint, locate_difference
from pytest_lora.numerics.merge_bound import LowRankUpdate, judge_cycle, judge_merge
from pytest_lora.numerics.rounding import Ball, ulp

FORMATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
STORED = [*FORMATS, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int16, torch.int64]

formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 2**32 - 1)
laws = settings(deadline=None, max_examples=150)


def numbers(dtype: torch.dtype) -> st.SearchStrategy[torch.Tensor]:
    """Any finite number of the format, by its bits, so that every exponent is as likely."""
    width = 8 * dtype.itemsize
    patterns = st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    tensors = patterns.map(lambda bits: torch.tensor(bits, dtype=BITS[dtype.itemsize]).view(dtype))
    return tensors.filter(lambda x: bool(x.isfinite()))


def exact(x: torch.Tensor) -> Fraction:
    return Fraction(float(x))


def holds(ball: Ball, value: Fraction) -> bool:
    mid, radius = float(ball.mid), float(ball.radius)
    return radius == float("inf") or abs(value - Fraction(mid)) <= Fraction(radius)


@laws
@given(st.data(), formats)
def test_a_rounded_operation_stays_in_its_ball_and_the_exact_result_too(
    data: Any, dtype: Any
) -> None:
    x, y = data.draw(numbers(dtype)), data.draw(numbers(dtype))
    a, b = Ball.exact(x), Ball.exact(y)
    # Results near the smallest float64 leave no room for the float64 midpoint itself.
    tiny = Fraction(2) ** -960
    assume(all(v == 0 or abs(v) > tiny for v in (exact(x), exact(y), exact(x) * exact(y))))
    for computed, ball, truth in [
        (x + y, a.plus(b, dtype), exact(x) + exact(y)),
        (x - y, a.minus(b, dtype), exact(x) - exact(y)),
        (x * y, a.times(b, dtype), exact(x) * exact(y)),
    ]:
        if computed.isfinite() and abs(truth) < Fraction(2) ** 1000:
            assert holds(ball, truth)
            assert float(ball.excess(computed)) <= 1


@laws
@given(st.data(), formats)
def test_a_conversion_is_off_by_half_an_ulp_of_its_result_at_most(data: Any, dtype: Any) -> None:
    x = data.draw(numbers(torch.float32))
    narrow = x.to(dtype)
    assume(bool(narrow.isfinite()))
    assert abs(exact(narrow) - exact(x)) <= Fraction(float(ulp(narrow, dtype))) / 2
    assert float(Ball.exact(x).rounded(dtype).excess(narrow)) <= 1


@laws
@given(seeds, st.integers(1, 70), st.integers(1, 12), formats)
def test_sums_of_products_in_any_order_stay_in_the_ball(
    seed: int, n: int, rows: int, dtype: Any
) -> None:
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = (torch.randn(rows, n, generator=g).to(dtype).to(wide) for _ in range(2))
    same = torch.arange(rows)
    ball = Ball.product(a, b.T, wide, at=(same, same))
    order = torch.randperm(n, generator=g)
    forwards, backwards, shuffled = torch.zeros(3, rows, dtype=wide)
    for i in range(n):
        forwards += a[:, i] * b[:, i]
        backwards += a[:, n - 1 - i] * b[:, n - 1 - i]
        shuffled += a[:, order[i]] * b[:, order[i]]
    for computed in (forwards, backwards, shuffled, (a * b).sum(1)):
        assert (ball.excess(computed) <= 1).all()
    truth = [
        sum(exact(x) * exact(y) for x, y in zip(*r, strict=True)) for r in zip(a, b, strict=True)
    ]
    for i, value in enumerate(truth):
        assert holds(Ball(ball.mid[i], ball.radius[i]), value)


merges = st.fixed_dictionaries(
    {
        "seed": seeds,
        "shape": st.tuples(st.integers(1, 40), st.integers(1, 60)),
        "rank": st.integers(1, 20),
        "weight": formats,
        "factors": st.sampled_from(FORMATS[:3]),
        "scaling": st.floats(0.01, 64),
        "size": st.sampled_from([1e-30, 1e-6, 1e-2, 1.0]),
        "safe": st.booleans(),
        "dora": st.booleans(),
    }
)


def build(drawn: dict[str, Any]) -> tuple[torch.Tensor, LowRankUpdate]:
    g = torch.Generator().manual_seed(drawn["seed"])
    (d, k), r, factors = drawn["shape"], drawn["rank"], drawn["factors"]
    base = (torch.randn(d, k, generator=g) * drawn["size"] ** 0.5).to(drawn["weight"])
    A = (torch.randn(r, k, generator=g) * drawn["size"]).to(factors)
    B = torch.randn(d, r, generator=g).to(factors)
    m = (torch.rand(d, generator=g) + 0.05).to(factors) if drawn["dora"] else None
    return base, LowRankUpdate(B, A, drawn["scaling"], m, drawn["safe"])


def merge_and_back(base: torch.Tensor, update: LowRankUpdate) -> tuple[torch.Tensor, torch.Tensor]:
    delta = ((update.B.float() @ update.A.float()) * update.scaling).to(update.dtype)
    if update.magnitude is None:
        merged = base.clone()
        merged += delta.to(base.dtype) if update.rounds_delta else delta
        back = merged.clone()
        back -= delta.to(base.dtype)
        return merged, back
    total = base + delta
    factor = (update.magnitude / torch.linalg.norm(total, dim=1).to(total.dtype))[:, None]
    merged = (factor * total).to(base.dtype)
    return merged, (merged / factor - delta).to(base.dtype)


@laws
@given(merges)
@example(
    {"seed": 0, "shape": (1, 5), "rank": 2, "weight": torch.float16, "factors": torch.bfloat16,
     "scaling": 1.0, "size": 1e-6, "safe": True, "dora": False}
)  # fmt: skip
def test_no_sound_merge_or_return_is_ever_outside(drawn: dict[str, Any]) -> None:
    base, update = build(drawn)
    merged, back = merge_and_back(base, update)
    if merged.isfinite().all():
        assert judge_merge(base, merged, update).worst <= 1
        assert judge_cycle(base, back, update).worst <= 1
    else:
        assert judge_merge(base, merged, update).worst == float("inf")


@laws
@given(merges, st.data())
def test_one_element_off_by_a_few_ulps_is_always_outside(drawn: dict[str, Any], data: Any) -> None:
    drawn["dora"] = False
    base, update = build(drawn)
    merged, _ = merge_and_back(base, update)
    assume(bool(merged.isfinite().all()))
    place = data.draw(st.integers(0, merged.numel() - 1))
    i, j = divmod(place, merged.shape[1])
    delta = update.delta_ball(slice(i, i + 1), slice(j, j + 1))
    largest = (
        torch.stack([base[i, j].double(), delta.reach[0, 0], merged[i, j].double()]).abs().max()
    )
    merged[i, j] += 4 * float(ulp(largest, base.dtype)) + 4 * float(delta.radius)
    assume(bool(merged[i, j].isfinite()))
    error = judge_merge(base, merged, update)
    assert error.worst > 1
    assert error.index == (i, j)


@laws
@given(
    st.sampled_from(STORED),
    st.lists(st.integers(0, 6), max_size=4),
    seeds,
    st.data(),
)
def test_any_single_changed_element_changes_the_fingerprint_and_is_located(
    dtype: Any, shape: list[int], seed: int, data: Any
) -> None:
    g = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    octets = torch.randint(0, 256, (*shape, size), generator=g, dtype=torch.uint8)
    x = octets.view(dtype).reshape(shape)
    assert fingerprint(x) == fingerprint(x.clone())
    assume(x.numel())
    place = data.draw(st.integers(0, x.numel() - 1))
    flip = data.draw(st.integers(1, 2 ** (8 * size) - 1))
    y = x.clone()
    bits = y.view(-1).view(BITS[size])
    bits[place] ^= torch.tensor(flip - (flip >> (8 * size - 1) << (8 * size)) if size > 1 else flip)
    assert fingerprint(y) != fingerprint(x)
    found = locate_difference(x, y)
    assert found.changed == 1
    assert found.place == tuple(torch.unravel_index(torch.tensor(place), x.shape))


@laws
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.data(),
)
def test_the_fingerprint_is_that_of_the_elements_not_of_the_strides(
    dtype: Any, shape: list[int], data: Any
) -> None:
    x = torch.arange(torch.Size(shape).numel() * 2).reshape(*shape, 2).to(dtype)
    view = x.permute(data.draw(st.permutations(range(x.dim()))))
    for axis in range(view.dim()):
        step = data.draw(st.integers(1, 3))
        start = data.draw(st.integers(0, view.shape[axis] - 1))
        view = view[(slice(None),) * axis + (slice(start, None, step),)]
    assert fingerprint(view) == fingerprint(view.clone(memory_format=torch.contiguous_format))


@laws
@given(seeds, st.integers(2, 9), st.data())
def test_moving_elements_about_changes_the_fingerprint(seed: int, n: int, data: Any) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(seed)).bfloat16()
    places = torch.tensor(
        data.draw(st.lists(st.integers(0, 399), min_size=n, max_size=n, unique=True))
    )
    y = x.clone()
    y[places] = x[places.roll(1)]
    assume(not torch.equal(x, y))
    assert fingerprint(x) != fingerprint(y)
