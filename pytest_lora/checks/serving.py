"""Would vLLM, SGLang, LoRAX or llama.cpp take the adapter, and apply it at the right scale?

A table of rules, each with the versions it was read from and where.  Servers move; a rule says what
held for the source it names, and the page ``docs/checks/serving_profile.md`` lists them all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_lora.adapter import lora_modules
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.locate import WEIGHTS_NAME
from pytest_lora.records import Measurement, Problem

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter, LoraModule
    from pytest_lora.records import Json

__all__ = ["RULES", "SERVERS", "Rule", "Target", "measure_serving_profile", "parse_target"]

Options = Mapping[str, int]

SERVERS: Mapping[str, Mapping[str, int]] = {
    "vllm": {"max_lora_rank": 16, "reads_patterns": 0},
    "sglang": {"max_lora_rank": 0},
    "lorax": {"tensor_parallel": 1},
    "llama.cpp": {},
}
"""Servers and their options with defaults; a ``max_lora_rank`` of 0 sets no limit."""

_VLLM = "vllm-project/vllm vllm/lora/peft_helper.py"
_VLLM_KEYS = "vllm-project/vllm vllm/lora/utils.py, parse_fine_tuned_lora_name"
_SGLANG = "sgl-project/sglang python/sglang/srt/lora/lora_config.py"
_SGLANG_LORA = "sgl-project/sglang python/sglang/srt/lora/lora.py"
_LORAX = "predibase/lorax server/lorax_server/adapters/lora.py"
_LLAMA = "ggml-org/llama.cpp convert_lora_to_gguf.py"
_VLLM_2026 = "snapshot of August 2026"
_VLLM_LATER = "snapshot of August 2026, without a word; later copies of the file reject it"
_SGLANG_AT = "commit 0ceb81fe, which does not read the setting"
_LORAX_AT = "commit a7394ba3, May 2026"
_LLAMA_AT = "commit 0b03adaa"
_EXPERTS = "compare what it serves with the adapted model"
_MERGE = "merge it into the base model and serve that, or train without it"


@dataclass(frozen=True, slots=True)
class Target:
    """A server to serve on, with its options."""

    server: str
    options: Options = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """What a rule looks at: the adapter, its LoRA modules and the server's options."""

    adapter: Adapter
    modules: tuple[LoraModule, ...]
    options: Options


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing a server does with an adapter.

    Attributes:
        id: ``server/topic``.
        effect: ``rejects`` it, ``drops`` a part of it, ``scales`` it wrongly, or ``may reject`` it
            (which never fails the check).
        find: what in the adapter triggers the rule, in words; empty where nothing does.
        fix: what to do.
        versions: what the rule held for when it was read.
        source: where it was read.
    """

    id: str
    effect: str
    find: Callable[[Case], str]
    fix: str
    versions: str
    source: str

    @property
    def server(self) -> str:
        """The server it is about."""
        return self.id.partition("/")[0]


def parse_target(text: str) -> Target:
    """A target such as ``vllm`` or ``vllm:max_lora_rank=64,reads_patterns=1``.

    Raises:
        UsageError: unknown server, option or value; the message lists the valid ones.
    """
    server, _, rest = text.strip().partition(":")
    if server not in SERVERS:
        raise UsageError(f"unknown server {server!r} in lora_target; give {', '.join(SERVERS)}")
    options = dict(SERVERS[server])
    for pair in filter(None, (part.strip() for part in rest.split(","))):
        name, _, value = pair.partition("=")
        if name not in options:
            valid = ", ".join(options) or "none"
            raise UsageError(f"unknown option {name!r} of {server} in lora_target; valid: {valid}")
        if not value.isdecimal():
            raise UsageError(f"{server}:{name} in lora_target is {value!r}; give a whole number")
        options[name] = int(value)
    return Target(server, options)


def measure_serving_profile(adapter: Adapter, *, targets: Sequence[str] = ()) -> Measurement:
    """Count what the servers in ``targets`` would reject, drop or scale wrongly.

    What other servers would do is among the notes, so that without targets this only reports.

    Args:
        adapter: the adapter as :func:`~pytest_lora.adapter.read_adapter` read it.
        targets: servers, each with options (see :func:`parse_target`).

    Returns:
        The number of findings for the targets, among all rules applied.

    Raises:
        UsageError: an unknown target.
        CannotRun: the adapter has no readable configuration or weights.
    """
    asked = [parse_target(text) for text in targets]
    if not adapter.config or not adapter.tensors:
        raise CannotRun(f"{adapter.name} has no readable configuration and weights")
    named = {target.server for target in asked}
    others = [Target(name, SERVERS[name]) for name in SERVERS if name not in named]
    problems: list[Problem] = []
    notes: list[str] = []
    profile: dict[str, Json] = {}
    modules = lora_modules(adapter)
    for target in (*asked, *others):
        found = list(_findings(Case(adapter, modules, target.options), target.server))
        profile[target.server] = [_row(rule, text) for rule, text in found]
        for rule, text in found:
            if target.server in named and rule.effect != "may reject":
                problems.append(_problem(rule, text))
            else:
                notes.append(f"{rule.server} {rule.effect}: {text}")
    return Measurement.of_problems(
        problems, count=len(RULES), notes=notes, targets=list(targets), profile=profile
    )


def _findings(case: Case, server: str) -> Iterator[tuple[Rule, str]]:
    for rule in RULES:
        if rule.server == server:
            text = rule.find(case)
            if text:
                yield rule, text


def _problem(rule: Rule, text: str) -> Problem:
    return Problem(f"{rule.server} {rule.effect}", text, "", f"{rule.fix} [{rule.versions}]")


def _row(rule: Rule, text: str) -> dict[str, Json]:
    return {
        "rule": rule.id,
        "effect": rule.effect,
        "found": text,
        "versions": rule.versions,
        "source": rule.source,
    }


# -- what the rules look for ---------------------------------------------------------------------


def _other_method(case: Case) -> str:
    method = case.adapter.peft_type
    return "" if method == "LORA" else f"peft_type {method or 'unknown'}: only LoRA is served"


def _dora(case: Case) -> str:
    return "use_dora: the magnitude vectors have no place there" if case.adapter.use_dora else ""


def _rank_over(case: Case) -> str:
    limit = case.options["max_lora_rank"]
    rank = max((module.rank for module in case.modules), default=case.adapter.r)
    return f"rank {rank} is over max_lora_rank {limit}" if 0 < limit < rank else ""


def _saved_modules(case: Case) -> str:
    saved = [name for name in case.adapter.modules_to_save if name not in ("classifier", "score")]
    return f"modules_to_save {', '.join(saved)}" if saved else ""


def _any_saved_module(case: Case) -> str:
    saved = case.adapter.modules_to_save
    return f"modules_to_save {', '.join(saved)}: the base model's own are used" if saved else ""


def _bias(case: Case) -> str:
    bias = case.adapter.bias
    return "" if bias == "none" else f"bias {bias}: trained biases"


def _lora_bias(case: Case) -> str:
    return "lora_bias: a bias on lora_B" if case.adapter.config.get("lora_bias") is True else ""


def _base_changing_init(case: Case) -> str:
    """Initialisations that change the base weights, which only PEFT repeats when it loads."""
    init = case.adapter.config.get("init_lora_weights")
    known = ("pissa", "olora", "corda", "loftq")
    if isinstance(init, str) and init.lower().startswith(known):
        return f"init_lora_weights {init!r} changed the base weights, the server's are unchanged"
    return ""


def _variant(case: Case) -> str:
    names = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    used = [name for name in names if case.adapter.config.get(name)]
    return f"{', '.join(used)}" if used else ""


def _regex_targets(case: Case) -> str:
    targets = case.adapter.target_modules
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        return f"target_modules is the pattern {targets!r:.60}, a list is needed"
    return ""


def _unusual_weights(case: Case) -> str:
    names = [path.name for path in case.adapter.weights_files]
    return "" if names == [WEIGHTS_NAME] else f"the weights are in {', '.join(names)}"


def _added_tokens(case: Case) -> str:
    present = (case.adapter.path / "added_tokens.json").is_file()
    return "added_tokens.json, if it adds to the base model's vocabulary" if present else ""


_PLAIN = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def _keys(case: Case, skipped: Callable[[str], bool]) -> str:
    keys = [key for key in case.adapter.tensors if not key.endswith(_PLAIN) and not skipped(key)]
    if not keys or case.adapter.peft_type != "LORA":
        return ""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"tensor {keys[0]!r}{more}: neither lora_A nor lora_B"


def _keys_vllm(case: Case) -> str:
    return _keys(case, lambda key: _is_known_to_vllm(case.adapter, key))


def _is_known_to_vllm(adapter: Adapter, key: str) -> bool:
    """Keys vLLM skips, and those another rule of its speaks of already."""
    if key.endswith(("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")):
        return True
    if key.endswith("lora_B.bias"):
        return adapter.config.get("lora_bias") is True
    if key.endswith(".bias") and adapter.bias != "none":
        return True
    if "lora_magnitude_vector" in key and adapter.use_dora:
        return True
    return any(f".{name}." in key for name in (*adapter.modules_to_save, "classifier", "score"))


def _keys_llama(case: Case) -> str:
    kept = (".base_layer.weight", "_layernorm", ".norm")
    return _keys(case, lambda key: any(part in key for part in kept))


def _fused_experts(case: Case) -> str:
    count = sum(module.kind == "parameter" for module in case.modules)
    return f"target_parameters: factors of {count} fused parameters" if count else ""


def _ragged_layers(case: Case) -> str:
    """LoRAX stacks each kind of module over all layers, and skips a kind that any layer lacks."""
    kinds: Counter[str] = Counter()
    layers: set[str] = set()
    for module in case.modules:
        before, found, after = module.name.partition(".layers.")
        layer, _, kind = after.partition(".")
        if found and layer.isdecimal():
            kinds[f"{before}.layers.*.{kind}"] += 1
            layers.add(f"{before}.{layer}")
    ragged = sorted(kind for kind, count in kinds.items() if count < len(layers))
    more = f" and {len(ragged) - 1} more" if len(ragged) > 1 else ""
    return f"{ragged[0]}{more}: not in every layer, so skipped in all" if ragged else ""


def _mixed_ranks(case: Case) -> str:
    ranks = {module.rank for module in case.modules}
    return f"ranks {sorted(ranks)}: factors of one kind are stacked" if len(ranks) > 1 else ""


# -- scaling -------------------------------------------------------------------------------------


def _scaling(rank: float, alpha: float, *, rslora: bool) -> float:
    divisor = math.sqrt(rank) if rslora else rank
    return alpha / divisor if divisor else math.nan


def _scales(case: Case, served: Callable[[LoraModule], float]) -> str:
    """How far the server's scaling is from PEFT's; empty where it is the same everywhere."""
    wrong = [
        (module, served(module))
        for module in case.modules
        if math.isfinite(module.scaling)
        and module.scaling
        and not math.isclose(served(module), module.scaling, rel_tol=1e-6)
    ]
    if not wrong:
        return ""
    module, value = wrong[0]
    return (
        f"{len(wrong)} of {len(case.modules)} modules: {module.name} gets {value:.6g} in place of "
        f"{module.scaling:.6g} (times {value / module.scaling:.4g})"
    )


def _vllm_scale(case: Case) -> str:
    if case.options["reads_patterns"]:
        return ""
    a = case.adapter
    return _scales(case, lambda m: _scaling(a.r, a.lora_alpha, rslora=m.rslora))


def _sglang_scale(case: Case) -> str:
    a = case.adapter
    return _scales(case, lambda m: _scaling(a.r, a.lora_alpha, rslora=False))


def _lorax_scale(case: Case) -> str:
    """After the first kind of module LoRAX divides by the rank it padded the factors to."""
    a = case.adapter
    first = case.modules[0].name.rpartition(".")[2] if case.modules else ""
    padded = _lorax_padded(a.r, case.options["tensor_parallel"])

    def served(module: LoraModule) -> float:
        rank = a.r if module.name.endswith(f".{first}") else padded
        return _scaling(rank, a.lora_alpha, rslora=module.rslora)

    return _scales(case, served)


def _lorax_padded(rank: int, tensor_parallel: int) -> int:
    """The rank LoRAX pads to: at least 8 per device, then the next multiple of 16."""
    least = 8 * max(1, tensor_parallel)
    return least if rank <= least else -(-rank // 16) * 16


def _llama_scale(case: Case) -> str:
    """llama.cpp divides the one stored alpha by each factor's own rank."""
    alpha = case.adapter.lora_alpha
    plain = replace(case, modules=tuple(m for m in case.modules if m.kind != "parameter"))
    return _scales(
        plain,
        lambda m: _scaling(_own_rank(m), alpha, rslora=False),
    )


