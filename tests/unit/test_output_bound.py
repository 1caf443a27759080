# ruff: noqa: E402 -- torch may be absent, so everything after it comes after the question
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F

from pytest_lora.numerics.output_bound import LinearLengths, linear_distance

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def outputs(
    weight: torch.dtype, factors: torch.dtype, *, k: int = 200, times: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LinearLengths]:
    g = torch.Generator().manual_seed(k)
    d, r, s = 30, 4, 1.75
    W, b = torch.randn(d, k, generator=g).to(weight), torch.randn(d, generator=g).to(weight)
    A = (torch.randn(r, k, generator=g) * 0.1).to(factors)
    B = torch.randn(d, r, generator=g).to(factors)
    x = torch.randn(25, k, generator=g).to(weight)
    merged = (W + (B.float() @ A.float()) * s * times).to(weight)
    unmerged = F.linear(x, W, b) + F.linear(F.linear(x.to(factors), A), B) * s
    lengths = LinearLengths(
        merged=merged.double().norm(dim=1),
        delta=B.double().norm(dim=1) * s * float(A.double().norm()),
        bias=b.double().abs(),
        inputs=k,
        rank=r,
        weight=weight,
        factors=factors,
    )
    return x, F.linear(x, merged, b), unmerged.to(weight), lengths


@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("factors", DTYPES[:3], ids=str)
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_sound_outputs_are_inside(weight, factors, k):
    x, merged, unmerged, lengths = outputs(weight, factors, k=k)
    assert 0 <= linear_distance(x, merged, unmerged, lengths) <= 1


def test_a_wrong_scaling_shows_in_float32():
    x, merged, unmerged, lengths = outputs(torch.float32, torch.float32, times=1.05)
    assert linear_distance(x, merged, unmerged, lengths) > 1


def test_equal_infinities_agree_and_nan_does_not():
    x, merged, unmerged, lengths = outputs(torch.float32, torch.float32)
    merged[0, 0] = unmerged[0, 0] = math.inf
    assert linear_distance(x, merged, unmerged, lengths) <= 1
    merged[0, 1] = math.nan
    assert linear_distance(x, merged, unmerged, lengths) == math.inf
    assert linear_distance(x[:0], merged[:0], unmerged[:0], lengths) == 0
