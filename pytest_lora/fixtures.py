"""The ``lora_*`` fixtures.  Every one can be overridden in a conftest.

``lora_adapter`` is parametrised with the adapters given by ``--lora-adapter`` (or the ini key, or
the marker ``lora_adapter(path)``), so a test that asks for it, directly or through another
fixture, runs once per adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora.errors import UsageError
from pytest_lora.records import Bound
from pytest_lora.settings import Layer, Settings

if TYPE_CHECKING:
    import torch

    from pytest_lora.adapter import Adapter
    from pytest_lora.data import SourceDomain, TargetTask
    from pytest_lora.memory.plan import MemoryPlan
    from pytest_lora.run import Run
    from pytest_lora.subject import BaseModel, Subject

RUN = pytest.StashKey["Run"]()
PARTS = {"lora_source": "sources", "lora_task": "tasks", "lora_written_task": "tasks"}
"""Fixtures that are parametrised with entries of the profile, and of which kind."""


@pytest.fixture(scope="session")
def lora_run(pytestconfig: pytest.Config) -> Run:
    """The state of this run (not for overriding)."""
    return pytestconfig.stash[RUN]


@pytest.fixture
def lora_adapter(request: pytest.FixtureRequest, lora_run: Run) -> Adapter:
    """The adapter under test, as its files tell it (:class:`pytest_lora.Adapter`)."""
    name = getattr(request, "param", None)
    if name is None:
        pytest.skip(
            "no adapter to test: give --lora-adapter=PATH or mark the test lora_adapter(path)"
        )
    return lora_run.adapter(name)


@pytest.fixture
def lora_settings(request: pytest.FixtureRequest, lora_run: Run, lora_adapter: Adapter) -> Settings:
    """Every setting that holds for this adapter and test."""
    return lora_run.settings_for(lora_adapter.name, marker_layer(request.node))


@pytest.fixture
def lora_bounds(
    request: pytest.FixtureRequest, lora_run: Run, lora_adapter: Adapter, lora_settings: Settings
) -> Mapping[str, Bound]:
    """Bounds that somebody set, by check; checks not in here use their own."""

    def base() -> BaseModel:
        return lora_run.wrap(request.getfixturevalue("lora_base_model"))

    return lora_run.bounds_for(
        lora_settings, lora_adapter.name, base, parts=_parts_of(request.node)
    )


@pytest.fixture
def lora_device(lora_settings: Settings) -> str:
    """Device the base model is put on: ``auto``, or as torch names it."""
    return lora_settings.device


@pytest.fixture
def lora_dtype(lora_settings: Settings) -> str:
    """Dtype the base model is loaded in: ``auto``, or as torch names it."""
    return lora_settings.dtype


@pytest.fixture
def lora_base_source(lora_run: Run, lora_adapter: Adapter, lora_settings: Settings) -> Path:
    """Folder of the base model; override it to keep bases elsewhere."""
    return lora_run.base_source(lora_adapter, lora_settings)


@pytest.fixture
def lora_base_model(
    lora_run: Run,
    lora_adapter: Adapter,
    lora_base_source: Path,
    lora_device: str,
    lora_dtype: str,
) -> torch.nn.Module:
    """The bare base model, shared by every test and adapter of the run.

    Override it for bases that cannot be loaded from a folder; whatever module it returns is what
    adapters are attached to.
    """
    base = lora_run.base_model(lora_adapter, lora_base_source, device=lora_device, dtype=lora_dtype)
    return base.module


@pytest.fixture
def lora_tokenizer(lora_run: Run, lora_base_model: torch.nn.Module) -> Any:
    """The base model's tokenizer; skips where there is none."""
    tokenizer = lora_run.wrap(lora_base_model).tokenizer
    if tokenizer is None:
        pytest.skip("the base model has no tokenizer")
    return tokenizer


@pytest.fixture
def lora_inputs() -> Mapping[str, torch.Tensor] | None:
    """Inputs for the forward passes; None for token ids drawn from the vocabulary.

    Override it for models that do not take token ids.
    """
    return None


