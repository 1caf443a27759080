"""Both spellings of --lora-adapter, and adapters that try to run code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_maker import write_adapter

from pytest_lora import _argv

SPELLINGS = ["--lora-adapter={}", "--lora-adapter {}"]
LAUNCHERS = [["-m", "pytest"], None]


def write_hostile(folder: Path, witness: Path) -> Path:
    """An adapter whose every file that pytest might read leaves a trace when it is run."""
    write_adapter(folder)
    for name in ("evil.py", "conftest.py", "test_evil.py", "setup.py"):
        (folder / name).write_text(f"open({str(witness)!r}, 'a').write({name!r} + '\\n')\n")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p evil\npythonpath = .\n")
    return folder


def write_project(folder: Path) -> None:
    (folder / "pytest.ini").write_text("[pytest]\nlora_merge_equivalence = 7\nmarkers = mine\n")
    (folder / "conftest.py").write_text("def pytest_report_header(): return 'project conftest'\n")
    (folder / "test_mine.py").write_text("def test_mine(): pass\n")


def run(folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    program = [str(Path(sys.executable).parent / "pytest")] if command[0] != "-m" else []
    head = program or [sys.executable]
    return subprocess.run(
        [*head, *command],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("launcher", ["pytest", "python -m pytest"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_a_hostile_adapter_runs_nothing_and_the_project_counts(
    tmp_path: Path, spelling: str, launcher: str, inside: bool
) -> None:
    project, witness = tmp_path / "project", tmp_path / "witness"
    project.mkdir()
    write_project(project)
    folder = project / "adapters" / "bad" if inside else tmp_path / "bad"
    hostile = write_hostile(folder, witness)
    words = ["-m", "pytest"] if launcher.startswith("python") else []
    words += [*spelling.format(hostile).split(" "), "--lora-checks=files"]
    done = run(project, words)
    assert not witness.exists(), witness.read_text()
    assert "project conftest" in done.stdout
    assert "configfile: pytest.ini" in done.stdout
    assert f"rootdir: {project}" in done.stdout
    assert "test_mine.py ." in done.stdout
    assert "adapter_files" in done.stdout
    assert "FAILED lora/test_files::test_adapter_files" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_from_inside_a_hostile_adapter_the_run_stops(tmp_path: Path, spelling: str) -> None:
    witness = tmp_path / "witness"
    hostile = write_hostile(tmp_path / "bad", witness)
    done = run(hostile, spelling.format(".").split(" "))
    assert not witness.exists(), witness.read_text()
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "lies in the adapter" in done.stderr


def test_a_hostile_adapter_as_a_test_path_stops_the_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    hostile = write_hostile(tmp_path / "bad", witness)
    (hostile / "pytest.ini").unlink()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = run(tmp_path, [f"--lora-adapter={hostile}", "bad"])
    assert not witness.exists(), witness.read_text()
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "the test path" in done.stderr


def test_a_hostile_adapter_named_like_a_test_folder_stops_the_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    hostile = write_hostile(tmp_path / "test_adapter", witness)
    done = run(tmp_path, [f"--lora-adapter={hostile}"])
    assert not witness.exists(), witness.read_text()
    assert done.returncode == pytest.ExitCode.USAGE_ERROR


def test_addopts_from_the_environment_may_use_a_space(tmp_path: Path) -> None:
    write_project(tmp_path)
    adapter = write_adapter(tmp_path / "elsewhere" / "good")
    (adapter / "pytest.ini").write_text("[pytest]\n")
    done = run(
        tmp_path,
        ["--lora-checks=files", "-q"],
        PYTEST_ADDOPTS=f"--lora-adapter {adapter} -p no:cacheprovider",
    )
    assert "project conftest" in done.stdout or "LoRA adapters" in done.stdout
    assert "adapter_files" in done.stdout


def test_pytest_main_may_use_a_space(pytester: pytest.Pytester) -> None:
    write_project(pytester.path)
    adapter = write_adapter(pytester.path / "elsewhere" / "good")
    (adapter / "pytest.ini").write_text("[pytest]\n")
    result = pytester.runpytest_inprocess("--lora-adapter", str(adapter), "--lora-checks=files")
    result.stdout.fnmatch_lines(["project conftest", "*adapter_files*"])


def test_an_option_without_a_value_is_pytests_own_error(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--lora-adapter")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--lora-adapter: expected one argument*"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], []),
        (["-q", "x"], ["-q", "x"]),
        (["--lora-adapter", "a", "b"], ["--lora-adapter=a", "b"]),
        (["--lora-adapter", "a", "--lora-adapter", "b"], ["--lora-adapter=a", "--lora-adapter=b"]),
        (["--lora-adapter=a"], ["--lora-adapter=a"]),
        (["--lora-adapter"], ["--lora-adapter"]),
        (["--lora-adapter", "-q"], ["--lora-adapter", "-q"]),
        (["--", "--lora-adapter", "a"], ["--", "--lora-adapter", "a"]),
    ],
)
def test_join_values(before: list[str], after: list[str]) -> None:
    assert _argv.join_values(before) == after


def test_only_a_pytest_command_line_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["serve.py", "--lora-adapter", "a"]
    monkeypatch.setattr(sys, "argv", list(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments])
    modules = dict(sys.modules)
    try:
        _argv.repair()
        assert sys.argv == arguments
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest", *arguments[1:]])
        _argv.repair()
        assert sys.argv == ["serve.py", "--lora-adapter=a"]
    finally:
        sys.modules.update(modules)
