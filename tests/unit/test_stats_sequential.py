"""Sequential verdicts on a mean: certain where they say so, honest about caps, deterministic."""

from __future__ import annotations

import importlib.util
import json
import random
from itertools import combinations
from types import ModuleType
from typing import Any

import pytest
from example import ROOT

from pytest_lora.stats.sequential import SequentialMean, Verdict


def normal(size: int, seed: int = 0, mean: float = 0.0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(mean, 1.0) for _ in range(size)]


def run(values: list[float], limit: float, **options: Any) -> SequentialMean:
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


def test_an_interval_of_values_that_hardly_differ_ends() -> None:
    pytest.importorskip("numpy")
    gate = SequentialMean(200, 0.0, alpha=0.1)
    gate.extend(1e6 + 1e-9 * (i % 3) for i in range(100))
    low, high = gate.interval(0.9)
    assert 1e6 <= low <= high <= 1e6 + 1e-8


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


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"limit": float("nan")},
        {"floor": 2.0, "cap": 1.0},
        {"max_unseen": 1.5},
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SequentialMean(**{"size": 3, "limit": 0.0, "alpha": 0.1, **arguments})


def test_a_limit_beyond_what_is_possible_needs_no_item() -> None:
    assert SequentialMean(9, 2.0, alpha=0.1, cap=1.5).verdict is Verdict.AT_MOST
    assert SequentialMean(9, -1.0, alpha=0.1, floor=0.0).verdict is Verdict.ABOVE
    assert SequentialMean(9, 0.0, alpha=0.1, floor=0.0).verdict is None


def test_before_the_first_item_nothing_is_known() -> None:
    gate = SequentialMean(9, 0.0, alpha=0.1)
    assert gate.verdict is None
    assert (gate.used, gate.p_at_most, gate.p_above) == (0, 1.0, 1.0)
    evidence = gate.evidence()
    assert (evidence["estimate"], evidence["cap"], evidence["unseen_above_cap"]) == (None, None, 1)
    assert gate.interval(0.9) == (float("-inf"), float("inf"))
    with pytest.raises(ValueError, match="confidence"):
        gate.interval(1.0)


def test_values_that_never_differ_from_the_limit_decide_nothing_early() -> None:
    gate = run([0.5] * 100, 0.5)
    assert gate.used == 100
    assert gate.verdict is Verdict.AT_MOST


@pytest.mark.parametrize("mean", [-1.0, 1.0])
def test_a_wrong_early_verdict_is_put_right_by_the_whole_set(mean: float) -> None:
    """A set that begins unlike the rest: what one order in thousands does."""
    values = [*normal(100, mean=mean), *normal(900, mean=-mean)]
    gate = run(values, 0.0)
    early = gate.verdict
    assert gate.used < 100
    gate.extend(values[gate.used :])
    assert gate.certain
    assert early is not gate.verdict is not None


def catastrophic(size: int, every: int) -> list[float]:
    values = [value / 5 for value in normal(size)]
    return [value + 5 * (i % every == every - 1) for i, value in enumerate(values)]


def test_a_catastrophe_seen_does_not_end_the_evidence() -> None:
    """Small stakes survive it: the limit is far above, and the set need not be exhausted."""
    gate = run(catastrophic(2000, 30), 1.0)
    assert gate.verdict is Verdict.AT_MOST
    values = catastrophic(2000, 30)
    gate = SequentialMean(2000, 0.5, alpha=0.001)
    gate.extend(values[:1000])
    assert gate.evidence()["above_cap"] == 33
    assert gate.verdict is Verdict.AT_MOST


def test_max_unseen_waits_for_more_items() -> None:
    values = normal(2000, mean=-1)
    early, late = run(values, 0.0), run(values, 0.0, max_unseen=0.01)
    assert early.used < late.used < 2000
    assert float(late.evidence()["unseen_above_cap"] or 0) <= 0.01
    assert float(early.evidence()["unseen_above_cap"] or 0) > 0.01


