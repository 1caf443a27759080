"""What each tensor of an adapter is, told from its name and the configuration alone."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_lora.adapter import BASE_PREFIX, split_key
from pytest_lora.peft_tables import HEADS, METHODS
from pytest_lora.records import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_lora.adapter import Adapter
    from pytest_lora.safetensors_header import TensorInfo

__all__ = ["EXTRAS", "NamedTensor", "explain_names", "is_vocabulary", "repair_names"]

_WRAPPERS: Mapping[str, str] = {
    "_orig_mod.": "torch.compile's '_orig_mod.' in the key",
    "_fsdp_wrapped_module.": "FSDP's '_fsdp_wrapped_module.' in the key",
    "_checkpoint_wrapped_module.": "a checkpoint wrapper in the key",
}
_ADAPTER_NAME = re.compile(
    r"(?P<before>.*\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"\.(?P<name>(?!weight$|bias$)[^.]+)(?P<after>\.weight|\.bias|)"
)
_SAVE_UNWRAPPED = "save_pretrained of the unwrapped PEFT model writes the plain key"
_TOKENS = ".token_adapter.trainable_tokens_delta"
EXTRAS: Mapping[str, str] = {
    "lora_diag": "kasa_config",
    "lora_velora_embed": "velora_config",
    "lora_monteclora_sampler": "monteclora_config",
}
"""Tensors of LoRA variants beside A and B, and the setting that asks for each."""

_INPUT_EMBEDDINGS = {
    "embed_tokens",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "tok_embeddings",
}
_OUTPUT_EMBEDDINGS = {"lm_head", "embed_out", "output"}
_PROMPTS = {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One tensor and what it stands for.

    Attributes:
        key: its key, repaired where its name was flawed.
        info: the tensor.
        role: ``factor`` (of LoRA), ``part`` (of another method), ``extra`` (of a LoRA variant),
            ``saved`` (a module trained whole), ``tokens``, ``bias``, ``vocabulary``, or empty for
            a tensor nothing accounts for.
        module: path of the module it belongs to in the base model; empty for a shared tensor.
        part: what it is within the module (``lora_A.weight``).
        doubt: why nothing accounts for it.
    """

    key: str
    info: TensorInfo
    role: str
    module: str
    part: str
    doubt: str = ""


# -- flawed names --------------------------------------------------------------------------------


def repair_names(adapter: Adapter) -> tuple[Adapter, list[Problem]]:
    """The adapter under the names it should have, and one problem per kind of flaw.

    Going on with repaired names keeps one fault from being reported as a hundred.
    """
    repaired: dict[str, TensorInfo] = {}
    flaws: dict[str, list[tuple[str, str]]] = {}
    kept_name = _adapter_name(adapter)
    for key, info in adapter.tensors.items():
        plain, flaw = _repair(key)
        match = _ADAPTER_NAME.fullmatch(plain)
        if match:
            plain = match["before"] + match["after"]
            flaw = flaw or _name_flaw(match["name"], kept_name)
        if flaw:
            flaws.setdefault(flaw, []).append((key, plain))
        if not match or match["name"] == kept_name:
            repaired.setdefault(plain, info)
    problems = [_flaw_problem(flaw, found) for flaw, found in flaws.items()]
    return replace(adapter, tensors=repaired), problems


def _adapter_name(adapter: Adapter) -> str:
    """The adapter's name as it occurs in the keys; empty where plain keys show there is none."""
    found: Counter[str] = Counter()
    for key in adapter.tensors:
        match = _ADAPTER_NAME.fullmatch(key)
        if match:
            found[match["name"]] += 1
        elif split_key(key)[1]:
            return ""
    return found.most_common(1)[0][0] if found else ""


def _name_flaw(name: str, kept: str) -> str:
    if name == kept:
        return f"the adapter's name {name!r} in the key"
    return f"a tensor of another adapter, {name!r}"


def _repair(key: str) -> tuple[str, str]:
    """``(the key PEFT would have written, what is wrong with this one)``."""
    flaw = ""
    for wrapper, what in _WRAPPERS.items():
        if wrapper in key:
            key, flaw = key.replace(wrapper, ""), what
    if key.startswith("base_model.") or key in _PROMPTS:
        doubled = key.startswith(BASE_PREFIX * 2)
        while key.startswith(BASE_PREFIX * 2):
            key = key.removeprefix(BASE_PREFIX)
        return key, "PEFT's prefix twice (a PEFT model was wrapped again)" if doubled else flaw
    before, found, after = key.partition(BASE_PREFIX)
    if found:
        return BASE_PREFIX + after, flaw or f"{before!r} before the key"
    return BASE_PREFIX + key, flaw or f"no {BASE_PREFIX!r} at the beginning of the key"


