"""Hostile programs, each really run, none of which may harm anything.

Every program runs under every plan this machine has, so that what a weaker one still guarantees is
tested where a stronger one would be taken.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path

import pytest

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.tasks import sandbox
from pytest_lora.tasks.sandbox import Isolation, Limits, Process, SandboxResult, run_program

if sys.platform == "win32":
    pytest.skip("there is no sandbox on Windows", allow_module_level=True)

SHORT = Limits(cpu_seconds=1, wall_seconds=2.0)


@functools.cache
def plan_or_reason(plan: str) -> Isolation | str:
    try:
        found = Isolation(plan, sandbox._not_guaranteed(plan))
        with Process("print('up')", plan=found) as process:
            result = process.wait()
    except CannotRun as error:
        return str(error)
    return found if result.output == "up\n" else result.output[-300:]


@pytest.fixture(params=sandbox.PLANS)
def plan(request: pytest.FixtureRequest) -> Isolation:
    found = plan_or_reason(request.param)
    if isinstance(found, str):
        pytest.skip(f"this machine has no plan {request.param}: {found}")
    return found


def run(program: str, plan: Isolation, limits: Limits = SHORT) -> SandboxResult:
    with Process(program, limits, plan=plan) as process:
        return process.wait()


# --------------------------------------------------------------------------------- permission


def test_nothing_runs_without_permission(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--lora-allow-code-execution"):
        run_program(f"open({str(tmp_path / 'made')!r}, 'w')")
    assert not list(tmp_path.iterdir())


def test_with_permission_it_runs_in_the_strongest_plan() -> None:
    result = run_program("print(6 * 7)", allow_code_execution=True)
    assert (result.output, result.returncode, result.timed_out) == ("42\n", 0, False)
    assert result.isolation == sandbox.isolation()
    assert result.ended == "exit code 0"


@pytest.mark.parametrize("name", ["cpu_seconds", "wall_seconds", "processes"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        Limits(**{name: 0})


def test_windows_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "win32")
    with pytest.raises(CannotRun, match="not run on Windows") as refused:
        sandbox.isolation.__wrapped__()
    assert refused.value.missing


def test_where_no_plan_works_the_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_interpreter", lambda: "/bin/false")
    with pytest.raises(CannotRun, match=r"no limits: "):
        sandbox.isolation.__wrapped__()


def test_a_weaker_plan_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    weaker = [name for name in sandbox.PLANS[1:] if isinstance(plan_or_reason(name), Isolation)]
    monkeypatch.setattr(sandbox, "_visible", lambda: ["/no/such/folder"])  # the jail cannot be made
    if not weaker:
        with pytest.raises(CannotRun, match=r"no limits: "):
            sandbox.isolation.__wrapped__()
        return
    found = sandbox.isolation.__wrapped__()
    assert found.plan == weaker[0]
    assert any(reason.startswith("files: ") for reason in found.lacking)
    if sys.platform == "linux":
        assert "no jail: " in found.lacking[0]
        assert "no/such/folder" in found.lacking[0]


# ----------------------------------------------------------------------------- hostile programs


def test_an_endless_loop_ends_by_its_processor_time(plan: Isolation) -> None:
    result = run("while True: pass", plan, Limits(cpu_seconds=1, wall_seconds=30.0))
    assert not result.timed_out
    assert result.returncode < 0
    assert result.cpu_seconds < 3


def test_sleeping_ends_by_the_clock(plan: Isolation) -> None:
    started = time.monotonic()
    result = run("import time; time.sleep(600)", plan, Limits(wall_seconds=1.0))
    assert result.timed_out
    assert "clock" in result.ended
    assert time.monotonic() - started < 15


BOMB = """
import os, time
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        time.sleep(0.02)
"""


def test_a_fork_bomb_stays_small_and_leaves_nothing(plan: Isolation) -> None:
    with Process(BOMB, SHORT, plan=plan) as process:
        time.sleep(1.0)
        if sys.platform == "linux":
            assert len(children_of(process._supervisor.pid)) <= SHORT.processes + 2
        assert process.wait().timed_out
    if sys.platform == "linux":
        assert not children_of(process._supervisor.pid)


def children_of(root: int) -> set[int]:
    """Every living descendant of a process, and whatever is in their sessions."""
    parents = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        parents[int(name)] = int(fields[1])
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in {root, *found}} - found:
        found |= more
    return found


ORPHAN = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.3)
        open({path!r}, "w").close()
    os._exit(0)
print("done")
"""


def test_what_a_program_leaves_running_is_ended_with_it(plan: Isolation, tmp_path: Path) -> None:
    """Without an end it would write its file; a world-writable folder lets it, under any plan."""
    tmp_path.chmod(0o777)
    late = tmp_path / "late"
    result = run(ORPHAN.format(path=str(late)), plan)
    if "BlockingIOError" in result.output:
        return  # this plan lets it start no process at all
    assert result.output == "done\n"
    time.sleep(0.6)
    assert not late.exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
def test_a_huge_allocation_is_refused(plan: Isolation) -> None:
    program = """
try:
    bytearray(8 << 30)
except MemoryError:
    print("no")
"""
    assert run(program, plan).output == "no\n"


def test_it_starts_in_an_empty_folder_that_is_gone_afterwards(plan: Isolation) -> None:
    result = run("import os; print(os.listdir(), os.getcwd()); open('f', 'w').write('x')", plan)
    listed, _, folder = result.output.strip().partition(" ")
    assert listed == "[]"
    assert folder == "/work" if plan.plan == "jail" else not Path(folder).exists()


def test_files_are_bounded(plan: Isolation) -> None:
    program = """
try:
    with open("big", "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    print("wrote it all")
except OSError as error:
    print("stopped")
"""
    assert run(program, plan).output == "stopped\n"


