"""``target_modules`` and its kin against the modules that have tensors, in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_lora.checks.tensor_names import is_vocabulary
from pytest_lora.patterns import PatternError, layer_index, matches_names, names_match
from pytest_lora.peft_tables import METHODS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_lora.adapter import Adapter, LoraModule
    from pytest_lora.checks.adapter_config import Findings
    from pytest_lora.checks.tensor_names import NamedTensor

__all__ = ["adapted_modules", "check_targets"]

_OWN_RULES = {"ADAPTION_PROMPT", "SHADOW", "UNILORA", "XLORA"}
"""Methods that read ``target_modules`` in their own way, or store nothing by module."""

_RESTORE = "restore the list used in training"


def adapted_modules(
    adapter: Adapter, modules: Sequence[LoraModule], named: Iterable[NamedTensor]
) -> list[str]:
    """Paths of the modules ``target_modules`` has to account for, as PEFT saw them."""
    if adapter.peft_type == "LORA":
        return [_owner(adapter, m) for m in modules if m.kind != "parameter"]
    return sorted({t.module for t in named if t.role == "part" and t.module})


def _owner(adapter: Adapter, module: LoraModule) -> str:
    """A projection inside an attention block that was wrapped whole goes with its block."""
    owner, inside, _ = module.path.partition(".base_layer.")
    return owner if inside and not _matches(adapter, module.name) else module.name


def _matches(adapter: Adapter, module: str) -> bool:
    try:
        return names_match(adapter.target_modules or (), module)
    except PatternError:
        return False


def check_targets(
    adapter: Adapter,
    modules: Sequence[LoraModule],
    named: Iterable[NamedTensor],
    findings: Findings,
) -> None:
    """Add what is wrong with targets, exclusions, layers and targeted parameters."""
    method = METHODS[adapter.peft_type]
    if not method.has_targets or adapter.peft_type in _OWN_RULES:
        return
    adapted = adapted_modules(adapter, modules, named)
    try:
        _check_list(adapter, adapted, findings)
        _check_exclusions(adapter, adapted, findings)
        _check_layer_choice(adapter, adapted, findings)
    except PatternError:
        return  # adapter_files names the broken pattern
    _check_parameters(adapter, modules, findings)


def _check_list(adapter: Adapter, adapted: list[str], findings: Findings) -> None:
    targets = adapter.target_modules
    if targets is None or targets == "all-linear":
        if adapted and not adapter.names("target_parameters"):
            findings.notes.append(
                f"target_modules is {targets or 'not set'}: which modules were meant cannot be told"
            )
        return
    stray = [
        module
        for module in adapted
        if not names_match(targets, module) and not _is_tied(adapter, module)
    ]
    if stray:
        more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
        findings.fail(
            "target_modules",
            f"no entry stands for the module {stray[0]!r}{more}, whose tensors are in the file",
            "one for every module",
            _RESTORE,
        )
    if isinstance(targets, tuple) and adapted:
        _check_dead(adapter, targets, adapted, findings)
    elif not adapted:
        findings.fail("target_modules", "no tensor of any target is in the file", "A and B of each")


def _is_tied(adapter: Adapter, module: str) -> bool:
    """With ``ensure_weight_tying`` PEFT takes the tied head off the list and adapts it along."""
    return adapter.config.get("ensure_weight_tying") is True and is_vocabulary(module)


def _check_dead(
    adapter: Adapter, targets: tuple[str, ...], adapted: list[str], findings: Findings
) -> None:
    """Entries that no tensor stands for; saved modules take precedence over targets in PEFT."""
    alive = {entry for module in adapted for entry in targets if matches_names((entry,), module)}
    dead = [
        entry
        for entry in targets
        if entry not in alive and not matches_names(adapter.modules_to_save, entry)
    ]
    if len(dead) > 5:
        findings.fail(
            "target_modules",
            f"no tensor stands for {dead[0]!r} and {len(dead) - 1} more entries",
            "tensors of every target",
            _RESTORE,
        )
        return
    for entry in dead:
        findings.fail(
            "target_modules",
            f"no tensor stands for {entry!r}",
            "tensors of every target",
            "remove the entry if the base model has no such module, else train it",
        )


def _check_exclusions(adapter: Adapter, adapted: list[str], findings: Findings) -> None:
    value = adapter.config.get("exclude_modules")
    excluded = value if isinstance(value, str) else adapter.names("exclude_modules")
    hit = [module for module in adapted if excluded and names_match(excluded, module)]
    if hit:
        findings.fail(
            "exclude_modules",
            f"excludes {hit[0]!r} and {len(hit) - 1} more, whose tensors are in the file",
            "no tensors of excluded modules",
            "restore the setting used in training",
        )


def _check_layer_choice(adapter: Adapter, adapted: list[str], findings: Findings) -> None:
    choice = adapter.config.get("layers_to_transform")
    chosen = [choice] if type(choice) is int else choice
    targets = adapter.target_modules
    if not isinstance(chosen, list) or not chosen or not isinstance(targets, tuple):
        return
    pattern = adapter.names("layers_pattern")
    by_name = [module for module in adapted if module not in targets]
    layers = {module: layer_index(module, pattern) for module in by_name}
    outside = [module for module, layer in layers.items() if layer not in chosen]
    if outside:
        findings.fail(
            "layers_to_transform",
            f"{chosen} does not reach {outside[0]!r} and {len(outside) - 1} more, "
            "whose tensors are in the file",
            "every adapted layer (PEFT before 0.20 took the last number of the path for the layer)",
            _RESTORE,
        )
    empty = [layer for layer in chosen if layer not in layers.values()]
    if empty and not outside:
        findings.fail(
            "layers_to_transform", f"no tensor is of layer {empty[0]}", "every layer", _RESTORE
        )


def _check_parameters(adapter: Adapter, modules: Sequence[LoraModule], findings: Findings) -> None:
    owners = [m.path.replace(".base_layer", "") for m in modules if m.kind == "parameter"]
    for entry in adapter.names("target_parameters"):
        owner = entry.rpartition(".")[0]
        if not any(not owner or f".{name}".endswith(f".{owner}") for name in owners):
            findings.fail(
                "target_parameters",
                f"no tensor stands for {entry!r}",
                "tensors of every targeted parameter",
                _RESTORE,
            )
