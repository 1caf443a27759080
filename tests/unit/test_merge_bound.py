# ruff: noqa: E402 -- torch may be absent, so everything after it comes after the question
from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product

import pytest

torch = pytest.importorskip("torch")

from pytest_lora.numerics.merge_bound import (
    LowRankUpdate,
    WeightError,
    judge_cycle,
    judge_merge,
    judge_sum,
    judge_sum_cycle,
)
from pytest_lora.numerics.rounding import Ball

HALF = [torch.bfloat16, torch.float16]
BASES = [*HALF, torch.float32, torch.float64]
FACTORS = [*HALF, torch.float32]


def case(
    weight: torch.dtype = torch.float32,
    factors: torch.dtype = torch.float32,
    *,
    shape: tuple[int, int] = (60, 90),
    rank: int = 8,
    size: float = 0.02,
    dora: bool = False,
    safe: bool = False,
    seed: int = 0,
) -> tuple[torch.Tensor, LowRankUpdate]:
    g = torch.Generator().manual_seed(seed)
    d, k = shape
    base = (torch.randn(d, k, generator=g) * 0.05).to(weight)
    A = (torch.randn(rank, k, generator=g) * size).to(factors)
    B = (torch.randn(d, rank, generator=g) * 0.5).to(factors)
    magnitude = (torch.rand(d, generator=g) + 0.1).to(factors) if dora else None
    return base, LowRankUpdate(B, A, 1.7, magnitude, safe)


def merged(base: torch.Tensor, update: LowRankUpdate) -> torch.Tensor:
    """What a correct implementation does, whole."""
    delta = ((update.B.float() @ update.A.float()) * update.scaling).to(update.dtype)
    if update.magnitude is not None:
        total = base + delta
        factor = update.magnitude / torch.linalg.norm(total, dim=1).to(total.dtype)
        return (factor[:, None] * total).to(base.dtype)
    result = base.clone()
    result += delta.to(base.dtype) if update.rounds_delta else delta
    return result


