"""``pytest --lora-contract``, as its users meet it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

from example import ROOT

pytest_plugins = ["pytester"]

PAGE = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
PAPER, *_ = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\n")
    pytester.makepyfile(test_mine="def test_mine(): pass")
    return pytester


def layer(project: pytest.Pytester, name: str, *change: str) -> None:
    text = PAPER.replace(*change) if change else PAPER
    assert not change or text != PAPER
    (project.path / f"{name}.py").write_text(text)


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:randomly", *options)


def test_a_class_is_held_against_every_law_beside_the_projects_own_tests(
    project: pytest.Pytester,
) -> None:
    layer(project, "sound_layer")
    result = run(project, "--lora-contract=sound_layer:MyLora", "-v")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*test_mine.py::test_mine PASSED*",
            "*contract::forward?MyLora? PASSED*",
            "*contract::linear_in_scaling?MyLora? SKIPPED*(MyLora has no scale)*",
            "*LoRA contract*",
            "MyLora *",
            "* 0 fail (F)*",
        ]
    )
    count = sum(line.startswith("contract::") for line in result.outlines)
    result.stdout.fnmatch_lines([f"*collected {1 + count} items"])


def test_a_broken_law_prints_a_script_that_runs_without_us(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer(project, "scaled_layer", "= alpha / r,", "= alpha,")
    result = run(project, "--lora-contract=scaled_layer:MyLora", "-k", "forward")
    assert result.ret == 1
    text = result.stdout.str()
    assert "MyLora breaks forward" in text
    assert "rounding allows" in text
    shown = text.split("To see it by itself:\n\n")[1].splitlines()
    last = next(i for i, line in enumerate(shown) if line.startswith("    assert abs("))
    code = "\n".join(line[4:] for line in shown[: last + 1])
    assert "pytest_lora" not in code
    monkeypatch.syspath_prepend(str(project.path))
    with pytest.raises(AssertionError, match=r"^tensor"):
        exec(compile(code, "shown", "exec"), {"__name__": "shown"})


def test_the_installed_peft_is_held_and_known_deviations_are_expected_failures(
    project: pytest.Pytester,
) -> None:
    result = run(
        project, "--lora-contract", "-rx", "-k", "tied_weights and LORA or forward and IA3"
    )
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*LoRA contract*",
            "LORA *k",
            "known: tied_weights?LORA?*",
            "XFAIL contract::tied_weights?LORA? *peft/issues/2018*",
        ]
    )


def test_a_peft_that_attaches_nothing_fails_the_run(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    def broken(*args: object, **kwargs: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'foo'")

    monkeypatch.setattr(peft, "get_peft_model", broken)
    chosen = "([LORA] or IA3) and (forward or isolation or sequences)"
    result = run(project, "--lora-contract", "-k", chosen)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["0 pass (.), 5 fail (F), 1 n/a (-), 0 known (k)"])
    result.stdout.fnmatch_lines(["*AttributeError: 'NoneType' object has no attribute 'foo'*"])


def test_hypothesis_profiles_and_seeds_do_what_they_do_elsewhere(project: pytest.Pytester) -> None:
    layer(project, "profiled_layer")
    project.makeconftest(
        "from hypothesis import settings\nsettings.register_profile('three', max_examples=3)\n"
    )
    result = run(
        project,
        "--lora-contract=profiled_layer:MyLora",
        "--hypothesis-profile=three",
        "--hypothesis-seed=1",
        "--hypothesis-show-statistics",
        "-k",
        "forward",
    )
    result.stdout.fnmatch_lines(["contract::forward?MyLora?:", "*3 passing*"])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("=nowhere.at.all:Class", "cannot import nowhere.at.all"),
        ("=test_mine", "package.module:Class after a = sign"),
        ("=json:JSONDecoder", "attach, factors"),
        ("=broken_module:MyLora", "cannot import broken_module: ZeroDivisionError"),
    ],
)
def test_a_class_that_cannot_be_had_is_one_line(
    project: pytest.Pytester, value: str, says: str
) -> None:
    project.makepyfile(broken_module="1 // 0")
    result = run(project, f"--lora-contract{value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert says in result.stderr.str()
    assert "Traceback" not in result.stderr.str()


@pytest.mark.parametrize(
    ("device", "says"),
    [("nonsense", "device 'nonsense' is not one torch knows"), ("cuda:99", "but torch sees")],
)
def test_a_device_that_cannot_be_had_is_one_line(
    project: pytest.Pytester, device: str, says: str
) -> None:
    result = run(project, "--lora-contract", f"--lora-device={device}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert says in result.stderr.str()
    assert "Traceback" not in result.stderr.str()


def test_a_run_without_the_option_imports_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    code = (
        "import json, pytest, sys; pytest.main(['-q', '-p', 'no:cacheprovider', 'test_nothing.py'])"
        ";"
        "print('MODULES' + json.dumps([m for m in sys.modules if 'contract' in m or "
        "m.startswith('pytest_lora.str')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout.split("MODULES")[1])
    assert set(loaded) <= {"pytest_lora.strict_json"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each job is a process of its own")
def test_one_worker_tries_all_that_needs_fresh_processes_and_begins_with_it(
    project: pytest.Pytester,
) -> None:
    pytest.importorskip("xdist")
    chosen = "(LOHA or LOKR) and (seeded_initialisation or dtypes_kept or save_reload)"
    words = ("--lora-contract", "--lora-contract-depth=full")  # else they are tried on few methods
    result = run(project, *words, "-n", "2", "-v", "-k", chosen)
    assert result.ret == 0
    ran = re.findall(r"\[(gw\d)\].* PASSED contract::(\w+)\[\w+\]", result.stdout.str())
    assert sorted(law for _, law in ran) == [
        law for law in ("dtypes_kept", "save_reload", "seeded_initialisation") for _ in range(2)
    ]
    [fresh] = {worker for worker, law in ran if law != "dtypes_kept"}
    assert {worker for worker, law in ran if law == "dtypes_kept"} != {fresh}
