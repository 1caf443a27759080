"""Workflows and actions hold no program: each ``run`` calls one script, which the tests run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example import ROOT

yaml = pytest.importorskip("yaml")

ACTIONS = [ROOT / "action.yml", *sorted((ROOT / "ci").glob("*/action.yml"))]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CALL = re.compile(
    r'(?P<script>\.?ci/\w+)|(?:python )?"\$GITHUB_ACTION_PATH/(?P<own>[\w./]+)"(?: [a-z]+)?'
)


def steps_of(file: Path) -> Iterator[dict[str, Any]]:
    data = yaml.safe_load(file.read_text("utf-8"))
    groups = [data["runs"]] if "runs" in data else data["jobs"].values()
    for group in groups:
        yield from group.get("steps", [])


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.mark.parametrize("file", names([*ACTIONS, *WORKFLOWS]))
def test_each_run_is_one_script_of_the_repository(file: str) -> None:
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for step in steps_of(ROOT / file):
        if "run" not in step:
            continue
        call = CALL.fullmatch(step["run"])
        assert call, step["run"]
        folder = (ROOT / file).parent if call["own"] else ROOT
        script = (folder / (call["own"] or call["script"])).resolve()
        assert script.is_file()
        assert script.name == "run" or f'CI / "{script.name}"' in tests, "no test runs it"


@pytest.mark.parametrize("file", names(ACTIONS))
def test_every_input_reaches_a_script_as_a_variable(file: str) -> None:
    data = yaml.safe_load((ROOT / file).read_text("utf-8"))
    text = (ROOT / file).read_text("utf-8")
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(data.get("inputs", {}))
    for step in data["runs"]["steps"]:
        if "run" in step and "env" in step:
            script = (
                step["run"].split('"')[1].replace("$GITHUB_ACTION_PATH", str((ROOT / file).parent))
            )
            program = Path(script).read_text("utf-8")
            assert [name for name in step["env"] if name not in program] == []


@pytest.mark.parametrize("script", ["check", "gpu", "install", "nox"])
def test_a_script_reads_the_variables_it_tells_of(script: str) -> None:
    lines = (ROOT / "ci" / script).read_text("utf-8").splitlines()
    told = re.findall(r"\b[A-Z]{4,}\b", " ".join(line for line in lines if line[:1] == "#"))
    read = re.findall(r"\$\{?([A-Z_]+)", " ".join(line for line in lines if line[:1] != "#"))
    assert set(told) - {"CUDA"} <= set(read)


@pytest.mark.parametrize("file", names(WORKFLOWS))
def test_a_workflow_asks_for_little(file: str) -> None:
    data = yaml.safe_load((ROOT / file).read_text("utf-8"))
    assert data["permissions"] == {"contents": "read"}
    for job in data["jobs"].values():
        assert "timeout-minutes" in job
        writes = [scope for scope, right in job.get("permissions", {}).items() if right == "write"]
        if writes:  # a job that may write has no checkout, so no code of a pull request
            assert writes == ["pull-requests"]
            assert not any("checkout" in step.get("uses", "") for step in job["steps"])


@pytest.mark.parametrize("file", ["lora-comment.yml", "lora-gpu.yml"])
def test_a_comment_is_written_also_where_there_is_no_report(file: str) -> None:
    """Under the name of its artifact, and knowing how the run ended."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / file).read_text("utf-8"))["jobs"]
    download, _, comment = jobs["comment"]["steps"]
    assert download["continue-on-error"] is True
    assert not [step for step in jobs["comment"]["steps"] if "if" in step]
    assert comment["with"]["name"] == download["with"]["name"]
    assert re.fullmatch(r"\$\{\{ .+\.(conclusion|result) \}\}", comment["with"]["conclusion"])


def test_reports_that_are_commented_on_have_names_of_their_own() -> None:
    found = []
    for file in WORKFLOWS:
        for step in steps_of(file):
            if "/ci/comment@" in step.get("uses", ""):
                found.append(step["with"]["name"])
    assert sorted(set(found)) == sorted(found) == ["lora-report-cpu", "lora-report-gpu"]


def test_only_planned_adapters_reach_a_gpu() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/lora-gpu.yml").read_text("utf-8"))["jobs"]
    assert "needs.plan.outputs.gpu == 'true'" in jobs["gpu"]["if"]
    assert jobs["gpu"]["permissions"] == {"contents": "read"}
    refs = [
        step["with"]["ref"] for step in jobs["gpu"]["steps"] if "checkout" in step.get("uses", "")
    ]
    assert refs == ["${{ needs.plan.outputs.ref }}"]


def test_what_checks_a_fork_out_does_nothing_where_the_repository_is_trusted() -> None:
    data = yaml.safe_load((ROOT / ".github" / "workflows" / "lora-cpu.yml").read_text("utf-8"))
    [job] = data["jobs"].values()
    assert job["if"] == "${{ github.event_name != 'pull_request_target' }}"
