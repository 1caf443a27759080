"""The process that locks one program up; run by its path, never imported by the package.

    caller ── supervisor (this file) ── init of the namespaces ── program

The supervisor reads one line of JSON from standard input, unshares the namespaces it is told to,
starts the program in them and waits: until the program ends, until its time is up, or until
standard input ends, which means that the caller is gone.  Then it kills whatever is left and writes
one line of JSON, the report, to standard error.  It tries nothing twice: whether this machine has
namespaces is for the caller to find out.

Standard library only, and no import of ours: it runs with ``-I -S``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

NOBODY = 65534
NO_GROUP = 65534
FIRST_UID = 0x70000000
"""User ids from here on belong to nobody; one each keeps programs from counting together."""

_CLONE = {"mount": 0x00020000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000}
_CLONE["net"] = 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_NOATIME, _MS_NODIRATIME = 32, 1024, 2048
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_RELATIME = 4096, 16384, 1 << 18, 1 << 21
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38

Job = dict[str, Any]
Ended = tuple[int, float]
"""Exit code, negative for a signal, and CPU seconds."""


def main() -> None:
    """Read the job, run the program, report."""
    with open(0, "rb", buffering=0, closefd=False) as line:
        job: Job = json.loads(line.readline())
    job["uid"] = _free_uid() if os.geteuid() == 0 else None
    job["ours"] = 1
    job["channels"] = [_out_of_the_way(channel) for channel in job["channels"]]
    source = os.open(job["program"], os.O_RDONLY)
    status, tell = map(_out_of_the_way, os.pipe())
    if job["plan"] != "limits":
        _unshare(job)
    elif sys.platform == "linux":
        _prctl(_PR_SET_DUMPABLE, 0)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    started = time.monotonic()
    with _deaths() as deaths:
        child = os.fork()
        if child == 0:
            os.close(status)
            _report_errors(tell, lambda: _first_child(job, source, tell))
        os.close(tell)
        ended = _wait(child, job["wall_seconds"], deaths)
        report = _end(job, child, ended, status)
    report |= {"timed_out": ended is None, "seconds": time.monotonic() - started}
    sys.stderr.write(json.dumps(report) + "\n")


def _out_of_the_way(descriptor: int) -> int:
    """The same file under a high number, which no program inherits."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64)
    os.close(descriptor)
    return moved


# ------------------------------------------------------------------------------- supervision


