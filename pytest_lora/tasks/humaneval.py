"""HumanEval: does a program written by a model do what its docstring says?

M. Chen et al., "Evaluating Large Language Models Trained on Code", 2021.  An item is a function's
head with its docstring and a test; a completion passes if head and completion together pass the
test.  Programs run in the sandbox (:mod:`pytest_lora.tasks.sandbox`), only where that is allowed.

Completion and test run in two sandboxes that exchange plain data (``_referee.py``), so that passing
cannot be faked from within.  A verdict counts when the tests' process prints a random token behind
them, which the completion's process has never held.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import math
import os
import secrets
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.tasks.sandbox import (
    GRACE,
    Limits,
    Process,
    SandboxResult,
    require_permission,
)

__all__ = [
    "STOP",
    "HumanEvalGrader",
    "HumanEvalItem",
    "ProgramVerdict",
    "grade_completion",
    "grade_completions",
    "pass_at_k",
    "read_humaneval",
    "truncate",
]

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends: Chen et al. 2021, section 3."""

PATIENCE = 1.0
"""Seconds a completion's process has to end when the tests are through; it has nothing to do."""

MOST_READ = 64 << 20
"""Characters of a file of items, unpacked."""

_REFEREE = Path(__file__).with_name("_referee.py")
_FIELDS = ("task_id", "prompt", "entry_point", "test")


@dataclass(frozen=True, slots=True)
class HumanEvalItem:
    """One problem.

    Attributes:
        id: its name (``task_id``).
        prompt: imports, helpers and the head of the function, docstring included.
        entry_point: the function's name.
        test: source that defines ``check(candidate)``.
        canonical_solution: a completion that passes; empty where the file has none.
    """

    id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str = ""


@dataclass(frozen=True, slots=True)
class ProgramVerdict:
    """Whether a completion passed.

    Attributes:
        passed: whether it did.
        reason: why it did not; empty where it passed.
        sandbox: how the tests' process ended.
    """

    passed: bool
    reason: str
    sandbox: SandboxResult


# --------------------------------------------------------------------------------------- items