def _flaw_problem(flaw: str, found: list[tuple[str, str]]) -> Problem:
    key, plain = found[0]
    foreign = flaw.startswith("a tensor of another")
    return Problem(
        f"tensor {key!r}{_more(len(found))}",
        f"{flaw}: PEFT loads none of it",
        "" if foreign else repr(plain),
        "save each adapter by itself" if foreign else _SAVE_UNWRAPPED,
    )


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


# -- what each tensor is -------------------------------------------------------------------------


def explain_names(adapter: Adapter) -> list[NamedTensor]:
    """Every tensor of ``adapter`` with the part it plays."""
    saved = (*adapter.modules_to_save, *HEADS.get(adapter.task_type or "", ()))
    named = [_explain(adapter, key, info, saved) for key, info in adapter.tensors.items()]
    adapted = {tensor.module for tensor in named if tensor.role == "factor"}
    resized = any(
        tensor.part == "weight" and _last(tensor.module) in _INPUT_EMBEDDINGS for tensor in named
    )
    return [
        replace(tensor, role="vocabulary", doubt="")
        if not tensor.role and _is_whole_embedding(tensor, adapted, resized=resized)
        else tensor
        for tensor in named
    ]


def _is_whole_embedding(tensor: NamedTensor, adapted: set[str], *, resized: bool) -> bool:
    """PEFT stores embeddings whole when they are adapted, or both when the vocabulary was resized.

    A head without the input embedding is neither.
    """
    owner = tensor.module.removesuffix(".base_layer")
    if tensor.part != "weight" or not is_vocabulary(owner):
        return False
    return owner in adapted if owner != tensor.module else resized


def _explain(adapter: Adapter, key: str, info: TensorInfo, saved: tuple[str, ...]) -> NamedTensor:
    prompts = METHODS[adapter.peft_type].learns_prompts
    path = key.removeprefix("base_model." if prompts else BASE_PREFIX)
    lora = adapter.peft_type == "LORA"
    module, factor = split_key(key) if lora else ("", "")
    if factor:
        return NamedTensor(key, info, "factor", module, factor)
    if not lora and _split_part(adapter.peft_type, path):
        module, part = _split_part(adapter.peft_type, path) or ("", "")
        return NamedTensor(key, info, "part", module, part)
    module, _, part = path.rpartition(".")
    if any(f"{name}." in path for name in saved):
        return NamedTensor(key, info, "saved", module, part)
    if path.endswith(_TOKENS):
        return _tokens(adapter, key, info, path.removesuffix(_TOKENS))
    if lora and any(f".{name}" in key for name in EXTRAS):
        return _extra(adapter, key, info, path)
    if part == "bias":
        return _bias(adapter, key, info, module)
    return NamedTensor(key, info, "", module, part, _doubt(adapter, path))


def _split_part(method: str, path: str) -> tuple[str, str] | None:
    """``(module, part)`` where a component of ``path`` begins like this method's tensors."""
    marks = tuple(METHODS[method].marks.split())
    components = path.split(".")
    for place, component in enumerate(components):
        if component.startswith(marks):
            module = ".".join(components[:place])
            return module.removeprefix("base_model").removesuffix("."), ".".join(components[place:])
    return None


def _tokens(adapter: Adapter, key: str, info: TensorInfo, module: str) -> NamedTensor:
    if adapter.config.get("trainable_token_indices"):
        return NamedTensor(key, info, "tokens", module, "trainable_tokens_delta")
    doubt = "trained token rows although trainable_token_indices is not set"
    return NamedTensor(key, info, "", module, "trainable_tokens_delta", doubt)


def _extra(adapter: Adapter, key: str, info: TensorInfo, path: str) -> NamedTensor:
    name = next(name for name in EXTRAS if f".{name}" in key)
    module, _, _ = path.partition(f".{name}")
    if adapter.config.get(EXTRAS[name]):
        return NamedTensor(key, info, "extra", module, name)
    return NamedTensor(key, info, "", module, name, f"a variant's tensor without {EXTRAS[name]}")


def _bias(adapter: Adapter, key: str, info: TensorInfo, module: str) -> NamedTensor:
    setting = str(adapter.config.get("bias") or "none")
    owner = module.removesuffix(".base_layer")
    if setting == "all" or setting.endswith("_only"):
        return NamedTensor(key, info, "bias", owner, "bias")
    return NamedTensor(
        key, info, "", owner, "bias", f"a bias of the base although bias is {setting}"
    )


def is_vocabulary(module: str) -> bool:
    """Whether a module's name is one that input or output embeddings go by."""
    return _last(module) in _INPUT_EMBEDDINGS | _OUTPUT_EMBEDDINGS


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _doubt(adapter: Adapter, path: str) -> str:
    components = path.split(".")
    for name, method in METHODS.items():
        marks = tuple(mark for mark in method.marks.split() if mark.endswith("_"))
        if marks and name != adapter.peft_type and any(c.startswith(marks) for c in components):
            return f"looks like a tensor of {name}, not of {adapter.peft_type}"
    return "nothing in the configuration accounts for it"
