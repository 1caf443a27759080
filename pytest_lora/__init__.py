"""pytest-lora: the test suite every LoRA adapter should pass before it ships.

Importing this package imports nothing else: every public name is loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter as Adapter
    from pytest_lora.adapter import read_adapter as read_adapter
    from pytest_lora.assertions import assert_adapter_effect as assert_adapter_effect
    from pytest_lora.assertions import assert_adapter_files as assert_adapter_files
    from pytest_lora.assertions import assert_adapter_isolation as assert_adapter_isolation
    from pytest_lora.assertions import assert_base_compatibility as assert_base_compatibility
    from pytest_lora.assertions import (
        assert_config_matches_weights as assert_config_matches_weights,
    )
    from pytest_lora.assertions import assert_delta_spectrum as assert_delta_spectrum
    from pytest_lora.assertions import assert_disable_equals_base as assert_disable_equals_base
    from pytest_lora.assertions import assert_dtype_stability as assert_dtype_stability
    from pytest_lora.assertions import assert_finite_weights as assert_finite_weights
    from pytest_lora.assertions import assert_frozen_weights as assert_frozen_weights
    from pytest_lora.assertions import (
        assert_generation_diversity as assert_generation_diversity,
    )
    from pytest_lora.assertions import assert_generation_health as assert_generation_health
    from pytest_lora.assertions import assert_merge_equivalence as assert_merge_equivalence
    from pytest_lora.assertions import assert_merged_reload as assert_merged_reload
    from pytest_lora.assertions import assert_padding_invariance as assert_padding_invariance
    from pytest_lora.assertions import assert_perplexity_drift as assert_perplexity_drift
    from pytest_lora.assertions import assert_requires_grad as assert_requires_grad
    from pytest_lora.assertions import assert_save_reload as assert_save_reload
    from pytest_lora.assertions import assert_serving_profile as assert_serving_profile
    from pytest_lora.assertions import assert_task_accuracy as assert_task_accuracy
    from pytest_lora.assertions import assert_unmerge_restoration as assert_unmerge_restoration
    from pytest_lora.checks.base import measure_base_compatibility as measure_base_compatibility
    from pytest_lora.checks.best import (
        measure_best_checkpoint_restored as measure_best_checkpoint_restored,
    )
    from pytest_lora.checks.config import (
        measure_config_matches_weights as measure_config_matches_weights,
    )
    from pytest_lora.checks.effect import measure_adapter_effect as measure_adapter_effect
    from pytest_lora.checks.export import measure_export_parity as measure_export_parity
    from pytest_lora.checks.files import measure_adapter_files as measure_adapter_files
    from pytest_lora.checks.finite import measure_finite_weights as measure_finite_weights
    from pytest_lora.checks.forgetting import (
        measure_perplexity_drift as measure_perplexity_drift,
    )
    from pytest_lora.checks.frozen import measure_frozen_weights as measure_frozen_weights
    from pytest_lora.checks.generation import (
        measure_generation_diversity as measure_generation_diversity,
    )
    from pytest_lora.checks.generation import (
        measure_generation_health as measure_generation_health,
    )
    from pytest_lora.checks.gradients import (
        measure_accumulation_equivalent as measure_accumulation_equivalent,
    )
    from pytest_lora.checks.gradients import (
        measure_checkpointing_equivalent as measure_checkpointing_equivalent,
    )
    from pytest_lora.checks.labels import measure_labels_sound as measure_labels_sound
    from pytest_lora.checks.learning import measure_task_accuracy as measure_task_accuracy
    from pytest_lora.checks.learning import measure_task_change as measure_task_change
    from pytest_lora.checks.memory import measure_memory_inference as measure_memory_inference
    from pytest_lora.checks.memory import measure_memory_load as measure_memory_load
    from pytest_lora.checks.memory import measure_memory_merge as measure_memory_merge
    from pytest_lora.checks.memory import measure_memory_train_step as measure_memory_train_step
    from pytest_lora.checks.merge import measure_merge_equivalence as measure_merge_equivalence
    from pytest_lora.checks.metric import measure_metric as measure_metric
    from pytest_lora.checks.padding import measure_padding_invariance as measure_padding_invariance
    from pytest_lora.checks.parity import measure_serving_parity as measure_serving_parity
    from pytest_lora.checks.reference import measure_reference_policy as measure_reference_policy
    from pytest_lora.checks.reload import measure_merged_reload as measure_merged_reload
    from pytest_lora.checks.reload import measure_save_reload as measure_save_reload
    from pytest_lora.checks.repeatable import measure_resume_equivalent as measure_resume_equivalent
    from pytest_lora.checks.repeatable import (
        measure_seeded_initialisation as measure_seeded_initialisation,
    )
    from pytest_lora.checks.serving import measure_serving_profile as measure_serving_profile
    from pytest_lora.checks.spectrum import measure_delta_spectrum as measure_delta_spectrum
    from pytest_lora.checks.stability import measure_dtype_stability as measure_dtype_stability
    from pytest_lora.checks.switching import measure_adapter_isolation as measure_adapter_isolation
    from pytest_lora.checks.switching import (
        measure_disable_equals_base as measure_disable_equals_base,
    )
    from pytest_lora.checks.trainable import measure_requires_grad as measure_requires_grad
    from pytest_lora.checks.training import measure_gradient_coverage as measure_gradient_coverage
    from pytest_lora.checks.training import measure_optimizer_holds as measure_optimizer_holds
    from pytest_lora.checks.training import measure_overfits_one_batch as measure_overfits_one_batch
    from pytest_lora.checks.training import (
        measure_trains_only_adapter as measure_trains_only_adapter,
    )
    from pytest_lora.checks.unmerge import (
        measure_unmerge_restoration as measure_unmerge_restoration,
    )
    from pytest_lora.data import SourceDomain as SourceDomain
    from pytest_lora.data import TargetTask as TargetTask
    from pytest_lora.errors import CannotRun as CannotRun
    from pytest_lora.errors import CheckFailed as CheckFailed
    from pytest_lora.errors import LoraError as LoraError
    from pytest_lora.errors import NotApplicable as NotApplicable
    from pytest_lora.errors import UsageError as UsageError
    from pytest_lora.memory.accounting import account_adapter as account_adapter
    from pytest_lora.memory.measured import measure_cpu_memory as measure_cpu_memory
    from pytest_lora.memory.measured import measure_gpu_memory as measure_gpu_memory
    from pytest_lora.memory.measured import measure_memory_left as measure_memory_left
    from pytest_lora.memory.plan import MemoryPlan as MemoryPlan
    from pytest_lora.memory.plot import memory_svg as memory_svg
    from pytest_lora.memory.predict import predict_memory as predict_memory
    from pytest_lora.memory_assertions import assert_gpu_memory as assert_gpu_memory
    from pytest_lora.memory_assertions import assert_memory_inference as assert_memory_inference
    from pytest_lora.memory_assertions import assert_memory_load as assert_memory_load
    from pytest_lora.memory_assertions import assert_memory_merge as assert_memory_merge
    from pytest_lora.memory_assertions import assert_memory_train_step as assert_memory_train_step
    from pytest_lora.memory_assertions import assert_memory_unchanged as assert_memory_unchanged
    from pytest_lora.memory_assertions import assert_no_memory_left as assert_no_memory_left
    from pytest_lora.memory_assertions import limit_memory as limit_memory
    from pytest_lora.parity import assert_export_parity as assert_export_parity
    from pytest_lora.parity import assert_metric_sound as assert_metric_sound
    from pytest_lora.parity import assert_serving_parity as assert_serving_parity
    from pytest_lora.records import Bound as Bound
    from pytest_lora.records import CheckResult as CheckResult
    from pytest_lora.records import Measurement as Measurement
    from pytest_lora.records import Outcome as Outcome
    from pytest_lora.records import Problem as Problem
    from pytest_lora.settings import Settings as Settings
    from pytest_lora.subject import BaseModel as BaseModel
    from pytest_lora.subject import Subject as Subject
    from pytest_lora.tasks.configure import task_from_config as task_from_config
    from pytest_lora.tasks.formats import read_task as read_task
    from pytest_lora.tasks.records import Task as Task
    from pytest_lora.tasks.records import TaskItem as TaskItem
    from pytest_lora.training import (
        assert_accumulation_equivalent as assert_accumulation_equivalent,
    )
    from pytest_lora.training import (
        assert_best_checkpoint_restored as assert_best_checkpoint_restored,
    )
    from pytest_lora.training import (
        assert_checkpointing_equivalent as assert_checkpointing_equivalent,
    )
    from pytest_lora.training import assert_gradient_coverage as assert_gradient_coverage
    from pytest_lora.training import assert_labels_sound as assert_labels_sound
    from pytest_lora.training import assert_optimizer_holds as assert_optimizer_holds
    from pytest_lora.training import assert_overfits_one_batch as assert_overfits_one_batch
    from pytest_lora.training import assert_reference_policy as assert_reference_policy
    from pytest_lora.training import assert_resume_equivalent as assert_resume_equivalent
    from pytest_lora.training import assert_seeded_initialisation as assert_seeded_initialisation
    from pytest_lora.training import assert_trains_only_adapter as assert_trains_only_adapter

# Where each public name lives; __getattr__ looks it up on first use.
_HOMES = {
    "Adapter": "adapter",
    "BaseModel": "subject",
    "Bound": "records",
    "CannotRun": "errors",
    "CheckFailed": "errors",
    "CheckResult": "records",
    "LoraError": "errors",
    "Measurement": "records",
    "NotApplicable": "errors",
    "Outcome": "records",
    "Problem": "records",
    "Settings": "settings",
    "SourceDomain": "data",
    "Subject": "subject",
    "Task": "tasks.records",
    "TaskItem": "tasks.records",
    "TargetTask": "data",
    "UsageError": "errors",
    "assert_gpu_memory": "memory_assertions",
    "assert_memory_inference": "memory_assertions",
    "assert_memory_load": "memory_assertions",
    "assert_memory_merge": "memory_assertions",
    "assert_memory_train_step": "memory_assertions",
    "assert_memory_unchanged": "memory_assertions",
    "assert_no_memory_left": "memory_assertions",
    "MemoryPlan": "memory.plan",
    "measure_memory_inference": "checks.memory",
    "measure_memory_load": "checks.memory",
    "measure_memory_merge": "checks.memory",
    "measure_memory_train_step": "checks.memory",
    "limit_memory": "memory_assertions",
    "measure_gpu_memory": "memory.measured",
    "measure_memory_left": "memory.measured",
    "measure_cpu_memory": "memory.measured",
    "predict_memory": "memory.predict",
    "account_adapter": "memory.accounting",
    "memory_svg": "memory.plot",
    "assert_adapter_effect": "assertions",
    "assert_adapter_files": "assertions",
    "assert_adapter_isolation": "assertions",
    "assert_base_compatibility": "assertions",
    "assert_config_matches_weights": "assertions",
    "assert_delta_spectrum": "assertions",
    "assert_disable_equals_base": "assertions",
    "assert_dtype_stability": "assertions",
    "assert_finite_weights": "assertions",
    "assert_frozen_weights": "assertions",
    "assert_generation_diversity": "assertions",
    "assert_generation_health": "assertions",
    "assert_merge_equivalence": "assertions",
    "assert_merged_reload": "assertions",
    "assert_padding_invariance": "assertions",
    "assert_perplexity_drift": "assertions",
    "assert_requires_grad": "assertions",
    "assert_save_reload": "assertions",
    "assert_serving_profile": "assertions",
    "assert_task_accuracy": "assertions",
    "assert_unmerge_restoration": "assertions",
    "measure_adapter_effect": "checks.effect",
    "measure_adapter_files": "checks.files",
    "measure_adapter_isolation": "checks.switching",
    "measure_base_compatibility": "checks.base",
    "measure_config_matches_weights": "checks.config",
    "measure_disable_equals_base": "checks.switching",
    "measure_dtype_stability": "checks.stability",
    "measure_finite_weights": "checks.finite",
    "measure_frozen_weights": "checks.frozen",
    "measure_generation_diversity": "checks.generation",
    "measure_generation_health": "checks.generation",
    "measure_merge_equivalence": "checks.merge",
    "measure_merged_reload": "checks.reload",
    "measure_padding_invariance": "checks.padding",
    "measure_perplexity_drift": "checks.forgetting",
    "measure_requires_grad": "checks.trainable",
    "measure_save_reload": "checks.reload",
    "measure_serving_profile": "checks.serving",
    "measure_task_accuracy": "checks.learning",
    "measure_task_change": "checks.learning",
    "measure_unmerge_restoration": "checks.unmerge",
    "read_adapter": "adapter",
    "read_task": "tasks.formats",
    "task_from_config": "tasks.configure",
    "assert_accumulation_equivalent": "training",
    "assert_checkpointing_equivalent": "training",
    "assert_gradient_coverage": "training",
    "assert_metric_sound": "parity",
    "assert_optimizer_holds": "training",
    "assert_overfits_one_batch": "training",
    "assert_best_checkpoint_restored": "training",
    "assert_labels_sound": "training",
    "assert_reference_policy": "training",
    "assert_resume_equivalent": "training",
    "assert_seeded_initialisation": "training",
    "assert_export_parity": "parity",
    "assert_serving_parity": "parity",
    "assert_trains_only_adapter": "training",
    "measure_accumulation_equivalent": "checks.gradients",
    "measure_checkpointing_equivalent": "checks.gradients",
    "measure_gradient_coverage": "checks.training",
    "measure_metric": "checks.metric",
    "measure_optimizer_holds": "checks.training",
    "measure_overfits_one_batch": "checks.training",
    "measure_best_checkpoint_restored": "checks.best",
    "measure_labels_sound": "checks.labels",
    "measure_reference_policy": "checks.reference",
    "measure_resume_equivalent": "checks.repeatable",
    "measure_seeded_initialisation": "checks.repeatable",
    "measure_export_parity": "checks.export",
    "measure_serving_parity": "checks.parity",
    "measure_trains_only_adapter": "checks.training",
    "measure_delta_spectrum": "checks.spectrum",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