def read_humaneval(path: Path | str) -> tuple[HumanEvalItem, ...]:
    """The items of a ``.jsonl`` or ``.jsonl.gz`` file in the published form.

    Raises:
        UsageError: naming the file, the line and what was expected.
    """
    path = Path(path)
    lines = _text(path).split("\n")
    items = tuple(_item(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not items:
        raise UsageError(f"{path}: no items in it; expected one JSON object a line")
    return items


def _text(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                data = packed.read(MOST_READ + 1)
        else:
            with path.open("rb") as plain:
                data = plain.read(MOST_READ + 1)
        if len(data) > MOST_READ:
            raise UsageError(f"{path}: more than {MOST_READ >> 20} MiB, expected HumanEval items")
        return data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"{path}: cannot be read as .jsonl or .jsonl.gz: {why}") from None


def _item(path: Path, number: int, line: str) -> HumanEvalItem:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: not JSON, expected an object with {_expected()}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a {type(row).__name__}, expected an object with {_expected()}")
    for name in _FIELDS:
        if not isinstance(row.get(name), str):
            raise UsageError(f"{where}: no text {name!r}, expected {_expected()}")
    if not row["entry_point"].isidentifier():
        raise UsageError(f"{where}: entry_point {row['entry_point']!r} is not a function's name")
    solution = row.get("canonical_solution", "")
    return HumanEvalItem(
        row["task_id"], row["prompt"], row["entry_point"], row["test"], str(solution)
    )


def _expected() -> str:
    return "the texts " + ", ".join(_FIELDS)


# --------------------------------------------------------------------------------------- grading


def truncate(completion: str, stop: Sequence[str] = STOP) -> str:
    """The completion up to the first of the stop sequences."""
    ends = [completion.find(sequence) for sequence in stop]
    return completion[: min((end for end in ends if end >= 0), default=len(completion))]


def grade_completion(
    completion: str,
    item: HumanEvalItem,
    limits: Limits | None = None,
    *,
    allow_code_execution: bool = False,
    stop: Sequence[str] = STOP,
) -> ProgramVerdict:
    """Whether ``item.prompt`` with ``completion``, truncated, passes the item's test.

    Raises:
        UsageError: running programs was not allowed.
        CannotRun: there is no sandbox here; or the test is at fault: it ends its own process, or
            hands over what is not plain data.
    """
    require_permission(allow_code_execution)
    limits, token = limits or Limits(), secrets.token_hex(16)
    source = item.prompt + truncate(completion, stop) + "\n"
    tests = _program("check", item.prompt, item.test, item.entry_point, token)
    with contextlib.ExitStack() as stack:
        asked, ask = _pipe(stack)
        answers, answer = _pipe(stack)
        program = stack.enter_context(
            Process(
                _program("serve", source, item.entry_point),
                replace(limits, output_bytes=0),
                channels=(asked.fileno(), answer.fileno()),
            )
        )
        referee = stack.enter_context(
            Process(tests, _referees(limits), channels=(answers.fileno(), ask.fileno()))
        )
        for end in (asked, ask, answers, answer):
            end.close()
        result = referee.wait()
        return _verdict(token, result, program.stop(PATIENCE), item)


def grade_completions(
    completions: Sequence[tuple[str, HumanEvalItem]],
    limits: Limits | None = None,
    *,
    allow_code_execution: bool = False,
    workers: int | None = None,
    stop: Sequence[str] = STOP,
) -> Iterator[ProgramVerdict]:
    """The verdict on each completion, in their order, ``workers`` at a time.

    ``workers``: default one for each processor this process may use.  Every completion occupies two
    sandboxes, of which one waits for the other.
    """
    require_permission(allow_code_execution)

    def grade(pair: tuple[str, HumanEvalItem]) -> ProgramVerdict:
        return grade_completion(*pair, limits, allow_code_execution=True, stop=stop)

    with ThreadPoolExecutor(workers or _processors(), "lora-programs") as pool:
        try:
            yield from pool.map(grade, completions)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class HumanEvalGrader:
    """Grades an answer as a completion of its item's prompt: the form graders of tasks have.

    The item has a ``prompt``, and ``entry_point`` and ``test`` either of its own or in ``extra``.

    Attributes:
        allow_code_execution: without it, making the grader raises UsageError.
        limits: what one program may use up.
        stop: where a completion ends.
    """

    allow_code_execution: bool = False
    limits: Limits | None = None
    stop: tuple[str, ...] = STOP
    name: str = "humaneval"

    def __post_init__(self) -> None:
        require_permission(self.allow_code_execution)

    def __call__(self, answer: str, item: Any) -> bool:
        """Whether the program passes the item's test."""
        return grade_completion(
            answer,
            _as_problem(item),
            self.limits,
            allow_code_execution=self.allow_code_execution,
            stop=self.stop,
        ).passed


def _as_problem(item: Any) -> HumanEvalItem:
    if isinstance(item, HumanEvalItem):
        return item
    texts = {name: item.extra.get(name) for name in ("entry_point", "test")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UsageError(f"item {item.id}: no text {name!r}, which grading a program needs")
    return HumanEvalItem(item.id, item.prompt, texts["entry_point"], texts["test"])


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples passes (Chen et al. 2021, eq. 1).

    ``1 - C(n - c, k) / C(n, k)`` from ``samples`` = n completions of which ``correct`` = c pass.

    Raises:
        UsageError: not ``1 <= k <= samples`` or not ``0 <= correct <= samples``.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise UsageError(
            f"pass@{k} from {samples} samples of which {correct} pass: expected 1 to {samples} for"
            f" k, and 0 to {samples} that pass"
        )
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


# ------------------------------------------------------------------------------------- the sandbox


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    first = stack.enter_context(os.fdopen(read, "rb", 0))
    return first, stack.enter_context(os.fdopen(write, "wb", 0))


@functools.cache
def _referee() -> str:
    return _REFEREE.read_text(encoding="utf-8")


def _program(role: str, *arguments: str) -> str:
    """The referee's text and a call; literals are plain ASCII."""
    return f"{_referee()}\n\n{role}({', '.join(map(ascii, arguments))})\n"


def _referees(limits: Limits) -> Limits:
    """Limits of the tests' process: it outlasts the completion's, and its verdict is kept."""
    kept = max(limits.output_bytes, 1 << 13)
    return replace(limits, wall_seconds=limits.wall_seconds + GRACE, output_bytes=kept)


def _verdict(
    token: str, tests: SandboxResult, program: SandboxResult, item: HumanEvalItem
) -> ProgramVerdict:
    said, reason = _said(token, tests.output)
    if said == "unsupported":
        raise CannotRun(f"{item.id}: its test cannot be used here: {reason}")
    if said == "passed":
        return ProgramVerdict(True, "", tests)
    if not said:
        reason = f"the tests ended without a verdict: {tests.ended}"
    if program.timed_out:
        reason = f"{program.ended} ({reason})"
    elif program.returncode == -signal.SIGXCPU:
        reason = f"it used up its processor time ({reason})"
    return ProgramVerdict(False, reason, tests)


def _said(token: str, output: str) -> tuple[str, str]:
    """Verdict and reason in the line that holds the token; two empty texts without one."""
    for line in reversed(output.splitlines()):
        if token in line:
            _, verdict, reason = json.loads(line)
            return verdict, reason
    return "", ""


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
