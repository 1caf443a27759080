"""Comments, posted to a server that answers as GitHub does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ci.github import CI, Step

from pytest_lora.records import CheckResult, Outcome
from pytest_lora.report.github import COMMENT_MARK, comment_mark
from pytest_lora.report.json_report import build_report, write_report

NAME = "lora-report-gpu"
MARK = comment_mark(NAME)
PULL = {"pull_request": {"number": 7, "head": {"sha": "abc"}}}
RUN = {
    "workflow_run": {
        "event": "pull_request",
        "head_branch": "theirs",
        "head_sha": "abc",
        "head_repository": {"owner": {"login": "fork"}},
    }
}


class GitHub(HTTPServer):
    """What it was asked to write, and what it answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.comments: list[dict[str, Any]] = []
        self.written: list[tuple[str, str, str]] = []
        self.sha = "abc"
        self.forbidden = False


class Answer(BaseHTTPRequestHandler):
    server: GitHub

    def do_GET(self) -> None:
        if self.path.endswith("/pulls/7"):
            self.say({"number": 7, "head": {"sha": self.server.sha}})
        elif "/pulls?" in self.path:
            assert "head=fork%3Atheirs" in self.path
            self.say([{"number": 7, "head": {"sha": self.server.sha}}])
        else:
            page = int(self.path.rpartition("page=")[2]) - 1
            self.say(self.server.comments[page * 100 : (page + 1) * 100])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.written.append((self.command, self.path, body["body"]))
        self.say({}, 403 if self.server.forbidden else 200)

    do_PATCH = do_POST  # noqa: N815  # the server's name for it

    def say(self, answer: Any, status: int = 200) -> None:
        assert self.headers["Authorization"] == "Bearer secret"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def github() -> Iterator[GitHub]:
    with GitHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def post(
    github: GitHub, folder: Path, event_name: str, event: Any, expected: int = 0, **more: str
) -> str:
    step = Step(folder, event_name, event)
    variables = {
        "GITHUB_API_URL": f"http://127.0.0.1:{github.server_port}",
        "TOKEN": "secret",
        "REPORT": "report.json",
        "NAME": NAME,
    }
    done = step.run(CI / "comment.py", **{**variables, **more})
    assert done.returncode == expected, done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    result = CheckResult("adapter_files", "@everyone <img src=x>", Outcome.FAILED, reason="[a](b)")
    write_report(tmp_path / "work" / "report.json", build_report([result], {}))
    return tmp_path / "work"


def test_a_comment_is_written_and_means_only_itself(github: GitHub, folder: Path) -> None:
    assert "comment written" in post(github, folder, "pull_request", PULL)
    [(method, path, text)] = github.written
    assert (method, path) == ("POST", "/repos/our/adapters/issues/7/comments")
    assert text.startswith(f"{MARK}\n{NAME}, commit abc\n\n### LoRA: 1 adapter failed")
    assert not any(mark in text for mark in ("@everyone", "<img", "[a](b)"))


def test_the_comment_before_is_replaced_and_no_persons(github: GitHub, folder: Path) -> None:
    person = {"id": 1, "user": {"type": "User"}, "body": MARK}
    ours = {"id": 2, "user": {"type": "Bot"}, "body": f"{MARK}\nold"}
    nobody = {"id": 3, "user": None, "body": None}
    github.comments = [nobody, *[person] * 99, ours]
    post(github, folder, "pull_request", PULL)
    [(method, path, _)] = github.written
    assert (method, path) == ("PATCH", "/repos/our/adapters/issues/comments/2")


@pytest.mark.parametrize("name", ["lora-report-cpu", "lora-report", "-->\n@x"])
def test_the_comment_of_another_report_stays(github: GitHub, folder: Path, name: str) -> None:
    marks = [COMMENT_MARK, comment_mark("lora-report-gpu"), comment_mark("lora-report-gpu-2")]
    github.comments = [{"id": 2, "user": {"type": "Bot"}, "body": f"{m}\nold"} for m in marks]
    post(github, folder, "pull_request", PULL, NAME=name)
    [(method, _, text)] = github.written
    assert method == "POST"
    assert text.startswith(f"{comment_mark(name)}\n")
    assert "@x" not in text


def test_a_forks_run_is_said_to_be_one(github: GitHub, folder: Path) -> None:
    post(github, folder, "workflow_run", RUN)
    assert "Run by code of a fork" in github.written[0][2]


def test_a_pull_request_that_moved_on_gets_none(github: GitHub, folder: Path) -> None:
    github.sha = "def"
    assert "nothing to comment on" in post(github, folder, "workflow_run", RUN)
    assert "nothing to comment on" in post(github, folder, "pull_request", PULL)
    assert "nothing to comment on" in post(github, folder, "pull_request_target", PULL)
    assert "nothing to comment on" in post(github, folder, "push", {})
    assert github.written == []


def test_a_token_that_may_not_is_no_failure(github: GitHub, folder: Path) -> None:
    github.forbidden = True
    assert "this run's token may not write one" in post(github, folder, "pull_request", PULL)


def test_a_run_without_a_report_says_so(github: GitHub, folder: Path) -> None:
    (folder / "report.json").unlink()
    post(github, folder, "pull_request", PULL)
    [(_, _, text)] = github.written
    assert text.startswith(f"{MARK}\n{NAME}, commit abc\n\n### LoRA: no verdicts")


@pytest.mark.parametrize("conclusion", ["success", "skipped", "failure", "cancelled", ""])
def test_the_verdict_of_a_commit_before_does_not_stay(
    github: GitHub, folder: Path, conclusion: str
) -> None:
    """Whether the run broke or no adapter changed, of this commit nothing was judged."""
    (folder / "report.json").unlink()
    github.comments = [{"id": 2, "user": {"type": "Bot"}, "body": f"{MARK}\npassed"}]
    post(github, folder, "workflow_run", RUN, CONCLUSION=conclusion)
    [(method, _, text)] = github.written
    assert method == "PATCH"
    assert "nothing was judged" in text
    assert f"{NAME}, commit abc" in text
    well = conclusion in ("success", "skipped")
    assert ("The run ended before there was a report" in text) != well


def test_where_no_adapter_changed_no_comment_is_begun(github: GitHub, folder: Path) -> None:
    (folder / "report.json").unlink()
    assert "no adapter is to be judged" in post(
        github, folder, "workflow_run", RUN, CONCLUSION="success"
    )
    assert github.written == []
    post(github, folder, "workflow_run", RUN, CONCLUSION="failure")
    assert [method for method, _, _ in github.written] == ["POST"]


WRONG = CheckResult("c", "a", Outcome.FAILED, reason=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[",
        '{"schema": "@x\\n::error::y"}',
        "[" * 100_000,
        pytest.param(json.dumps(build_report([WRONG], {})), id="a reason that is a number"),
    ],
)
def test_what_is_no_report_is_refused(github: GitHub, folder: Path, text: str) -> None:
    (folder / "report.json").write_text(text)
    out = post(github, folder, "pull_request", PULL, expected=1)
    assert out.startswith("::error::")
    assert len(out.splitlines()) == 1
    assert github.written == []
