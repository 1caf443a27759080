"""Whole runs on the example base: all of the example passes, and the base is read once."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from example import FIXTURES, NEEDS_EXAMPLE, QUICK

pytest.importorskip("torch")
pytest.importorskip("peft")

from pytest_lora import loading

pytestmark = NEEDS_EXAMPLE

ADAPTERS = sorted(path.name for path in (FIXTURES / "adapters").iterdir())
NOTE_READS = """
import os
from pathlib import Path


def pytest_collection_finish():  # of who runs tests: whoever hands them out needs no torch
    import pytest_lora.loading as loading

    load = loading.load_weights

    def noted(spec, adapter=None):
        with (Path(__file__).parent / "reads").open("a") as reads:
            reads.write(f"{spec.path} {os.getpid()}\\n")
        return load(spec, adapter)

    loading.load_weights = noted
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project of its own."""
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    return pytester


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The bases that are read in this process."""
    load, read = loading.load_weights, list[Path]()

    def noted(spec: Any, adapter: Any = None) -> Any:
        read.append(spec.path)
        return load(spec, adapter)

    monkeypatch.setattr(loading, "load_weights", noted)
    return read


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    # As users do: processes of its own, in which nothing has been imported or loaded before, and
    # which note which of them reads which base.
    project.makeconftest(NOTE_READS)
    return project.runpytest_subprocess(*QUICK, *words)


def run_here(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    # Where that is not the point: importing the model libraries takes longer than most checks.
    return project.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:randomly", *words)


def reads(project: pytest.Pytester) -> list[list[str]]:
    """Base and process of each reading."""
    return [line.split() for line in (project.path / "reads").read_text().splitlines()]


def test_all_of_the_example_passes_and_its_base_is_read_once(project: pytest.Pytester) -> None:
    words = [f"--lora-adapter={FIXTURES / 'adapters' / name}" for name in ADAPTERS]
    result = run(project, *words, "--lora-dtype=float32", "--lora-strict")
    result.assert_outcomes(passed=16 * len(ADAPTERS))
    assert len(reads(project)) == 1


@pytest.mark.parametrize(
    ("dtype", "names"), [("bfloat16", ADAPTERS), ("float16", ["attention-lora"])]
)
def test_half_precision_passes_as_well(
    project: pytest.Pytester, read_here: list[Path], dtype: str, names: list[str]
) -> None:
    words = [f"--lora-adapter={FIXTURES / 'adapters' / name}" for name in names]
    result = run_here(project, *words, f"--lora-dtype={dtype}", "--lora-strict")
    result.assert_outcomes(passed=16 * len(names))
    assert len(read_here) == 1


def test_of_two_workers_one_reads_each_base(project: pytest.Pytester) -> None:
    other = project.path / "other"
    shutil.copytree(FIXTURES / "base", other)
    project.path.joinpath("lora.toml").write_text(f'[adapters."*dora*"]\nbase_model = "{other}"\n')
    words = [f"--lora-adapter={FIXTURES / 'adapters' / name}" for name in ADAPTERS[:4]]
    checks = "--lora-checks=adapter_effect,disable_equals_base,requires_grad"
    words += ["-n", "2", "--dist", "loadgroup", "--lora-profile=lora.toml"]
    result = run(project, checks, *words)
    result.assert_outcomes(passed=3 * 4)
    by_base = Counter(base for base, _ in reads(project))
    assert set(by_base.values()) == {1}
    assert len(by_base) == 2


def test_a_broken_file_ends_the_run_before_a_model_is_read(
    project: pytest.Pytester, read_here: list[Path]
) -> None:
    sound, broken = project.path / "out" / "a", project.path / "out" / "b"
    for folder in (sound, broken):
        shutil.copytree(FIXTURES / "adapters" / "attention-lora", folder)
    (broken / "adapter_model.safetensors").write_bytes(b"")
    words = ["-x", "--lora-adapter=out/*", f"--lora-base-model={FIXTURES / 'base'}"]
    result = run_here(project, *words)
    assert result.parseoutcomes()["failed"] == 1
    assert read_here == []
    result.stdout.fnmatch_lines(["FAILED lora/test_files::test_adapter_files[[]out/b[]]*"])


def test_fifty_adapters_would_be_shared_and_their_base_read_once_per_worker(
    project: pytest.Pytester,
) -> None:
    for number in range(6):
        folder = project.path / "out" / f"run{number}"
        shutil.copytree(FIXTURES / "adapters" / "attention-lora", folder)
    words = ["-n", "2", "--lora-adapter=out/*", f"--lora-base-model={FIXTURES / 'base'}"]
    result = run(project, "--lora-checks=adapter_files,requires_grad", *words)
    result.assert_outcomes(passed=2 * 6)
    by_process = Counter(process for _, process in reads(project))
    assert list(by_process.values()) == [1, 1]
    result.stdout.fnmatch_lines(["6 adapters, those that need attention first"])


def test_a_base_in_four_bits(project: pytest.Pytester) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import torch
    import transformers

    from pytest_lora.loading import quiet

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with quiet():
        transformers.AutoModelForCausalLM.from_pretrained(
            FIXTURES / "base", quantization_config=config, dtype=torch.float32
        ).save_pretrained(project.path / "base")
    checks = "adapter_effect,delta_spectrum,frozen_weights,merge_equivalence,unmerge_restoration"
    adapter = FIXTURES / "adapters" / "attention-lora"
    words = [f"--lora-adapter={adapter}", "--lora-base-model=base", f"--lora-checks={checks}"]
    run_here(project, *words, "--lora-strict").assert_outcomes(passed=5)


def test_a_test_that_changes_the_base_is_reported_and_the_next_has_a_sound_one(
    project: pytest.Pytester, read_here: list[Path]
) -> None:
    project.makepyfile(
        """
        import torch
        import pytest
        from pytest_lora import assert_disable_equals_base

        def test_careless(lora_subject):
            with torch.no_grad():
                lora_subject.model.get_base_model().lm_head.weight[3, 5] += 1

        def test_next(lora_subject):
            assert_disable_equals_base(lora_subject)
        """
    )
    adapter = FIXTURES / "adapters" / "attention-lora"
    result = run_here(project, f"--lora-adapter={adapter}", "--lora-checks=disable_equals_base")
    result.stdout.fnmatch_lines(
        [
            "*teardown of test_careless*",
            "*left the base model changed*lm_head.weight*at [[]3, 5[]]*",
        ]
    )
    result.assert_outcomes(passed=3, errors=1)
    assert len(read_here) == 2
