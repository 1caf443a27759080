"""Checks made for the entries of a profile: when they are collected, and what they say."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from adapter_maker import write_adapter
from example import FIXTURES, NEEDS_EXAMPLE

pytest.importorskip("torch")

from pytest_lora.errors import UsageError
from pytest_lora.run import Run
from pytest_lora.settings import Layer, option_name

ADAPTERS = FIXTURES / "adapters"
STORIES = FIXTURES / "data" / "source_heldout.jsonl"


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:randomly", *words)


def profile(project: pytest.Pytester, text: str) -> None:
    (project.path / "lora.toml").write_text(text, encoding="utf-8")


def results(project: pytest.Pytester) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((project.path / "out.json").read_text())["results"]
    return found


# ---------------------------------------------------------------------------------- collection

TWO = """\
[sources.prose]
path = "texts.txt"

[sources.code]
path = "texts.txt"

[adapters."*other".sources.extra]
path = "texts.txt"
"""


@pytest.fixture
def two(project: pytest.Pytester) -> pytest.Pytester:
    for name in ("good", "other"):
        write_adapter(project.path / "adapters" / name)
    (project.path / "texts.txt").write_text("One.\n\nTwo.\n")
    profile(project, TWO)
    return project


def collected(project: pytest.Pytester, *words: str) -> list[str]:
    listed = run(project, "--lora-adapter=adapters/*", "--collect-only", "-q", *words)
    return [line for line in listed.outlines if "perplexity_drift" in line]


def test_each_source_of_each_adapter_is_a_test_of_its_own(two: pytest.Pytester) -> None:
    test = "lora/test_forgetting::test_perplexity_drift"
    assert collected(two) == [
        f"{test}[adapters/good:prose]",
        f"{test}[adapters/good:code]",
        f"{test}[adapters/other:prose]",
        f"{test}[adapters/other:code]",
        f"{test}[adapters/other:extra]",
    ]
    assert collected(two, "-k", "other and code") == [f"{test}[adapters/other:code]"]
    assert collected(two, "--lora-checks=process") == []


def test_without_a_profile_there_is_nothing_to_collect(two: pytest.Pytester) -> None:
    (two.path / "lora.toml").unlink()
    assert collected(two) == []


def test_data_that_is_not_there_stops_the_run_before_any_check(two: pytest.Pytester) -> None:
    (two.path / "texts.txt").unlink()
    result = run(two, "--lora-adapter=adapters/good")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: path in *lora.toml:2: *texts.txt is not there"])
    run(two, "--lora-adapter=adapters/good", "--lora-checks=files").assert_outcomes(
        passed=4, deselected=16
    )


def test_a_run_that_ends_early_names_the_sources_it_did_not_come_to(two: pytest.Pytester) -> None:
    (two.path / "adapters" / "good" / "adapter_model.safetensors").write_bytes(b"broken")
    words = ["--lora-adapter=adapters/good", "--lora-checks=adapter_files,perplexity_drift"]
    run(two, *words, "-x", "--lora-report=out.json")
    assert [(item["check"], item["part"], item["outcome"]) for item in results(two)] == [
        ("adapter_files", "", "failed"),
        ("perplexity_drift", "prose", "skipped"),
        ("perplexity_drift", "code", "skipped"),
    ]


def test_a_fixture_without_a_profile_skips_with_the_reason(project: pytest.Pytester) -> None:
    write_adapter(project.path / "good")
    project.makepyfile("def test_mine(lora_source): pass")
    result = run(project, "--lora-adapter=good", "--lora-checks=adapter_files", "-rs")
    result.assert_outcomes(passed=1, skipped=1, deselected=15)


# -------------------------------------------------------------------------------- with the example

GATE = f"""\
[sources.stories]
path = "{STORIES}"
max_drift = "2.5 nats"
"""


@NEEDS_EXAMPLE
def test_the_example_that_forgets_fails_the_gate_and_a_sound_one_passes(
    project: pytest.Pytester,
) -> None:
    profile(project, GATE)
    names = ["dora", "overtrained"]
    words = [f"--lora-adapter={ADAPTERS / name}" for name in names]
    words += [f"--lora-base-model={FIXTURES / 'base'}", "--lora-checks=perplexity_drift"]
    words += ["--lora-report=out.json", "--lora-cache-dir=kept"]
    first = run(project, *words)
    first.assert_outcomes(passed=1, failed=1, deselected=34)
    first.stdout.fnmatch_lines(
        [
            "*perplexity_drift[[]stories[]] FAILED for *overtrained*nats per token*",
            "*allowed: at most 2.5 (max_drift in *lora.toml:3)*",
        ]
    )
    before = results(project)
    assert all(item["measurement"]["count"] < 128 for item in before)
    again = run(project, *words)
    again.assert_outcomes(passed=1, failed=1, deselected=34)
    after = results(project)
    for old, new in zip(before, after, strict=True):
        domain = new["measurement"]["details"]["domains"]["stories"]
        assert domain.pop("from_cache")["adapted"] > 0
        old["measurement"]["details"]["domains"]["stories"].pop("from_cache")
        assert {**old, "seconds": 0} == {**new, "seconds": 0}
    run(project, *words, "--lora-full-eval").assert_outcomes(passed=1, failed=1, deselected=34)
    for old, new in zip(after, results(project), strict=True):
        assert new["measurement"]["count"] == 256 > old["measurement"]["count"]
        assert new["measurement"]["low"] is None  # known, not estimated
        assert old["measurement"]["low"] <= new["measurement"]["value"]
        assert new["measurement"]["value"] <= float(old["measurement"]["high"])  # may be infinite


@NEEDS_EXAMPLE
def test_the_examples_own_profile_lets_a_sound_adapter_through_and_stops_the_other(
    project: pytest.Pytester,
) -> None:
    words = [f"--lora-adapter={ADAPTERS / name}" for name in ("dora", "overtrained")]
    words += [f"--lora-base-model={FIXTURES / 'base'}", "--lora-no-cache", "-k", "problems"]
    words += [f"--lora-profile={FIXTURES / 'lora.toml'}", "--lora-report=out.json"]
    run(project, *words, "--lora-checks=task_accuracy").assert_outcomes(
        passed=1, failed=1, deselected=46
    )
    sound, forgetful = (item["measurement"] for item in results(project))
    assert sound["count"] < 256
    assert sound["low"] >= 0.5 > forgetful["high"]
    assert "expected '" in forgetful["where"]


def test_a_floor_may_be_relative_to_the_base_and_choices_have_no_health(
    two: pytest.Pytester,
) -> None:
    (two.path / "chosen.jsonl").write_text(
        '{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n' * 2
    )
    (two.path / "written.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    profile(
        two,
        '[tasks.chosen]\npath = "chosen.jsonl"\nmin_accuracy = "base - 2%"\n'
        '[tasks.written]\npath = "written.jsonl"\ngrader = "exact"\n',
    )
    listed = run(two, "--lora-adapter=adapters/good", "--collect-only", "-q")
    found = [line for line in listed.outlines if line.startswith("lora/test_learning")]
    assert found == [
        "lora/test_learning::test_task_accuracy[adapters/good:chosen]",
        "lora/test_learning::test_task_accuracy[adapters/good:written]",
        "lora/test_learning::test_generation_health[adapters/good:written]",
        "lora/test_learning::test_generation_diversity[adapters/good:written]",
    ]
    run_ = _run_of(two)
    assert list(run_.task("adapters/good", "chosen").floor) == ["min_change"]
    # Two tasks are four verdicts, and this one's share is that of an accuracy.
    assert run_.task("adapters/good", "chosen").options["alpha"] == 0.001 / 4
    assert run_.task("adapters/good", "chosen").options["full"] is False
    assert run_.task("adapters/good", "written").floor["min_accuracy"].low == -math.inf


def test_data_is_read_once_for_all_adapters_that_are_asked_alike(two: pytest.Pytester) -> None:
    """Fifty adapters of one base must not be fifty copies of the items."""
    (two.path / "t.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (two.path / "s.txt").write_text("some text\n")
    profile(
        two,
        '[sources.s]\npath = "s.txt"\nmax_drift = 1\n'
        '[tasks.t]\npath = "t.jsonl"\nmin_accuracy = "50%"\nmax_unstopped = "10%"\n'
        '[adapters."*/b"]\ntasks.t.min_accuracy = "80%"\nsources.s.max_drift = 2\n'
        '[adapters."*/c".tasks.t]\ntemplate = "{prompt}?"\n',
    )
    run_ = _run_of(two)
    names = [f"adapters/{name}" for name in "abc"]
    a, b, c = (run_.task(name, "t") for name in names)
    assert a.task is b.task
    assert a.task is not c.task
    assert (a.floor["min_accuracy"].low, b.floor["min_accuracy"].low) == (0.5, 0.8)
    assert a.writing["limits"] == {"unstopped": 0.1}
    first, second, _ = (run_.source(name, "s", run_.settings) for name in names)
    assert first.texts["s"] is second.texts["s"]
    assert (first.max_drift.high, second.max_drift.high) == (1, 2)


def test_what_is_wrong_with_data_is_told_with_the_line_that_asks_for_them(
    two: pytest.Pytester,
) -> None:
    (two.path / "s.jsonl").write_text('{"txt": "some text"}\n')
    (two.path / "t.jsonl").write_text('{"prompt": "a"}\n')
    profile(
        two,
        '[sources.s]\npath = "s.jsonl"\n[tasks.t]\npath = "t.jsonl"\n'
        '[tasks.p]\npath = "t.jsonl"\ngrader = "regex"\npattern = "("\n',
    )
    run_ = _run_of(two)
    with pytest.raises(UsageError, match=r"lora.toml:1: .*s.jsonl:1: no field 'text'"):
        run_.source("adapters/good", "s", run_.settings)
    with pytest.raises(UsageError, match=r"lora.toml:3: .*lacks answer"):
        run_.task("adapters/good", "t")
    with pytest.raises(UsageError, match=r"lora.toml:5: the pattern '\('"):
        run_.task("adapters/good", "p")


def test_a_section_about_no_adapter_of_the_run_is_named(two: pytest.Pytester) -> None:
    profile(two, '[adapters."adapters/god"]\nscaling = 3.0\n[adapters."*"]\ncycles = 2\n')
    told = run(two, "--lora-adapter=adapters/good", "--co")
    told.stdout.fnmatch_lines(["lora: no adapter of this run matches ?adapters.'adapters/god'?*"])
    profile(two, '[adapters."adapters/good"]\nscaling = 4.0\n')
    run(two, "--lora-adapter=adapters/good", "--co").stdout.no_fnmatch_line("*no adapter of this*")


def _run_of(project: pytest.Pytester) -> Run:
    layer = Layer({"adapter": ("adapters/good",), "no_cache": True}, option_name)
    found = Run([layer], start=project.path, root=project.path)
    found.locate()
    return found


def test_humaneval_is_refused_before_the_run_without_permission(two: pytest.Pytester) -> None:
    (two.path / "humaneval.jsonl").write_text(
        '{"task_id": "x/0", "prompt": "def f():\\n", "entry_point": "f", '
        '"canonical_solution": "    return 1\\n", "test": "def check(f): assert f() == 1"}\n'
    )
    profile(two, '[tasks.humaneval]\npath = "humaneval.jsonl"\n')
    result = run(two, "--lora-adapter=adapters/good")
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*--lora-allow-code-execution*"])
    result.stdout.no_fnmatch_line("*_caller.py*")
    allowed = run(two, "--lora-adapter=adapters/good", "--lora-allow-code-execution", "--co", "-q")
    assert any("test_task_accuracy[adapters/good:humaneval]" in line for line in allowed.outlines)


@NEEDS_EXAMPLE
def test_a_task_of_lm_eval_is_a_test_of_the_suite(project: pytest.Pytester) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"one and {i}:", "choices": ["two", "red"], "answer": 0} for i in range(6)]
    items = project.path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"data_files": {"test": str(items)}, "cache_dir": str(project.path / "cache")}
    own = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metadata": {"version": 1},
    }
    (project.path / "own.yaml").write_text(json.dumps(own), encoding="utf-8")
    table = '[tasks.{}]\nlm_eval = "own.yaml"\nmin_accuracy = {}\n'
    profile(
        project,
        table.format("low", 0.0)
        + table.format("high", '"base + 90%"')
        + table.format("off", 0.0)
        + 'metric = "acc_nrom"\n',
    )
    words = [f"--lora-adapter={ADAPTERS / 'dora'}", f"--lora-base-model={FIXTURES / 'base'}"]
    words += ["--lora-checks=task_accuracy,generation_health", "--lora-no-cache"]
    result = run(project, *words, "--lora-report=out.json")
    found = {item["part"]: item for item in results(project) if item["check"] == "task_accuracy"}
    assert {part: item["outcome"] for part, item in found.items()} == {
        "low": "passed",
        "high": "failed",
        "off": "error",
    }
    assert "expected one of acc, acc_norm" in found["off"]["reason"]
    assert found["low"]["measurement"]["details"]["rules"]["lm_eval"]["task"] == "own"
    assert not [item for item in results(project) if item["check"] == "generation_health"]
    result.stdout.fnmatch_lines(["*task_accuracy?high?*FAIL*adapter minus base*"])
