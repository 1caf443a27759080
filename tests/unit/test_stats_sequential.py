"""Sequential verdicts on a mean: certain where they say so, honest about caps, deterministic."""

from __future__ import annotations

import json
import random

import pytest

from pytest_lora.stats.sequential import SequentialMean, Verdict


def normal(size: int, seed: int = 0, mean: float = 0.0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(mean, 1.0) for _ in range(size)]


def run(values: list[float], limit: float, **options: float) -> SequentialMean:
    """The gate as it stood at its first verdict."""
    gate = SequentialMean(len(values), limit, **{"alpha": 0.001, **options})
    for value in values:
        gate.add(value)
        if gate.verdict:
            break
    return gate


@pytest.mark.parametrize(("mean", "verdict"), [(-0.5, Verdict.AT_MOST), (0.5, Verdict.ABOVE)])
@pytest.mark.parametrize("declared", [True, False])
def test_a_clear_case_is_decided_early(mean: float, verdict: Verdict, declared: bool) -> None:
    options = {"floor": -6.0, "cap": 6.0} if declared else {}
    gate = run(normal(2000, mean=mean), 0.0, **options)
    assert gate.verdict is verdict
    assert gate.used < 300
    assert not gate.certain
    assert min(gate.p_at_most, gate.p_above) <= 0.001


def test_the_whole_set_decides_exactly() -> None:
    gate = run([0.1] * 3, 0.1)
    assert (gate.used, gate.verdict, gate.certain) == (3, Verdict.AT_MOST, True)
    assert gate.estimate == 0.1
    assert (gate.p_at_most, gate.p_above) == (0.0, 1.0)


def test_what_is_left_cannot_change_it() -> None:
    gate = run([1.0, 1.0, 0.0, 0.0], 0.4, floor=0.0, cap=1.0)
    assert (gate.used, gate.verdict, gate.certain) == (2, Verdict.ABOVE, True)


def test_an_item_beyond_a_declared_cap_leaves_the_verdict_to_the_whole_set() -> None:
    values = [9.0, *normal(500, mean=-2)]
    gate = SequentialMean(501, 0.0, alpha=0.001, cap=5.0)
    gate.extend(values[:500])
    assert gate.verdict is None
    assert gate.p_at_most > 0.1
    assert gate.evidence()["above_cap"] == 1
    gate.extend(values[500:])
    assert gate.verdict is Verdict.AT_MOST
    assert gate.certain


@pytest.mark.parametrize("options", [{}, {"floor": -6.0, "cap": 6.0}])
def test_the_interval_shrinks_onto_the_mean(options: dict[str, float]) -> None:
    pytest.importorskip("numpy")
    values = normal(500)
    gate = SequentialMean(500, 0.0, alpha=0.001, **options)
    ends = []
    for start in range(0, 500, 125):
        gate.extend(values[start : start + 125])
        ends.append(gate.interval(0.95))
    mean = sum(values) / 500
    assert all(low <= mean + 1e-12 and mean - 1e-12 <= high for low, high in ends)
    widths = [high - low for low, high in ends]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] < 1
    assert ends[-1] == (gate.estimate, gate.estimate)


def test_the_interval_and_the_verdict_agree() -> None:
    pytest.importorskip("numpy")
    gate = run(normal(2000, mean=-0.5), 0.0)
    assert gate.interval(0.9999)[1] > 0 > gate.interval(0.998)[1]


def test_the_evidence_is_plain_and_names_the_cap() -> None:
    gate = run(normal(2000, mean=-0.5), 0.0)
    evidence = gate.evidence()
    assert json.loads(json.dumps(evidence)) == evidence
    assert evidence["cap_origin"] == "screened"
    assert 0 < float(evidence["unseen_above_cap"] or 0) < 0.1
    assert evidence["used"] == gate.used


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_numbers_that_have_no_mean_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no number"):
        SequentialMean(3, 0.0, alpha=0.01).add(value)


def test_more_items_than_the_set_has_are_refused() -> None:
    gate = SequentialMean(1, 0.0, alpha=0.01)
    gate.add(1.0)
    with pytest.raises(ValueError, match="1 items"):
        gate.add(1.0)
