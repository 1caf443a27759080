"""What the action and the pre-commit hook run, run here with the variables they would have."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from adapter_maker import write_adapter
from ci.github import CI, NEEDS_SHELL, Step
from example import EXAMPLE, FIXTURES, NEEDS_EXAMPLE, ROOT

from pytest_lora.cli import main

NEEDS_MODEL = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the model libraries"
)


@pytest.fixture
def step(tmp_path: Path) -> Step:
    folder = tmp_path / "work"
    folder.mkdir()
    return Step(folder)


@NEEDS_SHELL
def test_it_judges_and_leaves_its_reports(step: Step) -> None:
    name = "an adapter; touch x"
    write_adapter(step.folder / name)
    write_adapter(step.folder / "another")
    lines = f"{name}\n\nanother\n"
    done = step.run(CI / "check", ADAPTER=lines, REPORT="lora-report", CHECKS="files")
    assert done.returncode == 0, done.stdout + done.stderr
    left = {path.name for path in (step.folder / "lora-report").iterdir()}
    assert left == {"report.json", "report.html"}
    assert "2 adapters passed" in step.left("GITHUB_STEP_SUMMARY")
    assert not (step.folder / "x").exists()


@NEEDS_SHELL
def test_it_fails_for_a_faulty_adapter(step: Step) -> None:
    write_adapter(step.folder / "bad")
    (step.folder / "bad" / "adapter_config.json").write_text("{}")
    done = step.run(CI / "check", ADAPTER="bad", REPORT="lora-report", CHECKS="files")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "::error file=bad/adapter_config.json,line=1" in done.stdout


@NEEDS_SHELL
@NEEDS_MODEL
@NEEDS_EXAMPLE
def test_inputs_become_options(step: Step) -> None:
    """The example, its base, a profile, a folder for likelihoods and two workers."""
    done = step.run(
        CI / "check",
        ADAPTER=str(EXAMPLE),
        BASE_MODEL=str(FIXTURES / "base"),
        PROFILE=str(FIXTURES / "lora.toml"),
        CHECKS="perplexity_drift",
        LEDGERS=str(step.files / "ledgers"),
        WORKERS="1",
        REPORT="lora-report",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((step.folder / "lora-report" / "report.json").read_text("utf-8"))
    [result] = report["results"]
    assert result["bound"]["origin"].startswith("max_drift in ")
    assert any((step.files / "ledgers").iterdir())
    assert "created: 1/1 worker" in done.stdout


@NEEDS_SHELL
@pytest.mark.parametrize(
    ("variables", "extra"),
    [({}, ["."]), ({"EXTRAS": "model", "WORKERS": "auto"}, [".[model]", "pytest-xdist"])],
)
def test_what_is_installed(step: Step, variables: dict[str, str], extra: list[str]) -> None:
    assert words_of_python(step, CI / "install", **variables) == [["-m", "pip", "install", *extra]]


@NEEDS_SHELL
def test_it_installs(step: Step) -> None:
    """For true, from this folder, into one of its own."""
    pytest.importorskip("hatchling")
    target = step.files / "installed"
    options = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_TARGET": str(target)}
    done = step.run(CI / "install", PIP_NO_BUILD_ISOLATION="0", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (target / "pytest_lora" / "plugin.py").exists()


@NEEDS_SHELL
def test_one_session_of_nox_is_run(step: Step) -> None:
    ours, theirs = words_of_python(step, CI / "nox", SESSION="tests-3.12; x")
    assert ours == ["-m", "pip", "install", "-c", "constraints.txt", "nox"]
    assert theirs == ["-m", "nox", "-s", "tests-3.12; x"]


def words_of_python(step: Step, script: Path, **variables: str) -> list[list[str]]:
    """What a script calls ``python`` with, by one in its place that only takes notes."""
    notes = step.files / "notes"
    shim = step.files / "bin" / "python"
    shim.parent.mkdir()
    shim.write_text(
        f'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >>"{notes}"\necho >>"{notes}"\n'
    )
    shim.chmod(0o755)
    path = f"{shim.parent}:{step.variables['PATH']}"
    done = step.run(script, **variables, PATH=path)
    assert done.returncode == 0, done.stderr
    return [line.rstrip("\0").split("\0") for line in notes.read_text().splitlines()]


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


@pytest.mark.parametrize("broken", [False, True])
def test_the_hook_as_a_commit_runs_it(step: Step, broken: bool) -> None:
    write_adapter(step.folder / "a")
    config = step.folder / "a" / "adapter_config.json"
    if broken:
        config.write_text("{}")
    [entry] = re.findall(
        r"entry: pytest-lora (.*)", (ROOT / ".pre-commit-hooks.yaml").read_text("utf-8")
    )
    command = (
        (sys.executable, "-m", "pytest_lora.cli")
        if shutil.which("pytest-lora") is None
        else ("pytest-lora",)
    )
    done = step.run(*command, *shlex.split(entry), "a/adapter_config.json")
    assert done.returncode == int(broken), done.stdout + done.stderr


@NEEDS_SHELL
def test_the_job_for_gitlab(step: Step) -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((CI / "gitlab.yml").read_text("utf-8"))["lora"]
    write_adapter(step.folder / "adapters" / "a")
    installing = [line for line in job["script"] if "pip install" in line]
    assert installing == ['python -m pip install "pytest-lora[model]"']
    script = "\n".join(line for line in job["script"] if line not in installing)
    step.variables["PYTEST_ADDOPTS"] += " --lora-checks=files"
    done = step.run("sh", "-euc", script, **job["variables"])
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]):
        assert (step.folder / path).exists()
    assert 'tests="4"' in (step.folder / "junit.xml").read_text("utf-8")


def test_a_base_that_is_a_folder_needs_no_hub(step: Step) -> None:
    pytest.importorskip("torch")
    base = str(FIXTURES / "base")
    done = step.run(CI / "hub.py", "key", ADAPTER=str(EXAMPLE), BASE_MODEL=base)
    assert done.returncode == 0, done.stderr
    assert step.outputs["key"] == ""
    assert step.outputs["ledgers"] == str(step.files / "pytest-lora")
    done = step.run(CI / "hub.py", "warm", ADAPTER=str(EXAMPLE), BASE_MODEL=base)
    assert done.returncode == 0, done.stderr
    assert step.left("GITHUB_ENV") == "HF_HUB_OFFLINE=1\n"


@pytest.mark.parametrize("base", ["org/" + "x" * 300, "a\0b"])
def test_a_base_that_no_file_can_be_called_is_for_the_judging_to_report(
    step: Step, base: str
) -> None:
    pytest.importorskip("torch")
    write_adapter(step.folder / "odd", base_model_name_or_path=base)
    key = step.run(CI / "hub.py", "key", ADAPTER="odd")
    warm = step.run(CI / "hub.py", "warm", ADAPTER="odd", HF_HUB_OFFLINE="1")
    assert (key.returncode, warm.returncode) == (0, 0), key.stderr + warm.stderr
    assert warm.stdout.startswith("::notice title=pytest-lora::")
    assert step.left("GITHUB_ENV") == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_the_name_of_an_adapter_commands_nothing(step: Step) -> None:
    pytest.importorskip("torch")
    name = "::stop-commands::x ##[set-output name=key]y"
    base = str(FIXTURES / "base")
    missing = step.run(CI / "hub.py", "key", ADAPTER=name, BASE_MODEL=base)
    write_adapter(step.folder / name)
    there = step.run(CI / "hub.py", "warm", ADAPTER=name, BASE_MODEL=base)
    assert (missing.returncode, there.returncode) == (4, 0), there.stderr
    assert missing.stdout.startswith("::error::")
    assert len(missing.stdout.splitlines()) == 1
    assert there.stdout.startswith("base of ")
    assert "##[" not in missing.stdout + there.stdout
