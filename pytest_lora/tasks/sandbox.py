"""One untrusted Python program in a process of its own, under limits and, where the system has
them, behind namespaces.

What holds where is written in docs/code-execution.md.  In short: everywhere but on Windows, limits
on CPU, memory, file size, processes and time, an empty folder, an empty environment, bounded output
and nothing left running.  As root on Linux, or where users may make namespaces, the program also
has no network, sees no other process and no file but Python's own, and all it writes is gone with
it.

The standard library is all a program gets: no package of this environment is importable.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pytest_lora.errors import CannotRun, UsageError

__all__ = [
    "Isolation",
    "Limits",
    "Process",
    "SandboxResult",
    "isolation",
    "require_permission",
    "run_program",
]

OPTION = "--lora-allow-code-execution"
PLANS = ("jail", "namespaces", "limits")
"""Ways to lock a program up, the strongest first (see :class:`Isolation`)."""

GRACE = 10.0
"""Seconds beyond its own limit after which a supervisor is taken for dead."""

_JAIL = Path(__file__).with_name("_jail.py")
_SYSTEM = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib",
           "/etc/ld.so.cache", "/nix/store", "/gnu/store")  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_CODE = ["-s", "-P", "-S", "-B", "-X", "utf8"]
"""Options of the program's interpreter: no packages, no folder of anyone's on its path."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use up.

    Attributes:
        cpu_seconds: processor time of each of its processes.  This, and not the clock, is what ends
            a loop, so that a busy machine does not change an outcome.
        wall_seconds: time on the clock, its start included.
        memory_bytes: address space of each of its processes.
        file_bytes: size of a file; with the plan ``jail``, of all files together.
        files: files and folders at a time (plan ``jail``).
        processes: processes and threads at a time, itself included.
        output_bytes: how much of what it prints is kept, from its end; 0 throws all of it away.
    """

    cpu_seconds: int = 3
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    files: int = 1000
    processes: int = 8
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (0 if name == "output_bytes" else 1):
                raise UsageError(f"the sandbox's limit {name} is {value}, expected 1 or more")


@dataclass(frozen=True, slots=True)
class Isolation:
    """How programs are locked up on this machine.

    Attributes:
        plan: ``"jail"``: namespaces of its own for processes, network, IPC and files, with a file
            system that holds Python, read-only, and one folder; ``"namespaces"``: the same, but on
            the machine's own files; ``"limits"``: limits only, and, as root, a user of its own.
        lacking: what is not guaranteed here, one sentence each; empty for the plan ``jail``.
    """

    plan: str
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """How a program ended.

    Attributes:
        returncode: its exit code, negative for the signal that ended it.
        output: the end of what it wrote to standard output and standard error.
        timed_out: whether its time on the clock was up.
        truncated: whether it printed more than is kept.
        cpu_seconds, seconds: processor time of the program, and time on the clock.
        isolation: how it was locked up.
    """

    returncode: int
    output: str
    timed_out: bool
    truncated: bool
    cpu_seconds: float
    seconds: float
    isolation: Isolation

    @property
    def ended(self) -> str:
        """How it ended, in words."""
        if self.timed_out:
            return f"its time on the clock was up after {self.seconds:.0f} s"
        if self.returncode < 0:
            return f"ended by signal {-self.returncode}"
        return f"exit code {self.returncode}"


def require_permission(allow_code_execution: bool) -> None:
    """Raise UsageError unless the caller may run programs nobody has read."""
    if not allow_code_execution:
        raise UsageError(
            "this runs programs written by a model, and was not allowed to: give"
            f" {OPTION} on the command line, or allow_code_execution=True"
            " (docs/code-execution.md says what they can and cannot do here)"
        )


def run_program(
    program: str, limits: Limits | None = None, *, allow_code_execution: bool = False
) -> SandboxResult:
    """Run ``program``, Python source, as ``__main__`` and wait for its end.

    That it ends well proves nothing: a program can end early.  Let one that is to be believed say
    something only a program that got there can know.

    Raises:
        UsageError: it was not allowed.
        CannotRun: there is no sandbox here (Windows), or it could not be set up.
    """
    require_permission(allow_code_execution)
    with Process(program, limits) as process:
        return process.wait()


class Process:
    """A program in the sandbox, running.  A context manager: it does not outlive the block.

    Permission is for the callers to see to (:func:`require_permission`).
    """

    def __init__(
        self,
        program: str,
        limits: Limits | None = None,
        *,
        channels: Sequence[int] = (),
        plan: Isolation | None = None,
    ) -> None:
        """Start it; ``channels`` are descriptors it finds at 3, 4, ... and may use."""
        self.limits = limits or Limits()
        self.isolation = plan or isolation()
        self._home = tempfile.TemporaryDirectory(prefix="lora-", ignore_cleanup_errors=True)
        try:
            self._start(program, channels)
        except BaseException:
            self._home.cleanup()
            raise

    def _start(self, program: str, channels: Sequence[int]) -> None:
        home = Path(self._home.name)
        home.chmod(0o711)  # the program's user may pass through
        (home / "root").mkdir()
        (home / "program.py").write_text(program, encoding="utf-8", errors="surrogatepass")
        self._supervisor = subprocess.Popen(
            [_interpreter(), "-I", "-S", "-B", str(_JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if self.limits.output_bytes else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=channels,
            cwd="/",
            env={},
            start_new_session=True,
        )
        job = _job(home, self.limits, self.isolation.plan) | {"channels": list(channels)}
        with contextlib.suppress(BrokenPipeError):  # it has ended, and wait says why
            _pipe_of(self._supervisor.stdin).write(json.dumps(job).encode() + b"\n")

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End the program, if it still runs, and remove what it left."""
        process = self._supervisor
        _pipe_of(process.stdin).close()  # what its supervisor takes for our end, and obeys
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        self._home.cleanup()

    def stop(self, patience: float = 0.0) -> SandboxResult:
        """Give it ``patience`` seconds to end, then end it; the result is that of :meth:`wait`."""
        with selectors.DefaultSelector() as selector:
            selector.register(_pipe_of(self._supervisor.stderr), selectors.EVENT_READ)
            if not selector.select(patience):
                _pipe_of(self._supervisor.stdin).close()
        return self.wait()

    def wait(self) -> SandboxResult:
        """Wait for its end.

        Raises:
            CannotRun: the sandbox could not be set up.
        """
        process = self._supervisor
        printed, told = _drain(process, self.limits.wall_seconds + GRACE, self.limits.output_bytes)
        process.kill()  # it has ended, or has not answered
        report = _report(told, process.wait())
        kept = printed.kept()
        return SandboxResult(
            returncode=int(report["returncode"]),
            output=kept.decode("utf-8", "replace"),
            timed_out=bool(report["timed_out"]),
            truncated=printed.size > len(kept),
            cpu_seconds=float(report["cpu"]),
            seconds=float(report["seconds"]),
            isolation=self.isolation,
        )


