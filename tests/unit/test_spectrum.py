"""Spectra from factors against dense ones."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

import torch

from pytest_lora.numerics.spectrum import Spectrum, intruders, low_rank_spectrum, relative_norm


def factors(
    d: int, k: int, r: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(shape, generator=generator) for shape in ((d, r), (r, k)))
    return B.to(dtype), A.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize(("d", "k", "r"), [(40, 24, 4), (24, 40, 1), (3, 30, 8), (30, 3, 8)])
def test_the_dense_product_has_the_same_singular_values(
    d: int, k: int, r: int, dtype: torch.dtype
) -> None:
    B, A = factors(d, k, r, dtype)
    found = low_rank_spectrum(B, A, -2.5)
    dense = torch.linalg.svdvals(-2.5 * B.double() @ A.double())
    count = min(d, k, r)
    assert len(found.values) == count == found.rank
    assert torch.tensor(found.values, dtype=torch.float64) == pytest.approx(
        dense[:count], abs=found.error
    )
    assert found.spectral == pytest.approx(float(dense[0]), rel=1e-12)
    assert found.frobenius == pytest.approx(float(dense.norm()), rel=1e-12)
    assert 1 <= found.stable_rank <= found.effective_rank * (1 + 1e-12) <= count + 1e-9


def test_ranks_of_known_spectra() -> None:
    equal = Spectrum((2.0,) * 4, 0.0)
    assert equal.effective_rank == pytest.approx(4)
    assert equal.stable_rank == pytest.approx(4)
    one = Spectrum((3.0, 0.0, 0.0), 1e-15)
    assert (one.effective_rank, one.stable_rank, one.rank) == (1.0, 1.0, 1)
    none = Spectrum((0.0, 0.0), 0.0)
    assert (none.effective_rank, none.stable_rank, none.rank, none.frobenius) == (0.0, 0.0, 0, 0.0)
    # (2, 1): entropy of (2/3, 1/3), and 5/4.
    two = Spectrum((2.0, 1.0), 0.0)
    assert two.effective_rank == pytest.approx(3 / 2 ** (2 / 3))
    assert two.stable_rank == pytest.approx(1.25)


def test_collapsed_factors_have_the_rank_that_is_left() -> None:
    B, A = factors(50, 30, 6)
    B[:, 3:] = B[:, :3] @ torch.ones(3, 3)
    assert low_rank_spectrum(B.double(), A, 1.0).rank in (3, 4)  # float32 rounded the copies
    B[:, 3:] = B[:, :3]
    assert low_rank_spectrum(B, A, 1.0).rank == 3
    assert low_rank_spectrum(torch.zeros(50, 6), A, 1.0).rank == 0


def test_what_is_not_finite_is_said() -> None:
    B, A = factors(5, 4, 2)
    B[0, 0] = math.nan
    assert not low_rank_spectrum(B, A, 1.0).finite
    assert not low_rank_spectrum(*factors(5, 4, 2), math.inf).finite


def test_relative_norms() -> None:
    spectrum = Spectrum((3.0, 4.0), 0.0)
    assert relative_norm(spectrum, 10.0) == 0.5
    assert relative_norm(spectrum, 0.0) == math.inf
    assert relative_norm(Spectrum((0.0,), 0.0), 0.0) == 0.0


def test_intruders_are_directions_the_weight_did_not_have() -> None:
    """A diagonal weight: an update along a mixture of many axes intrudes, one along an axis not."""
    weight = torch.diag(torch.arange(20.0, 0.0, -1.0))
    axis = torch.zeros(20, 1)
    axis[4] = 1.0
    mixture = torch.ones(20, 1) / math.sqrt(20)
    assert intruders(weight, axis, axis.T, 100.0) == 0
    assert intruders(weight, mixture, mixture.T, 1e3) == 1
    assert intruders(weight, mixture, mixture.T, 1e-3) == 0
    assert intruders(weight, mixture, mixture.T, 1e3, similarity=0.2) == 0


@pytest.mark.parametrize("scaling", [0.0, 1.0, 5.0, 50.0])
def test_intruders_counted_one_by_one(scaling: float) -> None:
    """The definition, loop by loop."""
    B, A = factors(16, 24, 2, torch.float64, seed=4)
    weight = factors(16, 24, 16, torch.float64, seed=5)[1]
    own, new = (
        torch.linalg.svd(matrix)[0] for matrix in (weight, weight + scaling * B @ A)
    )  # fmt: skip
    count = 0
    for j in range(10):
        if all(abs(float(own[:, i] @ new[:, j])) < 0.5 for i in range(16)):
            count += 1
    assert intruders(weight, B, A, scaling) == count
    assert (count == 0) is (scaling == 0)
