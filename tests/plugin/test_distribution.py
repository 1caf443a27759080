"""Workers: how many there are, what each is given, and which adapters each of them judges."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from adapter_maker import write_adapter

pytest.importorskip("xdist")
execnet = pytest.importorskip("execnet")

from pytest_lora import devices, distribution, plugin  # noqa: E402
from pytest_lora.distribution import ByBase, Place, _choose_base, equip  # noqa: E402
from pytest_lora.run import Run  # noqa: E402
from pytest_lora.settings import Layer  # noqa: E402

GPUS = ("GPU-1", "MIG-2", "3")


class Worker:
    """What a scheduler sees of a worker."""

    def __init__(self, name: str) -> None:
        self.name, self.sent, self.shutting_down = name, [], False
        self.gateway = SimpleNamespace(id=name)

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def place_of(nodeid: str) -> Place | None:
    found = re.fullmatch(r"lora::\w+\[(\w+)/(\w+)\]", nodeid)
    return Place(found[1], found[2]) if found else None


def model_checks(**adapters: int) -> list[str]:
    """Three checks of each adapter of each base, as a run orders them."""
    return [
        f"lora::c{check}[{base}/{base}{number}]"
        for base, count in adapters.items()
        for number in range(count)
        for check in range(3)
    ]


def play(tests: list[str], workers: int, speeds: tuple[int, ...] = ()) -> dict[str, list[str]]:
    """Which tests each worker runs, in order, when all take turns."""
    option = SimpleNamespace(loadscopereorder=True, tx=["popen"] * workers, maxschedchunk=None)
    config = SimpleNamespace(option=option, getvalue=lambda name: option.tx)
    scheduler = ByBase(config, None, place_of)
    nodes = [Worker(f"gw{number}") for number in range(workers)]
    for node in nodes:
        scheduler.add_node(node)
    for node in nodes:
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    done: dict[str, list[str]] = {node.name: [] for node in nodes}
    for step in range(workers * 20 * len(tests)):
        turn, number = divmod(step, workers)
        node = nodes[number]
        pending = node.sent[len(done[node.name]) :]
        if pending and turn % (speeds[number] if speeds else 1) == 0:
            done[node.name].append(tests[pending[0]])
            scheduler.mark_test_complete(node, pending[0])
    assert sorted(test for ran in done.values() for test in ran) == sorted(tests)
    return done


def bases_of(tests: list[str]) -> list[str]:
    """The bases a worker loads, in the order it loads them."""
    places = [place.base for place in map(place_of, tests) if place is not None]
    return [base for i, base in enumerate(places) if i == 0 or places[i - 1] != base]


def test_fifty_adapters_of_one_base_are_shared_and_it_is_loaded_once_per_worker():
    done = play(model_checks(a=50), 2)
    assert [bases_of(tests) for tests in done.values()] == [["a"], ["a"]]
    assert min(map(len, done.values())) >= 60
    whole = Counter(place_of(test).adapter for tests in done.values() for test in tests)
    per_worker = [{place_of(test).adapter for test in tests} for tests in done.values()]
    assert not per_worker[0] & per_worker[1]
    assert set(whole.values()) == {3}


def test_every_base_has_its_worker_where_there_are_enough():
    done = play(model_checks(a=2, b=2, c=2), 3)
    assert sorted(bases_of(tests)[0] for tests in done.values()) == ["a", "b", "c"]
    assert all(len(bases_of(tests)) == 1 for tests in done.values())


def test_a_worker_that_is_through_helps_where_much_is_left_and_only_there():
    assert _choose_base({"a": 9, "b": 5}, {"a": 1, "b": 1}, "b") == "b"
    assert _choose_base({"a": 9, "b": 5}, {"a": 1}, "c") == "b"
    assert _choose_base({"a": 9, "b": 50}, {"a": 1, "b": 10}, "c") == "a"
    assert _choose_base({"a": 3}, {"a": 1}, "c") is None
    assert _choose_base({"a": 4}, {"a": 1}, "c") == "a"
    assert _choose_base({"a": 1}, {"a": 1}, None) == "a"
    done = play(model_checks(a=1, b=30), 2)
    assert bases_of(done["gw0"]) == ["a", "b"]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_other_tests_and_those_of_files_come_first_and_all_are_run(workers: int):
    first = [f"test_mine.py::test_{number}" for number in range(7)]
    done = play([*first, *model_checks(a=5, b=1)], workers, tuple(range(1, workers + 1)))
    for tests in done.values():
        kinds = [place_of(test) is not None for test in tests]
        assert kinds == sorted(kinds)


def test_work_of_a_worker_that_died_goes_to_another():
    tests = model_checks(a=4)
    option = SimpleNamespace(loadscopereorder=True, tx=["popen"] * 2)
    scheduler = ByBase(
        SimpleNamespace(option=option, getvalue=lambda name: option.tx), None, place_of
    )
    nodes = [Worker("gw0"), Worker("gw1")]
    for node in nodes:
        scheduler.add_node(node)
    for node in nodes:
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    assert scheduler.remove_node(nodes[0]) == tests[0]
    ran: list[int] = []
    while len(ran) < len(nodes[1].sent):
        ran.append(nodes[1].sent[len(ran)])
        scheduler.mark_test_complete(nodes[1], ran[-1])
    assert sorted(ran) == list(range(len(tests)))


# ------------------------------------------------------------------- what a worker is given


def a_run(tmp_path: Path, **values: object) -> Run:
    return Run([Layer({"adapter": ["a"], **values}, str)], start=tmp_path, root=tmp_path)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "visible_devices", lambda environ: GPUS)
    monkeypatch.setattr(devices, "cores", lambda: 12)


def equipped(run: Run, texts: list[str], environ: dict[str, str] | None = None) -> list[dict]:
    specs = [execnet.XSpec(text) for text in texts]
    equip(run, specs, environ or {})
    return [spec.env for spec in specs]


def test_each_worker_gets_a_gpu_and_its_cores(tmp_path: Path, gpus):
    assert equipped(a_run(tmp_path), ["popen"] * 4) == [
        {"CUDA_VISIBLE_DEVICES": name, "OMP_NUM_THREADS": "3"} for name in (*GPUS, GPUS[0])
    ]


def test_what_the_user_says_of_a_worker_stays(tmp_path: Path, gpus):
    texts = ["popen//env:CUDA_VISIBLE_DEVICES=7", "ssh=elsewhere//python=python3"]
    assert equipped(a_run(tmp_path), texts, {"OMP_NUM_THREADS": "2"}) == [
        {"CUDA_VISIBLE_DEVICES": "7"},
        {},
    ]


@pytest.mark.parametrize(
    ("values", "workers"),
    [
        ({}, 3),
        ({"device": "cuda"}, 3),
        ({"device": "cuda:1"}, 1),
        ({"device_map": "auto"}, 1),
        ({"device": "cpu"}, None),
    ],
)
def test_auto_is_a_worker_per_gpu_unless_one_model_takes_them_all(
    tmp_path: Path, gpus, values: dict[str, str], workers: int | None
):
    run = a_run(tmp_path, **values)
    assert distribution.gpu_workers(run, {}) == workers
    shared = equipped(run, ["popen"])[0]
    assert ("CUDA_VISIBLE_DEVICES" in shared) == (workers == 3)


# ------------------------------------------------------------------- a run with workers

SAY = """
import json, os, sys
from pathlib import Path

