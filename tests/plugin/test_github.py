"""What a run leaves on GitHub: the job's summary, a comment, marks at lines; nothing elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapter_maker import lora_tensors, write_adapter
from stack import since

from pytest_lora.report.github import COMMENT_MARK, Annotation, append_summary, workflow_command
from pytest_lora.report.markdown import SUMMARY_LIMIT

FILES = "--lora-checks=files"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytester.makeini("[pytest]\n")
    write_adapter(pytester.path / "good")
    write_adapter(pytester.path / "bad")
    config = pytester.path / "bad" / "adapter_config.json"
    content = {**json.loads(config.read_text()), "lora_dropout": 7}
    config.write_text(json.dumps(content, indent=2))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(pytester.path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "no:randomly", "-m", "lora", FILES, *arguments)


def errors(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if line.startswith("::error ")]


def test_the_summary_of_the_job_is_added_to(project: pytest.Pytester) -> None:
    summary = project.path / "summary.md"
    summary.write_text("before\n")
    run(project, "--lora-adapter=good", "--lora-adapter=bad")
    assert summary.read_text().startswith("before\n### LoRA: 1 of 2 adapters failed, 1 passed\n")


def test_a_run_without_adapters_leaves_nothing(project: pytest.Pytester) -> None:
    project.makepyfile("def test_mine(): pass")
    result = project.runpytest_inprocess()
    assert not errors(result)
    assert not (project.path / "summary.md").exists()


def test_elsewhere_nothing_is_left(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert not errors(run(project, "--lora-adapter=bad"))
    assert not (project.path / "summary.md").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("-q",),
        ("-n2",),
        pytest.param(("--no-summary",), marks=since("calls no summary hook then", pytest=(9, 2))),
    ],
)
def test_a_mark_stands_at_the_offending_key(project: pytest.Pytester, words: tuple[str]) -> None:
    text = (project.path / "bad" / "adapter_config.json").read_text()
    line = 1 + text[: text.index('"lora_dropout"')].count("\n")
    [error] = errors(run(project, "--lora-adapter=good", "--lora-adapter=bad", *words))
    assert error.startswith(
        f"::error file=bad/adapter_config.json,line={line},title=adapter_files%3A bad::"
    )
    assert "lora_dropout" in error
    assert "%0A" in error


@pytest.mark.parametrize("limit", ["0", '"baseline + 0.5"'])
def test_a_mark_stands_at_the_line_of_the_profile_that_set_the_bound(
    project: pytest.Pytester, limit: str
) -> None:
    (project.path / "lora.toml").write_text(
        f'# bounds\n[adapters."good"]\nmerge_equivalence = {limit}\n'
    )
    project.makepyfile(
        test_mine="""
        import pytest
        from pytest_lora.records import CheckResult, Measurement, Outcome, emit
        from pytest_lora.settings import bound_for

        @pytest.mark.lora
        def test_mine(lora_adapter, lora_settings):
            bound = bound_for(lora_settings, "merge_equivalence", recorded=1.0)
            emit(CheckResult("merge_equivalence", "good", Outcome.FAILED, part="wiki",
                 measurement=Measurement(2.0, "x", 1), bound=bound))
        """
    )
    result = run(project, "--lora-adapter=good", "--lora-profile=lora.toml", "test_mine.py")
    [error] = errors(result)
    assert error.startswith("::error file=lora.toml,line=3,title=merge_equivalence[wiki]%3A good::")


def test_a_file_outside_of_the_repository_is_not_marked(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(project.mkdir("elsewhere")))
    assert not errors(run(project, "--lora-adapter=bad"))


def test_a_comment_is_marked_and_within_the_limit(project: pytest.Pytester) -> None:
    run(project, "--lora-adapter=bad", "--lora-pr-comment=out/comment.md")
    text = (project.path / "out" / "comment.md").read_text("utf-8")
    assert text.startswith(f"{COMMENT_MARK}\n### LoRA: 1 adapter failed\n")


def test_a_comment_that_is_a_folder_is_refused(project: pytest.Pytester) -> None:
    result = run(project, "--lora-adapter=bad", "--lora-pr-comment=good")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --lora-pr-comment: *good is a folder"])


def test_a_summary_that_cannot_be_written_is_said(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project.path / "no" / "folder"))
    result = run(project, "--lora-adapter=good", "--lora-report=r.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["ERROR: *cannot write the summary*"])
    assert (project.path / "r.json").exists()


def test_a_full_summary_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("x" * (SUMMARY_LIMIT - 5))
    append_summary(path, [], {})
    assert path.stat().st_size <= SUMMARY_LIMIT


def test_an_adapter_cannot_give_commands(project: pytest.Pytester) -> None:
    """GitHub obeys a line that begins with ``::``, and ``##[`` anywhere in one."""
    evil = "x" * 70 + " ::add-mask::a ::stop-commands::b ##[error]c"
    write_adapter(project.path / "evil", tensors={**lora_tensors(), evil: ((2,), 1.0)})
    result = run(project, "--lora-adapter=evil", "--lora-adapter=bad")
    starts = [line.strip() for line in result.outlines if line.strip().startswith("::")]
    assert starts
    assert all(line.startswith("::error file=") for line in starts)
    assert "##[" not in result.stdout.str()


def test_commands_are_escaped_as_githubs_toolkit_does() -> None:
    line = workflow_command(Annotation("a,b:c.json", 3, "t: 100%\n", "m: 5%, x\r\n::error::y"))
    assert line == (
        "::error file=a%2Cb%3Ac.json,line=3,title=t%3A 100%25%0A::m: 5%25, x%0D%0A::error::y"
    )
