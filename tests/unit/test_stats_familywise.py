"""Holm against scipy's closed form, and gates that run at the same time."""

from __future__ import annotations

import random

import pytest

from pytest_lora.stats.familywise import SequentialHolm, holm
from pytest_lora.stats.sequential import SequentialMean, Verdict


def test_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    with pytest.raises(ValueError, match="no p-value"):
        holm([1.2])


def test_holm_is_closed_testing_by_bonferroni() -> None:
    """Rejected is what every intersection that contains it rejects: the definition, all 2^k."""
    rng = random.Random(0)
    for _ in range(50):
        p = [rng.random() ** 3 for _ in range(5)]
        for i in range(5):
            sets = [[p[j] for j in range(5) if m >> j & 1] for m in range(32) if m >> i & 1]
            assert holm(p)[i] == pytest.approx(max(min(1, len(s) * min(s)) for s in sets))


def test_a_decided_gate_leaves_its_share_to_the_others() -> None:
    family = SequentialHolm(["a", "b", "c"], 0.03)
    assert [family.alpha_for(gate) for gate in "abc"] == pytest.approx([0.01] * 3)
    assert family.update("a", 0.001, 1.0) is True
    # Failing has not been decided for any gate, so its level still divides by three.
    assert family.alpha_for("b") == pytest.approx(0.01)
    assert family.update("b", 0.014, 1.0) is True
    assert family.update("c", 0.02, 0.5) is True
    assert family.update("c", 1.0, 1.0) is True


def test_a_gate_fails_by_its_other_p_value() -> None:
    family = SequentialHolm(["drift", "accuracy"], 0.01)
    assert family.update("drift", 1.0, 0.004) is False
    assert family.update("accuracy", 0.006, 1.0) is None
    assert family.verdict("accuracy") is None
    assert family.adjusted("accuracy") == (pytest.approx(0.012), 1.0)


def test_what_cannot_be_meant_is_refused() -> None:
    for gates, alpha in ((["a", "a"], 0.1), ([], 0.1), (["a"], 1.0)):
        with pytest.raises(ValueError):
            SequentialHolm(gates, alpha)
    family = SequentialHolm(["a"], 0.1)
    with pytest.raises(KeyError, match="'b'"):
        family.update("b", 1.0, 1.0)
    with pytest.raises(ValueError, match="p-values"):
        family.update("a", 1.0, -1.0)


def gates_that_should_fail(seed: int) -> list[tuple[list[float], float]]:
    rng = random.Random(seed)
    sets = [[rng.random() for _ in range(60)] for _ in range(4)]
    return [(values, sum(values) / 60 - 1e-6) for values in sets]


def test_the_rate_of_any_wrong_pass_is_kept_over_gates_run_side_by_side() -> None:
    """Four gates just above their limits, alpha 0.1, 150 runs."""
    wrong = 0
    for seed in range(150):
        family = SequentialHolm("abcd", 0.1)
        gates = {
            name: (SequentialMean(60, limit, alpha=0.1, floor=0.0, cap=1.0), values)
            for name, (values, limit) in zip("abcd", gates_that_should_fail(seed), strict=True)
        }
        passed = False
        for i in range(59):
            for name, (gate, values) in gates.items():
                gate.add(values[i])
                passed |= family.update(name, gate.p_at_most, gate.p_above) is True
        wrong += passed
    assert wrong <= 27  # binomial(150, 0.1) exceeds 27 with a chance of 0.0006


def test_a_gate_run_alone_at_its_alpha_gives_a_verdict_that_stands() -> None:
    family = SequentialHolm(["a", "b"], 0.01)
    rng = random.Random(1)
    for name in ("a", "b"):
        gate = SequentialMean(500, 0.0, alpha=family.alpha_for(name))
        while gate.verdict is None:
            gate.add(rng.gauss(-1, 1))
        assert gate.verdict is Verdict.AT_MOST
        assert family.update(name, gate.p_at_most, gate.p_above) is True