@pytest.fixture
def lora_subject(
    lora_run: Run,
    lora_adapter: Adapter,
    lora_base_model: torch.nn.Module,
    lora_inputs: Mapping[str, torch.Tensor] | None,
) -> Iterator[Subject]:
    """The adapter on its base model (:class:`pytest_lora.subject.Subject`).

    A test that leaves the base model changed is reported as an error, and the base is loaded anew.
    """
    base = lora_run.wrap(lora_base_model)
    yield lora_run.subject(lora_adapter, base, lora_inputs)
    lora_run.prove_intact(base)


@pytest.fixture
def lora_source(
    request: pytest.FixtureRequest, lora_run: Run, lora_adapter: Adapter, lora_settings: Settings
) -> SourceDomain:
    """A source domain of the profile (:class:`pytest_lora.SourceDomain`).

    A test that asks for it runs once per source domain of each adapter.
    """
    name = getattr(request, "param", None)
    if name is None:
        pytest.skip("no source domain to test: declare [sources.NAME] in lora.toml")
    return lora_run.source(lora_adapter.name, name, lora_settings)


@pytest.fixture
def lora_task(request: pytest.FixtureRequest, lora_run: Run, lora_adapter: Adapter) -> TargetTask:
    """A target task of the profile (:class:`pytest_lora.TargetTask`).

    A test that asks for it runs once per task of each adapter.
    """
    name = getattr(request, "param", None)
    if name is None:
        pytest.skip("no task to test: declare [tasks.NAME] in lora.toml")
    return lora_run.task(lora_adapter.name, name)


@pytest.fixture
def lora_written_task(
    request: pytest.FixtureRequest, lora_run: Run, lora_adapter: Adapter
) -> TargetTask:
    """As ``lora_task``, for the tasks in which the model writes its answers."""
    name = getattr(request, "param", None)
    if name is None:
        pytest.skip("no task with written answers: declare [tasks.NAME] in lora.toml")
    return lora_run.task(lora_adapter.name, name, judged=False)


@pytest.fixture
def lora_memory_plan(
    request: pytest.FixtureRequest,
    lora_adapter: Adapter,
    lora_base_source: Path,
    lora_settings: Settings,
    lora_device: str,
    lora_dtype: str,
) -> MemoryPlan:
    """What the memory checks are about (:class:`pytest_lora.MemoryPlan`).

    On a GPU with the adapter on its loaded base, to be measured; without one no weights are read.
    """
    from pytest_lora.loading import parse_device
    from pytest_lora.memory.plan import MemoryPlan

    on_gpu = parse_device(lora_device).type == "cuda"
    return MemoryPlan(
        lora_adapter,
        lora_base_source,
        dtype=lora_dtype,
        profile=lora_settings.gpu_profile,
        workload=dict(lora_settings.memory_workload),
        subject=request.getfixturevalue("lora_subject") if on_gpu else None,
    )


@pytest.fixture
def lora_model(lora_subject: Subject) -> Iterator[torch.nn.Module]:
    """A freshly attached ``PeftModel``; the test may train or change the adapter's weights."""
    with lora_subject.attached() as model:
        yield model


def _parts_of(node: pytest.Item) -> dict[str, str]:
    """The source domain and the task that a test is parametrised with, by kind."""
    params = getattr(getattr(node, "callspec", None), "params", {})
    return {kind: str(params[name]) for name, kind in PARTS.items() if name in params}


def marker_layer(node: pytest.Item) -> Layer | None:
    """The settings that the markers ``lora_bounds`` of a test give, the closest one winning."""
    values: dict[str, Any] = {}
    for mark in reversed(list(node.iter_markers("lora_bounds"))):
        if mark.args:
            raise UsageError(
                f"marker lora_bounds{mark.args}: name what the value is for, as in "
                "lora_bounds(merge_equivalence=2)"
            )
        values.update(mark.kwargs)
    return Layer(values, lambda name: f"marker lora_bounds({name}=...)") if values else None
