"""--lora-baseline and --lora-update-baseline: what is written, what is judged, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_maker import write_adapter
from example import FIXTURES, NEEDS_EXAMPLE

pytest.importorskip("torch")
pytest.importorskip("peft")

from pytest_lora import subject

ADAPTERS = FIXTURES / "adapters"
PROFILE = """\
[sources.stories]
path = "texts.jsonl"
max_drift = "baseline + 0.1"

[tasks.facts]
path = "facts.jsonl"
min_accuracy = "baseline - 10%"
"""
FEW = "--lora-checks=perplexity_drift,task_accuracy,merge_equivalence"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CI", raising=False)
    pytester.makeini(
        f"[pytest]\nfilterwarnings = error\nlora_base_model = {FIXTURES / 'base'}\n"
        "lora_cache_dir = kept\nlora_baseline = b.json\n"
    )
    for name, source, count in (
        ("texts.jsonl", "source_heldout.jsonl", 48),
        ("facts.jsonl", "source_choices.jsonl", 48),
    ):
        lines = (FIXTURES / "data" / source).read_text("utf-8").splitlines()[:count]
        (pytester.path / name).write_text("\n".join(lines), encoding="utf-8")
    (pytester.path / "lora.toml").write_text(PROFILE, encoding="utf-8")
    return pytester


def run(project: pytest.Pytester, *words: str, adapter: str = "attention-lora") -> Any:
    return project.runpytest_inprocess(
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        f"--lora-adapter={ADAPTERS / adapter}",
        *words,
    )


def baseline(project: pytest.Pytester) -> Any:
    return json.loads((project.path / "b.json").read_text("utf-8"))


@NEEDS_EXAMPLE
def test_a_release_is_recorded_and_the_next_one_held_to_it(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested = []
    digest_of = subject._digest_of
    monkeypatch.setattr(
        subject, "_digest_of", lambda module, found: digested.append(1) or digest_of(module, found)
    )
    words = (FEW, "--lora-report=out.json")
    recorded = run(project, *words, "--lora-update-baseline")
    recorded.assert_outcomes(passed=3)
    assert len(digested) == 1, "the base of three results, with data and without, is digested once"
    recorded.stdout.fnmatch_lines(["*being recorded,*", "baseline b.json: 3 measurements recorded"])
    [entries] = baseline(project)["adapters"].values()
    assert sorted(entries) == [
        "merge_equivalence",
        "perplexity_drift[stories]",
        "task_accuracy[facts]",
    ]
    assert len(entries["perplexity_drift[stories]"]["by_item"]) == 48
    assert {"base", "device", "dtype", "versions.torch"} <= set(
        entries["merge_equivalence"]["facts"]
    )

    # The same adapter: nothing to find fault with, and no item is computed again.
    before = (project.path / "b.json").read_bytes()
    run(project, *words, "--lora-merge-equivalence=baseline").assert_outcomes(passed=3)
    report = json.loads((project.path / "out.json").read_text())
    notes = [item["measurement"]["details"]["notes"] for item in report["results"]]
    assert ["baseline" in " ".join(listed) for listed in notes] == [True, True, True]

    # A worse one, whatever its name, and with few documents.
    worse = run(project, *words, adapter="overtrained")
    worse.assert_outcomes(passed=1, failed=2)
    worse.stdout.fnmatch_lines(
        [
            "*perplexity_drift[[]stories[]] FAILED*",
            "*allowed: at most *(max_drift in lora.toml:3: baseline + 0.1)*",
        ]
    )
    report = json.loads((project.path / "out.json").read_text())
    drift = next(item for item in report["results"] if item["check"] == "perplexity_drift")
    assert drift["measurement"]["count"] < 48
    assert drift["measurement"]["details"]["domains"]["stories"]["baseline"]["paired"] is True
    assert (project.path / "b.json").read_bytes() == before, "nobody asked for an update"


@NEEDS_EXAMPLE
def test_a_baseline_made_otherwise_is_refused_by_the_name_of_what_differs(
    project: pytest.Pytester,
) -> None:
    run(project, "--lora-checks=perplexity_drift", "--lora-update-baseline")
    other = run(project, "--lora-checks=perplexity_drift", "--lora-dtype=float64")
    other.assert_outcomes(failed=1)
    other.stdout.fnmatch_lines(
        ["*not comparable: dtype was 'float32' and is 'float64'*--lora-update-baseline*"]
    )
    absolute = run(
        project,
        "--lora-checks=merge_equivalence",
        "--lora-merge-equivalence=baseline + 1",
    )
    absolute.assert_outcomes(failed=1)
    absolute.stdout.fnmatch_lines(["*no merge_equivalence recorded of *record it again*"])


@NEEDS_EXAMPLE
def test_a_change_in_the_domain_is_decided_by_pairs(project: pytest.Pytester) -> None:
    text = PROFILE + 'about = "domain"\n'
    (project.path / "lora.toml").write_text(text, encoding="utf-8")
    few = ("--lora-checks=task_accuracy", "--lora-report=out.json")
    run(project, *few, "--lora-update-baseline").assert_outcomes(passed=1)
    run(project, *few).assert_outcomes(passed=1)
    [item] = json.loads((project.path / "out.json").read_text())["results"]
    assert item["measurement"]["unit"] == "accuracy, since the baseline"
    assert item["measurement"]["value"] == 0
    assert item["measurement"]["low"] < 0 < item["measurement"]["high"]
    assert item["measurement"]["details"]["baseline"]["mcnemar_p"] == 1
    remarks = [text for text in item["measurement"]["details"]["notes"] if "baseline" in text]
    assert len(remarks) == 1
    assert remarks[0].endswith("unchanged")
    run(project, *few, adapter="overtrained").assert_outcomes(failed=1)


def test_without_a_baseline_a_relative_bound_is_an_error_and_no_pass(
    project: pytest.Pytester,
) -> None:
    project.makeini("[pytest]\n")
    write_adapter(project.path / "good")
    (project.path / "other.toml").write_text('[sources.stories]\npath = "texts.jsonl"\n')
    result = project.runpytest_inprocess("--lora-adapter=good", "-k", "drift")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*max_drift in lora.toml:3 is relative to a baseline: give --lora-baseline=FILE*"]
    )
    for check in ("perplexity-drift", "dtype-stability", "merge-equivalence"):
        option = project.runpytest_inprocess(
            "--lora-adapter=good", f"--lora-{check}=baseline + 1", "--lora-profile=other.toml"
        )
        assert option.ret == pytest.ExitCode.USAGE_ERROR
        option.stderr.fnmatch_lines([f"*--lora-{check} is relative to a baseline*"])
    project.makepyfile(
        """
        import pytest

        @pytest.mark.lora_bounds(merge_equivalence="baseline")
        def test_own(lora_bounds):
            lora_bounds["merge_equivalence"]
        """
    )
    own = project.runpytest_inprocess("--lora-adapter=good", "--lora-profile=other.toml", "-kown")
    own.assert_outcomes(failed=1)
    own.stdout.fnmatch_lines(["*marker lora_bounds(merge_equivalence=...) is relative to a *"])


@NEEDS_EXAMPLE
def test_a_check_made_for_each_task_is_held_to_the_entry_of_its_own(
    project: pytest.Pytester,
) -> None:
    sums = (FIXTURES / "data" / "target_tasks.jsonl").read_text("utf-8").splitlines()[:2]
    (project.path / "sums.jsonl").write_text("\n".join(sums), encoding="utf-8")
    (project.path / "lora.toml").write_text(
        '[tasks.sums]\npath = "sums.jsonl"\nmax_new_tokens = 8\n'
    )
    few = "--lora-checks=generation_diversity"
    run(project, few, "--lora-update-baseline").assert_outcomes(passed=1)
    [entries] = baseline(project)["adapters"].values()
    assert list(entries) == ["generation_diversity[sums]"]

    run(project, few, "--lora-generation-diversity=baseline").assert_outcomes(passed=1)
    better = run(project, few, "--lora-generation-diversity=baseline + 100")
    better.assert_outcomes(failed=1)
    better.stdout.fnmatch_lines(
        [
            "*generation_diversity[[]sums[]] FAILED*",
            "*allowed: at least 10* (--lora-generation-diversity: baseline + 100.0)",
        ]
    )


@NEEDS_EXAMPLE
def test_another_number_of_cycles_is_no_number_to_be_relative_to(project: pytest.Pytester) -> None:
    few = ("--lora-checks=unmerge_restoration", "--lora-unmerge-restoration=baseline")
    run(project, *few, "--lora-cycles=2", "--lora-update-baseline").assert_outcomes(passed=1)
    run(project, *few, "--lora-cycles=2").assert_outcomes(passed=1)
    other = run(project, *few, "--lora-cycles=1")
    other.assert_outcomes(failed=1)
    other.stdout.fnmatch_lines(["*not comparable: cycles was 2 and is 1; record it again*"])


@NEEDS_EXAMPLE
def test_inputs_of_ones_own_and_a_safe_merge_are_facts(project: pytest.Pytester) -> None:
    few = ("--lora-checks=merge_equivalence", "--lora-merge-equivalence=baseline + 1")
    run(project, *few, "--lora-update-baseline").assert_outcomes(passed=1)
    safe = run(project, *few, "--lora-safe-merge")
    safe.assert_outcomes(failed=1)
    safe.stdout.fnmatch_lines(["*not comparable: safe_merge was False and is True; *"])
    project.makeconftest(
        """
        import pytest, torch

        @pytest.fixture
        def lora_inputs():
            return {"input_ids": torch.tensor([[5, 6, 7]])}
        """
    )
    own = run(project, *few)
    own.assert_outcomes(failed=1)
    own.stdout.fnmatch_lines(["*not comparable: inputs was 'probe' and is '????????????????*'; *"])


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        ([], {}, "b.json: there is no baseline yet: record it with --lora-update-baseline"),
        (["--lora-update-baseline", "--lora-baseline=."], {}, "--lora-baseline: * is a folder"),
        (
            ["--lora-update-baseline"],
            {"CI": "true"},
            "--lora-update-baseline: CI is set, *--lora-update-baseline-in-ci does it nevertheless",
        ),
    ],
)
def test_what_cannot_be_meant_stops_the_run(
    project: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    environment: dict[str, str],
    says: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write_adapter(project.path / "good")
    result = project.runpytest_inprocess(
        "--lora-adapter=good", "--lora-checks=adapter_files", *words
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {says}"])


def test_an_update_names_its_file(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\n")
    result = project.runpytest_inprocess("--lora-update-baseline")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --lora-update-baseline: name the file*"])


@pytest.mark.parametrize("value", ["true", "1"])
def test_ci_may_update_when_asked_by_name(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("CI", value)
    write_adapter(project.path / "good")
    result = project.runpytest_inprocess(
        "--lora-adapter=good",
        "--lora-checks=adapter_files",
        "--lora-update-baseline-in-ci",
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["baseline b.json: 0 measurements recorded"])
    assert baseline(project) == {"schema": "pytest-lora/baseline/1", "adapters": {}}


def test_a_run_that_was_cut_short_writes_nothing(project: pytest.Pytester) -> None:
    write_adapter(project.path / "good")
    project.makepyfile("def test_stop(): raise KeyboardInterrupt")
    path = Path(project.path / "b.json")
    path.write_text('{"schema": "pytest-lora/baseline/1", "adapters": {}}')
    result = project.runpytest_subprocess(
        "--lora-adapter=good", "--lora-checks=adapter_files", "--lora-update-baseline"
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert path.read_text() == '{"schema": "pytest-lora/baseline/1", "adapters": {}}'


@NEEDS_EXAMPLE
def test_workers_record_the_same_file(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    run(project, FEW, "--lora-update-baseline")
    alone = (project.path / "b.json").read_text("utf-8")
    (project.path / "b.json").unlink()
    project.runpytest_subprocess(
        f"--lora-adapter={ADAPTERS / 'attention-lora'}", FEW, "--lora-update-baseline", "-n2"
    ).assert_outcomes(passed=3)
    assert (project.path / "b.json").read_text("utf-8") == alone
