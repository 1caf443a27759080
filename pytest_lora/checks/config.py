"""Does every tensor follow from the configuration, and is every promise of it kept?

Everything is judged from tensor names, shapes and the configuration: no weights are read.  Whether
the modules exist in the base model is for ``base_compatibility`` to say.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from pytest_lora.adapter import lora_modules, pattern_names
from pytest_lora.checks.adapter_config import Findings
from pytest_lora.checks.layers import check_layers
from pytest_lora.checks.targets import check_targets
from pytest_lora.checks.tensor_names import EXTRAS, explain_names, repair_names
from pytest_lora.checks.witness import scaling_witnesses
from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.locate import CONFIG_NAME
from pytest_lora.patterns import matching_key, resolver
from pytest_lora.peft_tables import HEADS, METHODS
from pytest_lora.records import Measurement, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_lora.adapter import Adapter, LoraModule
    from pytest_lora.checks.tensor_names import NamedTensor
    from pytest_lora.records import Json
    from pytest_lora.safetensors_header import TensorInfo

__all__ = ["measure_config_matches_weights"]

_ZERO3 = (
    "save under deepspeed.zero.GatheredParameters or FSDP's full state dict, so that the shards "
    "are gathered first"
)
_RESAVE = "save the adapter again with save_pretrained"


def measure_config_matches_weights(
    adapter: Adapter, *, expected_scaling: float | None = None
) -> Measurement:
    """Count contradictions between an adapter's configuration and its tensors, both ways.

    Args:
        adapter: the adapter as :func:`~pytest_lora.adapter.read_adapter` read it.
        expected_scaling: the factor before ``B @ A`` that every module outside ``rank_pattern``
            and ``alpha_pattern`` should have, if known; one configuration and one set of weights
            cannot tell a wrong ``lora_alpha``.

    Returns:
        The number of problems among all tensors and promises; ``details`` hold the effective rank,
        alpha and scaling of every LoRA module.

    Raises:
        CannotRun: there is no readable configuration or no readable weights.
        NotApplicable: the method is not one of PEFT's.
    """
    _require_readable(adapter)
    findings = Findings()
    repaired, flaws = repair_names(adapter)
    findings.problems += flaws
    named = explain_names(repaired)
    modules = lora_modules(repaired)
    findings.problems += _unexplained(named)
    findings.problems += _emptied(named)
    findings.problems += _grouped(_factor_problems(repaired, modules, named))
    findings.problems += _grouped(_part_problems(repaired, named))
    _check_promises(repaired, named, findings)
    check_targets(repaired, modules, named, findings)
    check_layers(repaired, named, findings)
    _check_patterns(repaired, modules, findings)
    _note_old_rule(repaired, modules, findings)
    _check_scaling(adapter, modules, expected_scaling, findings)
    _note_dtypes(modules, findings)
    return Measurement.of_problems(
        findings.problems,
        count=len(adapter.tensors),
        notes=findings.notes,
        method=adapter.peft_type,
        scaling=_scaling_summary(modules),
        modules=[_row(module) for module in modules],
        roles=dict(Counter(tensor.role or "unexplained" for tensor in named)),
    )


def _require_readable(adapter: Adapter) -> None:
    if not adapter.config:
        raise CannotRun(f"{adapter.name} has no readable {CONFIG_NAME}")
    if adapter.peft_type not in METHODS:
        raise NotApplicable(f"no rules for the method {adapter.config.get('peft_type')!r:.60}")
    if not adapter.tensors:
        raise CannotRun(f"{adapter.name} has no readable weights")


def _row(module: LoraModule) -> dict[str, Json]:
    return {
        "module": module.name,
        "kind": module.kind,
        "rank": module.rank,
        "alpha": module.alpha,
        "scaling": module.scaling,
    }


def _scaling_summary(modules: Sequence[LoraModule]) -> dict[str, Json]:
    """``{"2.0": 36}``: how many modules have which scaling."""
    return {str(key): count for key, count in Counter(m.scaling for m in modules).items()}


def _unexplained(named: Iterable[NamedTensor]) -> Iterator[Problem]:
    found: dict[str, list[str]] = defaultdict(list)
    for tensor in named:
        if not tensor.role:
            found[tensor.doubt].append(tensor.key)
    for doubt, keys in found.items():
        yield Problem(
            f"tensor {keys[0]!r}{_more(len(keys), 'tensors')}",
            doubt,
            "a tensor the configuration asks for",
            "restore the configuration it was trained with, or save the adapter by itself",
        )


def _emptied(named: Iterable[NamedTensor]) -> Iterator[Problem]:
    """Tensors kept whole that have no numbers; factors and parts are judged with their module."""
    whole = ("saved", "tokens", "bias", "vocabulary")
    empty = [t for t in named if t.role in whole and not t.info.numel]
    if empty:
        yield Problem(
            f"tensor {empty[0].key!r}{_more(len(empty), 'tensors')}",
            f"shape {list(empty[0].info.shape)}, not a single number",
            "what was trained",
            _ZERO3,
        )


def _more(count: int, what: str) -> str:
    return f" and {count - 1} more {what}" if count > 1 else ""


def _grouped(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The same fault of many modules as one problem that names the first."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for problem in problems:
        groups[problem.found, problem.expected, problem.fix].append(problem.where)
    for (found, expected, fix), places in groups.items():
        yield Problem(places[0] + _more(len(places), "modules"), found, expected, fix)


# -- LoRA factors --------------------------------------------------------------------------------


def _factor_problems(
    adapter: Adapter, modules: Iterable[LoraModule], named: Sequence[NamedTensor]
) -> Iterator[Problem]:
    extras: dict[str, set[str]] = defaultdict(set)
    for tensor in named:
        if tensor.role == "extra":
            extras[tensor.module].add(tensor.part)
    for module in modules:
        yield from _pair_problems(adapter, module)
        yield from _companion_problems(adapter, module, extras[module.path])


def _pair_problems(adapter: Adapter, module: LoraModule) -> Iterator[Problem]:
    if module.a is None or module.b is None:
        there, absent = ("lora_A", "lora_B") if module.a else ("lora_B", "lora_A")
        if not module.a and not module.b:
            there = "a magnitude or bias"
        yield Problem(
            f"module {module.name!r}",
            f"{there} without {absent}",
            "both factors",
            "copy or save the adapter again: half of this module is lost",
        )
        return
    for factor in (module.a, module.b):
        if 0 in factor.shape or len(factor.shape) < 2:
            yield Problem(
                f"module {module.name!r}",
                f"a factor of shape {list(factor.shape)}",
                f"a matrix of rank {module.rank or 'r'}",
                _ZERO3,
            )
            return
    yield from _shape_problems(adapter, module, module.a, module.b)


def _shape_problems(
    adapter: Adapter, module: LoraModule, a: TensorInfo, b: TensorInfo
) -> Iterator[Problem]:
    of_a, of_b, rank = a.shape[0], b.shape[1], module.rank
    where = f"module {module.name!r}"
    shapes = f"A {list(a.shape)}, B {list(b.shape)}"
    if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
        yield Problem(where, f"factors of type {a.dtype} and {b.dtype}", "floating-point numbers")
    if _fits(adapter, module, of_a, of_b):
        return
    if rank and len(a.shape) == 2 and (a.shape[1], b.shape[0]) == (rank, rank):
        yield Problem(
            where,
            f"A and B are swapped or transposed: {shapes}",
            f"A [{rank}, in], B [out, {rank}]",
            "put lora_A.weight and lora_B.weight back into their places",
        )
    elif of_a == of_b:
        yield Problem(
            where,
            f"rank {of_a}",
            f"{rank}, {_rank_source(adapter, module)}",
            "restore the rank used in training in the configuration",
        )
    else:
        yield Problem(
            where,
            f"A has rank {of_a} and B has rank {of_b}: {shapes}",
            f"rank {rank} for both",
            _RESAVE,
        )


_FLOATS = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}


def _fits(adapter: Adapter, module: LoraModule, of_a: int, of_b: int) -> bool:
    """Whether these ranks of A and B are what the configuration promises for the module."""
    rank = module.rank
    if not rank:  # the configuration leaves it open which of several ranks it is
        return of_a == of_b
    if module.kind == "parameter":  # one block of ranks per expert
        return of_a == of_b and of_a % rank == 0
    if module.kind == "conv":  # a grouped convolution splits B's ranks over its groups
        return of_a == rank and of_b > 0 and rank % of_b == 0
    blocks = adapter.config.get("use_bdlora")
    if isinstance(blocks, dict) and type(blocks.get("nblocks")) is int:
        return of_a == rank and of_b in (rank, rank // max(1, blocks["nblocks"]))
    return of_a == of_b == rank


def _rank_source(adapter: Adapter, module: LoraModule) -> str:
    names = pattern_names(adapter, module.path, module.kind)
    key = matching_key(adapter.rank_pattern, names[0]) if names else None
    return f"promised by r in {CONFIG_NAME}" if key is None else f"promised by rank_pattern {key!r}"


def _companion_problems(
    adapter: Adapter, module: LoraModule, extras: set[str]
) -> Iterator[Problem]:
    """DoRA's magnitude, B's own bias and the variants' tensors: there exactly when configured."""
    where = f"module {module.name!r}"
    magnitude, out = module.magnitude, module.b.shape[0] if module.b else 0
    if adapter.use_dora and magnitude is None:
        yield Problem(where, "no DoRA magnitude vector", "one, use_dora is set", _RESAVE)
    elif magnitude is not None and not adapter.use_dora:
        yield Problem(
            where,
            "a DoRA magnitude vector although use_dora is not set",
            "none",
            "set use_dora, or the adapter acts as plain LoRA",
        )
    elif magnitude is not None and module.b is not None and magnitude.numel != out:
        yield Problem(
            where,
            f"a DoRA magnitude vector of shape {list(magnitude.shape)}",
            f"{out} numbers, one per output of B",
            _RESAVE,
        )
    yield from _bias_problems(adapter, module, where, out)
    for name, setting in EXTRAS.items():
        if name == "lora_diag" and adapter.config.get(setting) and name not in extras:
            yield Problem(where, f"no {name}", f"one, {setting} is set", _RESAVE)


