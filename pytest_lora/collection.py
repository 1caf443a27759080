"""Turns the suite's modules into test items of the session, in a sensible order.

The modules are added to the session as nodes, not to its arguments: pytest 8 drops tests of the
user's own when arguments overlap, and an adapter's folder must never become a collected path.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from pytest_lora import suite
from pytest_lora.catalog import CHECKS, CheckSpec, Need, find_check
from pytest_lora.errors import UsageError
from pytest_lora.fixtures import PARTS
from pytest_lora.records import CheckResult, Outcome
from pytest_lora.run import Run

__all__ = ["SuiteModule", "SuitePlan", "collect_suite", "is_left_out", "part_of", "spec_of"]

_MODULES = ("files", "base", "weights", "switching", "merge", "reload", "forgetting", "learning")
_NODE_ID = re.compile(r"lora/test_\w+::test_(?P<check>\w+)\[(?P<adapter>.*)\](?:@.*)?", re.DOTALL)


class SuiteModule(pytest.Module):
    """A module of the built-in suite, whose node ids read ``lora/test_merge::...``."""

    def _getobj(self) -> ModuleType:
        return importlib.import_module(f"{suite.__name__}.{self.path.stem}")

    def funcnamefilter(self, name: str) -> bool:
        """The suite's own names, whatever ``python_functions`` says in the user's project."""
        return name.startswith("test_")

    def classnamefilter(self, name: str) -> bool:
        """The suite has no classes."""
        return False


@dataclass(frozen=True, slots=True)
class SuitePlan:
    """The checks a run is going to make, as (adapter, check, part)."""

    planned: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(cls, node_ids: Iterable[str]) -> SuitePlan:
        """The plan that node ids tell; those of other tests are passed over."""
        matches = (_NODE_ID.fullmatch(node_id) for node_id in node_ids)
        return cls(tuple(_planned(**match.groupdict()) for match in matches if match))

    def not_run(self, results: Sequence[CheckResult]) -> list[CheckResult]:
        """A result for every planned check that has none, saying so."""
        done = {(result.adapter, result.check, result.part) for result in results}
        reason = "not run: the run ended before it came to this check"
        return [
            CheckResult(check, adapter, Outcome.SKIPPED, reason, part=part)
            for adapter, check, part in self.planned
            if (adapter, check, part) not in done
        ]


def _planned(check: str, adapter: str) -> tuple[str, str, str]:
    if not find_check(check).per:
        return adapter, check, ""
    # Names of sources and tasks hold no colon.
    adapter, _, part = adapter.rpartition(":")
    return adapter, check, part


def collect_suite(
    session: pytest.Session, run: Run
) -> tuple[list[pytest.Function], list[pytest.Function]]:
    """The suite's items for every adapter of the run: those selected, and those left out.

    Raises:
        UsageError: an adapter has no item at all, which would be a silent pass.
    """
    items = [item for name in _MODULES for item in _module_items(session, name)]
    for name in run.locate():
        if not any(_adapter_of(item) == name for item in items):
            raise UsageError(f"no check was collected for the adapter {name}")
    bases = {name: run.base_name(name) for name in run.locate()}
    ordered = sorted(items, key=lambda item: _order(item, list(bases), list(bases.values())))
    for item in ordered:
        item.add_marker("lora")
    chosen = [item for item in ordered if run.settings.selected(_spec(item))]
    for item in chosen:
        run.require_data(_spec(item), _adapter_of(item))
    return chosen, [item for item in ordered if item not in chosen]


def is_left_out(definition: pytest.Function, run: Run) -> bool:
    """Whether a test function of the suite is one that ``--lora-checks`` leaves out."""
    if definition.getparent(SuiteModule) is None:
        return False
    return not run.settings.selected(find_check(definition.name.removeprefix("test_")))


def spec_of(item: pytest.Item) -> CheckSpec | None:
    """The check a test of the suite carries out; None for any other test."""
    if item.getparent(SuiteModule) is None or not isinstance(item, pytest.Function):
        return None
    return _spec(item)


def _spec(item: pytest.Function) -> CheckSpec:
    return find_check(item.originalname.removeprefix("test_"))


def _module_items(session: pytest.Session, name: str) -> list[pytest.Function]:
    path = Path(suite.__path__[0]) / f"test_{name}.py"
    module = SuiteModule.from_parent(session, path=path, nodeid=f"lora/{path.stem}")
    items = [item for item in session.genitems(module) if isinstance(item, pytest.Function)]
    # Where the profile declares nothing that a check is made for, it was not parametrised.
    return [item for item in items if hasattr(item, "callspec")]


def part_of(item: pytest.Function) -> str:
    """The source domain or task that a test of the suite is about; empty for most."""
    parts = (item.callspec.params.get(name) for name in PARTS)
    return next((str(part) for part in parts if part is not None), "")


def _adapter_of(item: pytest.Function) -> str:
    return str(item.callspec.params["lora_adapter"])


def _order(item: pytest.Function, names: list[str], bases: list[str]) -> tuple[int, ...]:
    """Cheap checks over all adapters first, then adapter by adapter, base by base."""
    spec = _spec(item)
    adapter = names.index(_adapter_of(item))
    position = CHECKS.index(spec)
    if spec.need <= Need.BASE:
        return (spec.need, adapter, position)
    return (Need.WEIGHTS, bases.index(bases[adapter]), adapter, position)