def _own_rank(module: LoraModule) -> int:
    return module.b.shape[1] if module.b and len(module.b.shape) > 1 else module.rank


_RESCALE = (
    "fold the true scaling into lora_B and set lora_alpha = r without patterns, or serve the "
    "merged model"
)

RULES: tuple[Rule, ...] = (
    Rule("vllm/method", "rejects", _other_method, _MERGE, _VLLM_2026, _VLLM),
    Rule(
        "vllm/rank",
        "rejects",
        _rank_over,
        "start it with --max-lora-rank, and say so: --lora-target=vllm:max_lora_rank=N",
        f"{_VLLM_2026}; the default is 16",
        f"{_VLLM}; vllm/config/lora.py",
    ),
    Rule("vllm/dora", "rejects", _dora, _MERGE, _VLLM_2026, _VLLM),
    Rule("vllm/modules_to_save", "rejects", _saved_modules, _MERGE, _VLLM_2026, _VLLM),
    Rule("vllm/bias", "rejects", _bias, _MERGE, _VLLM_2026, _VLLM),
    Rule("vllm/lora_bias", "rejects", _lora_bias, _MERGE, _VLLM_2026, _VLLM_KEYS),
    Rule("vllm/init", "drops", _base_changing_init, _MERGE, _VLLM_LATER, _VLLM),
    Rule("vllm/variant", "drops", _variant, _MERGE, _VLLM_LATER, _VLLM),
    Rule("vllm/keys", "rejects", _keys_vllm, _MERGE, _VLLM_2026, _VLLM_KEYS),
    Rule(
        "vllm/file",
        "rejects",
        _unusual_weights,
        f"save the weights whole, as {WEIGHTS_NAME}",
        "commit 0306474e",
        "vllm-project/vllm vllm/lora/lora_model.py",
    ),
    Rule(
        "vllm/experts",
        "may reject",
        _fused_experts,
        f"{_EXPERTS}, or {_MERGE}",
        "2026: dropped (41384) or rejected (52194) by some models, read by others",
        "vllm-project/vllm vllm/lora/model_manager.py",
    ),
    Rule(
        "vllm/scaling",
        "scales",
        _vllm_scale,
        f"{_RESCALE}; with a version that reads the patterns say "
        "--lora-target=vllm:reads_patterns=1",
        "commit 0306474e; a later copy of peft_helper.py reads the patterns",
        "vllm-project/vllm vllm/lora/lora_model.py",
    ),
    Rule("sglang/method", "rejects", _other_method, _MERGE, "commit db922586", _SGLANG_LORA),
    Rule(
        "sglang/rank",
        "rejects",
        _rank_over,
        "start it with --max-lora-rank",
        "commit 0ceb81fe; by default the limit follows from the adapters given at the start",
        _SGLANG,
    ),
    Rule("sglang/dora", "rejects", _dora, _MERGE, "April 2026 and later (22125)", _SGLANG),
    Rule(
        "sglang/targets",
        "rejects",
        _regex_targets,
        "write target_modules as a list, or start it with --lora-target-modules",
        "2025 and 2026",
        "sgl-project/sglang python/sglang/srt/lora/lora_manager.py",
    ),
    Rule(
        "sglang/added_tokens",
        "may reject",
        _added_tokens,
        "remove added_tokens.json if the base model has these tokens",
        "commit 0ceb81fe, if the base model lacks the tokens; before, always",
        _SGLANG,
    ),
    Rule("sglang/modules_to_save", "drops", _any_saved_module, _MERGE, _SGLANG_AT, _SGLANG),
    Rule("sglang/bias", "drops", _bias, _MERGE, _SGLANG_AT, _SGLANG),
    Rule("sglang/lora_bias", "drops", _lora_bias, _MERGE, _SGLANG_AT, _SGLANG),
    Rule("sglang/init", "drops", _base_changing_init, _MERGE, _SGLANG_AT, _SGLANG),
    Rule(
        "sglang/experts",
        "may reject",
        _fused_experts,
        f"start it with --lora-strict-loading, {_EXPERTS}, or {_MERGE}",
        "June 2026 (27381): dropped without a word; later versions read some models'",
        _SGLANG_LORA,
    ),
    Rule(
        "sglang/scaling",
        "scales",
        _sglang_scale,
        _RESCALE,
        "use_rslora: September 2026 (40835); patterns: ignored, or rejected by later commits",
        _SGLANG_LORA,
    ),
    Rule("lorax/method", "rejects", _other_method, _MERGE, _LORAX_AT, _LORAX),
    Rule("lorax/dora", "drops", _dora, _MERGE, _LORAX_AT, _LORAX),
    Rule("lorax/modules_to_save", "drops", _any_saved_module, _MERGE, _LORAX_AT, _LORAX),
    Rule("lorax/bias", "drops", _bias, _MERGE, _LORAX_AT, _LORAX),
    Rule("lorax/lora_bias", "drops", _lora_bias, _MERGE, _LORAX_AT, _LORAX),
    Rule("lorax/init", "drops", _base_changing_init, _MERGE, _LORAX_AT, _LORAX),
    Rule(
        "lorax/layers",
        "drops",
        _ragged_layers,
        "train the same modules in every layer, or serve the merged model",
        _LORAX_AT,
        _LORAX,
    ),
    Rule("lorax/ranks", "rejects", _mixed_ranks, _MERGE, _LORAX_AT, _LORAX),
    Rule(
        "lorax/scaling",
        "scales",
        _lorax_scale,
        f"{_RESCALE}; a rank of 8 or a multiple of 16 per device is safe",
        f"{_LORAX_AT}, with its padded kernels",
        f"{_LORAX}; utils/punica.py, pad_rank",
    ),
    Rule("llama.cpp/method", "rejects", _other_method, _MERGE, _LLAMA_AT, _LLAMA),
    Rule("llama.cpp/keys", "rejects", _keys_llama, _MERGE, _LLAMA_AT, _LLAMA),
    Rule("llama.cpp/experts", "rejects", _fused_experts, _MERGE, _LLAMA_AT, _LLAMA),
    Rule("llama.cpp/init", "drops", _base_changing_init, _MERGE, _LLAMA_AT, _LLAMA),
    Rule(
        "llama.cpp/file",
        "rejects",
        _unusual_weights,
        f"save the weights whole, as {WEIGHTS_NAME}",
        _LLAMA_AT,
        _LLAMA,
    ),
    Rule(
        "llama.cpp/scaling",
        "scales",
        _llama_scale,
        _RESCALE,
        _LLAMA_AT,
        f"{_LLAMA}; src/llama-adapter.h, get_scale",
    ),
)
"""Every rule, by server."""
