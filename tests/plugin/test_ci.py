"""What the action and the pre-commit hook run, run here with the variables they would have."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_maker import write_adapter
from example import ROOT

from pytest_lora.cli import main

NEEDS_SHELL = pytest.mark.skipif(sys.platform == "win32", reason="a script for a POSIX shell")


def check(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """The action's own step."""
    variables = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_WORKSPACE": str(folder),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "REPORT": "lora-report",
    }
    return subprocess.run(
        [ROOT / "ci" / "check"],
        cwd=folder,
        env={**os.environ, **variables, **inputs},
        capture_output=True,
        text=True,
        check=False,
    )


@NEEDS_SHELL
def test_the_action_judges_and_leaves_its_reports(tmp_path: Path) -> None:
    write_adapter(tmp_path / "an adapter; touch x")
    done = check(tmp_path, ADAPTER="an adapter; touch x", BASE_MODEL="", CHECKS="files")
    assert done.returncode == 0, done.stdout + done.stderr
    left = {path.name for path in (tmp_path / "lora-report").iterdir()}
    assert left == {"report.json", "report.html", "comment.md"}
    assert "1 adapter passed" in (tmp_path / "summary.md").read_text("utf-8")
    assert not (tmp_path / "x").exists()


@NEEDS_SHELL
def test_the_action_fails_for_a_faulty_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text("{}")
    done = check(tmp_path, ADAPTER="bad", CHECKS="files")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "::error file=bad/adapter_config.json,line=1" in done.stdout


def test_every_input_of_the_action_reaches_the_script_as_a_variable() -> None:
    text = (ROOT / "action.yml").read_text("utf-8")
    script = (ROOT / "ci" / "check").read_text("utf-8")
    passed = re.findall(r"^ +(\w+): \$\{\{ inputs\.[\w-]+ \}\}$", text, re.M)
    assert set(passed) - {"path"} == set(re.findall(r"\$\{?([A-Z_]+)", script))
    for line in re.findall(r"run: (.*)", text):
        assert "${{" not in line, "an input in a script would be read as shell"


def test_the_hook_judges_the_adapters_of_the_files_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "a")
    text = (ROOT / ".pre-commit-hooks.yaml").read_text("utf-8")
    [entry] = re.findall(r"entry: pytest-lora (.*)", text)
    [pattern] = re.findall(r"files: (.*)", text)
    files = sorted(str(path) for path in (tmp_path / "a").iterdir())
    chosen = [file for file in files if re.search(pattern, file)]
    assert len(chosen) == 2
    seen: list[list[str]] = []
    monkeypatch.setattr(pytest, "main", lambda words: seen.append(words) or 0)
    assert main([*shlex.split(entry), *chosen]) == 0
    folder = f"--lora-adapter={tmp_path / 'a'}"
    assert seen == [["-m", "lora", folder, "--lora-checks=files", "-q"]]