def unmerged(base: torch.Tensor, after: torch.Tensor, update: LowRankUpdate) -> torch.Tensor:
    delta = ((update.B.float() @ update.A.float()) * update.scaling).to(update.dtype)
    if update.magnitude is not None:
        total = base + delta
        factor = update.magnitude / torch.linalg.norm(total, dim=1).to(total.dtype)
        return (after / factor[:, None] - delta).to(base.dtype)
    result = after.clone()
    result -= delta.to(base.dtype)
    return result


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("weight", BASES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_sound_merges_and_returns_are_inside(weight, factors, dora):
    for seed, safe, size in product(range(3), (False, True), (1e-4, 0.02, 3.0)):
        base, update = case(weight, factors, dora=dora, safe=safe, size=size, seed=seed)
        after = merged(base, update)
        error = judge_merge(base, after, update)
        assert error.worst <= 1
        assert error.outside == 0
        assert error.elements == base.numel()
        back = judge_cycle(base, unmerged(base, after, update), update)
        assert back.worst <= 1
        assert back.elements == base.numel()


def faults(base: torch.Tensor, update: LowRankUpdate) -> dict[str, torch.Tensor]:
    good = merged(base, update)
    scaled = {
        "no division by r": 8.0,
        "root of r": 8**0.5,
        "one per cent": 1.01,
        "sign": -1.0,
        "twice": 2.0,
        "not at all": 0.0,
    }
    made = {
        name: merged(base, replace(update, scaling=update.scaling * times))
        for name, times in scaled.items()
    }
    fewer = replace(update, B=update.B[:, :-1], A=update.A[:-1])
    return {**made, "last rank dropped": merged(base, fewer), "shifted rows": good.roll(1, 0)}


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("weight", [*HALF, torch.float32], ids=str)
def test_faults_are_outside(weight, factors):
    base, update = case(weight, factors)
    for name, wrong in faults(base, update).items():
        assert judge_merge(base, wrong, update).worst > 1, name


@pytest.mark.parametrize("share", [1, 5400], ids=["gathered", "whole tile"])
@pytest.mark.parametrize("weight", [*HALF, torch.float32], ids=str)
def test_both_ways_of_looking_closer_agree(weight, share):
    """One wrong element is gathered; many make the tile be analysed as a whole."""
    base, update = case(weight)
    wrong = merged(base, update)
    wrong.view(-1)[:share] += 0.5
    wrong[7, 8] += 20000
    error = judge_merge(base, wrong, update)
    assert error.index == (7, 8)
    assert share <= error.outside <= share + 1
    cycle = judge_cycle(base, base + (wrong - merged(base, update)), update)
    assert cycle.index == (7, 8)
    assert share <= cycle.outside <= share + 1


def test_an_error_is_found_in_any_tile_and_placed():
    base, update = case(torch.bfloat16, shape=(600, 2500), rank=4)
    good = merged(base, update)
    assert judge_merge(base, good, update).outside == 0
    for place in [(0, 0), (599, 2499), (256, 1024), (255, 1023), (300, 2048)]:
        wrong = good.clone()
        wrong[place] += 1
        error = judge_merge(base, wrong, update)
        assert (error.index, error.outside, error.elements) == (place, 1, base.numel())
        assert error.ulps > 1


def test_few_elements_need_the_close_look():
    base, update = case(torch.bfloat16, shape=(512, 2048), rank=16)
    error = judge_merge(base, merged(base, update), update)
    assert error.evaluated < 0.01 * error.elements


def test_dora_blocks_of_rows_are_placed():
    base, update = case(torch.float32, shape=(700, 1000), dora=True)
    wrong = merged(base, update)
    wrong[699, 3] += 1
    assert judge_merge(base, wrong, update).index == (699, 3)
    base[699, 5] += 0  # unchanged
    back = base.clone()
    back[650, 4] += 1
    assert judge_cycle(base, back, update).index == (650, 4)


def test_what_is_told_beside_the_verdict():
    base, update = case(torch.float32)
    error = judge_merge(base, merged(base, update), update)
    assert error.changed == base.numel()
    assert error.applied == pytest.approx(1, rel=1e-4)
    assert error.noise_ratio < 1e-4
    twice = judge_merge(base, merged(merged(base, update), update), update)
    assert twice.applied == pytest.approx(2, rel=1e-4)
    nothing = judge_merge(base, base, update)
    assert (nothing.changed, nothing.noise_ratio) == (0, pytest.approx(1))
    assert math.isnan(nothing.applied) or nothing.applied == 0


def test_an_update_too_small_to_round_is_inside_and_changes_nothing():
    base, update = case(torch.bfloat16, size=1e-9)
    base.fill_(1)
    error = judge_merge(base, base.clone(), update)
    assert error.worst < 1
    assert error.changed == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dora", [False, True])
def test_infinities_and_nan_are_outside(value, dora):
    base, update = case(torch.float16, dora=dora)
    wrong = merged(base, update)
    wrong[5, 6] = value
    error = judge_merge(base, wrong, update)
    assert (error.worst, error.index, error.outside) == (math.inf, (5, 6), 1)
    assert judge_cycle(base, wrong, update).worst == math.inf


def test_an_overflow_that_the_recomputation_shares_is_outside():
    base, update = case(torch.float16)
    update = replace(update, scaling=1e6)
    after = merged(base, update)
    assert after.isinf().any()
    assert judge_merge(base, after, update).worst == math.inf


def test_a_result_in_another_dtype_is_judged_in_that():
    base, update = case(torch.bfloat16)
    wide = base.float() + update.delta(slice(None), slice(None))
    assert judge_merge(base, wide, update).worst <= 1


def test_sums_of_vectors():
    g = torch.Generator().manual_seed(0)
    bias, extra = torch.randn(50, generator=g).bfloat16(), torch.randn(50, generator=g)
    delta = Ball.exact(extra).scaled(0.3, torch.float32)
    after = bias.clone()
    after += extra * 0.3
    error = judge_sum(bias, after, delta, torch.float32)
    assert error.worst <= 1
    assert error.elements == error.evaluated == 50
    assert judge_sum(bias, bias + extra.bfloat16(), delta, torch.float32).worst > 1
    back = after.clone()
    back -= (extra * 0.3).bfloat16()
    assert judge_sum_cycle(bias, back, delta, torch.float32).worst <= 1
    assert judge_sum_cycle(bias, after, delta, torch.float32).worst > 1
    assert judge_sum(bias[:0], after[:0], Ball.exact(extra[:0]), torch.float32).elements == 0


def test_what_cannot_be_judged_is_refused():
    base, update = case()
    with pytest.raises(ValueError, match=r"no rounding model for torch\.int8"):
        judge_merge(base.to(torch.int8), base, update)
    with pytest.raises(ValueError, match=r"do not fit a delta \(60, 90\)"):
        judge_merge(base[1:], base[1:], update)


def test_joined_errors_keep_the_worst_place():
    a = WeightError(worst=2.0, index=(1,), outside=1, elements=5, noise=1.0, effect=4.0)
    b = WeightError(worst=3.0, index=(2,), outside=2, elements=6)
    assert a.joined(b).index == b.joined(a).index == (2,)
    assert a.joined(b).outside == 3
    assert a.joined(WeightError()).index == (1,)
    assert a.noise_ratio == 0.5
    assert WeightError().noise_ratio == 0
    assert WeightError(noise=1.0).noise_ratio == math.inf
    assert a.moved(10).index == (11,)
    assert WeightError(index=(1, 2)).moved(3).index == (4, 2)
    assert WeightError().moved(3).index is None


def test_random_shapes_ranks_and_scales_raise_no_alarm():
    """Half a million elements over all formats, subnormal results included."""
    rng = random.Random(5)
    for seed in range(60):
        weight, factors = rng.choice(BASES), rng.choice(FACTORS)
        shape = rng.randint(1, 120), rng.randint(1, 200)
        base, update = case(
            weight, factors, shape=shape, rank=rng.choice([1, 2, 5, 16, 64]),
            size=rng.choice([1e-8, 1e-3, 0.1]), safe=rng.random() < 0.5, seed=seed,
        )  # fmt: skip
        base *= rng.choice([0, 1e-38, 1e-6, 1, 100])
        assert judge_merge(base, merged(base, update), update).worst <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weight", BASES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_cuda_arithmetic_is_inside(weight, factors):
    base, update = case(weight, factors, shape=(700, 900))
    base = base.cuda()
    update = replace(update, B=update.B.cuda(), A=update.A.cuda())
    after = base.clone()
    after += (update.B @ update.A) * update.scaling
    assert judge_merge(base, after, update).worst <= 1
    assert judge_merge(base, base, update).worst > 1
