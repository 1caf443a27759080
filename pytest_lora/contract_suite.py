"""``pytest --lora-contract``: the contract's cells as tests of the session, and their table.

Loaded only where the option is given.  Each cell (method and law) is one test; what does not apply
is skipped with its reason, what is known to deviate is an expected failure, and a known deviation
that no longer shows is told at the end.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pytest_lora.carried import arrived, hand_on
from pytest_lora.contract import IN_FRESH_PROCESSES, cells
from pytest_lora.contract.cells import Cell, Result, Verdict, contract_cells
from pytest_lora.contract.laws import HASH_SEEDS
from pytest_lora.contract.table import summary, table_lines
from pytest_lora.contract.trial import ContractBroken
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.fresh import get_ready

__all__ = ["ContractPlugin"]

PROFILE_OPTION = "--hypothesis-profile"
QUICK, FULL = "quick", "full"
_EXAMPLES = {QUICK: (5, 1), FULL: (60, 8)}
"""Examples of LoRA itself (or one's own class), and of every other method."""
_IN_FRESH_PROCESSES = {QUICK: (2, 1), FULL: (20, 3)}
"""Likewise for the laws whose every example takes processes: what they look for shows at once."""


class ContractModule(pytest.Module):
    """Where the cells' node ids begin: ``contract``."""

    def _getobj(self) -> types.ModuleType:
        return sys.modules[cells.__name__]

    def collect(self) -> Iterator[pytest.Item]:
        """Nothing: the plugin makes the items."""
        return iter(())


class ContractItem(pytest.Function):
    """One cell."""

    cell: Cell

    def runtest(self) -> None:
        """Run the property test and turn what came of it into pytest's outcome."""
        if self.cell.law in IN_FRESH_PROCESSES:
            get_ready(range(HASH_SEEDS))  # all at once, where the session has not begun with it
        try:
            with _no_collection():
                super().runtest()
        except Exception as failure:
            hand_on(self, "call", self.cell.verdict(failure).to_dict(), kind="contract")
            raise
        verdict = self.cell.verdict()
        hand_on(self, "call", verdict.to_dict(), kind="contract")
        if verdict.result is Result.NOT_APPLICABLE:
            raise pytest.skip.Exception(verdict.reason)
        if verdict.result is Result.KNOWN:
            pytest.xfail(f"known: {'; '.join(verdict.known)}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:  # type: ignore[override]
        """A broken law as its message: the script in it is the evidence, not our frames."""
        if isinstance(excinfo.value, ContractBroken | pytest.xfail.Exception):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int, str]:
        """The file of the laws."""
        return Path(cells.__file__), 0, self.name


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is left for when the cell is through: all of it is young then, and soon found."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ContractPlugin:
    """Collects the cells and, from the reports, the table.

    Args:
        value: of the option; empty for the installed PEFT, else ``package.module:Class``.
        depth: ``quick`` or ``full``; a Hypothesis profile named on the command line comes first.
        device: where the networks are; ``auto`` is the CPU, whose rounding is the best known.
    """

    def __init__(self, config: pytest.Config, value: str, depth: str, device: str) -> None:
        self.config, self.depth = config, depth
        self.verdicts: list[Verdict] = []
        sys.path.insert(0, str(config.invocation_params.dir))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what PEFT's dependencies deprecate on import
                place = "cpu" if device == "auto" else device
                self.cells = contract_cells(value or None, device=place)
        except (UsageError, CannotRun) as error:
            raise pytest.UsageError(str(error)) from None
        finally:
            sys.path.pop(0)

    def _settings(self, cell: Cell) -> settings:
        chosen = settings()  # of the profile in force
        if self.config.getoption(PROFILE_OPTION, None):
            return chosen
        many = _IN_FRESH_PROCESSES if cell.law in IN_FRESH_PROCESSES else _EXAMPLES
        examples = many[self.depth][0 if cell.is_main else 1]
        return settings(parent=chosen, max_examples=examples)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        """Add the cells to the session's items."""
        module = ContractModule.from_parent(session, path=Path(cells.__file__), nodeid="contract")
        # Last what needs fresh processes: these start while the others run.  First where one worker
        # runs them all (distribution.py): these start while the other workers go on.
        first = hasattr(self.config, "workerinput")
        made: list[pytest.Item | pytest.Collector] = []
        for cell in sorted(self.cells, key=lambda cell: (cell.law in IN_FRESH_PROCESSES) != first):
            function = cell.function(self._settings(cell))
            name = f"{cell.law}[{cell.method}]"
            item: ContractItem = ContractItem.from_parent(module, name=name, callobj=function)
            item.cell = cell
            items.append(item)
            made.append(item)
        # As of every collector: what counts the session's tests counts these.
        report = pytest.CollectReport(module.nodeid, "passed", None, made)
        session.ihook.pytest_collectreport(report=report)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Fresh processes take seconds to import what they need: they may begin now."""
        here = not hasattr(self.config, "workerinput") and not self.config.option.collectonly
        laws = {item.cell.law for item in session.items if isinstance(item, ContractItem)}
        if laws:
            # A fifth of the time would go into looking for garbage among what was imported.
            gc.collect()
            gc.freeze()
        if here and laws & IN_FRESH_PROCESSES:
            get_ready(range(HASH_SEEDS))

    def pytest_sessionfinish(self) -> None:
        """Garbage is collected as it was."""
        gc.unfreeze()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather verdicts; on the controller, where workers run the tests."""
        verdict = arrived(report, "contract")
        if verdict is not None:
            self.verdicts.append(Verdict.from_dict(verdict))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table of laws and methods, and what is worth saying about it."""
        if not self.verdicts or hasattr(self.config, "workerinput"):
            return
        order = {(cell.method, cell.law): place for place, cell in enumerate(self.cells)}
        self.verdicts.sort(key=lambda verdict: order[verdict.method, verdict.law])
        terminalreporter.write_sep("=", "LoRA contract")
        quick = self.depth == QUICK and not self.config.getoption(PROFILE_OPTION, None)
        for line in (*table_lines(self.verdicts), "", *summary(self.verdicts, quick=quick)):
            terminalreporter.write_line(line)
