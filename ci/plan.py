"""What of a repository is to be judged for this event, and whether it may reach a GPU.

Runs in a checkout with history and asks nothing but git and the event; nothing of the checkout is
imported or run.  Variables: ADAPTERS, patterns of adapter folders, one a line (``*`` also matches
``/``, ``.`` is the repository's root); ALSO, patterns of files that concern every adapter, such as
a profile.  Patterns that no adapter matches are an error, for nothing would ever be judged, unless
the event has just removed the last adapter.

Outputs: ``adapters``, one a line; ``any``, whether there are some; ``gpu``, whether they may reach
one, which a fork's never do; ``ref``, the commit they are of.
"""

from __future__ import annotations

import fnmatch
import json
import os
import posixpath
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outputs import error, lines_of, notice, write_outputs

CONFIG = "adapter_config.json"
ROOT = "."
PULL_REQUESTS = ("pull_request", "pull_request_target")
OURS = ("push", "schedule", "workflow_dispatch", "repository_dispatch", "release")
"""Events that only those cause who may write to the repository, and that are of its own commits."""
MOST_NAMED = 10


@dataclass(frozen=True)
class Plan:
    """What an event asks for.

    Attributes:
        head: the commit whose adapters are judged.
        start: the commit to compare ``head`` with; empty for all adapters.
        gpu: whether the adapters may reach a GPU.
        why: in a few words.
    """

    head: str
    start: str
    gpu: bool
    why: str


def plan_of(event_name: str, event: dict[str, Any], sha: str) -> Plan:
    """The plan for an event, from what GitHub says of it alone; one unknown reaches no GPU.

    Other events have a pull request as well, such as the review of one, which may be a fork's.
    """
    if "pull_request" in event:
        pull = event["pull_request"]
        source = (pull["head"].get("repo") or {}).get("full_name")
        ours = source == pull["base"]["repo"]["full_name"]
        gpu = ours and event_name in PULL_REQUESTS
        why = f"{event_name} of {'this repository' if ours else 'a fork'}"
        why = why if gpu else f"{why}: it reaches no GPU"
        return Plan(pull["head"]["sha"], pull["base"]["sha"], gpu, why)
    if event_name == "push":
        before = str(event.get("before") or "")
        return Plan(sha, before if before.strip("0") else "", True, "a push: what it changed")
    if event_name in OURS:
        return Plan(sha, "", True, f"{event_name}: all adapters")
    return Plan(sha, "", False, f"{event_name}: all adapters; they reach no GPU")


def git(*words: str) -> list[str]:
    """Names that a git command prints, separated by null characters."""
    done = subprocess.run(["git", *words], check=True, capture_output=True)
    return [name for name in done.stdout.decode("utf-8", "surrogateescape").split("\0") if name]


def adapters_of(commit: str) -> list[str]:
    """Folders with an adapter's configuration, in the tree of ``commit``; ``.`` for its root."""
    files = git("ls-tree", "-r", "-z", "--name-only", "--full-tree", commit)
    return sorted(
        posixpath.dirname(name) or ROOT for name in files if posixpath.basename(name) == CONFIG
    )


def changed(start: str, head: str) -> list[str] | None:
    """Files that differ between where ``head`` left ``start`` and ``head``; None if unknown."""
    options = ("--name-only", "-z", "--no-renames", "--no-ext-diff", "--no-textconv")
    try:
        return git("diff", *options, f"{start}...{head}")
    except subprocess.CalledProcessError:
        return None  # rewritten history: what is compared with is gone


def matches(name: str, patterns: list[str]) -> bool:
    """Whether a pattern fits; ``./a``, ``a/`` and ``a`` are the same one."""
    return any(fnmatch.fnmatchcase(name, posixpath.normpath(pattern)) for pattern in patterns)


def wanted(plan: Plan, adapters: list[str], also: list[str]) -> list[str]:
    """The adapters to judge: those with a change in their folder, or all."""
    files = changed(plan.start, plan.head) if plan.start else None
    if files is None or any(matches(file, also) for file in files):
        return adapters
    return [one for one in adapters if any(_below(file, one) for file in files)]


def _below(file: str, folder: str) -> bool:
    return folder == ROOT or file.startswith(f"{folder}/")


def had_some(start: str, patterns: list[str]) -> bool:
    """Whether adapters matched before: where none is left, they were removed, not misspelt."""
    try:
        return any(matches(folder, patterns) for folder in adapters_of(start)) if start else False
    except subprocess.CalledProcessError:
        return False  # rewritten history


def nothing_matches(patterns: list[str], there: list[str]) -> str:
    """What to say of patterns that no adapter matches: there may be none, or a typing error."""
    named = ", ".join(there[:MOST_NAMED]) + (", ..." if len(there) > MOST_NAMED else "")
    found = (
        f"the adapters of this commit are {named}"
        if there
        else f"none of its folders has an {CONFIG}"
    )
    return f"no adapter matches {', '.join(patterns) or 'an empty list of patterns'}: {found}"


def main() -> int:
    """Write the outputs; 1 if nothing matches, or an adapter's name cannot be written down."""
    event = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
    plan = plan_of(os.environ["GITHUB_EVENT_NAME"], event, os.environ["GITHUB_SHA"])
    patterns, there = lines_of("ADAPTERS"), adapters_of(plan.head)
    matching = [folder for folder in there if matches(folder, patterns)]
    if not matching and (there or not had_some(plan.start, patterns)):
        error(nothing_matches(patterns, there))
        return 1
    adapters = wanted(plan, matching, lines_of("ALSO"))
    if strange := [name for name in adapters if not name.isprintable()]:
        error(f"an adapter folder with a name no report can show: {strange[0]!a}")
        return 1
    notice(f"{plan.why}; to judge: {', '.join(adapters) or 'none'}")
    write_outputs(
        {
            "adapters": "\n".join(adapters),
            "any": "true" if adapters else "false",
            "gpu": "true" if plan.gpu else "false",
            "ref": plan.head,
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
