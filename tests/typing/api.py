"""Calls as users write them.  Type-checked, never run: what breaks them shows here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import pytest_lora
from pytest_lora import (
    Adapter,
    BaseModel,
    Bound,
    CannotRun,
    CheckFailed,
    CheckResult,
    LoraError,
    Measurement,
    NotApplicable,
    Outcome,
    Problem,
    Settings,
    Subject,
    UsageError,
)

if TYPE_CHECKING:
    import torch


def files(path: Path) -> None:
    adapter = pytest_lora.read_adapter(path)
    assert_type(adapter, Adapter)
    pytest_lora.read_adapter(str(path))
    for given in (adapter, path, str(path)):
        assert_type(pytest_lora.assert_adapter_files(given), Measurement)
        pytest_lora.assert_adapter_files(given, newer_writer="note")
        pytest_lora.assert_config_matches_weights(given, scaling=2.0)
        pytest_lora.assert_finite_weights(given)
        pytest_lora.assert_serving_profile(given, targets=["vllm:max_lora_rank=64"])
        pytest_lora.assert_base_compatibility(given, path)
    assert_type(pytest_lora.measure_adapter_files(adapter), Measurement)
    assert_type(pytest_lora.measure_finite_weights(adapter), Measurement)
    pytest_lora.measure_base_compatibility(adapter)


def models(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    pytest_lora.assert_adapter_effect(model, inputs, bound=0.01)
    pytest_lora.assert_delta_spectrum(model, least_effective_rank=2, bound=0.5)
    pytest_lora.assert_disable_equals_base(model, inputs)
    pytest_lora.assert_requires_grad(model, inputs)
    pytest_lora.assert_frozen_weights(model, inputs)
    pytest_lora.assert_adapter_isolation(model, inputs)
    pytest_lora.assert_padding_invariance(model, inputs, bound=1.0)
    pytest_lora.assert_merge_equivalence(model, inputs, safe_merge=True)
    pytest_lora.assert_unmerge_restoration(model, inputs, cycles=10)


def subjects(
    lora_subject: Subject, lora_settings: Settings, lora_bounds: Mapping[str, Bound]
) -> None:
    assert_type(lora_subject.adapter, Adapter)
    assert_type(lora_subject.base, BaseModel)
    measured = pytest_lora.assert_merge_equivalence(
        lora_subject,
        safe_merge=lora_settings.safe_merge,
        bound=lora_bounds.get("merge_equivalence"),
    )
    assert_type(measured, Measurement)
    pytest_lora.assert_save_reload(lora_subject, hash_seeds=(0, 1), timeout=60)
    pytest_lora.assert_merged_reload(lora_subject, bound=Bound.at_most(3, "ours"))
    pytest_lora.measure_adapter_effect(lora_subject)
    pytest_lora.measure_merge_equivalence(lora_subject, safe_merge=False)
    pytest_lora.measure_unmerge_restoration(lora_subject, cycles=3)
    with lora_subject.attached(is_trainable=True) as model:
        model.train()


def training(
    step: Callable[[torch.nn.Module], torch.Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    build: Callable[[int], torch.nn.Module],
) -> None:
    assert_type(pytest_lora.assert_trains_only_adapter(step, model, steps=5), Measurement)
    pytest_lora.assert_gradient_coverage(step, model, idle=["*.experts.*"])
    pytest_lora.assert_optimizer_holds(optimizer, model, lr={"*lora_A*": 1e-4, "*lora_B*": 1e-3})
    pytest_lora.assert_overfits_one_batch(step, model, steps=40, chance=1e-4)
    pytest_lora.assert_checkpointing_equivalent(step, model, checkpointing={"use_reentrant": False})
    pytest_lora.assert_accumulation_equivalent(step, step, model=model, bound=2.0)
    pytest_lora.assert_seeded_initialisation(build, hash_seeds=range(4))


def verdicts(adapter: Adapter) -> str | None:
    try:
        measured = pytest_lora.measure_finite_weights(adapter)
    except (NotApplicable, CannotRun, UsageError) as error:
        assert_type(str(error), str)
        return None
    except LoraError:
        raise
    assert_type(measured.problems, tuple[Problem, ...])
    assert_type(Bound.at_least(0.5, "ours").judge(measured), Outcome)
    try:
        pytest_lora.assert_finite_weights(adapter)
    except CheckFailed as failed:
        assert_type(failed.result, CheckResult)
        return json.dumps(failed.result.to_dict())
    return measured.where
