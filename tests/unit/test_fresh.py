"""Jobs in fresh processes: what comes back, what is said when nothing does, what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import safetensors
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from pytest_lora import _fresh_job, fresh
from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.fresh import (
    Job,
    Refused,
    Script,
    require_space,
    run_fresh,
    run_side_by_side,
    scratch,
    shutdown,
)
from pytest_lora.loading import BaseSpec
from pytest_lora.locate import AdapterLocation
from pytest_lora.numerics.precision import switches
from pytest_lora.subject import Subject, load_base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_lora.adapter import Adapter

FORKS = pytest.mark.skipif(sys.platform != "linux", reason="processes fork on Linux only")


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tiny.llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    home = tmp_path_factory.mktemp("adapter")
    return tiny.save_adapter(
        tiny.llama(), home, task_type="CAUSAL_LM", use_dora=True, modules_to_save=["lm_head"]
    )


@pytest.fixture
def subject(folder: Path, adapter: Adapter) -> Subject:
    return Subject(adapter, load_base(folder, adapter=adapter, device="cpu"))


@pytest.fixture
def spec(subject: Subject) -> BaseSpec:
    assert subject.base.spec is not None
    return subject.base.spec


@pytest.fixture
def stuck(tmp_path: Path, spec: BaseSpec) -> Job:
    """A job that never ends: the base's configuration is a pipe nobody writes to."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    home = tmp_path / "stuck"
    home.mkdir()
    (home / fresh._OURS).touch()
    os.mkfifo(home / "config.json")
    return Job(BaseSpec(home, spec.model_class, None, None, spec.device))


def job_directory(home: Path, job: Job, inputs: dict[str, torch.Tensor]) -> Path:
    home.mkdir(exist_ok=True)
    fresh._write_job(home, job, inputs)
    return home


def running(pid: int) -> bool:
    """Whether there is such a process, other than as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def wait_for(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


def server(seed: int = 0) -> Any:
    assert fresh._home is not None
    return fresh._home.servers[seed]


@contextlib.contextmanager
def killing(victim: Callable[[], int | None]) -> Iterator[None]:
    """Kill a process as soon as it is there."""

    def kill() -> None:
        os.kill(wait_for(victim), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()


# ---------------------------------------------------------------------------- what comes back


def test_a_job_gives_the_same_bits_as_this_process(subject: Subject, spec: BaseSpec) -> None:
    threads = torch.get_num_threads()
    result = run_fresh(Job(spec, subject.adapter.location, tensors=True), subject.inputs)
    assert torch.equal(result.outputs["output"], subject.output())
    assert set(result.outputs) == {"output"}
    assert set(result.tensors) == set(subject.adapter.tensors)
    assert result.hash_seed == 0
    assert result.pid != os.getpid()
    assert 0 < result.seconds < fresh.TIMEOUT
    plain = run_fresh(Job(spec), subject.inputs)
    assert torch.equal(plain.outputs["output"], subject.base_output())
    assert plain.tensors == {}
    assert torch.get_num_threads() == threads


@FORKS
def test_a_server_is_reused_and_every_job_has_a_process_of_its_own(
    subject: Subject, spec: BaseSpec
) -> None:
    pids = {run_fresh(Job(spec), subject.inputs).pid for _ in range(2)}
    before = server()
    pids.add(run_fresh(Job(spec), subject.inputs).pid)
    assert len(pids) == 3
    assert server() is before
    assert not any(running(pid) for pid in pids)
    assert children(before._process.pid) == []


def test_a_job_leaves_no_files(subject: Subject, spec: BaseSpec) -> None:
    run_fresh(Job(spec), subject.inputs)
    assert fresh._home is not None
    assert list(fresh._home.path.glob("job-*")) == []


# ---------------------------------------------------------------------------- what does not


def test_what_cannot_be_loaded_is_refused_in_a_sentence(subject: Subject, tmp_path: Path) -> None:
    spec = BaseSpec(tmp_path / "gone", "AutoModelForCausalLM", None, None, torch.device("cpu"))
    with pytest.raises(Refused, match=r"^in a fresh process: .*gone.*config\.json") as caught:
        run_fresh(Job(spec), subject.inputs)
    assert "last words" not in str(caught.value)


def test_missing_weights_are_an_error(subject: Subject, spec: BaseSpec, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(spec.path) / "config.json").read_text())
    bare = BaseSpec(tmp_path, spec.model_class, None, None, spec.device)
    with pytest.raises(Refused, match="holds no weights") as caught:
        run_fresh(Job(bare), subject.inputs)
    assert not caught.value.missing


def test_an_unexpected_error_comes_with_its_traceback(subject: Subject, spec: BaseSpec) -> None:
    job = Job(BaseSpec(spec.path, "NoSuchModel", None, None, spec.device))
    with pytest.raises(CannotRun, match="in a fresh process: AttributeError") as caught:
        run_fresh(job, subject.inputs)
    assert not isinstance(caught.value, Refused)
    assert "; its last words: Traceback" in str(caught.value)
    assert "NoSuchModel" in str(caught.value)


def test_what_has_no_meaning_is_not_applicable(
    folder: Path, tmp_path: Path, subject: Subject, spec: BaseSpec
) -> None:
    prompts = tiny.save_adapter(
        tiny.llama(), tmp_path, cls="PromptTuningConfig", num_virtual_tokens=4,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    job = Job(spec, prompts.location, merge_to=tmp_path / "merged")
    with pytest.raises(NotApplicable, match="PEFT cannot merge it"):
        run_fresh(job, subject.inputs)


@FORKS
def test_the_numeric_state_reaches_the_process(
    subject: Subject, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that cannot be applied shows that it is."""
    monkeypatch.setattr(fresh, "numeric_state", lambda: {"threads": 0})
    with pytest.raises(CannotRun, match="set_num_threads expects a positive"):
        run_fresh(Job(spec), subject.inputs)