@contextlib.contextmanager
def _deaths() -> Iterator[int]:
    """A descriptor that becomes readable when a child ends."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    yield read
    signal.set_wakeup_fd(-1)


def _wait(child: int, seconds: float, deaths: int) -> Ended | None:
    """How ``child`` ended; None if its time was up first, or the caller was gone."""
    deadline = time.monotonic() + seconds
    while True:
        pid, code, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(code), _cpu(usage)
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        ready, _, _ = select.select([0, deaths], [], [], left)
        if deaths in ready:
            os.read(deaths, 4096)
        if 0 in ready and not os.read(0, 4096):
            return None


def _end(job: Job, child: int, ended: Ended | None, status: int) -> Job:
    """Kill what is left of the program and gather how it ended."""
    if ended is None:
        os.kill(child, signal.SIGKILL)  # and the kernel all that lives in its namespace
    if job["plan"] == "limits":
        _kill_all(job, child)  # here the child is the program itself
    if ended is None:
        _, code, usage = os.wait4(child, 0)
        ended = os.waitstatus_to_exitcode(code), _cpu(usage)
    if job["plan"] == "limits":
        _kill_strays()
    with os.fdopen(status, "rb") as told:
        line = told.readline()
    return {"returncode": ended[0], "cpu": ended[1], **(json.loads(line) if line else {})}


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _kill_all(job: Job, child: int) -> None:
    """Every process of the program's own group, and of its user where that is its alone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if job["uid"] in (None, NOBODY):
        return
    killer = os.fork()
    if killer == 0:
        os.setuid(job["uid"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # whatever this user may signal, itself excepted
        os._exit(0)
    os.waitpid(killer, 0)


def _kill_strays() -> None:
    """Descendants that left the group: orphans become our children, one generation at a time."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in _children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children() -> Iterator[int]:
    if sys.platform != "linux":
        return
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The parent is the second field behind the name, which may itself hold brackets.
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                yield int(name)


# -------------------------------------------------------------------------------- namespaces


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    """A C function that returns 0, or an OSError that names it."""
    done = getattr(_libc(), name)(*arguments)
    if done:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3)


def _unshare(job: Job) -> None:
    """New namespaces; the process id namespace starts with the next child."""
    kinds = ["pid", "net", "ipc"] + (["mount"] if job["plan"] == "jail" else [])
    uid, gid = os.geteuid(), os.getegid()
    if uid:
        kinds.append("user")
    _call("unshare", sum(_CLONE[kind] for kind in kinds))
    if uid:
        job["ours"] = 3  # supervisor and init count for this user as well
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                           ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
            with open(f"/proc/self/{file}", "w") as out:
                out.write(text)


def _mount(source: str, target: str, flags: int, kind: str | None = None, data: str = "") -> None:
    texts = (source, target, kind, data or None)
    first, second, third, last = (None if text is None else text.encode() for text in texts)
    try:
        _call("mount", first, second, third, ctypes.c_ulong(flags), last)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({target})") from None


def _enter_root(job: Job) -> None:
    """Make an empty file system the root: what Python needs, read-only, and one folder to write."""
    root = job["root"]
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, _MS_NOSUID | _MS_NODEV, "tmpfs", "size=1m,nr_inodes=4096,mode=755")
    for path in job["paths"]:
        _show(root, path)
    work = root + job["work"]
    os.makedirs(work)
    room = f"size={job['file_bytes']},nr_inodes={job['files']},mode=700"
    _mount("tmpfs", work, _MS_NOSUID | _MS_NODEV, "tmpfs", room)
    if job["uid"] is not None:
        os.chown(work, job["uid"], NO_GROUP)
    if not os.path.lexists(root + "/tmp"):  # Python itself may live there
        os.symlink(job["work"], root + "/tmp")
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    _mount("none", "/", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _show(root: str, path: str) -> None:
    """``path`` in the new root, read-only; a link as a link, a device as a device."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        if not os.path.lexists(target):
            os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    try:
        _mount(path, target, _MS_BIND)
    except OSError:  # mounts below that may not be parted from it
        _mount(path, target, _MS_BIND | _MS_REC)
    if not path.startswith("/dev/"):
        flags = _locked(target) | _MS_NOSUID | _MS_NODEV
        _mount("none", target, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)


def _locked(path: str) -> int:
    """Flags of a mount that a user namespace may not take away."""
    now = os.statvfs(path).f_flag
    pairs = (
        (os.ST_NOEXEC, _MS_NOEXEC),
        (os.ST_NOATIME, _MS_NOATIME),
        (os.ST_NODIRATIME, _MS_NODIRATIME),
        (os.ST_RELATIME, _MS_RELATIME),
    )
    return sum(flag for seen, flag in pairs if now & seen)


# ------------------------------------------------------------------------------- the program


def _report_errors(tell: int, work: Any) -> NoReturn:
    """Run what never returns; should it fail, say so to the supervisor."""
    try:
        work()
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror + (f" ({error.filename})" if error.filename else "")
        os.write(tell, json.dumps({"error": text}).encode() + b"\n")
    os._exit(1)


def _first_child(job: Job, source: int, tell: int) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if job["plan"] == "limits":
        os.chdir(job["work"])
        if job["uid"] is not None:
            os.chown(".", job["uid"], NO_GROUP)
        _become_program(job, source)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDWR)
    if job["plan"] == "jail":
        _enter_root(job)
    os.chdir(job["work"])
    if job["plan"] != "jail" and job["uid"] is not None:
        os.chown(".", job["uid"], NO_GROUP)
    program = os.fork()
    if program == 0:
        _report_errors(tell, lambda: _become_program(job, source))
    os.dup2(null, 1)  # the program's output ends when the program does
    ended = 0
    while ended != program:
        ended, code, usage = os.wait4(-1, 0)
    done = {"returncode": os.waitstatus_to_exitcode(code), "cpu": _cpu(usage)}
    os.write(tell, json.dumps(done).encode() + b"\n")
    os._exit(0)


def _become_program(job: Job, source: int) -> NoReturn:
    os.setsid()
    os.dup2(source, 0)
    os.dup2(1, 2)
    for place, channel in enumerate(job["channels"], 3):
        os.dup2(channel, place)
    if job["uid"] is not None:
        os.setgroups([])
        os.setgid(NO_GROUP)
        os.setuid(job["uid"])
    if sys.platform == "linux":
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name, wanted in _limits(job).items():
        _limit(name, wanted)
    os.execve(job["python"], [job["python"], *job["options"], "-"], job["environment"])


def _limits(job: Job) -> dict[str, int]:
    # Where the user is not the program's own, its processes elsewhere count, and one is too many.
    alone = job["plan"] == "limits" and job["uid"] is None
    return {
        "RLIMIT_CPU": job["cpu_seconds"],
        "RLIMIT_AS": job["memory_bytes"],
        "RLIMIT_FSIZE": job["file_bytes"],
        "RLIMIT_NPROC": 1 if alone else job["processes"] + job["ours"] - 1,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_MEMLOCK": 0,
    }


def _limit(name: str, wanted: int) -> None:
    """Lower one limit; what was lower already stays."""
    kind = getattr(resource, name, None)
    if kind is None or (sys.platform == "darwin" and name == "RLIMIT_AS"):
        return  # macOS has it in name only
    hard = resource.getrlimit(kind)[1]
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    # Processor time beyond the limit first raises SIGXCPU, which tells it from a kill.
    later = limit + 1 if name == "RLIMIT_CPU" and limit != hard else limit
    resource.setrlimit(kind, (limit, later))


def _free_uid() -> int:
    """A user id no other process has; nobody's where the container knows no such ids."""
    wanted = FIRST_UID + os.getpid()
    if sys.platform != "linux":
        return wanted
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return wanted if any(low <= wanted < low + size for low, _, size in ranges) else NOBODY


if __name__ == "__main__":
    main()