def test_all_files_together_are_bounded_in_the_jail() -> None:
    plan = plan_or_reason("jail")
    if isinstance(plan, str):
        pytest.skip(plan)
    program = """
count = 0
try:
    while True:
        with open(f"file{count}", "wb") as file:
            file.write(bytes(1 << 20))
        count += 1
except OSError:
    print(count)
"""
    assert int(run(program, plan).output) <= SHORT.file_bytes >> 20


def test_writing_outside_is_refused(plan: Isolation, tmp_path: Path) -> None:
    if plan.plan != "jail" and os.geteuid() != 0:
        pytest.skip("; ".join(plan.lacking))
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    program = f"""
import os, shutil
for path in ({str(mine)!r}, {str(tmp_path / "new")!r}, "/etc/new", {str(sandbox._JAIL)!r}):
    for what in (lambda: open(path, "w"), lambda: os.unlink(path)):
        try:
            what()
            print("did it to", path)
        except OSError:
            pass
shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)
"""
    assert run(program, plan).output == ""
    assert mine.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_signals_reach_nobody(plan: Isolation) -> None:
    if any(reason.startswith("processes:") for reason in plan.lacking):
        pytest.skip("; ".join(plan.lacking))
    victim = run_victim()
    program = f"""
import os, signal
for process in ({os.getpid()}, {victim.pid}, {os.getppid()}, os.getppid(), 1, -1):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(process, number)
        except OSError:
            pass
print("alive")
"""
    try:
        result = run(program, plan)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
    assert result.output == "alive\n"
    assert result.returncode == 0


def run_victim() -> sandbox.subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    return sandbox.subprocess.Popen(command)


def test_only_the_end_of_a_flood_is_kept(plan: Isolation) -> None:
    program = """
for _ in range(2000):
    print("x" * 1000)
print("the end")
"""
    result = run(program, plan, Limits(output_bytes=1000))
    assert len(result.output) == 1000
    assert result.output.endswith("x\nthe end\n")
    assert result.truncated
    assert run(program, plan, Limits(output_bytes=0)).output == ""


def test_an_endless_flood_ends(plan: Isolation) -> None:
    result = run("while True: print('x' * 10000)", plan)
    assert result.truncated
    assert len(result.output) <= SHORT.output_bytes


def test_secrets_of_the_environment_stay_outside(
    plan: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    if any(reason.startswith("processes:") for reason in plan.lacking):
        pytest.skip("; ".join(plan.lacking))
    program = f"""
import os
print(sorted(os.environ))
for process in ({os.getpid()}, os.getppid(), "self"):
    try:
        print(b"s3cret" in open(f"/proc/{{process}}/environ", "rb").read())
    except OSError:
        print(False)
"""
    lines = run(program, plan).output.splitlines()
    assert set(eval(lines[0])) <= {"HOME", "TMPDIR", "PATH", "PYTHONHASHSEED", "LC_CTYPE"}
    assert lines[1:] == ["False"] * 3


def test_no_descriptor_of_ours_is_open_in_it(plan: Isolation, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        program = """
import os
found = []
for number in range(256):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
print(found)
"""
        assert run(program, plan).output == "[0, 1, 2]\n"


def test_standard_input_has_nothing_more(plan: Isolation) -> None:
    assert run("import sys; print(repr(sys.stdin.read()))", plan).output == "''\n"


def test_there_is_no_network(plan: Isolation) -> None:
    if any(reason.startswith("network:") for reason in plan.lacking):
        pytest.skip("; ".join(plan.lacking))
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
import socket
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 2)
    print("reached")
except OSError:
    print("unreachable")
"""
        assert run(program, plan).output == "unreachable\n"


def test_only_the_standard_library_can_be_imported(plan: Isolation) -> None:
    program = """
import collections, decimal, hashlib, heapq, itertools, json, math, random, re, statistics
for name in ("pytest", "pytest_lora", "torch"):
    try:
        __import__(name)
        print(name)
    except ImportError:
        pass
"""
    assert run(program, plan).output == ""


def test_the_same_program_gives_the_same_output(plan: Isolation) -> None:
    """The order of sets of strings, which differs from process to process elsewhere."""
    program = "print({str(number) for number in range(50)})"
    assert run(program, plan).output == run(program, plan).output


# ---------------------------------------------------------------------------------- being ended


def test_a_program_does_not_outlive_the_block(plan: Isolation) -> None:
    started = time.monotonic()
    with Process("import time; time.sleep(600)", plan=plan) as process:
        supervisor = process._supervisor
    assert time.monotonic() - started < 9
    assert supervisor.returncode is not None
    if sys.platform == "linux":
        assert not children_of(supervisor.pid)


def test_a_program_does_not_outlive_its_caller(tmp_path: Path) -> None:
    """The caller is killed, so that nothing of it can clean up."""
    script = """
import os, sys
from pytest_lora.tasks.sandbox import Limits, Process
process = Process("import time; time.sleep(600)", Limits(wall_seconds=600.0))
print(process._supervisor.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    popen = sandbox.subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=-1,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    supervisor = int(popen.communicate(timeout=30)[0])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(supervisor):
        time.sleep(0.05)
    assert not _alive(supervisor)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"


def test_a_supervisor_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sandbox.isolation()
    monkeypatch.setattr(sandbox, "_JAIL", Path("/no/such/file.py"))
    with pytest.raises(CannotRun, match="could not be set up"):
        run("print()", found)


def test_a_sandbox_that_cannot_be_made_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("no namespaces")
    found = plan_or_reason("jail")
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setattr(sandbox, "_visible", lambda: ["/no/such/folder"])
    with pytest.raises(CannotRun, match=r"could not be set up: .*no/such/folder"):
        run("print()", found)