def pytest_configure(config):
    if hasattr(config, "workerinput"):
        said = {
            "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "torch": "torch" in sys.modules,
        }
        name = config.workerinput["workerid"] + ".json"
        (Path(__file__).parent / name).write_text(json.dumps(said))
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.makeconftest(SAY)
    write_adapter(pytester.path / "adapters" / "good")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    return pytester


def said(project: pytest.Pytester) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(project.path.glob("gw*.json"))]


def test_auto_takes_a_worker_per_gpu(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distribution, "visible_devices", lambda environ: GPUS[:2])
    result = project.runpytest_inprocess(
        "-p", "no:randomly", "-n", "auto", "--lora-adapter=adapters/good", "--lora-checks=files"
    )
    result.assert_outcomes(passed=4)
    assert [path.name for path in sorted(project.path.glob("gw*"))] == ["gw0.json", "gw1.json"]
    assert [item["device"] for item in said(project)] == ["GPU-1", "MIG-2"]
    assert not any(item["torch"] for item in said(project))


def test_runs_of_others_are_left_alone(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distribution, "visible_devices", lambda environ: GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "outer")
    project.makepyfile(test_mine="def test_mine(): pass")
    result = project.runpytest_inprocess("-p", "no:randomly", "-n", "1")
    result.assert_outcomes(passed=1)
    assert said(project) == [{"device": "outer", "threads": None, "torch": False}]


def test_what_the_contract_tries_in_fresh_processes_is_one_place(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    laws = ("seeded_initialisation", "forward", "save_reload", "saved_alone")
    fresh, forward, again, alone = (
        distribution.place_of(run, f"contract::{law}[LORA]") for law in laws
    )
    assert fresh == again is not None
    assert forward is alone is None
    assert distribution.place_of(run, "tests/contract::save_reload[LORA]") is None


@pytest.mark.parametrize(
    ("contract", "device", "shared"),
    [(None, "cuda", False), ("", "auto", False), ("", "cpu", False), ("", "cuda", True)],
)
def test_workers_that_hold_the_contract_on_gpus_get_one_each(
    monkeypatch: pytest.MonkeyPatch, contract: str | None, device: str, shared: bool
) -> None:
    equipped: list[object] = []
    monkeypatch.setattr(distribution, "equip", lambda run, specs, environ: equipped.append(specs))
    run = SimpleNamespace(settings=SimpleNamespace(adapter=(), device=device))
    config = SimpleNamespace(stash={plugin.RUN: run}, getoption=lambda name: contract)
    plugin.pytest_xdist_setupnodes(config, ["popen"])
    assert equipped == ([["popen"]] if shared else [])


def test_without_a_gpu_auto_is_what_xdist_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "visible_devices", lambda environ: ())
    run = a_run(tmp_path)
    assert distribution.gpu_workers(run, {}) is None
    [environment] = equipped(run, ["popen"])
    assert list(environment) == ["OMP_NUM_THREADS"]


def test_a_number_of_workers_in_the_environment_is_obeyed(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "visible_devices", lambda environ: GPUS)
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "1")
    words = ["--lora-adapter=adapters/good", "--lora-checks=files", "-n", "auto"]
    project.runpytest_inprocess("-p", "no:randomly", *words).assert_outcomes(passed=4)
    assert [item["device"] for item in said(project)] == ["GPU-1"]


def test_a_setting_that_cannot_be_meant_is_a_usage_error_here_too(
    project: pytest.Pytester,
) -> None:
    words = ["--lora-adapter=adapters/good", "--lora-dtype=int8", "-n", "auto"]
    result = project.runpytest_inprocess(*words)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --lora-dtype: got 'int8'*"])


def test_without_xdist_there_is_nothing_to_settle(project: pytest.Pytester) -> None:
    words = ["--lora-adapter=adapters/good", "--lora-checks=files", "-p", "no:xdist"]
    project.runpytest_inprocess("-p", "no:randomly", *words).assert_outcomes(passed=4)
