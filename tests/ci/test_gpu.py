"""The script and the workflow that run the tests on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from example import ROOT

CI = ROOT / "ci"
WORKFLOW = (ROOT / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf-8")
PASSED = '<testcase classname="t.gpu" name="sound"/>'
SKIPPED = (
    '<testcase classname="t.gpu" name="left out"><skipped message="no CUDA device"/></testcase>'
)
FAILED = '<testcase classname="t.gpu" name="bad`[1]"><failure message="no"/></testcase>'
ERROR = '<testcase classname="t.gpu" name="broken"><error message="no"/></testcase>'


def summary(folder: Path, *cases: str) -> tuple[str, int]:
    if cases:
        text = f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"
        (folder / "gpu.xml").write_text(text)
    script = [sys.executable, str(CI / "gpu_summary.py"), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout, done.returncode


def test_counts_and_failures_are_told_and_tables_shown(tmp_path: Path) -> None:
    (tmp_path / "numbers.md").write_text("| a |\n| --- |\n")
    text, status = summary(tmp_path, PASSED, PASSED, SKIPPED, FAILED, ERROR)
    assert status == 0
    assert "2 passed, 2 failed, 1 skipped." in text
    assert "- `t.gpu::bad[1]`" in text
    assert "- `t.gpu::broken`" in text
    assert "### numbers\n\n| a |" in text


def test_a_machine_without_a_gpu_does_not_pass(tmp_path: Path) -> None:
    text, status = summary(tmp_path, SKIPPED, SKIPPED)
    assert (status, "No test ran" in text) == (1, True)
    (tmp_path / "gpu.xml").unlink()
    text, status = summary(tmp_path)
    assert (status, "did not come to an end" in text) == (1, True)


FAKE = """\
#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
    *"nox -s gpu --"*) for word; do last=$word; done
        echo "<testsuites>$CASES</testsuites>" > "${last#--junitxml=}"; exit "$STATUS";;
    *gpu_summary*) exec "$REAL" "$@";;
esac
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a script for a POSIX shell")
@pytest.mark.parametrize(
    ("cases", "status", "measure", "expected"),
    [(PASSED, "0", "false", 0), (FAILED, "1", "true", 1), (SKIPPED, "0", "true", 1)],
)
def test_the_jobs_script(
    tmp_path: Path, cases: str, status: str, measure: str, expected: int
) -> None:
    """With a ``python`` that says what it was asked for, and acts as the tests' runner."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    variables = {
        "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "REAL": sys.executable,
        "CASES": cases,
        "STATUS": status,
        "MEASURE": measure,
        "REPORT": str(tmp_path / "report"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }
    command = [str(CI / "gpu")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False)
    assert done.returncode == expected
    assert "## Tests on a GPU" in (tmp_path / "summary.md").read_text()
    assert ("nox -s gpu_numbers" in (tmp_path / "log").read_text()) == (measure == "true")


def test_no_pull_request_reaches_the_runner() -> None:
    triggers = WORKFLOW.partition("\npermissions:")[0].partition("\non:")[2]
    names = [line.strip(" :") for line in triggers.splitlines() if line[2:3].isalpha()]
    assert names == ["workflow_dispatch", "schedule"]
    assert "secrets." not in WORKFLOW
    assert "contents: read" in WORKFLOW