def _bias_problems(adapter: Adapter, module: LoraModule, where: str, out: int) -> Iterator[Problem]:
    wanted = adapter.config.get("lora_bias") is True and module.kind in ("linear", "conv")
    if wanted and module.bias is None:
        yield Problem(where, "no lora_B.bias", "one, lora_bias is set", _RESAVE)
    elif module.bias is not None and not wanted:
        yield Problem(where, "a lora_B.bias although lora_bias is not set", "none", "set lora_bias")
    elif module.bias is not None and module.bias.numel != out:
        yield Problem(where, f"a lora_B.bias of {module.bias.numel} numbers", f"{out}", _RESAVE)


# -- other methods -------------------------------------------------------------------------------


def _part_problems(adapter: Adapter, named: Iterable[NamedTensor]) -> Iterator[Problem]:
    """Of methods other than LoRA: every module whole, and of the promised rank."""
    method = METHODS[adapter.peft_type]
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for tensor in named:
        if tensor.role == "part" and tensor.module:
            parts[tensor.module][tensor.part] = tensor.info
    rank_of = resolver(adapter.rank_pattern)
    for module, found in parts.items():
        where = f"module {module!r}"
        absent = [part for part in method.parts.split() if part not in found]
        if absent:
            yield Problem(where, f"no {', '.join(absent)}", f"{method.parts}", _RESAVE)
        empty = [part for part, info in found.items() if not info.numel]
        if empty:
            yield Problem(where, f"{', '.join(empty)} without a single number", "", _ZERO3)
            continue
        key = rank_of(module)
        rank = adapter.config.get("r") if key is None else adapter.rank_pattern[key]
        for part, size in _sizes(method.rank_dims, found):
            if type(rank) is int and size != rank:
                yield Problem(where, f"{part} of rank {size}", f"{rank}, the configured rank")


