from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

# Nothing in the tests may reach for a hub: what is looked up there is a cache a test has built.
os.environ["HF_HUB_OFFLINE"] = "1"

# On GitHub, runs inside of tests would add to the summary of the job that tests us.
for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
    os.environ.pop(name, None)

# How long an example takes is the machine's affair and no verdict.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")

pytest_plugins = ["pytester"]


@pytest.fixture
def model_libraries() -> None:
    """Imported before a run inside of this one, which forgets the modules that it imported."""
    # Ours that others have by then imported from, or a class of theirs would be there twice.
    ours = ("assertions", "tasks.records", "checks.learning", "checks.forgetting")
    for name in ("torch", "transformers", "peft", *(f"pytest_lora.{module}" for module in ours)):
        import_module(name)


class _Torch:
    """What runs inside of this one have imported of torch, which cannot be imported twice: it
    registers its operators, once in a process.
    """

    def __init__(self) -> None:
        self.modules: dict[str, ModuleType] = {}

    def pytest_unconfigure(self) -> None:
        found = {name: module for name, module in sys.modules.items() if name.startswith("torch.")}
        self.modules |= found

    def put_back(self) -> None:
        if "torch" in sys.modules:
            sys.modules.update(self.modules)


@pytest.fixture
def _torch() -> Iterator[_Torch]:
    seen = _Torch()
    yield seen
    seen.put_back()  # after pytester, which forgets once more what it has not seen in the beginning


@pytest.fixture
def pytester(
    _torch: _Torch, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """pytest's own, but a run inside of this one does not forget what it imported of torch."""
    inline_run = pytester.inline_run

    def keeping(*args: Any, plugins: Sequence[Any] = (), **options: Any) -> Any:
        try:
            return inline_run(*args, plugins=[*plugins, _torch], **options)
        finally:
            _torch.put_back()

    monkeypatch.setattr(pytester, "inline_run", keeping)
    return pytester
