"""Distribution functions from the standard library alone, to about twelve digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

__all__ = [
    "beta_cdf",
    "beta_quantile",
    "binomial_cdf",
    "binomial_pmf",
    "hypergeometric_cdf",
    "log_beta",
    "log_comb",
    "most_marked",
    "normal_cdf",
    "normal_quantile",
    "root",
    "t_cdf",
    "t_quantile",
]


def normal_quantile(p: float) -> float:
    """Where the standard normal distribution function is ``p``."""
    return NormalDist().inv_cdf(p)


def normal_cdf(z: float) -> float:
    """Standard normal distribution function."""
    return math.erfc(-z / math.sqrt(2)) / 2


def log_beta(a: float, b: float) -> float:
    """Logarithm of the beta function."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def log_comb(n: int, k: int) -> float:
    """Logarithm of "n choose k"; minus infinity where there is no choice."""
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function: the chance that a Beta(a, b) is at most ``x``.

    By its continued fraction (NIST *Digital Library of Mathematical Functions*, 8.17.22), on the
    side where that converges fast.
    """
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) - log_beta(a, b)
    return math.exp(log_front) / a / _beta_fraction(x, a, b)


def _beta_fraction(x: float, a: float, b: float) -> float:
    """``1 + d1/(1 + d2/(1 + ...))``, by the modified Lentz algorithm."""
    tiny = 1e-300
    value, upper, lower = 1.0, 1.0, 0.0
    for n in range(1, 100_000):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1 / (1 + term * lower or tiny)
        upper = 1 + term / upper or tiny
        value *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return value


def beta_quantile(p: float, a: float, b: float) -> float:
    """Where :func:`beta_cdf` is ``p``, by bisection to the last bit."""
    return root(lambda x: beta_cdf(x, a, b) < p, 0.0, 1.0)


def root(below: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``below`` turns false, between ``low`` and ``high``, by bisection to the last bit."""
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        low, high = (middle, high) if below(middle) else (low, middle)


def t_cdf(t: float, degrees: float) -> float:
    """Student's distribution function."""
    tail = beta_cdf(degrees / (degrees + t * t), degrees / 2, 0.5) / 2
    return tail if t < 0 else 1 - tail


def t_quantile(p: float, degrees: float) -> float:
    """Where :func:`t_cdf` is ``p``."""
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    x = beta_quantile(2 * (1 - p), degrees / 2, 0.5)
    return math.sqrt(degrees * (1 - x) / x)


def binomial_pmf(k: int, n: int, p: float) -> float:
    """Chance of ``k`` successes in ``n`` trials."""
    if p in (0, 1):
        return float(k == n * p)
    return math.exp(log_comb(n, k) + k * math.log(p) + (n - k) * math.log1p(-p))


def binomial_cdf(k: int, n: int, p: float) -> float:
    """Chance of at most ``k`` successes in ``n`` trials."""
    if k >= n:
        return 1.0
    return 0.0 if k < 0 else beta_cdf(1 - p, n - k, k + 1)


def hypergeometric_cdf(k: int, size: int, marked: int, drawn: int) -> float:
    """Chance of at most ``k`` marked items among ``drawn`` of ``size``, ``marked`` being marked."""
    lowest, highest = max(0, drawn - (size - marked)), min(drawn, marked)
    if k < lowest:
        return 0.0
    if k >= highest:
        return 1.0
    logs = [log_comb(marked, i) + log_comb(size - marked, drawn - i) for i in range(lowest, k + 1)]
    top = max(logs)
    total = math.fsum(math.exp(x - top) for x in logs)
    return min(1.0, math.exp(top - log_comb(size, drawn)) * total)


def most_marked(k: int, size: int, drawn: int, alpha: float) -> int:
    """The most marked items a set can hold of which ``k`` among ``drawn`` were marked.

    Exact: a set that holds more would have shown at most ``k`` with a chance of at most ``alpha``.
    """
    low, high = k, size - (drawn - k)  # low is plausible; what is above high is impossible
    while low < high:
        middle = (low + high + 1) // 2
        if hypergeometric_cdf(k, size, middle, drawn) > alpha:
            low = middle
        else:
            high = middle - 1
    return low