def _sizes(rank_dims: str, found: dict[str, TensorInfo]) -> Iterator[tuple[str, int]]:
    for pair in rank_dims.split():
        part, _, dimension = pair.partition(":")
        if part in found and len(found[part].shape) > int(dimension):
            yield part, found[part].shape[int(dimension)]


# -- promises ------------------------------------------------------------------------------------


def _check_promises(adapter: Adapter, named: Sequence[NamedTensor], findings: Findings) -> None:
    _check_saved_modules(adapter, named, findings)
    _check_tokens(adapter, named, findings)
    _check_prompt(adapter, named, findings)
    biases = [tensor for tensor in named if tensor.role == "bias"]
    if adapter.bias != "none" and not biases:
        findings.notes.append(
            f"bias is {adapter.bias}, but there is no bias in the file: "
            "right only if the adapted modules have none"
        )
    whole = [tensor.key for tensor in named if tensor.role == "vocabulary"]
    if whole:
        findings.notes.append(
            f"whole embeddings are stored ({', '.join(whole)}), as PEFT does when they are adapted "
            "or the vocabulary was resized"
        )
    method = METHODS[adapter.peft_type]
    if adapter.peft_type != "LORA" and method.has_targets and not method.parts:
        findings.notes.append(
            f"for {adapter.peft_type} only tensor names, targets and layers were checked, "
            "not shapes"
        )


