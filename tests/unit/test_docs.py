"""The documentation is true: its examples run, its names exist, its tables are the code's."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
from adapter_maker import write_adapter
from example import EXAMPLE, NEEDS_EXAMPLE, ROOT
from pages import PAGES, Block, blocks

import pytest_lora
from pytest_lora import suite
from pytest_lora.catalog import CHECKS, Need
from pytest_lora.settings import option_name, table

IDS = [spec.id for spec in CHECKS]
OPTIONS = {option_name(name) for name, _ in table()} | {
    "--lora-list-checks",
    "--lora-init",
    "--lora-update-baseline",
    "--lora-update-baseline-in-ci",
    "--lora-contract",
    "--lora-contract-depth",
}
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
NEEDS_MODEL = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the model libraries"
)


def commands() -> list[tuple[Block, str]]:
    """Every command in a shell block, continued lines joined."""
    found = []
    for block in blocks("sh", "console", "bash"):
        lines = block.code.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            words = line.partition("  #")[0].strip()
            found += [(block, part.strip()) for part in words.split("&&") if part.strip()]
    return found


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTEST_ADDOPTS": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


# ----------------------------------------------------------------------------------- examples


@NEEDS_MODEL
@NEEDS_EXAMPLE
@pytest.mark.usefixtures("model_libraries")
@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_examples_run(
    block: Block, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: most need the model libraries, which take longer to import than to use."""
    path = pytester.path / "test_of_a_page.py"
    path.write_text(block.code, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    if re.search(r"^def test_", block.code, re.M):
        words = ["-q", "-p", "no:cacheprovider", "-W", "error", str(path)]
        assert pytester.runpytest_inprocess(*words).ret == pytest.ExitCode.OK
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("block", [b for b in blocks("toml") if "[tool.pytest" in b.code], ids=str)
def test_ini_examples_are_taken_by_pytest(block: Block, tmp_path: Path) -> None:
    if "[tool.pytest]" in block.code and int(pytest.__version__.partition(".")[0]) < 9:
        pytest.skip("the native table came with pytest 9")
    (tmp_path / "pyproject.toml").write_text(block.code, encoding="utf-8")
    (tmp_path / "lora.toml").write_text(profile_example().code, encoding="utf-8")
    for name in ("math-v3", "code"):
        write_adapter(tmp_path / "adapters" / name)
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n")
    options = ["--collect-only", "-q", "--strict-config", "-W", "error"]
    done = python("-m", "pytest", *options, "--lora-checks=files", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = done.stdout.split()
    assert "test_mine.py::test_mine" in collected
    for name in ("math-v3", "code"):
        assert f"lora/test_files::test_adapter_files[adapters/{name}]" in collected


def profile_example() -> Block:
    [block] = [block for block in blocks("toml") if "[adapters." in block.code]
    return block


def test_the_profile_example_means_what_it_says(tmp_path: Path) -> None:
    from pytest_lora.profile import Profile
    from pytest_lora.settings import resolve

    path = tmp_path / "lora.toml"
    path.write_text(profile_example().code, encoding="utf-8")
    settings = resolve(Profile.read(path).layers("adapters/math-v3"))
    assert (settings.dtype, settings.scaling, settings.cycles) == ("bfloat16", 2.0, 10)
    assert settings.hash_seeds == (0, 1, 2)
    assert resolve(Profile.read(path).layers("adapters/code")).scaling is None


@pytest.mark.parametrize("block", blocks("json", "toml"), ids=str)
def test_data_examples_parse(block: Block) -> None:
    import json

    {"json": json.loads, "toml": tomllib.loads}[block.language](block.code)


# ----------------------------------------------------------------------------------- commands

RUNS_PYTEST = re.compile(r"^(python -m )?pytest( |$)")
RUNS_NOX = re.compile(r"^(python -m )?nox( |$)")
INSTALLS = re.compile(r"^(python -m )?pip install ")
RUNS_SCRIPT = re.compile(r"^python (-m )?(?P<script>[\w/.]+)( |$)")
RUNS_SHELL = re.compile(r"^sh (?P<script>[\w/.-]+)( |$)")
PLAIN = re.compile(r"^(git clone|cd|\.|python -m venv) ")


@pytest.mark.parametrize(("block", "command"), commands(), ids=str)
def test_commands_name_only_what_exists(block: Block, command: str) -> None:
    if INSTALLS.match(command):
        check_install(command)
    elif RUNS_NOX.match(command):
        check_nox(command)
    elif RUNS_PYTEST.match(command):
        shlex.split(command)
    elif command.startswith("pytest-lora "):
        check_own(command)
    elif PLAIN.match(command) or command == ".ci/run":
        pass
    elif script := RUNS_SHELL.match(command):
        assert any((folder / script["script"]).is_file() for folder in (ROOT, block.page.parent))
    elif script := RUNS_SCRIPT.match(command):
        name = script["script"]
        assert (ROOT / name).exists() or (ROOT / name.replace(".", "/")).is_dir(), command
    else:
        pytest.fail(f"{block}: what is {command!r}?")


def check_own(command: str) -> None:
    """The console script takes these arguments."""
    from pytest_lora.cli import _parser

    given, further = _parser().parse_known_args(shlex.split(command)[1:])
    assert not further or given.command == "check"


def check_install(command: str) -> None:
    extras = project()["optional-dependencies"]
    for group in re.findall(r"\[([\w,]+)\]", command):
        assert set(group.split(",")) <= set(extras), command
    words = shlex.split(command)
    for option, file in itertools.pairwise(words):
        assert option not in ("-c", "-r") or (ROOT / file).exists(), command


def check_nox(command: str) -> None:
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^def ([a-z]\w*)\(session", text, re.M))
    words = shlex.split(command)
    if "-s" in words:
        named = [word.split("-")[0] for word in words[words.index("-s") + 1 :]]
        named = named[: named.index("")] if "" in named else named
        assert set(named) <= sessions, command


def project() -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return data


@NEEDS_MODEL
@NEEDS_EXAMPLE
def test_the_first_command_of_the_readme_judges_the_example() -> None:
    page = ROOT / "README.md"
    [command] = [
        command
        for block, command in commands()
        if block.page == page and command.endswith(f"={EXAMPLE.relative_to(ROOT).as_posix()}")
    ]
    assert command.startswith("python -m pytest ")
    done = python("-m", "pytest", *shlex.split(command)[3:], "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    once = [spec.id for spec in CHECKS if not spec.per and not spec.opt_in]
    assert f"{len(once)} passed" in done.stdout or " skipped" in done.stdout
    for check in once:
        assert re.search(rf"^  {check} +(pass|skip)", done.stdout, re.M), done.stdout


def test_ci_runs_the_test_command_of_the_readme_and_there_is_only_one() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    [pattern] = re.findall(r"\$\(grep '\^(.*)' README\.md\)", script)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in readme if re.match(pattern, line)]) == 1


# -------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"--lora-[a-z]+(?:-[a-z]+)*", text))
    assert named <= OPTIONS
    dead = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not dead


def maker(name: str) -> Any:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_settings_is_the_code() -> None:
    made = maker("make_settings_table")
    text = made.PAGE.read_text(encoding="utf-8")
    assert text == made.filled(text), "run python docs/make_settings_table.py"


def test_the_schema_of_profiles_is_the_code() -> None:
    made = maker("make_profile_schema")
    text = made.FILE.read_text(encoding="utf-8")
    assert text == made.text(), "run python docs/make_profile_schema.py"


@pytest.mark.parametrize("block", [b for b in blocks("toml") if "[tool." not in b.code], ids=str)
def test_profile_examples_fit_reader_and_schema(block: Block, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from pytest_lora.profile import Profile

    jsonschema.validate(tomllib.loads(block.code), maker("make_profile_schema").schema())
    path = tmp_path / "lora.toml"
    path.write_text(block.code, encoding="utf-8")
    Profile.read(path)


@pytest.mark.parametrize("check", IDS)
def test_every_check_has_its_five_pieces(check: str) -> None:
    """The table's entry is the first; a negative control is for tests/test_mutants.py to show."""
    assert callable(getattr(pytest_lora, f"assert_{check}", None))
    assert f"measure_{check}" in pytest_lora._HOMES
    folder = Path(suite.__path__[0])
    tests = "".join(path.read_text("utf-8") for path in folder.glob("test_*.py"))
    assert len(re.findall(rf"^def test_{check}\(", tests, re.M)) == 1
    page = ROOT / "docs" / "checks" / f"{check}.md"
    assert check in page.read_text("utf-8").splitlines()[0]


@NEEDS_MODEL
@pytest.mark.parametrize("check", IDS)
def test_every_measurement_can_be_imported(check: str) -> None:
    assert callable(getattr(pytest_lora, f"measure_{check}"))


def test_no_page_or_test_is_about_a_check_that_is_gone() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "checks").glob("*.md")}
    assert pages - {"README", "index"} <= set(IDS)
    folder = Path(suite.__path__[0])
    tests = "".join(path.read_text("utf-8") for path in folder.glob("test_*.py"))
    assert set(re.findall(r"^def test_(\w+)\(", tests, re.M)) == set(IDS)


def test_the_readme_lists_every_check() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert [check for check in IDS if f"docs/checks/{check}.md" not in text] == []


@pytest.mark.parametrize("need", Need)
def test_the_settings_page_names_every_group(need: Need) -> None:
    assert need.label in (ROOT / "docs" / "settings.md").read_text("utf-8")


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version = project()["version"]
    assert re.search(rf"^## \[?{re.escape(version)}\b", text, re.M) or "## [Unreleased]" in text


def test_every_public_name_is_in_all() -> None:
    assert set(pytest_lora._HOMES) == set(pytest_lora.__all__)
