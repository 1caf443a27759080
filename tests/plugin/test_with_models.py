"""Whole runs on the example base: all of the example passes, and the base is read once."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
from example import FIXTURES, NEEDS_EXAMPLE

pytest.importorskip("torch")
pytest.importorskip("peft")

pytestmark = NEEDS_EXAMPLE

ADAPTERS = sorted(path.name for path in (FIXTURES / "adapters").iterdir())
NOTE_READS = """
import os
from pathlib import Path

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
    """A project of its own that notes which process reads which base."""
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.makeconftest(NOTE_READS)
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    # As users do: a process of its own, in which nothing has been imported or loaded before.
    return project.runpytest_subprocess("-p", "no:cacheprovider", *words)


def reads(project: pytest.Pytester) -> list[list[str]]:
    """Base and process of each reading."""
    return [line.split() for line in (project.path / "reads").read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_of_the_example_passes_and_its_base_is_read_once(
    project: pytest.Pytester, dtype: str
) -> None:
    words = [f"--lora-adapter={FIXTURES / 'adapters' / name}" for name in ADAPTERS]
    result = run(project, *words, f"--lora-dtype={dtype}", "--lora-strict")
    result.assert_outcomes(passed=16 * len(ADAPTERS))
    assert len(reads(project)) == 1


def test_half_precision_passes_as_well(project: pytest.Pytester) -> None:
    adapter = FIXTURES / "adapters" / "attention-lora"
    run(project, f"--lora-adapter={adapter}", "--lora-dtype=float16").assert_outcomes(passed=16)


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


def test_a_test_that_changes_the_base_is_reported_and_the_next_has_a_sound_one(
    project: pytest.Pytester,
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
    result = run(project, f"--lora-adapter={adapter}", "--lora-checks=disable_equals_base")
    result.stdout.fnmatch_lines(
        [
            "*teardown of test_careless*",
            "*left the base model changed*lm_head.weight*at [[]3, 5[]]*",
        ]
    )
    result.assert_outcomes(passed=3, errors=1)
    assert len(reads(project)) == 2
