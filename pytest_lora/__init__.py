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
    from pytest_lora.assertions import assert_disable_equals_base as assert_disable_equals_base
    from pytest_lora.assertions import assert_dtype_stability as assert_dtype_stability
    from pytest_lora.assertions import assert_finite_weights as assert_finite_weights
    from pytest_lora.assertions import assert_frozen_weights as assert_frozen_weights
    from pytest_lora.assertions import assert_merge_equivalence as assert_merge_equivalence
    from pytest_lora.assertions import assert_merged_reload as assert_merged_reload
    from pytest_lora.assertions import assert_padding_invariance as assert_padding_invariance
    from pytest_lora.assertions import assert_requires_grad as assert_requires_grad
    from pytest_lora.assertions import assert_save_reload as assert_save_reload
    from pytest_lora.assertions import assert_serving_profile as assert_serving_profile
    from pytest_lora.assertions import assert_unmerge_restoration as assert_unmerge_restoration
    from pytest_lora.checks.base import measure_base_compatibility as measure_base_compatibility
    from pytest_lora.checks.config import (
        measure_config_matches_weights as measure_config_matches_weights,
    )
    from pytest_lora.checks.effect import measure_adapter_effect as measure_adapter_effect
    from pytest_lora.checks.files import measure_adapter_files as measure_adapter_files
    from pytest_lora.checks.finite import measure_finite_weights as measure_finite_weights
    from pytest_lora.checks.frozen import measure_frozen_weights as measure_frozen_weights
    from pytest_lora.checks.merge import measure_merge_equivalence as measure_merge_equivalence
    from pytest_lora.checks.padding import measure_padding_invariance as measure_padding_invariance
    from pytest_lora.checks.reload import measure_merged_reload as measure_merged_reload
    from pytest_lora.checks.reload import measure_save_reload as measure_save_reload
    from pytest_lora.checks.serving import measure_serving_profile as measure_serving_profile
    from pytest_lora.checks.stability import measure_dtype_stability as measure_dtype_stability
    from pytest_lora.checks.switching import measure_adapter_isolation as measure_adapter_isolation
    from pytest_lora.checks.switching import (
        measure_disable_equals_base as measure_disable_equals_base,
    )
    from pytest_lora.checks.trainable import measure_requires_grad as measure_requires_grad
    from pytest_lora.checks.unmerge import (
        measure_unmerge_restoration as measure_unmerge_restoration,
    )
    from pytest_lora.errors import CannotRun as CannotRun
    from pytest_lora.errors import CheckFailed as CheckFailed
    from pytest_lora.errors import LoraError as LoraError
    from pytest_lora.errors import NotApplicable as NotApplicable
    from pytest_lora.errors import UsageError as UsageError
    from pytest_lora.records import Bound as Bound
    from pytest_lora.records import CheckResult as CheckResult
    from pytest_lora.records import Measurement as Measurement
    from pytest_lora.records import Outcome as Outcome
    from pytest_lora.records import Problem as Problem
    from pytest_lora.settings import Settings as Settings
    from pytest_lora.subject import BaseModel as BaseModel
    from pytest_lora.subject import Subject as Subject

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
    "Subject": "subject",
    "UsageError": "errors",
    "assert_adapter_effect": "assertions",
    "assert_adapter_files": "assertions",
    "assert_adapter_isolation": "assertions",
    "assert_base_compatibility": "assertions",
    "assert_config_matches_weights": "assertions",
    "assert_disable_equals_base": "assertions",
    "assert_dtype_stability": "assertions",
    "assert_finite_weights": "assertions",
    "assert_frozen_weights": "assertions",
    "assert_merge_equivalence": "assertions",
    "assert_merged_reload": "assertions",
    "assert_padding_invariance": "assertions",
    "assert_requires_grad": "assertions",
    "assert_save_reload": "assertions",
    "assert_serving_profile": "assertions",
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
    "measure_merge_equivalence": "checks.merge",
    "measure_merged_reload": "checks.reload",
    "measure_padding_invariance": "checks.padding",
    "measure_requires_grad": "checks.trainable",
    "measure_save_reload": "checks.reload",
    "measure_serving_profile": "checks.serving",
    "measure_unmerge_restoration": "checks.unmerge",
    "read_adapter": "adapter",
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
