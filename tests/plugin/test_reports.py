"""Verdicts in the terminal, in JSON and in JUnit; skips, errors and interrupted runs."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from adapter_maker import lora_tensors, write_adapter

from pytest_lora.report.json_report import report_schema

FILES = "--lora-checks=files"


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\n")
    write_adapter(pytester.path / "good")
    write_adapter(
        pytester.path / "bad",
        tensors={**lora_tensors(), "base_model.model.stray": ((2,), float("nan"))},
    )
    return pytester


def run(project: pytest.Pytester, *arguments: str, checks: str = FILES) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "no:randomly", "-m", "lora", checks, *arguments)


def read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    jsonschema.validate(report, report_schema())
    return report


def outcomes(report: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(item["adapter"], item["check"]): item["outcome"] for item in report["results"]}


def test_the_report_holds_every_check_in_a_stable_order(project: pytest.Pytester) -> None:
    path = project.path / "deep" / "er" / "report.json"
    run(project, "--lora-adapter=bad", "--lora-adapter=good", f"--lora-report={path}")
    report = read(path)
    assert [(item["adapter"], item["check"]) for item in report["results"]] == [
        (adapter, check)
        for adapter in ("bad", "good")
        for check in (
            "adapter_files",
            "config_matches_weights",
            "finite_weights",
            "serving_profile",
        )
    ]
    assert outcomes(report) == {
        ("good", "adapter_files"): "passed",
        ("good", "config_matches_weights"): "passed",
        ("good", "finite_weights"): "passed",
        ("good", "serving_profile"): "passed",
        ("bad", "adapter_files"): "passed",
        ("bad", "config_matches_weights"): "failed",
        ("bad", "finite_weights"): "failed",
        ("bad", "serving_profile"): "skipped",
    }
    assert report["environment"]["exit_status"] == 1
    assert set(report["environment"]["adapters"]) == {"bad", "good"}


def test_two_runs_write_the_same_but_for_times(project: pytest.Pytester) -> None:
    reports = []
    for name in ("one.json", "two.json"):
        run(project, "--lora-adapter=bad", f"--lora-report={name}")
        report = read(project.path / name)
        for item in report["results"]:
            item["seconds"] = 0.0
        reports.append(report)
    assert reports[0] == reports[1]


def test_a_failure_says_what_where_and_what_to_do(project: pytest.Pytester) -> None:
    result = run(project, "--lora-adapter=bad")
    result.stdout.fnmatch_lines(
        [
            "*finite_weights FAILED for bad: *",
            "*base_model.model.stray*",
            "*allowed: at most 0 (definition of the check)*",
            "*LoRA adapters*",
            "bad  LORA, r=2, on nowhere/base",
            "*finite_weights *FAIL*",
            "*serving_profile *skip*config_matches_weights did not pass*",
            "FAILED lora/test_files::test_finite_weights*finite_weights FAILED*",
        ]
    )
    result.stdout.no_fnmatch_line("*assertions.py*")


def test_quiet_shows_only_what_did_not_pass(project: pytest.Pytester) -> None:
    result = run(project, "-q", "--lora-adapter=good", "--lora-adapter=bad")
    result.stdout.no_fnmatch_line("good  LORA*")
    result.stdout.fnmatch_lines(["bad  LORA*"])
    assert "LoRA adapters" not in run(project, "-q", "--lora-adapter=good").stdout.str()


def test_no_summary_is_honoured(project: pytest.Pytester) -> None:
    result = run(project, "--no-summary", "--lora-adapter=good")
    result.stdout.no_fnmatch_line("*LoRA adapters*")


def test_a_base_that_cannot_be_had_is_one_error(project: pytest.Pytester) -> None:
    pytest.importorskip("torch", exc_type=ImportError)
    words = ("--lora-adapter=good", "--lora-report=r.json")
    checks = "--lora-checks=base_compatibility,merge_equivalence"
    result = run(project, *words, checks=checks)
    result.assert_outcomes(errors=1, skipped=1, deselected=14)
    result.stdout.fnmatch_lines(["*nowhere/base*hub cache*--lora-base-model=PATH*"])
    result.stdout.no_fnmatch_line("*loading.py*")
    found = outcomes(read(project.path / "r.json"))
    assert found["good", "base_compatibility"] == "error"
    assert found["good", "merge_equivalence"] == "skipped"
    alone = run(project, *words, checks="--lora-checks=merge_equivalence")
    alone.assert_outcomes(errors=1, deselected=15)


def test_what_a_failed_check_blocks_is_an_error_where_that_one_is_not_run(
    project: pytest.Pytester,
) -> None:
    result = run(project, "--lora-adapter=bad", checks="--lora-checks=serving_profile")
    result.assert_outcomes(errors=1, deselected=15)
    result.stdout.fnmatch_lines(["*config_matches_weights is not part of this run*"])
    chosen = run(project, "--lora-adapter=bad", "-k", "serving_profile")
    assert chosen.parseoutcomes()["errors"] == 1


def test_a_skip_has_its_reason_and_strict_makes_it_a_failure(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import pytest
        from pytest_lora import CannotRun

        @pytest.fixture
        def lora_settings():
            raise CannotRun("no room on this disk", missing=True)
        """
    )
    words = ("--lora-adapter=good", "--lora-report=r.json")
    result = run(project, *words, "-rs", checks="--lora-checks=adapter_files")
    result.assert_outcomes(skipped=1, deselected=15)
    result.stdout.fnmatch_lines(["SKIPPED*suite?test_files.py:*no room on this disk*"])
    strict = run(project, *words, "--lora-strict", checks="--lora-checks=adapter_files")
    strict.assert_outcomes(errors=1, deselected=15)  # decided in the setup of the test
    strict.stdout.no_fnmatch_line("*During handling*")
    [item] = read(project.path / "r.json")["results"]
    assert item["outcome"] == "failed"
    assert "--lora-strict" in item["reason"]