@FORKS
def test_a_killed_job_is_told_and_the_server_survives(
    subject: Subject, spec: BaseSpec, stuck: Job
) -> None:
    run_fresh(Job(spec), subject.inputs)
    survivor = server()
    pid = survivor._process.pid
    with (
        killing(lambda: next(iter(children(pid)), None)),
        pytest.raises(CannotRun, match=r"killed by signal SIGKILL \(out of memory\?\)"),
    ):
        run_fresh(stuck, subject.inputs, timeout=30)
    assert server() is survivor
    assert run_fresh(Job(spec), subject.inputs).outputs


def test_one_script_runs_side_by_side_under_several_hash_seeds() -> None:
    """In the order asked for, each told apart by what Python hashes, with this thread's numbers."""
    code = "import torch\nfound = {'y': torch.tensor([hash('lora'), torch.get_num_threads()])}"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        results = run_side_by_side(Script(code, "found"), (2, 0))
        results += run_side_by_side(Script(code, "found"), (2,))
    finally:
        torch.set_num_threads(threads)
    assert [result.hash_seed for result in results] == [2, 0, 2]
    first, other, again = (result.outputs["y"].tolist() for result in results)
    assert first == again
    assert first[0] != other[0]
    assert {first[1], other[1]} == {3}
    with pytest.raises(Refused, match="ZeroDivisionError"):
        run_side_by_side(Script("1 / 0", "{}"), (0, 1))


@FORKS
def test_of_several_processes_the_others_end_when_one_fails() -> None:
    """Nobody waits for a minute to hear that something cannot be run; nor for Ctrl-C."""
    code = "import os, time\nassert os.environ['PYTHONHASHSEED'] != '0', 'no'\ntime.sleep(60)"
    run_side_by_side(Script("", "{}"), (0, 1))
    begun = time.monotonic()
    with pytest.raises(Refused, match="no"):
        run_side_by_side(Script(code, "{}"), (0, 1))
    assert time.monotonic() - begun < 30


