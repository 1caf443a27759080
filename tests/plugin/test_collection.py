"""Which tests the plugin adds, under which names, and how they are selected."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_maker import write_adapter

from pytest_lora.catalog import CHECKS, Need
from pytest_lora.collection import SuitePlan

NEEDY = sum(spec.need > Need.FILES for spec in CHECKS)
FILES = "--lora-checks=files"
NODE = "lora/test_files::test_finite_weights[adapters/good]"


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\n")
    write_adapter(pytester.path / "adapters" / "good")
    pytester.makepyfile(test_mine="def test_mine(): pass")
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "no:randomly", FILES, *arguments)


def test_a_run_without_an_adapter_is_left_alone(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("-p", "no:randomly")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*LoRA*")
    result.stdout.no_fnmatch_line("lora:*")


def test_the_suite_runs_beside_the_users_own_tests(project: pytest.Pytester) -> None:
    result = run(project, "--lora-adapter=adapters/good")
    result.assert_outcomes(passed=5, deselected=12)
    result.stdout.fnmatch_lines(
        ["lora: 1 adapter;*", "test_mine.py .*", "lora/test_files ....*", "*LoRA adapters*"]
    )


def test_node_ids_name_module_check_and_adapter(project: pytest.Pytester) -> None:
    result = run(project, "--lora-adapter=adapters/good", "--collect-only", "-q")
    assert NODE in result.stdout.lines


@pytest.mark.parametrize(
    ("selection", "passed"),
    [
        (["-m", "lora"], 4),
        (["-m", "not lora"], 1),
        (["-k", "finite_weights"], 1),
        (["-k", "good"], 4),
        (["--deselect", NODE], 4),
    ],
)
def test_pytest_selects(project: pytest.Pytester, selection: list[str], passed: int) -> None:
    result = run(project, "--lora-adapter=adapters/good", *selection)
    assert result.parseoutcomes()["passed"] == passed


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        (["--lora-checks=adapter_files"], 1),
        (["--lora-checks=adapter_files,finite_weights"], 2),
        (["--lora-checks=adapter_files", "--lora-checks=finite_weights"], 2),
        (["--lora-checks=files"], 4),
    ],
)
def test_lora_checks_selects(project: pytest.Pytester, words: list[str], passed: int) -> None:
    result = project.runpytest_inprocess(
        "-p", "no:randomly", "-m", "lora", "--lora-adapter=adapters/good", *words
    )
    assert result.parseoutcomes()["passed"] == passed


def test_an_unknown_check_is_a_usage_error(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("--lora-adapter=adapters/good", "--lora-checks=mergers")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --lora-checks: got*mergers*--lora-list-checks*"])


def test_an_adapter_that_is_not_there_is_a_usage_error(project: pytest.Pytester) -> None:
    result = run(project, "--lora-adapter=./adapters/missing")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert len(result.stderr.lines) <= 3
    result.stderr.fnmatch_lines(["ERROR: *adapters/missing*"])


def test_several_adapters_by_repetition_and_glob(project: pytest.Pytester) -> None:
    for name in ("b", "c"):
        write_adapter(project.path / "adapters" / name)
    repeated = run(project, "--lora-adapter=adapters/good", "--lora-adapter=adapters/b")
    repeated.assert_outcomes(passed=9, deselected=24)
    globbed = run(project, "--lora-adapter=adapters/*")
    globbed.assert_outcomes(passed=13, deselected=36)


def test_cheap_checks_run_first_over_all_adapters(project: pytest.Pytester) -> None:
    pytest.importorskip("torch", exc_type=ImportError)
    write_adapter(project.path / "adapters" / "other")
    result = project.runpytest_inprocess(
        "-p", "no:randomly", "-m", "lora", "--collect-only", "-q", "--lora-adapter=adapters/*"
    )
    ids = [line for line in result.stdout.lines if "::" in line]
    kinds = [line.split("::")[0] for line in ids]
    assert kinds[:8] == ["lora/test_files"] * 8
    assert kinds[8:10] == ["lora/test_base"] * 2
    adapters = [line.split("[")[1] for line in ids[10:]]
    assert adapters == sorted(adapters)


def test_last_failed_runs_what_failed(project: pytest.Pytester) -> None:
    write_adapter(project.path / "adapters" / "bad", lora_alpha=0)
    first = run(project, "--lora-adapter=adapters/*")
    failed = first.parseoutcomes()["failed"]
    second = run(project, "--lora-adapter=adapters/*", "--lf")
    assert second.parseoutcomes()["failed"] == failed
    assert "passed" not in second.parseoutcomes()


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "no:cacheprovider"],
        ["-p", "no:terminal"],
        ["-W", "error"],
        ["--strict-config", "--strict-markers"],
        ["-x"],
        ["--import-mode=importlib"],
        ["-o", "python_functions=check_*"],
        ["-o", "python_files=check_*.py"],
    ],
    ids=lambda words: " ".join(words),
)
def test_it_runs_under(project: pytest.Pytester, words: list[str]) -> None:
    result = run(project, "--lora-adapter=adapters/good", "--lora-report=out.json", *words)
    assert result.ret == pytest.ExitCode.OK
    assert (project.path / "out.json").read_text().count('"passed"') == 4


def test_with_no_plugin_the_option_is_unknown(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("-p", "no:lora", "--lora-adapter=adapters/good")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_from_a_subdirectory(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    below = project.path / "below"
    below.mkdir()
    (project.path / "conftest.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def lora_settings(lora_settings):\n"
        "    print('project settings')\n"
        "    return lora_settings\n"
    )
    monkeypatch.chdir(below)
    result = run(project, "-s", "--lora-adapter=../adapters/good")
    result.assert_outcomes(passed=4, deselected=12)
    result.stdout.fnmatch_lines(["*project settings*"])


def test_the_project_may_override_a_fixture(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import dataclasses
        import pytest

        @pytest.fixture
        def lora_settings(lora_settings):
            return dataclasses.replace(lora_settings, scaling=3.0)
        """
    )
    result = run(project, "--lora-adapter=adapters/good")
    result.assert_outcomes(passed=3, failed=1, skipped=1, deselected=12)
    result.stdout.fnmatch_lines(["*config_matches_weights FAILED for adapters/good*"])


