"""The example repository does what its README says, from training to a refused release."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ci.github import NEEDS_SHELL
from example import FIXTURES, NEEDS_EXAMPLE, QUICK, ROOT

EXAMPLE = ROOT / "examples" / "release-gate"
NEEDS_MODEL = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the model libraries"
)
# The checks that are not about data have tests of their own.
FEW = [*QUICK, "--lora-checks=adapter_files,perplexity_drift,task_accuracy"]
LEFT = ("adapters", "lora-report", "baseline.json", "__pycache__", ".pytest_cache")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the example, and of the base model where the example looks for it."""
    copy = tmp_path / "examples" / EXAMPLE.name
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns(*LEFT))
    shutil.copytree(FIXTURES / "base", tmp_path / "fixtures" / "base")
    return copy


def ci(repository: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
    return subprocess.run(
        ["sh", "ci.sh", *words],
        cwd=repository,
        env={
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTEST_ADDOPTS": shlex.join(FEW),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def gate_again(repository: Path, pytester: pytest.Pytester) -> pytest.RunResult:
    """What ``ci.sh gate`` runs after training, in this process, with the adapter as it is."""
    script = (repository / "ci.sh").read_text("utf-8").replace("\\\n", " ")
    [command] = re.findall(r"^exec python -m pytest (.*) \$update$", script, re.M)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        return pytester.runpytest_inprocess(*FEW, *shlex.split(command))


def results(repository: Path) -> dict[str, Any]:
    text = (repository / "lora-report" / "report.json").read_text("utf-8")
    return {item["check"]: item for item in json.loads(text)["results"]}


@NEEDS_SHELL
@NEEDS_MODEL
@NEEDS_EXAMPLE
@pytest.mark.usefixtures("model_libraries")
def test_a_release_is_recorded_kept_and_a_worse_one_refused(
    repository: Path, pytester: pytest.Pytester
) -> None:
    recorded = ci(repository, "record", CI="true")
    assert recorded.returncode == 0, recorded.stdout + recorded.stderr
    assert "baseline baseline.json: 2 measurements recorded" in recorded.stdout
    baseline = (repository / "baseline.json").read_text("utf-8")
    entries = json.loads(baseline)["adapters"]["adapters/problems"]
    reference = entries["perplexity_drift[stories]"]
    assert len(reference["by_item"]) == 64
    assert entries["task_accuracy[problems]"]["value"] >= 0.05

    assert gate_again(repository, pytester).ret == pytest.ExitCode.OK
    assert {item["outcome"] for item in results(repository).values()} == {"passed"}

    worse = ci(repository, "gate", "--learning-rate", "3e-2", CI="true")
    assert worse.returncode == 1, worse.stdout + worse.stderr
    left = results(repository)
    drift = left.pop("perplexity_drift")
    assert drift["outcome"] == "failed"
    assert drift["measurement"]["value"] > reference["value"] + 1
    assert {item["outcome"] for item in left.values()} == {"passed"}, "it solves the task as before"
    at = (EXAMPLE / "lora.toml").read_text("utf-8").splitlines()
    line = 1 + next(i for i, text in enumerate(at) if text.startswith("max_drift"))
    said = worse.stdout
    assert f"perplexity_drift[stories] FAILED for adapters/problems: {said_value(drift)}" in said
    assert "  worst: stories, stories.jsonl:" in said
    assert f"(max_drift in lora.toml:{line}: baseline + 0.05)" in said
    assert "  what to do: train fewer steps or at a lower learning rate" in said
    assert "FAILED" in (repository / "lora-report" / "report.html").read_text("utf-8").upper()
    assert (repository / "baseline.json").read_text("utf-8") == baseline, "nobody asked for it"


def said_value(result: dict[str, Any]) -> str:
    return f"{result['measurement']['value']:.3g} nats per token"


@NEEDS_SHELL
def test_a_wrong_word_trains_nothing(repository: Path) -> None:
    done = ci(repository, "gates")
    assert done.returncode == 2
    assert done.stderr == "usage: sh ci.sh record|gate [options of train.py]\n"
    assert not (repository / "adapters").exists()


def test_its_workflow_fits_the_action_and_the_script() -> None:
    yaml = pytest.importorskip("yaml")
    flow = yaml.safe_load((EXAMPLE / ".github" / "workflows" / "gate.yml").read_text("utf-8"))
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    steps = flow["jobs"]["gate"]["steps"]
    [given] = [step["with"] for step in steps if "pytest-lora@" in step.get("uses", "")]
    assert set(given) <= set(action["inputs"])
    script = (EXAMPLE / "ci.sh").read_text("utf-8")
    for name in ("adapter", "profile", "baseline"):
        assert f"--lora-{name}={given[name]} " in script
    runs = [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    assert f"python train.py --out {given['adapter']}" in runs
    assert "sh ci.sh record" in runs
