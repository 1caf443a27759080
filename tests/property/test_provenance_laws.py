"""The command that a report names runs what was run: for every setting, whatever its value."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.catalog import CHECKS
from pytest_lora.plugin import pytest_addoption
from pytest_lora.provenance import command_of
from pytest_lora.settings import DTYPES, MEMORY_WORDS, Layer, Settings, ini_name, resolve, table

OUTPUTS = {"report", "pr_comment"}
START = Path("somewhere").absolute()
texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
words = st.text("abc019.:/-_", min_size=1)
counts = st.integers(1, 10**9)
seeds = st.integers(0, 2**32 - 1)
limits = st.floats(0, allow_infinity=False)
signed = st.floats(allow_nan=False, allow_infinity=False)
relative = st.builds("baseline {} {}".format, st.sampled_from("+-"), limits)
# Of a byte nothing is left below one.
sizes = st.builds("{} {}".format, st.integers(1, 2**60), st.sampled_from(["B", "MB", "GiB"])) | (
    st.builds("{:.6f} {}".format, st.floats(1, 1e6), st.sampled_from(["MB", "GB", "GiB"]))
)
devices = st.dictionaries(st.sampled_from(["0", "1", "cpu"]), sizes, max_size=3)


@st.composite
def workloads(draw: st.DrawFn) -> list[str]:
    names = draw(st.lists(st.sampled_from(sorted(MEMORY_WORDS)), unique=True))
    return [f"{n}={draw(counts if MEMORY_WORDS[n] is int else words)}" for n in names]


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "adapter": st.lists(texts, max_size=3),
    "base_model": texts,
    "device": texts,
    "dtype": st.sampled_from([*DTYPES, "fp32", "bf16"]),
    "device_map": st.sampled_from(["auto", "balanced", "balanced_low_0", "sequential"]),
    "max_memory": devices.map(lambda d: [f"{k}={v.replace(' ', '')}" for k, v in d.items()]),
    "checks": st.lists(st.sampled_from([*(spec.id for spec in CHECKS), "files"]), max_size=3),
    "target": st.lists(words, max_size=3),
    "profile": texts,
    "strict": st.booleans(),
    "inconclusive": st.sampled_from(["fail", "skip"]),
    "newer_writer": st.sampled_from(["fail", "note"]),
    "scaling": limits,
    "safe_merge": st.booleans(),
    "cycles": counts,
    "hash_seeds": seeds | st.lists(seeds, min_size=1, max_size=3),
    "process_timeout": counts,
    "error_rate": st.floats(0, 0.5, exclude_min=True, exclude_max=True),
    "full_eval": st.booleans(),
    "order_seed": seeds,
    "cache_dir": texts,
    "cache_size": counts,
    "no_cache": st.booleans(),
    "allow_code_execution": st.booleans(),
    "gpu_profile": texts,
    "memory_workload": workloads(),
    "baseline": texts,
}
for spec in CHECKS:
    if spec.limit:
        drift = spec.unit == "nats per token"
        VALUES[spec.id] = sizes if spec.opt_in else (signed if drift else limits) | relative
given_values = st.fixed_dictionaries({}, optional=VALUES)


class Options(argparse.ArgumentParser):
    """Takes options as pytest's parser does."""

    def getgroup(self, *_: str) -> Options:
        return self

    addoption = argparse.ArgumentParser.add_argument

    def addini(self, *_: Any, **__: Any) -> None:
        pass


OPTIONS = Options(allow_abbrev=False)
pytest_addoption(OPTIONS, SimpleNamespace(register=lambda *_: None))  # type: ignore[arg-type]


def of(settings: Settings) -> dict[str, Any]:
    known = {name: getattr(settings, name, None) for name, _ in table() if name not in OUTPUTS}
    return {**known, **settings.bounds}


def test_no_setting_is_left_out() -> None:
    assert set(VALUES) == {name for name, _ in table()} - OUTPUTS


@given(given_values)
def test_the_command_of_a_report_makes_the_same_settings(values: dict[str, Any]) -> None:
    settings = resolve([Layer(values, ini_name)])
    python, module, pytest_, select, lora, *options = shlex.split(command_of(settings, START))
    assert (python, module, pytest_, select, lora) == ("python", "-m", "pytest", "-m", "lora")
    read = vars(OPTIONS.parse_args(options))
    again = {name: read[ini_name(name)] for name, _ in table() if read[ini_name(name)] is not None}
    assert of(resolve([Layer(again, ini_name)])) == of(settings)


def test_a_command_is_for_people_to_read() -> None:
    values = {"memory_train_step": "14.5 GiB", "memory_workload": ["batch=4 sequence=128"]}
    command = command_of(resolve([Layer(values, ini_name)]), START)
    assert shlex.split(command)[5:] == [
        "--lora-memory-workload=batch=4",
        "--lora-memory-workload=sequence=128",
        "--lora-memory-train-step=14.5 GiB",
    ]