@FORKS
def test_a_job_that_takes_too_long_is_ended_with_all_it_started(
    subject: Subject, spec: BaseSpec, stuck: Job
) -> None:
    run_fresh(Job(spec), subject.inputs)
    pid = server()._process.pid
    known: list[int] = []
    watch = threading.Thread(target=lambda: known.extend(wait_for(lambda: children(pid))))
    watch.start()
    with pytest.raises(CannotRun, match=r"took more than 0\.5 s.*--lora-process-timeout=SECONDS"):
        run_fresh(stuck, subject.inputs, timeout=0.5)
    watch.join()
    assert known
    wait_for(lambda: not any(running(each) for each in (pid, *known)))
    assert fresh._home is not None
    assert 0 not in fresh._home.servers  # others may serve tests from before


@FORKS
def test_a_server_that_dies_with_a_job_is_told_and_replaced(
    subject: Subject, spec: BaseSpec, stuck: Job
) -> None:
    run_fresh(Job(spec), subject.inputs)
    first = server()
    jobs: list[int] = []

    def busy() -> int | None:
        jobs.extend(children(first._process.pid))
        return first._process.pid if jobs else None

    with (
        killing(busy),
        pytest.raises(CannotRun, match="a fresh process died"),
    ):
        run_fresh(stuck, subject.inputs, timeout=30)
    assert 0 not in fresh._home.servers  # type: ignore[union-attr]
    wait_for(lambda: not any(running(pid) for pid in jobs))
    assert run_fresh(Job(spec), subject.inputs).outputs
    second = server()
    os.kill(second._process.pid, signal.SIGKILL)  # while it is idle
    second._process.wait()
    assert run_fresh(Job(spec), subject.inputs).outputs
    assert server() is not second


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("", "JSONDecodeError"),
        ('{"ok": tr', "JSONDecodeError"),
        ('{"pid": 1}', "KeyError"),
        ('{"ok": true, "pid": 1, "hash_seed": "0"}', "FileNotFoundError"),
    ],
)
def test_a_malformed_result_is_no_crash(tmp_path: Path, result: str, reason: str) -> None:
    (tmp_path / "result.json").write_text(result)
    with pytest.raises(CannotRun, match=rf"no readable result: {reason}.*; its last words: ouch"):
        fresh._read_result(tmp_path, "; its last words: ouch", 0.0)


def test_truncated_outputs_are_no_crash(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"ok": true, "pid": 1, "hash_seed": "0"}')
    save_file({"output": torch.ones(9)}, tmp_path / "outputs.safetensors")
    os.truncate(tmp_path / "outputs.safetensors", 60)
    with pytest.raises(CannotRun, match="no readable result: SafetensorError"):
        fresh._read_result(tmp_path, "", 0.0)


@pytest.mark.parametrize(
    ("status", "how"),
    [(3, "ended with status 3"), (0, "ended with status 0"), (-11, "killed by signal SIGSEGV$"),
     (-250, "killed by signal 250")],
)  # fmt: skip
def test_how_a_process_ended(tmp_path: Path, status: int, how: str) -> None:
    with pytest.raises(CannotRun, match=how):
        fresh._require_success(status, tmp_path, "")


