from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_maker import lora_config, lora_tensors, write_adapter, write_safetensors
from raw_safetensors import one, write

from pytest_lora.adapter import read_adapter
from pytest_lora.checks import adapter_config, files
from pytest_lora.checks.files import measure_adapter_files
from pytest_lora.errors import UsageError
from pytest_lora.locate import AdapterLocation
from pytest_lora.records import Measurement

SHARED = Path(__file__).parents[3] / "shared" / "data" / "adapters"
PEFT = "0.21.2"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"


def measure(folder: Path, **options: Any) -> Measurement:
    return measure_adapter_files(read_adapter(folder), **{"peft_version": PEFT, **options})


def problems(folder: Path, **options: Any) -> list[str]:
    found = measure(folder, **options)
    assert found.value == len(found.problems)
    return [str(problem) for problem in found.problems]


def with_config(folder: Path, text: str | bytes) -> Path:
    write_adapter(folder)
    path = folder / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_sound_adapter_has_no_problems(tmp_path: Path) -> None:
    found = measure(write_adapter(tmp_path / "a"))
    assert (found.value, found.problems) == (0, ())
    assert found.count == 2 + len(lora_config()) + 8
    assert found.details["tensors"] == 8


# ---------------------------------------------------------------------------------- the config

BROKEN: dict[str, str | bytes] = {
    "not JSON": '{"r": 2',
    "empty": " ",
    "JSON array": "[]",
    "occurs twice": '{"r": 1, "r": 2}',
    "constant NaN": '{"lora_alpha": NaN}',
    "not UTF-8": b'{"r": "\xff"}',
    "nested too deeply": '{"a":' * 100_000,
    "peft_type: missing": "{}",
    "MLX adapter": '{"fine_tune_type": "lora", "lora_parameters": {}}',
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_configurations_each_have_their_message(tmp_path: Path, words: str) -> None:
    [problem] = problems(with_config(tmp_path / "a", BROKEN[words]))
    assert problem.startswith("adapter_config.json")
    assert words in problem


def test_a_missing_configuration_is_one_problem(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    [problem] = problems(folder)
    assert "adapter_config.json: missing" in problem


VALUES: list[tuple[str, Any, str]] = [
    ("peft_type", "lora", "peft_type: 'lora' (expected 'LORA'); write it in upper case"),
    ("peft_type", "LORAX", "peft_type: 'LORAX' (expected a method of PEFT"),
    ("peft_type", 7, "peft_type: 7"),
    ("r", "eight", "r: 'eight' (expected an integer from 1"),
    ("r", 0, "r: 0"),
    ("r", True, "r: True"),
    ("r", 2.0, "r: 2.0"),
    ("r", None, "r: None"),
    ("r", 2**21, "r: 2097152"),
    ("lora_alpha", 0, "lora_alpha: 0 (expected a finite number above 0)"),
    ("lora_alpha", -1, "lora_alpha: -1"),
    ("lora_alpha", "16", "lora_alpha: '16'"),
    ("lora_alpha", 1e301, "lora_alpha: 1e+301"),
    ("lora_dropout", 1.5, "lora_dropout: 1.5 (expected a number from 0 to 1)"),
    ("bias", "some", "bias: 'some' (expected none, all or lora_only)"),
    ("use_rslora", "yes", "use_rslora: 'yes' (expected true or false)"),
    ("task_type", "CHAT", "task_type: 'CHAT' (expected one of SEQ_CLS"),
    ("target_modules", {"q_proj": 1}, "target_modules: {'q_proj': 1} (expected a list"),
    ("target_modules", [1], "target_modules: [1]"),
    ("target_modules", [], "target_modules: an empty list"),
    ("target_modules", "(q_proj", "target_modules: the pattern (q_proj is not a regular"),
    ("exclude_modules", "(a+)+", "may never end"),
    ("modules_to_save", "score", "modules_to_save: 'score' (expected a list of module names)"),
    ("layers_to_transform", "1", "layers_to_transform: '1' (expected a layer index"),
    ("rank_pattern", {"q_proj": "4"}, "rank_pattern: {'q_proj': '4'}"),
    ("rank_pattern", {"(": 4}, "rank_pattern: the pattern ( is not a regular expression"),
    ("alpha_pattern", [4], "alpha_pattern: [4] (expected a map of patterns"),
    ("trainable_token_indices", {"embed_tokens": ["a"]}, "a list of token ids, or a map"),
    ("base_model_name_or_path", 3, "base_model_name_or_path: 3 (expected a hub id"),
    ("use_newvariant", True, "PEFT 0.21.2 does not know this key of a LORA configuration"),
    ("lora_alhpa", 16, "correct its spelling"),
    ("auto_map", {"AutoModel": "x.Y"}, "auto_map: names code to import"),
    ("auto_mapping", "x", "auto_mapping: 'x' (expected null"),
    ("auto_mapping", {"parent_library": "evil"}, "'evil', which PEFT's auto classes would import"),
    ("auto_mapping", {"parent_library": "transformersx.y"}, "'transformersx.y'"),
    ("peft_version", "0.22.0", "written by PEFT 0.22.0 (expected at most PEFT 0.21.2 installed"),
    ("peft_version", 21, "peft_version: 21 (expected a version)"),
]


@pytest.mark.parametrize(("key", "value", "words"), VALUES)
def test_a_wrong_value_is_one_problem_of_its_own(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    [problem] = problems(write_adapter(tmp_path / "a", **{key: value}))
    assert words in problem


def test_the_messages_of_wrong_values_differ() -> None:
    words = [words for _, _, words in VALUES] + list(BROKEN)
    assert len(set(words)) == len(words) >= 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", None),
        ("layers_to_transform", [0, 1]),
        ("layers_to_transform", 1),
        ("target_modules", None),
        ("task_type", None),
        ("init_lora_weights", "pissa"),
        ("lora_alpha", 0.5),
        ("trainable_token_indices", [1, 2]),
        ("auto_mapping", {"parent_library": "transformers.models.llama.modeling_llama"}),
        ("auto_mapping", {"base_model_class": "M", "parent_library": "__main__"}),
        ("peft_version", "0.21.9"),
        ("peft_version", "0.19.0.dev0@abc"),
        ("peft_version", "UNKNOWN"),
        ("use_newvariant", False),
        ("use_newvariant", None),
        ("lorap_emb_lr", 1e-6),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
    ],
)
def test_what_is_allowed_is_no_problem(tmp_path: Path, key: str, value: Any) -> None:
    assert problems(write_adapter(tmp_path / "a", **{key: value})) == []


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_required_keys_are_named_when_they_are_missing(tmp_path: Path, key: str) -> None:
    folder = write_adapter(tmp_path / "a")
    config = lora_config()
    del config[key]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    [problem] = problems(folder)
    assert f"{key}: missing (PEFT would take its default, 8)" in problem


def test_a_pattern_with_chosen_layers_is_refused_as_by_peft(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", target_modules=".*q_proj", layers_to_transform=[0])
    assert "PEFT refuses the pair" in problems(folder)[0]


def test_keys_and_methods_newer_than_the_reader_are_problems(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", use_qalora=True, target_parameters=None)
    [problem] = problems(folder, peft_version="0.15.2")
    assert "known since PEFT 0.16, PEFT 0.15.2 drops it, and it is in use (True)" in problem
    assert "pip install -U 'peft>=0.16'" in problem
    (grouped,) = problems(
        write_adapter(tmp_path / "c", use_qalora=True, qalora_group_size=8), peft_version="0.15.2"
    )[1:]
    assert "qalora_group_size" in grouped
    idle = write_adapter(tmp_path / "d", qalora_group_size=16)
    assert problems(idle, peft_version="0.15.2") == []
    road = write_adapter(tmp_path / "b", peft_type="ROAD")
    assert "ROAD is known since PEFT 0.18, not to PEFT 0.17.1" in str(
        problems(road, peft_version="0.17.1")
    )
    bone = write_adapter(tmp_path / "c", peft_type="BONE")
    assert "BONE is gone since PEFT 0.19" in str(problems(bone))
    oft = write_adapter(tmp_path / "d", peft_type="OFT", rank_pattern={"q": 1})
    assert "rank_pattern: no longer read since PEFT 0.15" in str(problems(oft))


def test_a_newer_writer_may_be_a_note(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", peft_version="1.0.0")
    found = measure(folder, newer_writer="note")
    assert found.value == 0
    assert "written by PEFT 1.0.0, newer than PEFT 0.21.2 installed here" in " ".join(found.notes)
    with pytest.raises(UsageError, match="lora_newer_writer is 'maybe'"):
        measure(folder, newer_writer="maybe")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UsageError):
        measure(folder, newer_writer="maybe")


def test_without_peft_the_newest_known_rules_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "installed_version", lambda name: None)
    folder = write_adapter(tmp_path / "a", peft_version="0.99.0", use_newvariant=1)
    found = problems(folder, peft_version=None)
    assert "at most PEFT 0.21, the newest whose rules are known here" in found[0]
    assert "PEFT 0.21 does not know this key" in found[1]


def test_a_peft_newer_than_the_table_is_asked_for_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = tmp_path / "peft" / "tuners" / "lora"
    tuner.mkdir(parents=True)
    (tuner / "config.py").write_text("class LoraConfig:\n    use_newvariant: bool = False\n")
    (tmp_path / "peft" / "__init__.py").write_text("raise SystemExit('imported')")
    spec = adapter_config.importlib.util.spec_from_file_location(
        "peft",
        tmp_path / "peft" / "__init__.py",
        submodule_search_locations=[str(tmp_path / "peft")],
    )
    monkeypatch.setattr(adapter_config.importlib.util, "find_spec", lambda _: spec)
    folder = write_adapter(tmp_path / "a", use_newvariant=True)
    assert problems(folder, peft_version="0.30.0") == []
    folder = write_adapter(tmp_path / "b", use_otherthing=True)
    assert "PEFT 0.30.0 does not know this key" in problems(folder, peft_version="0.30.0")[0]
    monkeypatch.setattr(adapter_config.importlib.util, "find_spec", lambda _: None)
    assert problems(folder, peft_version="0.30.0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": None}, "no base model is recorded"),
        ({"base_model_name_or_path": "/home/me/model"}, "a path of the machine that trained"),
        ({"base_model_name_or_path": r"C:\models\x"}, "a path of the machine that trained"),
        ({"base_model_name_or_path": "./model"}, "a path of the machine that trained"),
        ({"base_model_name_or_path": "org/name"}, "revision is not pinned (revision of org/name)"),
        ({"base_model_name_or_path": "org/name", "revision": "main"}, "revision is not pinned"),
        ({"auto_mapping": {"parent_library": "__main__"}}, "AutoPeftModel cannot"),
        ({"lora_dtype": "float32"}, "a setting of ms-swift that PEFT ignores"),
        ({"use_newvariant": False}, "keys PEFT will not read, none of them in use: 'use_newv"),
        ({"peft_version": "?"}, "peft_version '?' is no version"),
    ],
)
def test_what_is_worth_knowing_is_noted(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    found = measure(write_adapter(tmp_path / "a", **changes))
    assert found.value == 0
    assert words in " ".join(found.notes)


def test_a_pinned_base_needs_no_remark(tmp_path: Path) -> None:
    assert measure(write_adapter(tmp_path / "a", revision="0123abc")).notes == ()


# ---------------------------------------------------------------------------------- the weights


def test_missing_weights_are_named_with_what_is_there(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: missing" in problems(folder)[0]
    write(folder / "model.safetensors", [one("a")])
    assert "missing; there is model.safetensors" in problems(folder)[0]


def test_a_pickle_alone_is_never_opened(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    # Unpickling this would raise the exception named in it.
    (folder / "adapter_model.bin").write_bytes(b"cbuiltins\nSystemExit\n(tR.")
    [problem] = problems(folder)
    assert "adapter_model.bin: the only weights are a pickle" in problem
    assert "save_file" in problem
    (folder / "adapter_model.bin").write_text(LFS)
    [problem] = problems(folder)
    assert "a Git LFS pointer to 9 bytes that are not here" in problem
    assert "git lfs pull" in problem


def test_a_pickle_beside_the_weights_is_a_problem(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02}.")
    [problem] = problems(folder)
    assert "pickled weights beside the safetensors weights" in problem
    assert "delete adapter_model.bin" in problem


def test_an_lfs_pointer_or_a_cut_file_in_place_of_the_weights(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    [problem] = problems(folder)
    assert "cut off" in problem
    path.write_text(LFS)
    [problem] = problems(folder)
    assert "Git LFS pointer" in problem


def test_weights_without_tensors_are_none(tmp_path: Path) -> None:
    [problem] = problems(write_adapter(tmp_path / "a", tensors={}))
    assert "adapter_model.safetensors: holds no tensors" in problem


def test_a_named_weights_file_is_judged_in_place_of_the_usual(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    write_safetensors(folder / "best.safetensors", lora_tensors())
    (folder / "best.bin").write_bytes(b"\x80\x02}.")
    adapter = read_adapter(AdapterLocation.at(folder / "best.safetensors", start=tmp_path))
    found = measure_adapter_files(adapter, peft_version=PEFT)
    assert found.value == 0
    assert "PEFT itself looks for adapter_model.safetensors only" in " ".join(found.notes)
    adapter = read_adapter(AdapterLocation.at(folder / "best.bin", start=tmp_path))
    [problem] = measure_adapter_files(adapter, peft_version=PEFT).problems
    assert "the only weights are a pickle" in str(problem)


def test_shards_and_several_files(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(lora_tensors(), "s.safetensors")}))
    assert "which of the two is meant" in problems(folder)[0]
    (folder / "adapter_model.safetensors").rename(folder / "s.safetensors")
    found = measure(folder)
    assert found.value == 0
    assert "the weights are in shards" in " ".join(found.notes)
    write(folder / "extra.safetensors", [one("a")])
    assert "were not read: extra.safetensors" in " ".join(measure(folder).notes)
    (folder / "s.safetensors").unlink()
    assert "s.safetensors: missing" in problems(folder)[0]


def test_pickles_left_on_the_hub_count_too(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    location = AdapterLocation(folder, None, "o/n", "o/n", "c", ("adapter_model.bin",))
    [problem] = measure_adapter_files(read_adapter(location), peft_version=PEFT).problems
    assert problem.where == "adapter_model.bin"


# ----------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    "name",
    ["conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "pyproject.toml",
     "tox.ini", "setup.cfg", "modeling_x.py", "deep/er/handler.py", "fast.so", "x.PYD", "a.pyc",
     "__pycache__/x.cpython-311.pyc"],
)  # fmt: skip
def test_code_and_configuration_are_problems_and_never_run(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "a")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("raise SystemExit('the adapter ran code')")
    [problem] = problems(folder)
    assert problem.startswith(f"{name}: ")
    assert "move it out of the adapter's folder" in problem


def test_training_leftovers_are_noted_not_failed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "README.md", "x.ipynb"):
        (folder / name).write_bytes(b"\x80\x02")
    for name in ("checkpoint-5", "wandb", ".git"):
        (folder / name).mkdir()
        (folder / name / "code.py").write_text("")
    found = measure(folder)
    assert found.value == 0
    notes = " ".join(found.notes)
    assert "pickles, not opened: optimizer.pt, rng_state.pth, training_args.bin" in notes
    assert "notebooks: x.ipynb" in notes


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    for number in range(12):
        (folder / f"{number}.pkl").write_text("")
    assert "and 4 more" in " ".join(measure(folder).notes)


def test_a_huge_folder_is_looked_at_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_lora.checks.files._MAX_ENTRIES", 3)
    folder = write_adapter(tmp_path / "a")
    for name in ("x.txt", "y.txt", "z.py"):
        (folder / name).write_text("")
    found = measure(folder)
    assert found.value == 0
    assert "only the first 3 files of the folder were looked at" in " ".join(found.notes)


def test_links_may_stay_within_the_folder_only(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secrets").mkdir()
    (folder / "inside").symlink_to("adapter_config.json")
    assert problems(folder) == []
    (folder / "outside").symlink_to(tmp_path / "secret")
    (folder / "outside_folder").symlink_to(tmp_path / "secrets")
    (folder / "nowhere").symlink_to("nothing")
    found = problems(folder)
    assert [problem.split(":")[0] for problem in found] == ["nowhere", "outside", "outside_folder"]
    assert "a symbolic link to nothing" in found[0]
    assert f"leaves the folder, to {tmp_path / 'secret'}" in found[1]


def test_links_into_the_hub_cache_are_how_the_cache_works(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    folder = write_adapter(repo / "snapshots" / "abc" / "sub")
    (repo / "blobs").mkdir()
    path = folder / "adapter_model.safetensors"
    path.rename(repo / "blobs" / "123")
    path.symlink_to("../../../blobs/123")
    assert problems(folder) == []
    (folder / "other").symlink_to(tmp_path)
    assert len(problems(folder)) == 1


def test_a_folder_that_vanished_is_a_problem_not_a_traceback(tmp_path: Path) -> None:
    found = problems(tmp_path / "gone")
    assert found[0].startswith("adapter_config.json: missing")
    assert found[1].startswith("adapter_model.safetensors: missing")


# ------------------------------------------------------------------------------ the bare install

BARE = """
import sys
for name in ("torch", "numpy", "transformers", "peft", "packaging", "huggingface_hub", "pytest"):
    sys.modules[name] = None
from pytest_lora.adapter import read_adapter
from pytest_lora.checks.config import measure_config_matches_weights
from pytest_lora.checks.files import measure_adapter_files, measure_finite_weights
from pytest_lora.checks.serving import measure_serving_profile
adapter = read_adapter(sys.argv[1])
for measure in (measure_adapter_files, measure_config_matches_weights, measure_finite_weights):
    assert measure(adapter).value == 0, measure(adapter)
assert measure_serving_profile(adapter, targets=["vllm"]).value == 0
"""


def test_nothing_is_needed_but_the_standard_library(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BARE, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --------------------------------------------------------------------------------- real adapters


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real adapters are not here")
def test_real_adapters_get_sensible_verdicts() -> None:
    found = {path.name: problems(path) for path in SHARED.iterdir()}
    assert {name for name, texts in found.items() if texts} == {
        "distilbert-sdtrklse",
        "gpt2-josasa-lfs-pointer",
    }
    assert "the only weights are a pickle" in found["distilbert-sdtrklse"][0]
    assert "a Git LFS pointer to 2367673 bytes" in found["gpt2-josasa-lfs-pointer"][0]
