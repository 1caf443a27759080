"""``pytest --lora-contract``: the contract's cells as tests of the session, and their table.

Loaded only where the option is given.  Each cell (method and law) is one test; what does not apply
is skipped with its reason, what is known to deviate is an expected failure, and a known deviation
that no longer shows is told at the end.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pytest_lora.contract import cells
from pytest_lora.contract.cells import Cell, Result, Verdict, contract_cells
from pytest_lora.contract.table import summary, table_lines
from pytest_lora.contract.trial import ContractBroken
from pytest_lora.errors import UsageError

__all__ = ["ContractPlugin"]

PROPERTY = "pytest_lora_contract"
PROFILE_OPTION = "--hypothesis-profile"
QUICK, FULL = "quick", "full"
_EXAMPLES = {QUICK: (5, 1), FULL: (60, 8)}
"""Examples of LoRA itself (or one's own class), and of every other method."""


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
        try:
            super().runtest()
        except Exception as failure:
            self._hand_on(self.cell.verdict(failure))
            raise
        verdict = self.cell.verdict()
        self._hand_on(verdict)
        if verdict.result is Result.NOT_APPLICABLE:
            raise pytest.skip.Exception(verdict.reason)
        if verdict.result is Result.KNOWN:
            pytest.xfail(f"known: {'; '.join(verdict.known)}")

    def _hand_on(self, verdict: Verdict) -> None:
        # user_properties travel with the report, through workers, as plain text.
        self.user_properties.append((PROPERTY, json.dumps(verdict.to_dict())))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:  # type: ignore[override]
        """A broken law as its message: the script in it is the evidence, not our frames."""
        if isinstance(excinfo.value, ContractBroken):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int, str]:
        """The file of the laws."""
        return Path(cells.__file__), 0, self.name


class ContractPlugin:
    """Collects the cells and, from the reports, the table.

    Args:
        value: of the option; empty for the installed PEFT, else ``package.module:Class``.
        depth: ``quick`` or ``full``; a Hypothesis profile named on the command line comes first.
    """

    def __init__(self, config: pytest.Config, value: str, depth: str) -> None:
        self.config, self.depth = config, depth
        self.verdicts: list[Verdict] = []
        sys.path.insert(0, str(config.invocation_params.dir))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what PEFT's dependencies deprecate on import
                self.cells = contract_cells(value or None)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        finally:
            sys.path.pop(0)

    def _settings(self, cell: Cell) -> settings:
        chosen = settings()  # of the profile in force
        if self.config.getoption(PROFILE_OPTION, None):
            return chosen
        examples = _EXAMPLES[self.depth][0 if cell.is_main else 1]
        return settings(parent=chosen, max_examples=examples)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        """Add the cells to the session's items."""
        module = ContractModule.from_parent(session, path=Path(cells.__file__), nodeid="contract")
        for cell in self.cells:
            function = cell.function(self._settings(cell))
            name = f"{cell.law}[{cell.method}]"
            item: ContractItem = ContractItem.from_parent(module, name=name, callobj=function)
            item.cell = cell
            items.append(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather verdicts; on the controller, where workers run the tests."""
        if report.when == "call":
            found = [text for name, text in report.user_properties if name == PROPERTY]
            self.verdicts += [Verdict.from_dict(json.loads(str(text))) for text in found]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table of laws and methods, and what is worth saying about it."""
        if not self.verdicts or hasattr(self.config, "workerinput"):
            return
        order = {(cell.method, cell.law): place for place, cell in enumerate(self.cells)}
        self.verdicts.sort(key=lambda verdict: order[verdict.method, verdict.law])
        terminalreporter.write_sep("=", "LoRA contract")
        for line in (*table_lines(self.verdicts), "", *summary(self.verdicts)):
            terminalreporter.write_line(line)