def test_the_suite_may_be_imported(project: pytest.Pytester) -> None:
    project.makepyfile(test_ours="from pytest_lora.suite.test_files import *")
    result = run(project, "--lora-adapter=adapters/good", "test_ours.py", "-m", "not lora")
    result.assert_outcomes(passed=4, deselected=16)


def test_a_marker_names_the_adapter_of_a_test(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest
        from pytest_lora import assert_finite_weights

        @pytest.mark.lora_adapter("adapters/good")
        def test_it(lora_adapter):
            assert lora_adapter.r == 2
            assert_finite_weights(lora_adapter)
        """
    )
    result = project.runpytest_inprocess("-p", "no:randomly", "-k", "test_it")
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["*LoRA adapters*", "*finite_weights*pass*"])


def test_a_fixture_without_an_adapter_skips_with_the_reason(project: pytest.Pytester) -> None:
    project.makepyfile("def test_it(lora_adapter): pass")
    result = project.runpytest_inprocess("-p", "no:randomly", "-rs", "-k", "test_it")
    result.assert_outcomes(skipped=1, deselected=1)
    result.stdout.fnmatch_lines(["*--lora-adapter=PATH*"])


def test_list_checks(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("--lora-list-checks")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["adapter_files *", "*needs files; milliseconds*"])
    result.stdout.no_fnmatch_line("*test session starts*")


def test_ini_key_stands_for_the_option(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\nlora_adapter = adapters/good\nlora_checks = files\n")
    result = project.runpytest_inprocess("-p", "no:randomly")
    result.assert_outcomes(passed=5, deselected=12)


def test_ini_paths_are_relative_to_the_ini_file(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.makeini("[pytest]\nlora_adapter = adapters/good\nlora_checks = files\n")
    below = project.path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    result = project.runpytest_inprocess("-p", "no:randomly")
    result.assert_outcomes(passed=4, deselected=12)


def test_a_profile_sets_what_differs_between_adapters(project: pytest.Pytester) -> None:
    write_adapter(project.path / "adapters" / "other", lora_alpha=4)
    (project.path / "lora.toml").write_text(
        '[defaults]\nscaling = 4.0\n[adapters."*other"]\nscaling = 2.0\n'
    )
    result = run(project, "--lora-adapter=adapters/*", "--lora-profile=lora.toml", "-m", "lora")
    result.assert_outcomes(passed=8, deselected=25)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("scaling = 2", "*unknown table*scaling*"),
        ("[defaults]\nscalign = 2", "*scalign*did you mean 'scaling'*"),
        ("[defaults]\ndtype = 'int8'", "*dtype in *lora.toml*int8*float32*"),
        ("[adapters", "*not a TOML file*"),
        ("[sources.wiki]\nmax_drift = 1", "*[[]sources.wiki] has no 'path'*"),
        (None, "*cannot read the profile*"),
    ],
)
def test_a_broken_profile_is_a_usage_error(
    project: pytest.Pytester, profile: str | None, message: str
) -> None:
    if profile is not None:
        (project.path / "lora.toml").write_text(profile)
    result = run(project, "--lora-adapter=adapters/good", "--lora-profile=lora.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
    result.stdout.no_fnmatch_line("*ERROR collecting*")


def test_missing_libraries_stop_the_run(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_lora.run.missing_libraries", lambda: ("torch", "peft"))
    result = project.runpytest_inprocess("--lora-adapter=adapters/good")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: {NEEDY} of the selected checks need torch, peft*[[]model]*files*"]
    )
    limited = run(project, "--lora-adapter=adapters/good")
    limited.assert_outcomes(passed=5, deselected=12)


def test_the_adapters_folder_is_never_collected(project: pytest.Pytester) -> None:
    (project.path / "adapters" / "good" / "test_theirs.py").write_text("raise SystemExit(9)")
    result = run(project, "--lora-adapter=adapters/good", "-k", "mine")
    result.assert_outcomes(passed=1, deselected=16)


def test_an_empty_plan_is_not_a_pass(project: pytest.Pytester, tmp_path: Path) -> None:
    (project.path / "test_mine.py").unlink()
    result = run(project, "--lora-adapter=adapters/good", "-k", "nothing_like_this")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize("name", ["good", "caf\u00e9 \u2192 b", "back\\slash", "line\nfeed"])
def test_a_plan_knows_adapters_by_the_names_they_have(name: str) -> None:
    """Pytest escapes what is not plain ASCII where it makes node ids."""
    escaped = name.encode("unicode_escape").decode("ascii")
    plan = SuitePlan.of([f"lora/test_files::test_adapter_files[{escaped}]"])
    assert plan.planned == ((name, "adapter_files", ""),)