def _pipe_of(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


class _Tail:
    """The end of a stream that may be endless."""

    def __init__(self, most: int) -> None:
        self.most, self.size, self._end = most, 0, b""

    def add(self, data: bytes) -> None:
        self.size += len(data)
        self._end = (self._end + data)[-self.most :] if self.most else b""

    def kept(self) -> bytes:
        return self._end


def _drain(process: subprocess.Popen[bytes], seconds: float, most: int) -> tuple[_Tail, _Tail]:
    """What comes out of a supervisor's two pipes, until the report is complete."""
    printed, told = _Tail(most), _Tail(1 << 16)
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for pipe, into in ((process.stdout, printed), (process.stderr, told)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, into)
        # The report comes when the program has ended, and with it all it has printed.
        while process.stderr in selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(deadline - time.monotonic()):
                _take(selector, key.fd, key.data)
        if process.stdout is not None and process.stdout in selector.get_map():
            while _take(selector, process.stdout.fileno(), printed):
                pass
    return printed, told


def _take(selector: selectors.BaseSelector, pipe: int, into: _Tail) -> bool:
    """Read what is there; False at the end, or where nothing is."""
    try:
        data = os.read(pipe, 1 << 16)
    except BlockingIOError:
        return False
    if not data:
        selector.unregister(pipe)
        return False
    into.add(data)
    return True


def _report(told: _Tail, code: int) -> Mapping[str, Any]:
    text = told.kept().decode("utf-8", "replace").strip()
    last = text.splitlines()[-1] if text else f"its supervisor ended with code {code}"
    try:
        report: dict[str, Any] = json.loads(last)
    except ValueError:  # a traceback
        report = {"error": last}
    if "error" in report:
        raise CannotRun(f"the sandbox could not be set up: {report['error']}")
    return report


# ------------------------------------------------------------------------------- what there is


@functools.cache
def isolation() -> Isolation:
    """The strongest plan that works on this machine; found out once, by trying.

    Raises:
        CannotRun: none does.
    """
    if sys.platform == "win32":
        raise CannotRun(
            "programs written by a model are not run on Windows: it has none of the limits that"
            " keep them from harm; use Linux, or WSL",
            missing=True,
        )
    lacking: list[str] = []
    for plan in PLANS if sys.platform == "linux" else PLANS[-1:]:
        found = Isolation(plan, (*lacking, *_not_guaranteed(plan)))
        try:
            with Process("print('up')", plan=found) as process:
                result = process.wait()
        except CannotRun as error:
            lacking.append(f"no {plan}: {error}")
            continue
        if result.output.split() == ["up"]:
            return found
        lacking.append(f"no {plan}: Python does not start in it ({result.output[-200:].strip()})")
    raise CannotRun("; ".join(lacking))


def _not_guaranteed(plan: str) -> tuple[str, ...]:
    """What a plan leaves open, in sentences for results and reports."""
    apart = sys.platform != "win32" and os.geteuid() == 0
    open_ = []
    if plan != "jail":
        write = "everyone may write to" if apart else "you may write to"
        open_.append(f"files: a program can read and write what {write}")
    if plan == "limits":
        open_.append("network: a program can use it")
        if not apart:
            open_.append("processes: a program can send signals to yours")
    if sys.platform == "darwin":
        open_.append("memory: macOS does not limit it")
    return tuple(open_)


def _job(home: Path, limits: Limits, plan: str) -> dict[str, object]:
    """What the supervisor is told."""
    work = "/work" if plan == "jail" else str(home / "root")
    environment = {"HOME": work, "TMPDIR": work, "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
    return {
        **asdict(limits),
        "plan": plan,
        "root": str(home / "root"),
        "work": work,
        "program": str(home / "program.py"),
        "python": _interpreter(),
        "options": _CODE,
        "environment": environment,
        "paths": _visible(),
    }


def _interpreter() -> str:
    """The interpreter itself, whatever environment this process was started in."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


@functools.cache
def _visible() -> list[str]:
    """Files and folders Python needs, none of them inside another."""
    python = Path(_interpreter())
    wanted = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(python)]
    if sys.base_prefix not in ("/", "/usr"):
        wanted += [sys.base_prefix, sys.base_exec_prefix]
    existing = [path for path in (*_SYSTEM, *wanted, *_DEVICES) if os.path.lexists(path)]
    return [path for path in dict.fromkeys(existing) if not _inside(path, existing)]


def _inside(path: str, others: Sequence[str]) -> bool:
    """Whether one of ``others`` brings ``path`` along: an own folder above it, no link."""
    above = {str(parent) for parent in Path(path).parents}
    return any(other in above and not os.path.islink(other) for other in others)
