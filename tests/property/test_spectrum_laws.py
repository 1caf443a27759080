"""Laws of the spectrum of a low-rank update."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("hypothesis")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.numerics.spectrum import low_rank_spectrum

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**16)
SCALINGS = st.floats(-8, 8).filter(lambda scaling: abs(scaling) > 1e-3)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(d=SIZES, k=SIZES, r=SIZES, scaling=SCALINGS, seed=SEEDS)
def test_factors_may_be_mixed_turned_and_scaled(
    d: int, k: int, r: int, scaling: float, seed: int
) -> None:
    """B M and M^-1 A have one product; transposing and rotating keep singular values."""
    B, A = normal(d, r, seed=seed), normal(r, k, seed=seed + 1)
    mix, turn = (
        torch.linalg.qr(normal(n, n, seed=seed + n))[0] for n in (r, d)
    )  # fmt: skip
    found = low_rank_spectrum(B, A, scaling)
    dense = torch.linalg.svdvals(scaling * B @ A)[: len(found.values)]
    slack = 8 * max(found.error, 1e-300)
    assert found.values == pytest.approx(dense.tolist(), abs=slack)
    for b, a, s in [
        (B @ mix, mix.mT @ A, scaling), (A.mT, B.mT, scaling), (turn @ B, A, scaling),
        (scaling * B, A, 1.0), (B, A, -scaling),
    ]:  # fmt: skip
        assert low_rank_spectrum(b, a, s).values == pytest.approx(found.values, abs=slack)


@settings(max_examples=60, deadline=None)
@given(d=SIZES, k=SIZES, r=SIZES, seed=SEEDS)
def test_the_ranks_are_in_order(d: int, k: int, r: int, seed: int) -> None:
    found = low_rank_spectrum(normal(d, r, seed=seed), normal(r, k, seed=seed + 1), 1.0)
    count = min(d, k, r)
    assert 1 - 1e-12 <= found.stable_rank <= found.effective_rank * (1 + 1e-12)
    assert found.effective_rank <= count * (1 + 1e-12)
    assert found.spectral <= found.frobenius * (1 + 1e-12)
