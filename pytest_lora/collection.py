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
from typing import ClassVar

import pytest

from pytest_lora import suite
from pytest_lora.catalog import CHECKS, CheckSpec, Need, find_check
from pytest_lora.errors import UsageError
from pytest_lora.fixtures import PARTS
from pytest_lora.memory.profiles import find_profile
from pytest_lora.records import CheckResult, Outcome
from pytest_lora.run import Run
from pytest_lora.settings import option_name

__all__ = [
    "RootDirectory",
    "SuiteModule",
    "SuitePlan",
    "asked_for",
    "collect_suite",
    "is_left_out",
    "part_of",
    "spec_of",
]

_MODULES = (
    "files", "base", "weights", "switching", "merge", "memory", "reload", "forgetting", "learning"
)  # fmt: skip
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


class RootDirectory:
    """Remembers the node of the rootdir, for pytest 9.1.

    That release ties the fixtures of the rootdir's conftest.py to this node, so modules that hang
    on the session, as the suite's do, miss them (pytest#14683).  Others tie them to the session.
    """

    NAME: ClassVar = "pytest_lora_rootdir"
    NEEDED: ClassVar = pytest.version_tuple[:2] == (9, 1)
    node: pytest.Directory | None = None

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        """Keep the node if it is the rootdir's."""
        if isinstance(collector, pytest.Directory) and collector.path == collector.config.rootpath:
            self.node = collector

    @classmethod
    def of(cls, session: pytest.Session) -> pytest.Directory | pytest.Session:
        """What the suite's modules hang on: the session wherever its fixtures are all there."""
        kept = session.config.pluginmanager.get_plugin(cls.NAME)
        return kept.node if isinstance(kept, cls) and kept.node else session


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
    adapter = _unescaped(adapter)
    if not find_check(check).per:
        return adapter, check, ""
    # Names of sources and tasks hold no colon.
    adapter, _, part = adapter.rpartition(":")
    return adapter, check, part


def _unescaped(name: str) -> str:
    """A name as it was before pytest put it into a node id, where all but ASCII is escaped."""
    try:
        return name.encode("ascii").decode("unicode_escape")
    except UnicodeError:  # an ini key of pytest's leaves names as they are
        return name


def collect_suite(
    session: pytest.Session, run: Run
) -> tuple[list[pytest.Function], list[pytest.Function]]:
    """The suite's items for every adapter of the run: those selected, and those left out.

    Raises:
        UsageError: an adapter has no item at all, which would be a silent pass.
    """
    items = [item for name in _MODULES for item in _module_items(session, name)]
    collected = {_adapter_of(item) for item in items}
    for name in run.locate():
        if name not in collected:
            raise UsageError(f"no check was collected for the adapter {name}")
    places = _places(run)
    ordered = sorted(items, key=lambda item: _order(item, places))
    for item in ordered:
        item.add_marker("lora")
    chosen: list[pytest.Function] = []
    left_out: list[pytest.Function] = []
    for item in ordered:
        (chosen if run.settings.selected(_spec(item)) else left_out).append(item)
    for item in chosen:
        run.require_data(_spec(item), _adapter_of(item))
    _require_bounds(run, chosen)
    return chosen, left_out


def is_left_out(definition: pytest.Function, run: Run) -> bool:
    """Whether a test function of the suite is one that ``--lora-checks`` leaves out."""
    if definition.getparent(SuiteModule) is None:
        return False
    return not run.settings.selected(find_check(definition.name.removeprefix("test_")))


def asked_for(definition: pytest.Function, run: Run, names: list[str]) -> list[str]:
    """Those of the adapters ``names`` that a test function is made for: all, but for a check of the
    suite that is made only where its bound is set.
    """
    if definition.getparent(SuiteModule) is None:
        return names
    spec = find_check(definition.name.removeprefix("test_"))
    return [name for name in names if not spec.opt_in or spec.id in run.settings_for(name).bounds]


def _require_bounds(run: Run, chosen: Sequence[pytest.Function]) -> None:
    """Raise UsageError where a check is named that no bound was set for, or an unknown card."""
    made = {(_spec(item), _adapter_of(item)) for item in chosen if _spec(item).opt_in}
    for spec in CHECKS:
        named = spec.opt_in and spec.id in run.settings.checks
        if named and not any(spec is other for other, _ in made):
            raise UsageError(
                f"{run.settings.origin('checks')}: {spec.id} has no ceiling; set one, as in "
                f"{option_name(spec.id)}='14 GiB' or {spec.id} = \"14 GiB\" in lora.toml"
            )
    for _, adapter in made:
        find_profile(run.settings_for(adapter).gpu_profile)


def spec_of(item: pytest.Item) -> CheckSpec | None:
    """The check a test of the suite carries out; None for any other test."""
    if item.getparent(SuiteModule) is None or not isinstance(item, pytest.Function):
        return None
    return _spec(item)


def _spec(item: pytest.Function) -> CheckSpec:
    return find_check(item.originalname.removeprefix("test_"))


def _module_items(session: pytest.Session, name: str) -> list[pytest.Function]:
    path = Path(suite.__path__[0]) / f"test_{name}.py"
    parent = RootDirectory.of(session)
    module = SuiteModule.from_parent(parent, path=path, nodeid=f"lora/{path.stem}")
    items = [item for item in session.genitems(module) if isinstance(item, pytest.Function)]
    # Where the profile declares nothing that a check is made for, it was not parametrised.
    return [item for item in items if hasattr(item, "callspec")]


def part_of(item: pytest.Function) -> str:
    """The source domain or task that a test of the suite is about; empty for most."""
    parts = (item.callspec.params.get(name) for name in PARTS)
    return next((str(part) for part in parts if part is not None), "")


def _adapter_of(item: pytest.Function) -> str:
    return str(item.callspec.params["lora_adapter"])


def _places(run: Run) -> dict[str, tuple[int, int]]:
    """Of each adapter the number of its base model and its own, in the order they were given."""
    bases: dict[str, int] = {}
    return {
        name: (bases.setdefault(run.base_name(name), len(bases)), number)
        for number, name in enumerate(run.locate())
    }


def _order(item: pytest.Function, places: dict[str, tuple[int, int]]) -> tuple[int, ...]:
    """Cheap checks over all adapters first, then adapter by adapter, base by base."""
    spec = _spec(item)
    base, adapter = places[_adapter_of(item)]
    position = CHECKS.index(spec)
    if spec.need <= Need.BASE:
        return (spec.need, adapter, position)
    return (Need.WEIGHTS, base, adapter, position)