def test_evidence_that_a_catastrophe_undid_is_not_called_upon_later() -> None:
    """While few enough may lie unseen, what counts is the wealth at that time, not once before."""
    values = [value / 5 for value in normal(600)]
    for i in (300, 310, 320, 330, 340, 350):
        values[i] += 50
    limit = sum(values) / 600 - 0.001
    assert run(values, limit).verdict is Verdict.AT_MOST
    careful = run(values, limit, max_unseen=0.01)
    assert careful.verdict is Verdict.ABOVE
    assert careful.used > 300


def test_the_unseen_share_is_rarely_understated() -> None:
    """5% of 400 items lie beyond the cap: over 300 orders, each watched at every time."""
    understated = 0
    for seed in range(300):
        rng = random.Random(seed)
        values = [0.01 * rng.random() + 50 * (i < 20) for i in range(400)]
        rng.shuffle(values)
        gate = SequentialMean(400, 25.0, alpha=0.1)
        wrong = False
        for i, value in enumerate(values[:120]):
            gate.add(value)
            if gate.used > 16 and i % 4 == 0:
                cap = gate._low.cap
                assert cap is not None
                unseen = sum(value > cap for value in values[gate.used :])
                wrong |= unseen / 400 > gate._unseen(gate._low)
        understated += wrong
    assert understated <= 48  # binomial(300, 0.1) exceeds 48 with a chance below 0.001


@pytest.mark.parametrize("alpha", [0.25, 0.1])
@pytest.mark.parametrize(("nudge", "wrong"), [(-1e-3, Verdict.AT_MOST), (1e-3, Verdict.ABOVE)])
def test_the_error_rate_is_kept_over_every_order(
    alpha: float, nudge: float, wrong: Verdict
) -> None:
    """All 495 orders of 4 ones and 8 zeros, judged against limits just off their mean."""
    mistaken = 0
    for ones in combinations(range(12), 4):
        values = [float(i in ones) for i in range(12)]
        gate = run(values, 1 / 3 + nudge, alpha=alpha, floor=0.0, cap=1.0)
        mistaken += gate.verdict is wrong
    assert 0.02 < mistaken / 495 <= alpha


# ---------------------------------------------------------------------------------- simulation


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    pytest.importorskip("numpy")
    path = ROOT / "benchmarks" / "sequential.py"
    spec = importlib.util.spec_from_file_location("sequential_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("declared", [True, False])
def test_the_simulation_judges_as_the_class_does(simulation: ModuleType, declared: bool) -> None:
    import numpy as np

    for name, draw in {**simulation.LIGHT, "rare": simulation.catastrophes(0.02)}.items():
        values = draw(np.random.default_rng(3), (3, 120))
        for margin in (-1, -0.01, 0.3):
            limit = simulation.limits(values, margin)
            for most in (1.0, 0.05):
                low, high = (
                    simulation.first_verdicts(values, limit, 0.01, declared, most, above=above)
                    for above in (False, True)
                )
                for i in range(3):
                    beyond = np.ptp(values[i]) / 2
                    ends = {"floor": values[i].min() - beyond, "cap": values[i].max() + beyond}
                    options = {**(ends if declared else {}), "alpha": 0.01, "max_unseen": most}
                    gate = run(list(values[i]), limit[i], **options)
                    assert gate.used == min(low[i], high[i]), (name, margin, most)


@pytest.mark.parametrize("name", ["normal", "t, 3 degrees", "lognormal", "-lognormal"])
def test_wrong_verdicts_are_as_rare_as_promised(simulation: ModuleType, name: str) -> None:
    """The table of docs/statistics.md in small: more than 5 of 1,000 would show a rate above it."""
    import numpy as np

    values = simulation.LIGHT[name](np.random.default_rng(11), (1000, 50))
    for margin in (-0.001, 0.001):
        wrong = np.count_nonzero(simulation.wrong_at(values, margin, 0.001, declared=False))
        assert wrong <= 5


def test_a_tenth_of_the_set_tells_half_a_standard_deviation(simulation: ModuleType) -> None:
    import numpy as np

    values = simulation.LIGHT["normal"](np.random.default_rng(5), (40, 2000))
    for margin, most in ((0.5, 0.10), (-0.5, 0.10), (0.1, 0.45), (-0.1, 0.45)):
        used = simulation.used_at(values, margin, 0.001, declared=True)
        assert np.median(used) <= most * 2000
