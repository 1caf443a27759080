"""Predicted equals counted, to the byte; and an independent witness agrees with the count.

A subset; ``benchmarks/memory_truth.py`` runs all.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
torch = pytest.importorskip("torch")

import memory_cases as cases  # noqa: E402
from stack import follows_autocast, since  # noqa: E402

from pytest_lora.memory.tracing import run_step, trace_on_cpu  # noqa: E402

BF16 = torch.bfloat16
CHOSEN = [
    cases.Case(),
    cases.Case(options={"padding": "none"}),
    cases.Case(options={"attention": "eager", "padding": "full"}),
    cases.Case(options={"checkpointing": "reentrant", "clip": 1.0}),
    cases.Case(options={"checkpointing": "non-reentrant", "dtype": BF16}),
    cases.Case(options={"accumulation": 3, "optimizer": "sgd_momentum"}),
    cases.Case(options={"optimizer": "adamw_fused", "dtype": BF16, "adapter_dtype": BF16}),
    cases.Case(adapter="dora"),
    cases.Case(adapter="saved head"),
    cases.Case(adapter="ia3"),
    cases.Case(adapter="full training", options={"optimizer": "adamw_foreach"}),
    cases.Case("gemma3", "all-linear"),
    cases.Case("gpt2", "all-linear", changes={"attn_pdrop": 0.1, "resid_pdrop": 0.1}),
    cases.Case("bert", "all-linear", "SEQ_CLS"),
    cases.Case("t5", "all-linear", "SEQ_2_SEQ_LM"),
]


def _same(case: cases.Case) -> None:
    real, predicted = run_step(case.workload()).peak, trace_on_cpu(case.workload()).peak
    assert predicted.live == real.live
    assert predicted.by_category == real.by_category
    assert (predicted.op, predicted.phase) == (real.op, real.phase)


def _where_it_runs(case: cases.Case) -> Any:
    """Older transformers have no Gemma 3, and only one attention in T5."""
    young = str(case).startswith(("gemma3", "t5"))
    least = since("cannot build it", transformers=(5, 0))
    return pytest.param(case, marks=least) if young else case


@pytest.mark.parametrize("case", [_where_it_runs(case) for case in CHOSEN], ids=str)
def test_a_prediction_is_a_real_run_to_the_byte(case: cases.Case) -> None:
    _same(case)


@follows_autocast()
@pytest.mark.parametrize(
    "case",
    [_where_it_runs(case) for case in (*cases.AUTOCAST[:5], *cases.AUTOCAST[-5:-2])],
    ids=str,
)
def test_so_it_is_under_autocast(case: cases.Case) -> None:
    _same(case)


@pytest.mark.parametrize(
    "case", [*cases.QUANTISED[1:3], cases.QUANTISED[4], *cases.EIGHT_BIT], ids=str
)
def test_so_it_is_with_bases_in_four_bits_and_optimizers_in_eight(case: cases.Case) -> None:
    pytest.importorskip("bitsandbytes")
    _same(case)


@pytest.mark.parametrize(
    "change",
    [
        {"padding": "none"},
        {"checkpointing": "reentrant"},
        {"sequence": 65},
        {"attention": "eager"},
        {"dtype": torch.bfloat16},
        pytest.param({"autocast": torch.bfloat16}, marks=follows_autocast()),
    ],
    ids=str,
)
def test_another_step_is_another_number(change: dict[str, Any]) -> None:
    """The control: each of these would go unseen if the counter were blind to it."""
    plain, other = cases.Case().workload(), cases.Case(options=change).workload()
    assert trace_on_cpu(other).peak.live != run_step(plain).peak.live


def test_the_allocator_seen_by_the_profiler_agrees() -> None:
    """Every allocation of a real run, kernels' own included, within 0.1% of the live bytes."""
    from memory_witness import profiled_peak

    workload = cases.Case(options={"sequence": 128}).workload()
    witnessed = profiled_peak(workload)
    counted = run_step(workload).peak.live
    assert abs(witnessed / counted - 1) < 1e-3
