"""Adapters that other people published, and a base that is really trained: sensible verdicts.

The files lie outside the repository (``../shared/data``, see the README there) and are not ours to
pass on; the tests skip where they are absent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stack import since

DATA = Path(__file__).parents[2] / "shared" / "data"
ADAPTERS = DATA / "adapters"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the published adapters are not here")

without_faults_of_its_own = since("has faults that sound adapters fail with", peft=(0, 21))

FILES = ("adapter_files", "config_matches_weights", "finite_weights", "serving_profile")


def judge(folder: Path, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Results by adapter and check of a run of its own; the terminal shows no traceback of ours."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    ran = subprocess.run(
        [*command, f"--lora-report={report}"], cwd=folder, capture_output=True, text=True
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert "site-packages/torch" not in ran.stdout
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    return {(Path(item["adapter"]).name, item["check"]): item for item in results}


def outcomes(results: dict[tuple[str, str], dict[str, Any]], adapter: str) -> dict[str, str]:
    return {check: item["outcome"] for (name, check), item in results.items() if name == adapter}


def test_files_of_adapters_whose_base_is_not_here(tmp_path: Path) -> None:
    results = judge(tmp_path, f"--lora-adapter={ADAPTERS}/*", "--lora-checks=files")
    failed = {key for key, item in results.items() if item["outcome"] == "failed"}
    assert failed == {
        ("distilbert-sdtrklse", "adapter_files"),  # a pickle
        ("gpt2-josasa-lfs-pointer", "adapter_files"),  # 132 bytes that point to the weights
        ("gpt2-gurvineet-75f7-checkpoint-best", "config_matches_weights"),  # targets of Llama
    }
    pickled = json.dumps(results["distilbert-sdtrklse", "adapter_files"])
    assert "adapter_model.bin" in pickled
    assert "pickle" in pickled
    assert "git lfs pull" in json.dumps(results["gpt2-josasa-lfs-pointer", "adapter_files"])
    for name in ("gpt2-tigrinya-v1", "gpt2-tigrinya-v2", "gpt2-deepbiolab"):
        assert set(outcomes(results, name).values()) == {"passed"}


def test_a_base_that_is_not_here_is_an_error_with_its_name(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    results = judge(
        tmp_path,
        f"--lora-adapter={ADAPTERS / 'gpt2-tigrinya-v2'}",
        "--lora-checks=base_compatibility,merge_equivalence",
    )
    found = results["gpt2-tigrinya-v2", "base_compatibility"]
    assert found["outcome"] == "error"
    assert results["gpt2-tigrinya-v2", "merge_equivalence"]["outcome"] == "skipped"
    assert "gpt2" in found["reason"]
    assert "--lora-base-model" in found["reason"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 small in every shape that its adapters touch, with random weights and a few tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=500, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@without_faults_of_its_own
def test_a_published_adapter_passes_on_a_base_of_its_shape(tmp_path: Path, gpt2: Path) -> None:
    results = judge(
        tmp_path,
        f"--lora-adapter={ADAPTERS / 'gpt2-tigrinya-v2'}",
        f"--lora-base-model={gpt2}",
    )
    assert len(results) >= len(FILES) + 10
    assert Counter(item["outcome"] for item in results.values()) == {"passed": len(results)}


def test_dead_targets_fail_and_the_rest_says_so(tmp_path: Path, gpt2: Path) -> None:
    name = "gpt2-gurvineet-75f7-checkpoint-best"
    results = judge(tmp_path, f"--lora-adapter={ADAPTERS / name}", f"--lora-base-model={gpt2}")
    found = outcomes(results, name)
    failed = "config_matches_weights"
    assert [check for check, outcome in found.items() if outcome == "failed"] == [failed]
    details = json.dumps(results[name, failed])
    assert "q_proj" in details
    assert "v_proj" in details
    assert {found["merge_equivalence"], found["save_reload"]} == {"skipped"}
    assert failed in results[name, "merge_equivalence"]["reason"]


@without_faults_of_its_own
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_a_trained_base_pass_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    pytest.importorskip("torch")
    results = judge(
        tmp_path,
        f"--lora-adapter={DATA / 'adapters_stories260K' / '*'}",
        f"--lora-base-model={DATA / 'models' / 'stories260K'}",
        f"--lora-dtype={dtype}",
    )
    assert {name for name, _ in results} == {"lora_r8", "lora_r8_overtrained"}
    assert Counter(item["outcome"] for item in results.values()) == {"passed": len(results)}
