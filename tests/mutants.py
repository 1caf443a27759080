"""Faults that adapters are found with, one small function each, applied to a copy of a sound one.

Every mutant names the check that has to catch it; ``test_mutants.py`` proves that this check fails,
and no other one.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from example import FIXTURES
from safetensors.torch import load_file, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]
Verdicts = dict[str, dict[str, dict[str, Any]]]
"""Check results as in the JSON report, by adapter and check."""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: what the folder is called.
        check: id of the check meant for it.
        fault: one line for the documentation.
        apply: turns a copy of ``adapter`` into the mutant.
        adapter: the sound example it is made from.
        settings: what the user has to say for the fault to be decidable, as profile keys.
    """

    name: str
    check: str
    fault: str
    apply: Callable[[Path], None]
    adapter: str = "attention-lora"
    settings: dict[str, Any] = field(default_factory=dict)


MUTANTS: list[Mutant] = []


def mutant(
    check: str, fault: str, *, adapter: str = "attention-lora", **settings: Any
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(apply: Callable[[Path], None]) -> Callable[[Path], None]:
        MUTANTS.append(Mutant(apply.__name__, check, fault, apply, adapter, settings))
        return apply

    return register


def make(mutant: Mutant, sound: Path, folder: Path) -> Path:
    """Write the mutant into ``folder``, from the sound examples in ``sound``."""
    shutil.copytree(sound / mutant.adapter, folder)
    mutant.apply(folder)
    return folder


def run_suite(root: Path) -> Verdicts:
    """Make every mutant below ``root`` and run the whole suite over them, once."""
    for each in MUTANTS:
        make(each, FIXTURES / "adapters", root / "mutants" / each.name)
    _write_other_base(root / "other-base")
    _write_profile(root / "profile.toml", root)
    # The empty configuration keeps this project's own settings out of the experiment.
    (root / "pytest.ini").write_text("[pytest]\n")
    arguments = ["-q", "--no-summary", "-p", "no:cacheprovider", "-p", "no:randomly"]
    arguments += ["--tb=no", "-c", str(root / "pytest.ini")]
    arguments += ["--lora-adapter=mutants/*", "--lora-profile=profile.toml"]
    arguments += ["--lora-report=report.json"]
    before = os.getcwd()
    os.chdir(root)
    try:
        pytest.main(arguments)
    finally:
        os.chdir(before)
    found: Verdicts = {}
    for result in json.loads((root / "report.json").read_text())["results"]:
        found.setdefault(result["adapter"].removeprefix("mutants/"), {})[result["check"]] = result
    return found


def _write_other_base(folder: Path) -> None:
    """The example base's architecture at half its width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(FIXTURES / "base")
    config.hidden_size //= 2
    config.intermediate_size //= 2
    config.head_dim = config.hidden_size // config.num_attention_heads
    LlamaForCausalLM(config).save_pretrained(folder)


def _write_profile(path: Path, root: Path) -> None:
    lines = ["[defaults]", f"base_model = {json.dumps(str(FIXTURES / 'base'))}"]
    for each in MUTANTS:
        lines.append(f'[adapters."mutants/{each.name}"]')
        for key, value in each.settings.items():
            shown = str(root / value) if key == "base_model" else value
            lines.append(f"{key} = {json.dumps(shown)}")
    path.write_text("\n".join(lines) + "\n")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / WEIGHTS
    # Copies: what load_file gives is mapped to the very file that is written next.
    loaded = {name: tensor.clone() for name, tensor in load_file(path).items()}
    changed = {name: tensor.clone().contiguous() for name, tensor in change(loaded).items()}
    save_file(changed, path, metadata={"format": "pt"})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / WEIGHTS
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


# -------------------------------------------------------------------------------- adapter_files


@mutant("adapter_files", "adapter_config.json is missing")
def missing_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


@mutant("adapter_files", "adapter_config.json is cut in the middle")
def cut_config(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[: len(text) // 2])


@mutant("adapter_files", "the weights file is missing")
def missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@mutant("adapter_files", "the weights file is cut in the middle")
def truncated_weights(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


@mutant("adapter_files", "the weights file ends with bytes no tensor owns")
def trailing_bytes(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 64)


@mutant("adapter_files", "the header claims a length of 2**62 bytes")
def huge_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + data[8:])


@mutant("adapter_files", "two tensors claim the same bytes")
def overlapping_tensors(folder: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        one, two = sorted(name for name in header if name.endswith("lora_A.weight"))[:2]
        header[two]["data_offsets"] = header[one]["data_offsets"]

    edit_header(folder, overlap)


@mutant("adapter_files", "a shape says more elements than there are bytes")
def oversized_shape(folder: Path) -> None:
    def enlarge(header: dict[str, Any]) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[name]["shape"][0] *= 2

    edit_header(folder, enlarge)


@mutant("adapter_files", "a git-LFS pointer in place of the weights")
def lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
        "size 273680\n"
    )


@mutant("adapter_files", "the weights are a pickle only")
def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


@mutant("adapter_files", "a pickle lies beside the safetensors file")
def pickle_beside(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")


@mutant("adapter_files", "a pickle is called adapter_model.safetensors")
def pickle_in_disguise(folder: Path) -> None:
    loaded = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    torch.save(loaded, folder / WEIGHTS)


@mutant("adapter_files", "the folder holds a pytest.ini that loads a plugin of its own")
def hostile_pytest_ini(folder: Path) -> None:
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p evil\npythonpath = .\n")


@mutant("adapter_files", "the folder holds a conftest.py")
def hostile_conftest(folder: Path) -> None:
    (folder / "conftest.py").write_text("raise SystemExit('the adapter ran code')\n")


@mutant("adapter_files", "the folder holds Python code")
def shipped_code(folder: Path) -> None:
    (folder / "modeling_custom.py").write_text("raise SystemExit('the adapter ran code')\n")


@mutant("adapter_files", "auto_mapping names foreign code to import")
def foreign_auto_mapping(folder: Path) -> None:
    mapping = {"base_model_class": "Model", "parent_library": "modeling_custom"}
    edit_config(folder, auto_mapping=mapping, task_type=None)


@mutant("adapter_files", "the configuration has a key no PEFT knows")
def unknown_config_key(folder: Path) -> None:
    edit_config(folder, use_newvariant=True)


@mutant("adapter_files", "a newer PEFT than the installed one wrote it")
def newer_writer(folder: Path) -> None:
    edit_config(folder, peft_version="99.1.0")


@mutant("adapter_files", "the rank is a text")
def rank_is_text(folder: Path) -> None:
    edit_config(folder, r="eight")


@mutant("adapter_files", "the rank is negative")
def negative_rank(folder: Path) -> None:
    edit_config(folder, r=-8)


@mutant("adapter_files", "the PEFT type is unknown")
def unknown_peft_type(folder: Path) -> None:
    edit_config(folder, peft_type="LORAX")


# ----------------------------------------------------------------------- config_matches_weights


@mutant("config_matches_weights", "one layer's tensors are missing")
def dropped_layer(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if ".layers.1." not in k})


@mutant("config_matches_weights", "one lora_B is missing")
def dropped_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != first(t, "lora_B")})


@mutant("config_matches_weights", "every key has the prefix a compiled model gives")
def key_prefix_added(folder: Path) -> None:
    edit_tensors(folder, lambda t: {f"_orig_mod.{k}": v for k, v in t.items()})


@mutant("config_matches_weights", "every key lacks PEFT's prefix")
def key_prefix_removed(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})


@mutant("config_matches_weights", "the keys still hold the adapter's name")
def adapter_name_in_keys(folder: Path) -> None:
    edit_tensors(
        folder, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}
    )


@mutant("config_matches_weights", "A and B are swapped on a square layer")
def swapped_factors(folder: Path) -> None:
    def swap(tensors: Tensors) -> Tensors:
        a = first(tensors, "q_proj.lora_A")
        b = a.replace("lora_A", "lora_B")
        return {**tensors, a: tensors[b], b: tensors[a]}

    edit_tensors(folder, swap)


@mutant("config_matches_weights", "the configuration's rank is not the weights'")
def wrong_rank(folder: Path) -> None:
    edit_config(folder, r=4)


@mutant("config_matches_weights", "a rank_pattern key has a typo", adapter="all-linear-rslora")
def rank_pattern_typo(folder: Path) -> None:
    pattern = json.loads((folder / CONFIG).read_text())["rank_pattern"]
    edit_config(folder, rank_pattern={f"{key}x": value for key, value in pattern.items()})


@mutant("config_matches_weights", "an alpha_pattern key has a typo")
def alpha_pattern_typo(folder: Path) -> None:
    edit_config(folder, alpha_pattern={"q_porj": 64})


@mutant("config_matches_weights", "a target module stands for no tensor")
def dead_target(folder: Path) -> None:
    targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    edit_config(folder, target_modules=[*targets, "c_attn"])


@mutant("config_matches_weights", "tensors were saved empty, as a sharded trainer does")
def empty_tensors(folder: Path) -> None:
    edit_tensors(
        folder, lambda t: {k: torch.zeros(0) if "lora_B" in k else v for k, v in t.items()}
    )


@mutant("config_matches_weights", "another adapter's tensors are mixed in")
def foreign_tensors(folder: Path) -> None:
    def mix(tensors: Tensors) -> Tensors:
        return {**tensors, **{k.replace("q_proj", "gate_proj"): v for k, v in tensors.items()}}

    edit_tensors(folder, mix)


@mutant("config_matches_weights", "DoRA's magnitudes are missing", adapter="dora")
def missing_magnitudes(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if "magnitude" not in k})


@mutant("config_matches_weights", "use_dora was lost from the configuration", adapter="dora")
def dora_flag_lost(folder: Path) -> None:
    edit_config(folder, use_dora=False)


@mutant("config_matches_weights", "a module to save was not saved", adapter="saved-head")
def saved_module_missing(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if "lm_head" not in k})


@mutant("config_matches_weights", "modules_to_save was lost", adapter="saved-head")
def saved_module_unexplained(folder: Path) -> None:
    edit_config(folder, modules_to_save=None)


@mutant("config_matches_weights", "lora_alpha is not what it was trained with")
def wrong_alpha(folder: Path) -> None:
    edit_config(folder, lora_alpha=8)


@mutant("config_matches_weights", "use_rslora is not what it was trained with")
def rslora_flipped(folder: Path) -> None:
    edit_config(folder, use_rslora=True)


# -------------------------------------------------------------------------------- finite_weights


@mutant("finite_weights", "one element is NaN")
def one_nan(folder: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors[first(tensors, "lora_B")][5, 3] = float("nan")
        return tensors

    edit_tensors(folder, spoil)


@mutant("finite_weights", "one element is infinite, in bfloat16")
def one_infinity(folder: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        name = first(tensors, "lora_A")
        tensors[name] = tensors[name].bfloat16()
        tensors[name][0, 0] = float("-inf")
        return tensors

    edit_tensors(folder, spoil)


@mutant("finite_weights", "bfloat16 bytes are labelled float16")
def bfloat16_read_as_float16(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v.bfloat16().view(torch.float16) for k, v in t.items()})


# ----------------------------------------------------------------------------- base_compatibility


@mutant("base_compatibility", "the base model is another one", base_model="other-base")
def wrong_base(folder: Path) -> None:
    """Nothing in the folder is wrong; the profile gives it a base of another width."""


@mutant("base_compatibility", "the vocabulary was resized", adapter="saved-head")
def resized_vocabulary(folder: Path) -> None:
    def resize(tensors: Tensors) -> Tensors:
        name = first(tensors, "lm_head")
        return {**tensors, name: torch.cat([tensors[name], tensors[name][:8]])}

    edit_tensors(folder, resize)


@mutant("base_compatibility", "one module's tensors name a layer the base does not have")
def layer_beyond_the_base(folder: Path) -> None:
    edit_tensors(
        folder, lambda t: {k.replace(".layers.1.", ".layers.91."): v for k, v in t.items()}
    )


# --------------------------------------------------------------------------------- adapter_effect


@mutant("adapter_effect", "every lora_B is zero, as before training")
def zeroed_b(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()})


@mutant("adapter_effect", "lora_B of one kind of module is zero")
def zeroed_kind(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v * ("v_proj.lora_B" not in k) for k, v in t.items()})


@mutant("adapter_effect", "half the rows of every lora_B are zero, as a lost shard leaves them")
def half_the_rows(folder: Path) -> None:
    def cut(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor[tensor.shape[0] // 2 :] = 0
        return tensors

    edit_tensors(folder, cut)


@mutant("adapter_effect", "a factor overflows in the precision it is run in", dtype="float16")
def overflowing_factor(folder: Path) -> None:
    def enlarge(tensors: Tensors) -> Tensors:
        name = first(tensors, "lora_B")
        tensors[name] = tensors[name] * 1e7
        return tensors

    edit_tensors(folder, enlarge)


# -------------------------------------------------------------------------------- delta_spectrum


@mutant("delta_spectrum", "one lora_B is ten times as large as trained", delta_spectrum=2.0)
def exploded_norm(folder: Path) -> None:
    def enlarge(tensors: Tensors) -> Tensors:
        name = first(tensors, "lora_B")
        tensors[name] = tensors[name] * 10
        return tensors

    edit_tensors(folder, enlarge)


# -------------------------------------------------------------------------------- serving_profile


@mutant("serving_profile", "the target server does not take DoRA", adapter="dora", target="vllm")
def dora_for_vllm(folder: Path) -> None:
    """Nothing in the folder is wrong; the profile asks for a server."""


@mutant(
    "serving_profile",
    "the rank is above what the server was started with",
    target="vllm:max_lora_rank=4",
)
def rank_above_the_servers(folder: Path) -> None:
    """Nothing in the folder is wrong; the profile asks for a server."""