def _check_saved_modules(
    adapter: Adapter, named: Sequence[NamedTensor], findings: Findings
) -> None:
    keys = [tensor.key for tensor in named if tensor.role == "saved"]
    absent = [
        name for name in adapter.modules_to_save if not any(f".{name}." in f".{k}" for k in keys)
    ]
    heads = HEADS.get(adapter.task_type or "", ())
    # PEFT lists the usual names of a classifier's head; a model has one of them.
    if set(heads) & (set(adapter.modules_to_save) - set(absent)):
        absent = [name for name in absent if name not in heads]
    for name in absent:
        findings.fail(
            "modules_to_save",
            f"{name!r} is promised, but no tensor of it is in the file",
            f"{name}.weight or the like",
            "save the adapter again: without it the base model's own module is used",
        )


def _check_tokens(adapter: Adapter, named: Sequence[NamedTensor], findings: Findings) -> None:
    setting = adapter.config.get("trainable_token_indices")
    by_layer = setting if isinstance(setting, dict) else {"": setting}
    wanted = {layer: ids for layer, ids in by_layer.items() if isinstance(ids, list) and ids}
    rows = {t.module: t.info.shape[:1] for t in named if t.role == "tokens"}
    for layer, indices in wanted.items():
        found = [shape for module, shape in rows.items() if f".{module}".endswith(layer)]
        if not found:
            findings.fail(
                "trainable_token_indices",
                f"{len(indices)} rows{' of ' + layer if layer else ''} are promised, none is there",
                "token_adapter.trainable_tokens_delta",
                _RESAVE,
            )
        elif (len(indices),) not in found:
            findings.fail(
                "trainable_token_indices",
                f"{len(indices)} token ids for {sum(found[0])} trained rows",
                "as many rows as ids",
                _RESAVE,
            )


def _check_prompt(adapter: Adapter, named: Sequence[NamedTensor], findings: Findings) -> None:
    """A prompt has as many rows as it has virtual tokens (times the model's stacks)."""
    tokens = adapter.config.get("num_virtual_tokens")
    if type(tokens) is not int or METHODS[adapter.peft_type].has_targets:
        return
    stacks = adapter.config.get("num_transformer_submodules")
    rows = [t.info.shape[:1] for t in named if t.key.endswith("prompt_embeddings")]
    allowed = {(tokens,), (tokens * (stacks if type(stacks) is int else 1),)}
    if not rows:
        findings.fail("num_virtual_tokens", f"{tokens} tokens promised, no prompt_embeddings", "")
    elif rows[0] not in allowed:
        findings.fail(
            "num_virtual_tokens", f"{tokens} tokens for {sum(rows[0])} rows of prompt_embeddings"
        )


