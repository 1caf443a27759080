"""Which worker runs what: with ``--dist loadgroup``, all that needs one base model runs on one.

The groups are made where the tests are handed out, from their node ids.  Marks would be made in the
workers and travel as suffixes of node ids, which xdist 3.8 writes to an attribute that pytest 9.2
no longer reads: the run would go on without groups, and every worker would load every base model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xdist.scheduler import LoadGroupScheduling

from pytest_lora.catalog import Need, find_check
from pytest_lora.collection import SuitePlan

if TYPE_CHECKING:
    import pytest
    from xdist.remote import Producer

    from pytest_lora.run import Run

__all__ = ["GroupByBase", "base_of"]


class GroupByBase(LoadGroupScheduling):  # type: ignore[misc]  # xdist ships no types
    """xdist's ``loadgroup``, in which the base model of a check of the suite is its group."""

    def __init__(
        self, config: pytest.Config, log: Producer | None, base_of: Callable[[str], str | None]
    ) -> None:
        super().__init__(config, log)
        self._base_of = base_of

    def _split_scope(self, nodeid: str) -> str:
        return self._base_of(nodeid) or super()._split_scope(nodeid)


def base_of(run: Run, nodeid: str) -> str | None:
    """The base model that a test of the suite needs; None for tests that need none of ours."""
    for adapter, check, _ in SuitePlan.of([nodeid]).planned:
        return run.base_name(adapter) if find_check(check).need > Need.FILES else None
    return None
