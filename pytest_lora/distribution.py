"""Which worker runs what: all checks of an adapter on one, the adapters of one base on few.

What the contract tries in fresh processes runs on one worker, too: each that did it would start
them, which takes seconds and memory.

The groups are made where the tests are handed out, from their node ids.  Marks would be made in the
workers and travel as suffixes of node ids, which xdist 3.8 writes to an attribute that pytest 9.2
no longer reads: the run would go on without groups, and every worker would load every base model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from xdist.scheduler import LoadGroupScheduling

from pytest_lora.catalog import Need, find_check
from pytest_lora.collection import SuitePlan
from pytest_lora.contract import IN_FRESH_PROCESSES
from pytest_lora.devices import share_of, visible_devices

if TYPE_CHECKING:
    import pytest
    from xdist.remote import Producer

    from pytest_lora.run import Run

__all__ = ["ByBase", "Place", "equip", "gpu_workers", "place_of"]


class Place(NamedTuple):
    """What the tests have in common that are to run on one worker: an adapter and its base."""

    base: str
    adapter: str


_CELL = "contract::"  # what contract_suite's node ids begin with
_IN_FRESH_PROCESSES = Place("fresh processes", "contract")


class ByBase(LoadGroupScheduling):  # type: ignore[misc]  # xdist ships no types
    """Tests in their order, but the checks that need a model adapter by adapter, base by base.

    A worker stays with the base model it has loaded.  Once that has no adapter waiting it takes a
    base that no other worker has, or else helps with the one that has the most adapters waiting,
    provided that there are two for each worker then: below, loading costs more than it saves.
    """

    def __init__(
        self, config: pytest.Config, log: Producer | None, place_of: Callable[[str], Place | None]
    ) -> None:
        super().__init__(config, log)
        self._place_of = place_of
        self._places: dict[str, Place] = {}
        self._held: dict[Any, str] = {}
        self._in_order = False

    def _split_scope(self, nodeid: str) -> str:
        place = self._place_of(nodeid)
        if place is None:
            return str(super()._split_scope(nodeid))
        scope = f"{place.base}\n{place.adapter}"
        self._places[scope] = place
        return scope

    def _reschedule(self, node: Any) -> None:
        if not node.shutting_down and self.workqueue and self._next_for(node) is None:
            node.shutdown()
        else:
            super()._reschedule(node)

    def _assign_work_unit(self, node: Any) -> None:
        if not self._in_order:
            self._put_in_order()
        scope = self._next_for(node) or next(iter(self.workqueue))
        if scope in self._places:
            self._held[node] = self._places[scope].base
        self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)

    def _put_in_order(self) -> None:
        """Put the groups into the run's order.  xdist has put large ones first, those with a model,
        which it can be told not to only since 3.8.
        """
        position = {nodeid: number for number, nodeid in enumerate(self.collection)}
        first = {scope: position[next(iter(unit))] for scope, unit in self.workqueue.items()}
        for scope in sorted(first, key=first.__getitem__):
            self.workqueue.move_to_end(scope)
        self._in_order = True

    def _next_for(self, node: Any) -> str | None:
        """The group a worker should run next; None if what waits is better left to others."""
        first: str = next(iter(self.workqueue))
        if first not in self._places:
            return first
        ready = [scope for scope in self.workqueue if scope in self._places]
        waiting = Counter(self._places[scope].base for scope in ready)
        holders = Counter(self._held[other] for other in self.nodes if other in self._held)
        base = _choose_base(waiting, holders, self._held.get(node))
        return next((scope for scope in ready if self._places[scope].base == base), None)


def _choose_base(
    waiting: Mapping[str, int], holders: Mapping[str, int], own: str | None
) -> str | None:
    """The base model to go on with.

    Args:
        waiting: number of adapters that wait, by base, in the order of the run.
        holders: number of workers that have loaded a base.
        own: the base of the worker that asks.
    """
    if own in waiting:
        return own
    fresh = next((base for base in waiting if not holders.get(base)), None)
    if fresh is not None:
        return fresh
    most = max(waiting, key=lambda base: waiting[base] / holders[base])
    pays = own is None or waiting[most] >= 2 * (holders[most] + 1)
    return most if pays else None


def place_of(run: Run, nodeid: str) -> Place | None:
    """Adapter and base model of a test that needs one, or the place of what needs fresh processes;
    None for all other tests.
    """
    if nodeid.startswith(_CELL) and nodeid.removeprefix(_CELL).split("[")[0] in IN_FRESH_PROCESSES:
        return _IN_FRESH_PROCESSES
    for adapter, check, _ in SuitePlan.of([nodeid]).planned:
        needs_base = find_check(check).need > Need.FILES
        return Place(run.base_name(adapter), adapter) if needs_base else None
    return None


def gpu_workers(run: Run, environ: Mapping[str, str]) -> int | None:
    """How many workers ``-n auto`` means where the run's models are on GPUs: one for each.

    None where they are on the CPU, for xdist to count the cores.
    """
    if run.settings.device == "cpu":
        return None
    devices = visible_devices(environ)
    return (len(devices) if _takes_any(run) else 1) if devices else None


def _takes_any(run: Run) -> bool:
    """Whether any one GPU will do for a worker: no other is asked for, nor several together."""
    return run.settings.device in ("auto", "cuda") and run.settings.device_map is None


def equip(run: Run, specs: list[Any], environ: Mapping[str, str]) -> None:
    """Give the workers that are about to be started on this machine their GPU and threads.

    ``specs`` are execnet's, which sets their ``env`` before it starts xdist's part of a worker.
    """
    devices = visible_devices(environ) if _takes_any(run) else ()
    for number, spec in enumerate(specs):
        if spec.popen:
            share = share_of(number, len(specs), devices, environ)
            spec.env.update({**share, **spec.env})
