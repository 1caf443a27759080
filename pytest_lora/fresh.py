"""Work done in a process that has never seen the model: other memory, other PYTHONHASHSEED.

Importing torch, transformers and peft takes seconds, so on Linux one clean process per hash seed
imports them once and then forks for each job; it loads nothing itself, so every fork starts as
fresh as a new interpreter.  Elsewhere, and for work on an accelerator (whose drivers do not survive
a fork), each job is an interpreter of its own.

The processes run with ``-P`` in an empty private directory: nothing from the working directory, let
alone from an adapter's, can be imported.  They are ended when this process ends, however it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_lora._fresh_job import (
    INPUTS,
    JOB,
    OUTPUTS,
    RESULT,
    Job,
    Script,
    describe_job,
    numeric_state,
)
from pytest_lora.errors import CannotRun, NotApplicable

if TYPE_CHECKING:
    import torch

__all__ = [
    "FreshResult",
    "Job",
    "Refused",
    "Script",
    "get_ready",
    "require_space",
    "run_fresh",
    "run_side_by_side",
    "scratch",
    "shutdown",
]

TIMEOUT = 600.0
"""Seconds a job may take, the start of its process included."""

MOST_SERVERS = 4
"""Hash seeds kept ready at a time; each costs about 300 MB."""

_MAIN = Path(__file__).with_name("_fresh_main.py")
_OURS = ".pytest-lora-scratch"  # as in _fresh_main.py, which imports nothing of ours
_TAIL = 1500
_MARK = b"\x1e"
"""What a line of a server's own begins with: a start-up file may have printed before it."""

_DROPPED = ("PYTHONWARNINGS", "PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONPROFILEIMPORTTIME")


class Refused(CannotRun):
    """A fresh process was well, but could not load or run what it was given."""


@dataclasses.dataclass(frozen=True, slots=True)
class FreshResult:
    """What a fresh process gave back.

    Attributes:
        outputs: tensors on the CPU.  ``output`` is the model's; ``merged`` that of the merged
            model, where a merge was asked for.  Of a script, what it gives.
        tensors: the adapter's tensors as that process loaded them, where asked for.
        pid, hash_seed: the process, and its PYTHONHASHSEED.
        seconds: wall-clock time.
    """

    outputs: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]
    pid: int
    hash_seed: int
    seconds: float


def run_fresh(
    job: Job | Script,
    inputs: Mapping[str, torch.Tensor] | None = None,
    *,
    hash_seed: int = 0,
    timeout: float = TIMEOUT,
) -> FreshResult:
    """Do ``job`` on ``inputs`` in a fresh process.

    Args:
        job: what to do; its numeric state is taken from this process.
        inputs: the model's inputs by name; a script has none.
        hash_seed: PYTHONHASHSEED of the process, 0 to 4294967295.
        timeout: seconds until the process is ended.

    Raises:
        Refused: the process could not load the model or the adapter, or not run it, or a script
            raised.
        CannotRun: it died, took too long, or imports other libraries than this one; the message
            ends with what it wrote to stderr.
        NotApplicable: the process found that the job has no meaning for this adapter.
    """
    job = dataclasses.replace(job, numeric=numeric_state())
    return _run(job, inputs, hash_seed, timeout)


def run_side_by_side(job: Job | Script, hash_seeds: Sequence[int]) -> list[FreshResult]:
    """Do ``job``, which takes no inputs and little memory, once for each hash seed, all at a time.

    Args:
        job: as for :func:`run_fresh`.
        hash_seeds: no two alike, for a process does one job at a time.

    Raises:
        CannotRun: as :func:`run_fresh`; of several the first one's.
    """
    job = dataclasses.replace(job, numeric=numeric_state())  # of this thread
    home = _place()  # one, made before there are threads
    if _forks(job):
        get_ready(hash_seeds)
    with ThreadPoolExecutor(len(hash_seeds)) as pool:
        try:
            return list(pool.map(lambda seed: _run(job, None, seed, TIMEOUT), hash_seeds))
        except BaseException:  # nobody waits for the others, least of all after Ctrl-C
            for seed in hash_seeds:
                _forget(home, seed)
            raise


def _forks(job: Job | Script) -> bool:
    """Whether a server may fork for it."""
    device = job.device if isinstance(job, Script) else job.spec.device.type
    return sys.platform == "linux" and device == "cpu"


def _run(
    job: Job | Script, inputs: Mapping[str, torch.Tensor] | None, hash_seed: int, timeout: float
) -> FreshResult:
    started = time.monotonic()
    with scratch("job") as directory:
        _write_job(directory, job, inputs or {})
        run = _on_server if _forks(job) else _on_its_own
        said = run(directory, hash_seed, started + timeout, timeout)
        return _read_result(directory, said, time.monotonic() - started)