def test_a_broken_check_is_an_error(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import pytest

        @pytest.fixture
        def lora_settings():
            raise OSError("disk on fire")
        """
    )
    result = run(project, "--lora-adapter=good", "--lora-report=r.json")
    result.assert_outcomes(errors=1, skipped=3, deselected=12)
    report = read(project.path / "r.json")
    assert outcomes(report)["good", "adapter_files"] == "error"
    assert report["results"][0]["reason"] == "OSError: disk on fire"
    assert "adapter_files did not pass" in report["results"][1]["reason"]


def test_stopping_early_lists_what_was_not_run(project: pytest.Pytester) -> None:
    run(project, "-x", "--lora-adapter=bad", "--lora-adapter=good", "--lora-report=r.json")
    report = read(project.path / "r.json")
    late = [item for item in report["results"] if item["reason"].startswith("not run")]
    assert late
    assert {item["outcome"] for item in late} == {"skipped"}
    assert len(report["results"]) == 8


def test_an_interrupted_run_leaves_a_whole_report(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import pytest

        @pytest.fixture
        def lora_settings(lora_adapter):
            raise KeyboardInterrupt
        """
    )
    result = project.runpytest_subprocess(
        "-p", "no:randomly", FILES, "--lora-adapter=good", "--lora-report=r.json"
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    report = read(project.path / "r.json")
    assert len(report["results"]) == 4
    assert "passed" not in outcomes(report).values()


def test_a_cache_folder_that_is_a_file_is_refused(project: pytest.Pytester) -> None:
    (project.path / "cache").touch()
    result = run(project, "--lora-adapter=good", "--lora-cache-dir=cache")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --lora-cache-dir: *cache is not a folder"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.txt", "*not a .json file*"),
        (".", "*is not a .json*"),
        ("good.json", "*is a folder*"),
    ],
)
def test_a_report_that_cannot_be_written_is_a_usage_error(
    project: pytest.Pytester, name: str, message: str
) -> None:
    (project.path / "good.json").mkdir()
    result = run(project, "--lora-adapter=good", f"--lora-report={name}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --lora-report: {message}"])