def test_only_the_end_of_what_was_said_is_told(tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    log.write_text("of an earlier job\n" + "x" * 5000 + " the end\n")
    told = fresh._tail(log, 18)
    assert told.startswith("; its last words: xxx")
    assert told.endswith("the end")
    assert len(told) < fresh._TAIL + 30
    assert fresh._tail(log, log.stat().st_size) == ""


# ---------------------------------------------------------------------------- how it is started


@FORKS
def test_the_environment_and_the_hash_seed(
    subject: Subject, spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: a start-up file that prints does not disturb, and the oldest server makes room."""
    (tmp_path / "sitecustomize.py").write_text(
        "import json, os, sys\n"
        "print('hello from a start-up file', end='' if len(sys.argv) else '')\n"
        "path = os.path.join(os.path.dirname(__file__), 'seen.json')\n"
        "state = {'env': dict(os.environ), 'cwd': os.getcwd(), 'path': sys.path,\n"
        "         'hash': hash('x'), 'left': os.listdir('.')}\n"
        "json.dump(state, open(path, 'w'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("OF_THE_USERS", "own")
    monkeypatch.setattr(fresh, "MOST_SERVERS", 1)
    run_fresh(Job(spec), subject.inputs)
    first = server()
    result = run_fresh(Job(spec), subject.inputs, hash_seed=7)
    assert result.hash_seed == 7
    assert torch.equal(result.outputs["output"], subject.base_output())
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["env"]["PYTHONHASHSEED"] == "7"
    assert seen["env"]["OF_THE_USERS"] == "own"
    assert seen["env"]["HF_HUB_OFFLINE"] == seen["env"]["TRANSFORMERS_OFFLINE"] == "1"
    assert "PYTHONWARNINGS" not in seen["env"]
    assert seen["cwd"] not in seen["path"]
    assert seen["left"] == ["stderr"]
    known = subprocess.run(
        [sys.executable, "-c", "print(hash('x'))"], env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(seen["hash"]) in known.stdout
    assert list(fresh._home.servers) == [7]  # type: ignore[union-attr]
    assert not running(first._process.pid)


@FORKS
def test_an_interrupted_wait_ends_the_server(subject: Subject, spec: BaseSpec, stuck: Job) -> None:
    run_fresh(Job(spec), subject.inputs, hash_seed=7)
    pid = server(7)._process.pid

    def interrupt() -> None:
        wait_for(lambda: children(pid))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_fresh(stuck, subject.inputs, hash_seed=7, timeout=30)
    thread.join()
    assert not running(pid)
    assert 7 not in fresh._home.servers  # type: ignore[union-attr]


def test_a_process_that_cannot_import_says_why(
    subject: Subject, spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peft.py").write_text("raise ImportError('half an installation')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CannotRun, match=r"(?s)a fresh process (died|ended).*half an installation"):
        run_fresh(Job(spec), subject.inputs, hash_seed=1)
    assert 1 not in fresh._home.servers  # type: ignore[union-attr]


def test_a_folder_that_is_not_ours_is_refused_and_kept(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("kept")
    command = [sys.executable, "-P", os.fspath(fresh._MAIN), os.fspath(theirs)]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{theirs} is not a directory that pytest-lora made for itself" in done.stderr
    assert (theirs / "precious").read_text() == "kept"


def test_other_libraries_cannot_be_compared(
    subject: Subject, spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another copy of safetensors comes first on the path of the fresh process."""
    import shutil

    original = Path(str(safetensors.__file__)).parent
    shutil.copytree(original, tmp_path / "safetensors")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CannotRun, match=r"imports safetensors from .*, this one from") as caught:
        run_fresh(Job(spec), subject.inputs, hash_seed=2)
    assert str(tmp_path) in str(caught.value)
    assert str(original) in str(caught.value)
    assert 2 not in fresh._home.servers  # type: ignore[union-attr]


def test_a_library_that_is_not_there_at_all() -> None:
    ours = fresh._libraries()
    fresh._require_same_libraries(ours)
    with pytest.raises(CannotRun, match="imports peft from nowhere"):
        fresh._require_same_libraries({k: v for k, v in ours.items() if k != "peft"})


def test_the_time_to_start_counts(subject: Subject, spec: BaseSpec) -> None:
    with pytest.raises(CannotRun, match=r"took more than 0\.001 s"):
        run_fresh(Job(spec), subject.inputs, hash_seed=3, timeout=0.001)


def test_no_interpreter_to_start(
    subject: Subject, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CannotRun, match=r"no fresh process can be started: .*nowhere"):
        run_fresh(Job(spec), subject.inputs, hash_seed=4)


# ---------------------------------------------------------------------------- without a fork


def test_an_interpreter_of_its_own(subject: Subject, spec: BaseSpec, tmp_path: Path) -> None:
    job = Job(spec, subject.adapter.location, numeric=_fresh_job.numeric_state())
    directory = job_directory(tmp_path / "job", job, subject.inputs)
    said = fresh._on_its_own(directory, 5, time.monotonic() + 300, 300)
    result = fresh._read_result(directory, said, 1.5)
    assert torch.equal(result.outputs["output"], subject.output())
    assert (result.hash_seed, result.seconds) == (5, 1.5)
    assert not running(result.pid)


def test_an_interpreter_of_its_own_has_a_time_limit(
    subject: Subject, stuck: Job, tmp_path: Path
) -> None:
    directory = job_directory(tmp_path / "job", stuck, subject.inputs)
    with pytest.raises(CannotRun, match=r"took more than 0\.1 s"):
        fresh._on_its_own(directory, 0, time.monotonic() + 0.1, 0.1)


def test_off_linux_and_on_accelerators_nothing_forks(
    subject: Subject, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(directory: Path, hash_seed: int, deadline: float, timeout: float) -> str:
        raise CannotRun(f"of its own: {hash_seed}, {timeout:g}")

    monkeypatch.setattr(fresh, "_on_its_own", own)
    cuda = BaseSpec(spec.path, spec.model_class, None, None, torch.device("cuda"))
    with pytest.raises(CannotRun, match="of its own: 6, 9"):
        run_fresh(Job(cuda), subject.inputs, hash_seed=6, timeout=9)


# ---------------------------------------------------------------------------- what is left


@FORKS
def test_an_orphan_ends_its_job_and_removes_everything(
    subject: Subject, stuck: Job, tmp_path: Path
) -> None:
    """The real thing, driven by hand: its parent goes away in the middle of a job."""
    home = tmp_path / "home"
    home.mkdir()
    (home / fresh._OURS).touch()
    directory = job_directory(home / "job", stuck, subject.inputs)
    process = subprocess.Popen(
        [sys.executable, "-P", str(fresh._MAIN), str(home), *fresh._library_paths()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=home,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"\x1e{")
    process.stdin.write(f"{tmp_path / 'no job at all'}\n".encode())
    process.stdin.flush()
    assert process.stdout.readline() == b"\x1e1\n"
    process.stdin.write(f"{directory}\n".encode())
    process.stdin.flush()
    [child] = wait_for(lambda: children(process.pid))
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()
    assert not running(child)
    assert not home.exists()


@FORKS
def test_an_orphan_of_its_own_ends_too(subject: Subject, stuck: Job, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / fresh._OURS).touch()
    directory = job_directory(home / "job", stuck, subject.inputs)
    process = fresh._start(home, tmp_path, tmp_path / "log", 0, [f"--job={directory}"])
    wait_for((directory / "libraries.json").exists)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 1
    fresh._end(process)
    assert not home.exists()


def test_shutdown_leaves_nothing_and_can_be_followed_by_more(
    subject: Subject, spec: BaseSpec
) -> None:
    run_fresh(Job(spec), subject.inputs)
    assert fresh._home is not None
    home, servers = fresh._home.path, list(fresh._home.servers.values())
    shutdown()
    shutdown()
    assert not home.exists()
    assert not any(running(each._process.pid) for each in servers)
    with scratch() as directory:
        assert directory.parent != home
        assert directory.is_dir()


def test_a_scratch_directory_is_removed_whatever_happens() -> None:
    with pytest.raises(ZeroDivisionError), scratch("test") as directory:  # noqa: PT012
        (directory / "file").touch()
        assert directory.name.startswith("test-")
        raise ZeroDivisionError
    assert not directory.exists()


def test_a_home_that_was_cleaned_away_is_made_again() -> None:
    first = fresh._place()
    first.path.rmdir() if not list(first.path.iterdir()) else first.close()
    assert fresh._place().path.is_dir()
    assert fresh._place() is not first


def test_a_fork_of_ours_does_not_take_what_is_ours() -> None:
    home = fresh._Home()
    home.owner += 1
    home.close()
    assert home.path.is_dir()
    home.owner -= 1
    home.close()
    assert not home.path.exists()


def test_space_on_disk() -> None:
    require_space(1, "nothing much")
    with pytest.raises(CannotRun) as caught:
        require_space(10**18, "saving the merged model")
    assert caught.value.missing
    text = str(caught.value)
    assert text.startswith("saving the merged model takes 1000000000.00 GB on disk, but ")
    assert "GB free; make room there or set TMPDIR" in text


def test_a_full_disk_is_told(subject: Subject, spec: BaseSpec, tmp_path: Path) -> None:
    """Where results cannot be written, the process fails, and says so on stderr."""
    directory = job_directory(tmp_path / "job", Job(spec), subject.inputs)
    (directory / "outputs.safetensors").mkdir()
    _fresh_job.perform(directory)
    with pytest.raises(CannotRun, match="in a fresh process: "):
        fresh._read_result(directory, "", 0.0)


# ---------------------------------------------------------------------------- the wire format

paths = st.sampled_from([Path("/a/b"), Path("/models/x y"), Path("/ä")])
dtypes = st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64])
specs = st.builds(
    BaseSpec,
    paths,
    st.sampled_from(["AutoModel", "LlamaForCausalLM"]),
    st.none() | st.integers(2, 9),
    dtypes,
    st.sampled_from([torch.device("cpu"), torch.device("cuda:1")]),
)
locations = st.builds(AdapterLocation, paths, st.none() | paths, st.text(max_size=5))
jobs = st.builds(
    Job, specs, st.none() | locations, dtypes, st.none() | paths, st.booleans(),
    st.sampled_from([{}, _fresh_job.numeric_state()]),
)  # fmt: skip


@given(jobs)
def test_a_job_survives_the_wire(job: Job) -> None:
    assert _fresh_job.read_job(json.loads(json.dumps(_fresh_job.describe_job(job)))) == job


@pytest.fixture
def _numeric_state() -> Iterator[None]:
    state = _fresh_job.numeric_state()
    yield
    _fresh_job.apply_numeric_state(state)


@pytest.mark.usefixtures("_numeric_state")
def test_the_numeric_state_is_taken_over_as_a_whole() -> None:
    state = _fresh_job.numeric_state()
    _fresh_job.apply_numeric_state({})
    assert _fresh_job.numeric_state() == state
    torch.set_float32_matmul_precision("medium")
    medium = switches()
    _fresh_job.apply_numeric_state(state)
    other = {
        **state,
        "threads": 1 + (state["threads"] == 1),
        "precision": medium,
        "deterministic": not state["deterministic"],
        "warn_only": True,
        "default_dtype": "float64",
        "mkldnn": not state["mkldnn"],
        "sdp": {name: not value for name, value in state["sdp"].items()},
    }
    _fresh_job.apply_numeric_state(json.loads(json.dumps(other)))
    assert _fresh_job.numeric_state() == other


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_device_that_fails_is_not_a_method_that_cannot_merge(
    tmp_path: Path, error: Exception
) -> None:
    class Model(nn.Module):
        base_model = nn.Linear(1, 1)

        def merge_and_unload(self) -> nn.Module:
            raise error

    with pytest.raises(type(error), match="CUDA"):
        _fresh_job._merge(Model(), tmp_path, {})


# ---------------------------------------------------------------------------- the work, in process


def perform(home: Path, job: Job, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    directory = job_directory(home, job, inputs)
    _fresh_job.perform(directory)
    assert json.loads((directory / "result.json").read_text())["ok"]
    return load_file(directory / "outputs.safetensors")


def test_merging_saves_what_it_ran(subject: Subject, spec: BaseSpec, tmp_path: Path) -> None:
    job = Job(spec, subject.adapter.location, tensors=True, merge_to=tmp_path / "merged")
    found = perform(tmp_path / "a", job, subject.inputs)
    assert torch.equal(found["output"], subject.output())
    assert not torch.equal(found["merged"], found["output"])
    torch.testing.assert_close(found["merged"], found["output"], rtol=1e-3, atol=1e-4)
    assert {name for name in found if name.startswith("tensor:")} == {
        f"tensor:{key}" for key in subject.adapter.tensors
    }
    plain = BaseSpec(tmp_path / "merged", spec.model_class, None, None, spec.device)
    again = perform(tmp_path / "b", Job(plain), subject.inputs)
    assert torch.equal(again["output"], found["merged"])


def test_upcasting_widens_everything(subject: Subject, spec: BaseSpec, tmp_path: Path) -> None:
    job = Job(spec, subject.adapter.location, upcast=torch.float64)
    found = perform(tmp_path / "a", job, subject.inputs)["output"]
    assert found.dtype == torch.float64
    difference = (found - subject.output().double()).abs().max()
    assert 0 < float(difference) < 1e-4


def test_refusals_and_accidents_are_written_down(
    subject: Subject, spec: BaseSpec, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(job: Job) -> Any:
        _fresh_job.perform(job_directory(tmp_path, job, subject.inputs))
        return json.loads((tmp_path / "result.json").read_text())

    gone = BaseSpec(tmp_path / "gone", spec.model_class, None, None, spec.device)
    assert said(Job(gone))["kind"] == "CannotRun"
    assert capfd.readouterr().err == ""
    odd = BaseSpec(spec.path, "NoSuchModel", None, None, spec.device)
    result = said(Job(odd))
    assert (result["ok"], result["kind"], result["pid"]) == (False, "unexpected", os.getpid())
    assert "Traceback" in capfd.readouterr().err
    (tmp_path / "job.json").write_text("{")
    _fresh_job.perform(tmp_path)
    assert "JSONDecodeError" in (tmp_path / "result.json").read_text()


def test_what_cannot_be_saved_is_not_applicable(tmp_path: Path) -> None:
    model = tiny.wrap(tiny.cnn(), peft.LoraConfig(target_modules=["conv"]))
    with pytest.raises(NotApplicable, match="Cnn is no transformers model"):
        _fresh_job._merge(model, tmp_path, tiny.image())


def test_running_out_of_memory_is_no_property_of_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.wrap(tiny.cnn(), peft.LoraConfig(target_modules=["conv"]))

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(model.base_model), "merge_and_unload", full)
    with pytest.raises(torch.OutOfMemoryError):
        _fresh_job._merge(model, tmp_path, tiny.image())


def test_weights_at_odd_addresses_are_moved_before_running() -> None:
    model = nn.Linear(4, 4)
    model.weight.data = torch.arange(17.0)[1:].view(4, 4)
    expected = model.weight.detach().clone()
    assert model.weight.data_ptr() % 64
    output = _fresh_job._run(model, {"input": torch.eye(4)})
    assert model.weight.data_ptr() % 64 == 0
    assert torch.equal(model.weight, expected)
    assert torch.equal(output, (torch.eye(4) @ expected.T) + model.bias)


# ------------------------------------------------------------------------------ scripts


def test_a_script_runs_in_a_process_of_that_hash_seed_and_gives_tensors(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("WIDTH = 3\n")
    code = "import os, torch, only_here\nseed = int(os.environ['PYTHONHASHSEED'])"
    gives = "{'t': torch.full((only_here.WIDTH,), seed), 'hash': torch.tensor(hash('torch'))}"
    script = Script(code, gives, paths=(str(tmp_path),))
    here, there = (run_fresh(script, hash_seed=seed) for seed in (1, 2))
    assert torch.equal(there.outputs["t"], torch.full((3,), 2))
    assert not torch.equal(here.outputs["hash"], there.outputs["hash"])
    assert (here.hash_seed, there.hash_seed) == (1, 2)
    assert here.pid != os.getpid()


@pytest.mark.parametrize(("code", "gives"), [("1 / 0", "{}"), ("", "{'t': 1 / 0}")])
def test_what_a_script_raises_is_the_answer(code: str, gives: str) -> None:
    with pytest.raises(Refused, match="in a fresh process: ZeroDivisionError"):
        run_fresh(Script(code, gives), hash_seed=1)