def get_ready(hash_seeds: Iterable[int]) -> None:
    """Start the processes for jobs to come on the CPU: they import while this one goes on.

    At most :data:`MOST_SERVERS` are kept.  Does nothing where jobs have interpreters of their own.
    """
    if sys.platform == "linux":
        for hash_seed in hash_seeds:
            _server(_place(), hash_seed)


def _write_job(directory: Path, job: Job | Script, inputs: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    (directory / JOB).write_text(json.dumps(describe_job(job)), encoding="utf-8")
    save_file({name: tensor.cpu().contiguous() for name, tensor in inputs.items()},
              directory / INPUTS)  # fmt: skip


def _read_result(directory: Path, said: str, seconds: float) -> FreshResult:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        result = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        if not result["ok"]:
            _raise(result, said)
        found = load_file(directory / OUTPUTS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CannotRun(f"a fresh process left no readable result: {error!r}{said}") from None
    return FreshResult(
        outputs={name: tensor for name, tensor in found.items() if not name.startswith("tensor:")},
        tensors={
            name.removeprefix("tensor:"): tensor
            for name, tensor in found.items()
            if name.startswith("tensor:")
        },
        pid=result["pid"],
        hash_seed=int(result["hash_seed"]),
        seconds=seconds,
    )


def _raise(result: Mapping[str, Any], said: str) -> None:
    if result["kind"] == "NotApplicable":
        raise NotApplicable(result["message"])
    message = f"in a fresh process: {result['message']}"
    if result["kind"] == "CannotRun":
        raise Refused(message, missing=result["missing"])
    raise CannotRun(message + said)


# ------------------------------------------------------------------------------ places


class _Home:
    """A private directory of this process, removed when it ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pytest-lora-"))
        (self.path / _OURS).touch()
        self.owner = os.getpid()
        self.servers: dict[int, _Server] = {}

    def close(self) -> None:
        """End every process and remove the directory; a fork of the owner does neither."""
        if self.owner != os.getpid():
            return
        for server in self.servers.values():
            server.close()
        self.servers.clear()
        shutil.rmtree(self.path, ignore_errors=True)


_home: _Home | None = None


def _place() -> _Home:
    global _home
    if _home is None or _home.owner != os.getpid() or not _home.path.is_dir():
        _home = _Home()
        atexit.register(_home.close)
    return _home


def shutdown() -> None:
    """End all fresh processes and remove their files.  Later calls start new ones."""
    global _home
    if _home is not None:
        atexit.unregister(_home.close)
        _home.close()
        _home = None


@contextlib.contextmanager
def scratch(purpose: str = "files") -> Iterator[Path]:
    """An empty directory that is removed afterwards.

    Should this process be killed meanwhile, a fresh process that is running removes it.
    """
    path = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=_place().path))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def require_space(size: int, purpose: str) -> None:
    """Make sure that ``size`` bytes fit where :func:`scratch` puts its directories.

    Raises:
        CannotRun: they do not (``missing``); the message has the numbers.
    """
    where = _place().path
    free = shutil.disk_usage(where).free
    if free < size:
        raise CannotRun(
            f"{purpose} takes {_gigabytes(size)} on disk, but {where.parent} has only"
            f" {_gigabytes(free)} free; make room there or set TMPDIR to a larger disk",
            missing=True,
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


# ------------------------------------------------------------------------------ processes


class _Server:
    """A clean process that forks for each job."""

    def __init__(self, home: Path, hash_seed: int) -> None:
        directory = Path(tempfile.mkdtemp(prefix=f"seed-{hash_seed}-", dir=home))
        self.log = directory / "stderr"
        self._process = _start(home, directory, self.log, hash_seed, [])
        self._pending = b""
        self._ready = False

    def prepare(self, deadline: float) -> None:
        """Wait, the first time, until it has imported its libraries, and compare them with ours."""
        if not self._ready:
            _require_same_libraries(self.receive(deadline))
            self._ready = True

    @property
    def alive(self) -> bool:
        """Whether it can take another job."""
        return self._process.poll() is None

    def send(self, job: Path) -> None:
        """Hand over the directory of a job."""
        os.write(_pipe(self._process.stdin).fileno(), f"{job}\n".encode())

    def receive(self, deadline: float) -> Any:
        """Its next line, as JSON.

        Raises:
            TimeoutError: there was none until ``deadline``.
            EOFError: it died.
        """
        source = _pipe(self._process.stdout).fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while (line := self._next_line()) is None:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(source, 65536)
                if not chunk:
                    raise EOFError
                self._pending += chunk
        return json.loads(line)

    def _next_line(self) -> bytes | None:
        """The next whole line of its own among what it wrote."""
        while b"\n" in self._pending:
            line, _, self._pending = self._pending.partition(b"\n")
            _, mark, text = line.rpartition(_MARK)
            if mark:
                return text
        return None

    def close(self) -> None:
        """End it, and the job in hand."""
        _end(self._process)


def _start(
    home: Path, directory: Path, log: Path, hash_seed: int, options: list[str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", str(_MAIN), str(home), *options, *_library_paths()]
    try:
        with log.open("ab") as stderr:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=directory,
                env=_environment(hash_seed),
                start_new_session=True,  # Ctrl-C is for the parent, which ends it in order
            )
    except OSError as error:
        raise CannotRun(f"no fresh process can be started: {error}") from None


def _environment(hash_seed: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    return {
        **kept,
        "PYTHONHASHSEED": str(hash_seed),
        # Everything it needs is on disk.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def _libraries() -> dict[str, str]:
    import peft
    import safetensors
    import torch
    import transformers

    import pytest_lora

    modules = (torch, transformers, peft, safetensors, pytest_lora)
    return {module.__name__: str(module.__file__) for module in modules}


def _library_paths() -> list[str]:
    """Where this process found the libraries, should the other one not know (a test's own path)."""
    places = dict.fromkeys(str(Path(file).parent.parent) for file in _libraries().values())
    return [f"--path={place}" for place in places]


def _require_same_libraries(theirs: Mapping[str, str]) -> None:
    for name, ours in _libraries().items():
        found = theirs.get(name, "nowhere")
        if os.path.realpath(found) != os.path.realpath(ours):
            raise CannotRun(
                f"a fresh process imports {name} from {found}, this one from {ours}; the two could"
                " not be compared (is sys.path changed by hand?)"
            )


def _on_server(directory: Path, hash_seed: int, deadline: float, timeout: float) -> str:
    """Have the job done by a fork; returns what it wrote to stderr."""
    home = _place()
    server = _server(home, hash_seed)
    log, start = server.log, server.log.stat().st_size
    try:
        server.prepare(deadline)
        server.send(directory)
        status = server.receive(deadline)
    except BaseException as error:
        _forget(home, hash_seed)
        if isinstance(error, TimeoutError):
            raise CannotRun(_too_long(timeout) + _tail(log, start)) from None
        if isinstance(error, EOFError | BrokenPipeError):
            raise CannotRun("a fresh process died" + _tail(log, start)) from None
        raise
    said = _tail(log, start)
    _require_success(status, directory, said)
    return said


def _server(home: _Home, hash_seed: int) -> _Server:
    server = home.servers.pop(hash_seed, None)
    if server is not None and not server.alive:
        server.close()
        server = None
    if server is None:
        while len(home.servers) >= MOST_SERVERS:
            _forget(home, next(iter(home.servers)))
        server = _Server(home.path, hash_seed)
    home.servers[hash_seed] = server  # the last one is the one used last
    return server


def _forget(home: _Home, hash_seed: int) -> None:
    server = home.servers.pop(hash_seed, None)
    if server is not None:
        server.close()


def _on_its_own(directory: Path, hash_seed: int, deadline: float, timeout: float) -> str:
    """Have the job done by an interpreter of its own; returns what it wrote to stderr."""
    log = directory / "stderr"
    process = _start(_place().path, directory, log, hash_seed, [f"--job={directory}"])
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise CannotRun(_too_long(timeout) + _tail(log, 0)) from None
    finally:
        _end(process)
    said = _tail(log, 0)
    _require_success(process.returncode, directory, said)
    _require_same_libraries(json.loads((directory / "libraries.json").read_text(encoding="utf-8")))
    return said


def _require_success(status: int, directory: Path, said: str) -> None:
    if status == 0 and (directory / RESULT).is_file():
        return
    how = f"ended with status {status}"
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        how = f"was killed by signal {name}"
        how += " (out of memory?)" if name == "SIGKILL" else ""
    raise CannotRun(f"a fresh process {how}{said}")


def _too_long(timeout: float) -> str:
    return (
        f"a fresh process took more than {timeout:g} s and was ended; allow it more with"
        " --lora-process-timeout=SECONDS"
    )


def _tail(log: Path, start: int) -> str:
    """The end of what was written to ``log`` since ``start``, as the end of a message."""
    with log.open("rb") as stream:
        stream.seek(max(start, log.stat().st_size - _TAIL))
        text = stream.read().decode("utf-8", "replace").strip()
    return f"; its last words: {text}" if text else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and whatever it started, and reap it.  It has nothing to lose."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
        except (AttributeError, ProcessLookupError, PermissionError):
            process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise EOFError
    return stream
