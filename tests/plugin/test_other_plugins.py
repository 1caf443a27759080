"""Beside the plugins that suites really use: nothing is lost, doubled or hidden.

Each runs where its plugin is installed: ``nox -s plugins`` installs them all.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any, TypeAlias

import jsonschema
import pytest
from adapter_maker import lora_tensors, write_adapter
from example import QUICK

from pytest_lora.report.json_report import report_schema

OTHERS = ("xdist", "randomly", "reportlog", "html", "timeout", "rerunfailures")
FILES = (*QUICK, "-m", "lora", "--lora-checks=files", "--lora-report=r.json")
Verdicts: TypeAlias = list[tuple[str, str, str]]
CHECKS = ["adapter_files", "config_matches_weights", "finite_weights", "serving_profile"]


def needs(name: str) -> pytest.MarkDecorator:
    module = "xdist" if name == "xdist" else f"pytest_{name}"
    absent = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(absent, reason=f"needs pytest-{name} (nox -s plugins)")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\n")
    write_adapter(pytester.path / "good")
    bad = {**lora_tensors(), "base_model.model.stray": ((2,), float("nan"))}
    write_adapter(pytester.path / "bad", tensors=bad)
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    """In a process of its own: these plugins change what is global, seeds and signals for two."""
    return project.runpytest_subprocess(*FILES, "--lora-adapter=bad", "--lora-adapter=good", *words)


def verdicts(project: pytest.Pytester) -> Verdicts:
    report: dict[str, Any] = json.loads((project.path / "r.json").read_text("utf-8"))
    jsonschema.validate(report, report_schema())
    return [(row["adapter"], row["check"], row["outcome"]) for row in report["results"]]


@pytest.fixture
def alone(project: pytest.Pytester) -> Verdicts:
    """The verdicts of a run without any of the others."""
    blocked = [word for name in OTHERS for word in ("-p", f"no:{name}")]
    assert run(project, *blocked).ret == 1
    found = verdicts(project)
    assert [check for _, check, _ in found] == CHECKS * 2
    return found


@needs("xdist")
@pytest.mark.parametrize("distribution", ["load", "loadgroup", "worksteal", "each"])
def test_workers(project: pytest.Pytester, alone: Verdicts, distribution: str) -> None:
    assert run(project, "-n2", f"--dist={distribution}").ret == 1
    assert verdicts(project) == alone


@needs("randomly")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_order(project: pytest.Pytester, alone: Verdicts, seed: int) -> None:
    result = run(project, f"--randomly-seed={seed}", "-v")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"Using --randomly-seed={seed}"])
    assert verdicts(project) == alone


@needs("reportlog")
def test_a_report_log_has_the_verdicts(project: pytest.Pytester, alone: Verdicts) -> None:
    assert run(project, "--report-log=log.jsonl").ret == 1
    lines = map(json.loads, (project.path / "log.jsonl").read_text("utf-8").splitlines())
    carried = [json.loads(line["pytest_lora"]) for line in lines if "pytest_lora" in line]
    logged = [row for entry in carried for row in entry["results"]["results"]]
    assert sorted((row["adapter"], row["check"], row["outcome"]) for row in logged) == sorted(
        row for row in alone if row[2] != "skipped" or row[1] == "serving_profile"
    )


@needs("html")
def test_the_page_of_pytest_html_quotes_the_evidence(
    project: pytest.Pytester, alone: Verdicts
) -> None:
    assert run(project, "--html=page.html", "--self-contained-html").ret == 1
    page = (project.path / "page.html").read_text("utf-8")
    assert "finite_weights FAILED for bad: 1 problem" in page
    assert "base_model.model.stray" in page
    assert verdicts(project) == alone


@needs("timeout")
def test_a_check_that_takes_too_long_is_an_error_and_no_pass(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import time
        import pytest

        @pytest.fixture(autouse=True)
        def slow(request):
            if "finite_weights[good]" in request.node.name:
                time.sleep(60)
        """
    )
    result = run(project, "--timeout=1")
    assert result.ret == 1
    found = {(adapter, check): outcome for adapter, check, outcome in verdicts(project)}
    assert found["good", "finite_weights"] == "error"
    assert found["good", "serving_profile"] == "passed"
    result.stdout.fnmatch_lines(["  finite_weights *ERROR*Timeout*"])


FLAKY = """
    import pytest

    seen = []

    @pytest.fixture(autouse=True)
    def flaky(request):
        if "finite_weights[good]" in request.node.name:
            seen.append(1)
            if len(seen) == 1:
                raise OSError("the disk was busy")
"""


@needs("rerunfailures")
def test_a_check_that_is_run_again_counts_once_and_says_so(project: pytest.Pytester) -> None:
    project.makeconftest(FLAKY)
    result = run(project, "--reruns=1", "--junitxml=junit.xml")
    rows = json.loads((project.path / "r.json").read_text("utf-8"))["results"]
    assert [row["check"] for row in rows] == CHECKS * 2
    told = {(row["adapter"], row["check"]): (row["outcome"], row["reason"]) for row in rows}
    again = "attempt 2, the earlier ones failed"
    assert told["good", "finite_weights"] == ("passed", again)
    assert told["good", "adapter_files"] == ("passed", "")
    assert told["bad", "finite_weights"] == ("failed", again)
    result.stdout.fnmatch_lines(["  finite_weights *pass *; attempt 2, the earlier ones*"])
