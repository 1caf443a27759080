"""Posts the verdicts of a run on its pull request, in place of those of the run before.

The report is read as data and written anew: whatever a file from a fork's run says, none of it is
Markdown here, and which pull request and commit it is about is what GitHub says of the event.  A
run whose commit is no longer the head of its pull request says nothing: a later one has the word.

Variables: REPORT, the JSON report; NAME, its name, each of which has a comment of its own; TOKEN;
CONCLUSION, how the run ended that should have left the report: without one, ``success`` and
``skipped`` mean that no adapter changed.  A token that may not comment is no failure.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outputs import error, notice

from pytest_lora.errors import UsageError
from pytest_lora.report.github import comment_mark, comment_text
from pytest_lora.report.json_report import load_report
from pytest_lora.report.markdown import escape

LARGEST = 64 << 20
"""Bytes of a report that is read: some thousand adapters."""
PAGE = 100
FORBIDDEN = (401, 403, 404)
FROM_FORK = "*Run by code of a fork: the numbers are what that code says.*"
UNCHANGED = ("success", "skipped")
NOTHING_JUDGED = "### LoRA: nothing was judged\n\nOf this commit no adapter is to be judged."
NO_VERDICTS = (
    "### LoRA: no verdicts\n\n"
    "The run ended before there was a report, so nothing was judged; its log says why."
)


@dataclass(frozen=True)
class Pull:
    """An open pull request and the commit at its head."""

    number: int
    head: str


def ask(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """One request to GitHub's interface, below this repository; returns what it answers."""
    request = urllib.request.Request(
        f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}/{path}",
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={
            "Authorization": f"Bearer {os.environ['TOKEN']}",
            "Accept": "application/vnd.github+json",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def pull_request(event_name: str, event: dict[str, Any]) -> Pull | None:
    """The pull request an event belongs to; None for none, or one that has moved on."""
    if "pull_request" in event:
        head = event["pull_request"]["head"]["sha"]
        found = [ask("GET", f"pulls/{int(event['pull_request']['number'])}")]
    else:
        run = event.get("workflow_run") if event_name == "workflow_run" else None
        if not run or run["event"] not in ("pull_request", "pull_request_target"):
            return None
        head = run["head_sha"]
        source = (run.get("head_repository") or {}).get("owner", {}).get("login", "")
        branch = urllib.parse.quote(f"{source}:{run['head_branch']}", safe="")
        found = ask("GET", f"pulls?state=open&per_page={PAGE}&head={branch}")
    pulls = [Pull(int(pull["number"]), head) for pull in found if pull["head"]["sha"] == head]
    return pulls[0] if pulls else None


def text_of(report: Path, name: str, note: str) -> str:
    """What to post of a report.

    Raises:
        UsageError: it is too large, or no report.
    """
    if not report.exists():
        said = NOTHING_JUDGED if nothing_to_judge() else NO_VERDICTS
        return f"{comment_mark(name)}\n{note}\n\n{said}"
    if report.stat().st_size > LARGEST:
        raise UsageError(f"{report}: {report.stat().st_size:,} bytes, at most {LARGEST:,} are read")
    environment, results = load_report(report)
    return comment_text(results, environment, name=name, note=note)


def nothing_to_judge() -> bool:
    """Whether a run that left no report ended well: then no adapter changed."""
    return os.environ.get("CONCLUSION") in UNCHANGED


def earlier(number: int, mark: str) -> int | None:
    """Id of the comment an earlier run has left; a person's comment is never one."""
    page = 1
    while True:
        path = f"issues/{number}/comments?per_page={PAGE}&page={page}"
        comments = ask("GET", path)
        for comment in comments:
            author = comment["user"] or {}  # none where the account is gone
            if author.get("type") == "Bot" and (comment["body"] or "").startswith(mark):
                return int(comment["id"])
        if len(comments) < PAGE:
            return None
        page += 1


def post(pull: Pull, *, forked: bool) -> None:
    """Write the comment, or replace the one of the run before."""
    name, report = os.environ["NAME"], Path(os.environ["REPORT"])
    note = f"{escape(name)}, commit {pull.head}" + (f"\n\n{FROM_FORK}" if forked else "")
    text = text_of(report, name, note)
    known = earlier(pull.number, comment_mark(name))
    if known is not None:
        ask("PATCH", f"issues/comments/{known}", {"body": text})
    elif report.exists() or not nothing_to_judge():
        ask("POST", f"issues/{pull.number}/comments", {"body": text})
    else:
        notice("no adapter is to be judged, and no earlier comment says otherwise")
        return
    print(f"pull request {pull.number}: comment {'written' if known is None else 'replaced'}")


def main() -> int:
    """Post or replace the comment."""
    event_name = os.environ["GITHUB_EVENT_NAME"]
    event = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
    try:
        pull = pull_request(event_name, event)
        if pull is None:
            notice("no open pull request has this commit at its head; nothing to comment on")
        else:
            post(pull, forked=event_name == "workflow_run")
    except UsageError as wrong:
        error(str(wrong))
        return 1
    except urllib.error.HTTPError as answer:
        if answer.code not in FORBIDDEN:
            raise
        notice(f"no comment: this run's token may not write one (HTTP {answer.code})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
