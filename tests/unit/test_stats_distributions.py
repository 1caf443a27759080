"""The distribution functions against scipy, and in the corners."""

from __future__ import annotations

import math

import pytest

from pytest_lora.stats.distributions import (
    beta_cdf,
    beta_quantile,
    binomial_cdf,
    binomial_pmf,
    hypergeometric_cdf,
    most_marked,
    normal_cdf,
    normal_quantile,
    t_cdf,
    t_quantile,
)

SHAPES = [(0.5, 0.5), (1, 1), (2, 30), (30, 2), (0.5, 400), (120, 80), (5e4, 3e4)]


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_beta(a: float, b: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for p in (1e-12, 1e-5, 0.01, 0.3, 0.5, 0.9, 0.999):
        x = stats.beta.ppf(p, a, b)
        assert beta_cdf(x, a, b) == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-9, abs=1e-14)
        assert beta_quantile(p, a, b) == pytest.approx(x, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("degrees", [1, 2, 5, 30, 4999])
def test_student(degrees: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for t in (-40, -3.1, -0.2, 0, 1.7, 12):
        assert t_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), rel=1e-9)
    for p in (1e-6, 0.025, 0.5, 0.8, 0.999):
        assert t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9)


def test_normal() -> None:
    stats = pytest.importorskip("scipy.stats")
    for z in (-8, -1.96, 0, 0.5, 4):
        assert normal_cdf(z) == pytest.approx(stats.norm.cdf(z), rel=1e-12)
    assert normal_quantile(0.975) == pytest.approx(stats.norm.ppf(0.975), rel=1e-12)


@pytest.mark.parametrize("p", [0, 1e-4, 0.3, 0.5, 0.97, 1])
@pytest.mark.parametrize("n", [1, 7, 250])
def test_binomial(n: int, p: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for k in {0, 1, n // 2, n - 1, n}:
        assert binomial_cdf(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-9)
        assert binomial_pmf(k, n, p) == pytest.approx(stats.binom.pmf(k, n, p), rel=1e-9)
    assert binomial_cdf(-1, n, p) == 0


@pytest.mark.parametrize(
    ("size", "marked", "drawn"), [(10, 3, 4), (50, 50, 7), (500, 5, 80), (5000, 60, 900), (9, 0, 3)]
)
def test_hypergeometric(size: int, marked: int, drawn: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for k in range(-1, min(marked, drawn) + 1):
        expected = stats.hypergeom.cdf(k, size, marked, drawn)
        assert hypergeometric_cdf(k, size, marked, drawn) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("k", "size", "drawn"), [(0, 100, 20), (3, 100, 20), (0, 5, 5), (4, 9, 6)])
def test_most_marked_is_the_largest_set_not_excluded(k: int, size: int, drawn: int) -> None:
    possible = range(k, size - (drawn - k) + 1)
    plausible = [m for m in possible if hypergeometric_cdf(k, size, m, drawn) > 0.01]
    assert most_marked(k, size, drawn, 0.01) == max(plausible)


def test_ends() -> None:
    assert (beta_cdf(0, 2, 3), beta_cdf(1, 2, 3)) == (0, 1)
    assert t_quantile(0.5, 3) == 0
    assert math.isclose(t_cdf(0, 7), 0.5)