def test_a_report_lost_at_the_end_is_said(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    result = run(project, "--lora-adapter=good", "--lora-report=r.json", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["ERROR: *r.json: cannot write the report: No space left*"])
    assert [entry.name for entry in project.path.glob("*r.json*")] == []


@pytest.mark.parametrize("words", [(), ("-n2",)])
def test_junit_files_are_what_strict_readers_accept(
    project: pytest.Pytester, words: tuple[str, ...]
) -> None:
    run(project, "--lora-adapter=good", "--lora-adapter=bad", "--junitxml=junit.xml", *words)
    root = ET.parse(project.path / "junit.xml").getroot()
    assert list(against_the_schema(root)) == []
    assert {p.get("name"): p.get("value") for p in root.iter("property")} == {
        "lora_verdict": "1 of 2 adapters failed, 1 passed",
        "lora_adapters": "2",
        "lora_passed": "5",
        "lora_failed": "2",
        "lora_skipped": "1",
        "lora_inconclusive": "0",
        "lora_error": "0",
    }


# What the schema of the format (JUnit 10, pytest's xunit2) has below each element.
JUNIT_SCHEMA = {
    "testsuites": {"testsuite"},
    "testsuite": {"properties", "testcase", "system-out", "system-err"},
    "properties": {"property"},
    "testcase": {"skipped", "error", "failure", "system-out", "system-err"},
}


def against_the_schema(element: ET.Element) -> Iterator[str]:
    for child in element:
        if child.tag not in JUNIT_SCHEMA.get(element.tag, ()):
            yield f"{child.tag} in {element.tag}"
        yield from against_the_schema(child)


def test_the_older_family_of_junit_has_short_properties_at_each_test(
    project: pytest.Pytester,
) -> None:
    run(project, "--lora-adapter=bad", "--junitxml=junit.xml", "-ojunit_family=xunit1")
    root = ET.parse(project.path / "junit.xml").getroot()
    [case] = [c for c in root.iter("testcase") if "test_finite_weights" in c.get("name", "")]
    found = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert found == {
        "lora_check": "finite_weights",
        "lora_adapter": "bad",
        "lora_outcome": "failed",
        "lora_measured": "1 problem (n=98)",
        "lora_allowed": "at most 0 (definition of the check)",
    }
    assert "properties in testcase" in list(against_the_schema(root))


def test_a_run_without_adapters_has_no_properties(project: pytest.Pytester) -> None:
    project.makepyfile("def test_mine(): pass")
    project.runpytest_inprocess("--junitxml=junit.xml")
    assert list(ET.parse(project.path / "junit.xml").getroot().iter("property")) == []


@pytest.mark.parametrize("distribution", ["load", "loadgroup"])
def test_workers_give_the_same_report(project: pytest.Pytester, distribution: str) -> None:
    words = ("--lora-adapter=bad", "--lora-adapter=good")
    run(project, *words, "--lora-report=alone.json")
    run(project, *words, "--lora-report=many.json", "-n2", f"--dist={distribution}")
    alone, many = (read(project.path / name) for name in ("alone.json", "many.json"))
    assert outcomes(alone) == outcomes(many)
    assert [item["check"] for item in alone["results"]] == [
        item["check"] for item in many["results"]
    ]


def test_one_run_writes_several_reports(project: pytest.Pytester) -> None:
    words = [f"--lora-report=out/r{suffix}" for suffix in (".json", ".md", ".HTML")]
    result = run(project, "--lora-adapter=bad", "--lora-adapter=good", *words)
    assert result.ret == 1
    report = read(project.path / "out" / "r.json")
    markdown = (project.path / "out" / "r.md").read_text("utf-8")
    page = (project.path / "out" / "r.HTML").read_text("utf-8")
    assert markdown.startswith("### LoRA: 1 of 2 adapters failed, 1 passed")
    assert "<h1>LoRA: 1 of 2 adapters failed, 1 passed</h1>" in page
    for item in report["results"]:
        assert item["check"] in page
        assert item["check"].replace("_", "\\_") in markdown


def test_reports_can_be_set_in_an_ini_file(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\nlora_report =\n    r.json\n    r.html\n")
    run(project, "--lora-adapter=good")
    assert (project.path / "r.json").exists()
    assert (project.path / "r.html").exists()


def test_a_report_says_how_to_make_it_again(project: pytest.Pytester) -> None:
    (project.path / "lora.toml").write_text('[adapters."good"]\nscaling = 0.5\n')
    words = ("--lora-adapter=good", "--lora-profile=lora.toml", "--lora-report=r.json")
    run(project, *words)
    environment = read(project.path / "r.json")["environment"]
    assert environment["command"] == (
        "python -m pytest -m lora --lora-adapter=good --lora-checks=files --lora-profile=lora.toml"
    )
    settings = environment["settings"]["good"]
    assert settings["scaling"]["value"] == 0.5
    assert settings["scaling"]["origin"].startswith("scaling in ")
    assert "report" not in settings
    weights = (project.path / "good" / "adapter_model.safetensors").read_bytes()
    assert environment["digests"]["good"]["adapter_model.safetensors"] == (
        f"sha256:{hashlib.sha256(weights).hexdigest()}"
    )


def test_workers_that_stop_early_leave_a_whole_report(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import os
        import pytest

        @pytest.fixture
        def lora_settings(lora_adapter):
            os._exit(3)
        """
    )
    run(project, "--lora-adapter=good", "--lora-report=r.json", "-n1", "--max-worker-restart=0")
    report = read(project.path / "r.json")
    assert len(report["results"]) == 4
