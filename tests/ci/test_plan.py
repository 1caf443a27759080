"""Which adapters an event is about, and who may reach a GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ci.github import CI, Step

FOLDERS = ("adapters/a", "adapters/b c", "other/d")


class Repository:
    """A git repository with three adapters, and commits upon that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "-q")
        for adapter in FOLDERS:
            self.write(f"{adapter}/adapter_config.json", "{}")
        self.start = self.commit(**{"lora.toml": "#"})

    def git(self, *words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@localhost")
        command = ["git", *who, *words]
        return subprocess.run(
            command, cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def commit(self, **files: str) -> str:
        for name, text in files.items():
            self.write(name, text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "x")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "work")


def plan(
    repository: Repository,
    event_name: str,
    event: Any,
    sha: str,
    patterns: str = "adapters/*",
    also: str = "lora.toml\n",
) -> dict[str, str]:
    step = Step(repository.folder, event_name, event)
    done = step.run(CI / "plan.py", GITHUB_SHA=sha, ADAPTERS=patterns, ALSO=also)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::notice title=pytest-lora::" in done.stdout
    return dict(step.outputs)


def pull(repository: Repository, head: str, source: str | None, **more: Any) -> dict[str, Any]:
    repo = {"full_name": source} if source else None
    base = {"sha": repository.start, "repo": {"full_name": "our/adapters"}}
    return {
        "pull_request": {"number": 7, "head": {"sha": head, "repo": repo}, "base": base},
        **more,
    }


def test_a_push_is_about_the_adapters_it_changed(repository: Repository) -> None:
    sha = repository.commit(**{"adapters/b c/x": "1", "other/d/x": "1", "README": "1"})
    found = plan(repository, "push", {"before": repository.start}, sha)
    assert found == {
        "adapters": "adapters/b c",
        "any": "true",
        "gpu": "true",
        "ref": sha,
    }


def test_a_removed_adapter_is_not_judged(repository: Repository) -> None:
    (repository.folder / "adapters/a/adapter_config.json").unlink()
    sha = repository.commit()
    assert plan(repository, "push", {"before": repository.start}, sha)["any"] == "false"


def test_the_last_adapter_may_be_removed_but_not_moved_out_of_sight(
    repository: Repository,
) -> None:
    for adapter in FOLDERS:
        repository.git("rm", "-rq", adapter)
    gone = repository.commit()
    found = plan(repository, "pull_request", pull(repository, gone, "our/adapters"), gone)
    assert (found["adapters"], found["any"]) == ("", "false")
    moved = repository.commit(**{"adaptors/a/adapter_config.json": "{}"})
    for event, sha in ((pull(repository, moved, "our/adapters"), moved), ({}, gone)):
        name = "pull_request" if event else "schedule"
        step = Step(repository.folder, name, event)
        done = step.run(CI / "plan.py", GITHUB_SHA=sha, ADAPTERS="adapters/*", ALSO="")
        assert done.returncode == 1
        assert "::error::no adapter matches adapters/*" in done.stdout


@pytest.mark.parametrize("before", ["0" * 40, "1" * 40], ids=["new branch", "rewritten"])
def test_without_a_start_all_are_judged(repository: Repository, before: str) -> None:
    found = plan(repository, "push", {"before": before}, repository.start)
    assert found["adapters"].splitlines() == ["adapters/a", "adapters/b c"]


def test_nightly_and_for_a_changed_profile_all_are_judged(repository: Repository) -> None:
    every = ["adapters/a", "adapters/b c"]
    assert plan(repository, "schedule", {}, repository.start)["adapters"].splitlines() == every
    sha = repository.commit(**{"lora.toml": "# other"})
    found = plan(repository, "push", {"before": repository.start}, sha)
    assert found["adapters"].splitlines() == every


def test_a_pull_request_of_the_repository_reaches_the_gpu(repository: Repository) -> None:
    head = repository.commit(**{"adapters/a/x": "1"})
    event = pull(repository, head, "our/adapters")
    found = plan(repository, "pull_request_target", event, repository.start)
    assert (found["gpu"], found["ref"]) == ("true", head)
    assert found["adapters"] == "adapters/a"


@pytest.mark.parametrize("source", ["fork/adapters", None], ids=["fork", "deleted fork"])
@pytest.mark.parametrize("event_name", ["pull_request", "pull_request_target"])
def test_a_fork_reaches_no_gpu(repository: Repository, source: str | None, event_name: str) -> None:
    head = repository.commit(**{"adapters/a/x": "1"})
    event = pull(repository, head, source, action="labeled", label={"name": "gpu"})
    found = plan(repository, event_name, event, repository.start)
    assert (found["gpu"], found["adapters"]) == ("false", "adapters/a")


@pytest.mark.parametrize("source", ["fork/adapters", "our/adapters"])
@pytest.mark.parametrize("event_name", ["pull_request_review", "pull_request_review_comment"])
def test_a_review_reaches_no_gpu(repository: Repository, source: str, event_name: str) -> None:
    head = repository.commit(**{"adapters/a/x": "1"})
    found = plan(repository, event_name, pull(repository, head, source), repository.start)
    assert (found["gpu"], found["adapters"], found["ref"]) == ("false", "adapters/a", head)


@pytest.mark.parametrize("event_name", ["workflow_run", "issue_comment", "merge_group", "new"])
def test_an_event_that_is_not_known_reaches_no_gpu(repository: Repository, event_name: str) -> None:
    assert plan(repository, event_name, {}, repository.start)["gpu"] == "false"


@pytest.mark.parametrize("event_name", ["schedule", "workflow_dispatch", "release"])
def test_who_may_write_reaches_the_gpu(repository: Repository, event_name: str) -> None:
    assert plan(repository, event_name, {}, repository.start)["gpu"] == "true"


@pytest.mark.parametrize("pattern", [".", "./", "*"])
def test_an_adapter_in_the_root_is_judged_for_any_change(
    repository: Repository, pattern: str
) -> None:
    start = repository.commit(**{"adapter_config.json": "{}"})
    sha = repository.commit(README="1")
    found = plan(repository, "push", {"before": start}, sha, patterns=pattern, also="")
    assert found["adapters"] == "."


@pytest.mark.parametrize("pattern", ["./adapters/*", "adapters/*/", "adapters//*"])
def test_the_same_pattern_may_be_written_otherwise(repository: Repository, pattern: str) -> None:
    sha = repository.commit(**{"adapters/a/x": "1"})
    found = plan(repository, "push", {"before": repository.start}, sha, patterns=pattern)
    assert found["adapters"] == "adapters/a"
    sha = repository.commit(**{"lora.toml": "# other"})
    event = {"before": f"{sha}~"}
    every = plan(repository, "push", event, sha, patterns=pattern, also="./lora.toml")
    assert every["adapters"].splitlines() == ["adapters/a", "adapters/b c"]


@pytest.mark.parametrize("event_name", ["schedule", "push"])
def test_patterns_that_nothing_matches_are_refused(repository: Repository, event_name: str) -> None:
    step = Step(repository.folder, event_name, {"before": repository.start})
    done = step.run(CI / "plan.py", GITHUB_SHA=repository.start, ADAPTERS="adapter/*\nmore")
    assert done.returncode == 1
    assert done.stdout == (
        "::error::no adapter matches adapter/*, more: the adapters of this commit are "
        "adapters/a, adapters/b c, other/d\n"
    )
    assert step.outputs == {}


def test_a_commit_without_adapters_is_said_to_be_one(repository: Repository) -> None:
    for folder in FOLDERS:
        (repository.folder / folder / "adapter_config.json").unlink()
    step = Step(repository.folder, "schedule")
    done = step.run(CI / "plan.py", GITHUB_SHA=repository.commit(), ADAPTERS="adapters/*")
    assert done.returncode == 1
    assert (
        "no adapter matches adapters/*: none of its folders has an adapter_config.json"
        in done.stdout
    )


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
@pytest.mark.parametrize("name", ["::stop-commands::x", "##[set-output name=gpu]true"])
def test_a_name_commands_nothing(repository: Repository, name: str) -> None:
    sha = repository.commit(**{f"{name}/adapter_config.json": "{}"})
    step = Step(repository.folder, "schedule")
    for patterns in ("*", "nothing"):
        done = step.run(CI / "plan.py", GITHUB_SHA=sha, ADAPTERS=patterns)
        starts = [line for line in done.stdout.splitlines() if line.startswith("::")]
        assert all(line.startswith(("::notice title=", "::error::")) for line in starts)
        assert "##[" not in done.stdout + done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_name_with_a_line_break_is_refused(repository: Repository) -> None:
    sha = repository.commit(**{"adapters/x\ny/adapter_config.json": "{}"})
    step = Step(repository.folder, "schedule")
    done = step.run(CI / "plan.py", GITHUB_SHA=sha, ADAPTERS="adapters/*")
    assert done.returncode == 1
    assert (
        r"::error::an adapter folder with a name no report can show: 'adapters/x\ny'" in done.stdout
    )
