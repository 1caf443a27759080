"""``--lora-init``: a profile that is valid as written, and with all its examples uncommented."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from adapter_maker import write_adapter
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.adapter import read_adapter
from pytest_lora.errors import UsageError
from pytest_lora.init_profile import _one_line, _quoted, profile_text, write_profile
from pytest_lora.profile import Profile


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    write_adapter(pytester.path / "adapters" / "good")
    return pytester


def init(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "no:cacheprovider", "--lora-init", *words)


def test_the_profile_is_written_and_taken_by_the_next_run(project: pytest.Pytester) -> None:
    result = init(project, "--lora-adapter=adapters/good")
    result.stdout.fnmatch_lines([f"wrote {project.path / 'lora.toml'}"])
    assert result.ret == pytest.ExitCode.OK
    found = Profile.read(project.path / "lora.toml")
    [layer] = found.layers("adapters/good")
    assert layer.values == {"scaling": 4.0}
    judged = project.runpytest_inprocess("--lora-adapter=adapters/good", "--lora-checks=files")
    judged.assert_outcomes(passed=4, deselected=12)
    text = project.path.joinpath("lora.toml").read_text()
    project.path.joinpath("lora.toml").write_text(text.replace("scaling = 4.0", "scaling = 2.0"))
    judged = project.runpytest_inprocess("--lora-adapter=adapters/good", "--lora-checks=files")
    judged.assert_outcomes(passed=2, failed=1, skipped=1, deselected=12)


@pytest.mark.skipif(os.name != "posix", reason="permissions of files are POSIX's")
def test_others_may_read_it_as_any_file(tmp_path: Path) -> None:
    write_profile(tmp_path / "lora.toml", [])
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_an_existing_profile_is_never_overwritten(project: pytest.Pytester) -> None:
    (project.path / "lora.toml").write_text("# mine\n")
    result = init(project, "--lora-adapter=adapters/good")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *lora.toml: is there already*"])
    assert (project.path / "lora.toml").read_text() == "# mine\n"
    assert sorted(path.name for path in project.path.iterdir()) == ["adapters", "lora.toml"]


def test_the_named_profile_is_the_one_written(project: pytest.Pytester) -> None:
    init(project, "--lora-adapter=adapters/good", "--lora-profile=gate.toml")
    assert (project.path / "gate.toml").exists()


def test_without_an_adapter_there_is_nothing_to_write(project: pytest.Pytester) -> None:
    result = init(project)
    result.stderr.fnmatch_lines(["ERROR: --lora-init: name the adapters*"])
    assert not (project.path / "lora.toml").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "good"))
    with pytest.raises(UsageError, match=r"gone/lora\.toml: cannot write the profile: No such"):
        write_profile(tmp_path / "gone" / "lora.toml", [adapter])


def test_every_example_in_it_is_valid_once_uncommented(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "good"))
    text = re.sub(r"^# (?=\[|\w+ = )", "", profile_text([adapter]), flags=re.M)
    (tmp_path / "lora.toml").write_text(text)
    found = Profile.read(tmp_path / "lora.toml")
    [source], [task] = found.entries("sources", "any"), found.entries("tasks", "any")
    assert (source.get("max_drift"), task.get("min_accuracy").value) == (0.05, 0.8)
    assert [set(layer.values) for layer in found.layers(adapter.name)] == [
        {"dtype", "target"},
        {"scaling", "base_model"},
    ]


@given(st.text())
def test_any_name_is_quoted_for_toml(name: str) -> None:
    encodable = name.encode("utf-8", "replace").decode()  # files hold no lone surrogates
    assert tomllib.loads(f"name = {_quoted(encodable)} # {_one_line(name)}") == {"name": encodable}