# -- patterns, scaling, types --------------------------------------------------------------------


def _check_patterns(adapter: Adapter, modules: Sequence[LoraModule], findings: Findings) -> None:
    """A pattern key that matches no module silently leaves the default in force."""
    if not modules:
        return
    names = [name for m in modules for name in pattern_names(adapter, m.path, m.kind)]
    for setting, default, table in (
        ("rank_pattern", "r", adapter.rank_pattern),
        ("alpha_pattern", "lora_alpha", adapter.alpha_pattern),
    ):
        find = resolver(table)
        used = {find(name) for name in names}
        for key in [key for key in table if key not in used]:
            alone = resolver({key: None})
            if any(alone(name) for name in names):
                findings.notes.append(f"{setting} {key!r} never applies: an earlier key wins")
            else:
                findings.fail(
                    setting,
                    f"{key!r} matches no module of the adapter, so {default} applied in its place",
                    "a pattern that matches",
                    f"correct or remove the key; the modules are named like {names[0]!r}",
                )


def _note_old_rule(adapter: Adapter, modules: Sequence[LoraModule], findings: Findings) -> None:
    """PEFT 0.13 looked ranks and alphas up under one key: the first match among both tables."""
    ranks, alphas = adapter.rank_pattern, adapter.alpha_pattern
    if not ranks or not alphas:
        return
    find, find_alpha = resolver({**ranks, **alphas}), resolver(alphas)
    changed = [
        module.name
        for module in modules
        for name in pattern_names(adapter, module.path, module.kind)[:1]
        if alphas.get(find(name) or "") != alphas.get(find_alpha(name) or "")
    ]
    if changed:
        findings.notes.append(
            f"PEFT before 0.14 takes lora_alpha for {changed[0]}{_more(len(changed), 'modules')} "
            "from no alpha_pattern: there the scaling is another one"
        )


def _check_scaling(
    adapter: Adapter,
    modules: Sequence[LoraModule],
    expected: float | None,
    findings: Findings,
) -> None:
    if expected is not None:
        wrong = (
            module
            for module in _outside_patterns(adapter, modules)
            if not math.isclose(module.scaling, expected, rel_tol=1e-9)
        )
        findings.problems += _grouped(
            Problem(
                f"module {module.name!r}",
                f"scaling {module.scaling:.9g} (alpha {module.alpha:g}, rank {module.rank}"
                f"{', rsLoRA' if module.rslora else ''})",
                f"{expected:.9g}, as lora_scaling says",
                "restore lora_alpha and use_rslora as they were in training",
            )
            for module in wrong
        )
    if not modules:
        return
    for witness in scaling_witnesses(adapter):
        fix = "restore the value used in training: B @ A is multiplied by alpha / r"
        if not math.isclose(witness.alpha, adapter.lora_alpha, rel_tol=1e-9):
            found = f"{adapter.lora_alpha:g}"
            findings.fail("lora_alpha", found, f"{witness.alpha:g} as {witness.where} says", fix)
        if witness.rslora is not None and witness.rslora != adapter.use_rslora:
            found, wanted = str(adapter.use_rslora).lower(), str(witness.rslora).lower()
            findings.fail("use_rslora", found, f"{wanted} as {witness.where} says", fix)


def _outside_patterns(adapter: Adapter, modules: Iterable[LoraModule]) -> Iterator[LoraModule]:
    """Modules whose rank and alpha are the default ones."""
    find = resolver({**adapter.rank_pattern, **adapter.alpha_pattern})
    for module in modules:
        if not any(find(name) for name in pattern_names(adapter, module.path, module.kind)):
            yield module


def _note_dtypes(modules: Iterable[LoraModule], findings: Findings) -> None:
    factors = (factor for module in modules for factor in (module.a, module.b) if factor)
    dtypes = Counter(factor.dtype for factor in factors)
    if len(dtypes) > 1:
        mixed = ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.most_common())
        findings.notes.append(f"the factors are of mixed types: {mixed}")
