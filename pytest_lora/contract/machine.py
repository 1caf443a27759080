"""Random sequences of operations against the reference: what a user may do, in any order.

After every step the model is run, and its output has to be what the reference says for the adapters
that are active, and the base's where all are off.  Merged or not must not show.  For methods whose
layers compute something else than ``W x + s B A x`` the reference is memory instead: the same
adapters active give the same bits as the first time, whatever happened in between; merging is left
to the laws about it, as there nobody knows how much it may round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pytest_lora.contract.dialects import FIRST, Case, Dialect
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.reference import Term
from pytest_lora.contract.trial import ContractBroken
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import quiet

if TYPE_CHECKING:
    import torch

__all__ = ["LAW", "SAYS", "machine_for"]

LAW = "sequences"
SAYS = "After any sequence of operations the output is that of the adapters at work."
NAMES = (FIRST, "one2", "two")


def _guarded(step: Callable[..., None]) -> Callable[..., None]:
    """A known deviation ends the sequence without a failure; nothing is done any more."""

    @functools.wraps(step)
    def guarded(self: _Sequences, **given: Any) -> None:
        if self.over:
            return
        try:
            with quiet():
                step(self, **given)
        except NotApplicable:
            self.over = True  # not with the numbers drawn
        except ContractBroken as broken:
            if not type(self).excuse(broken):
                raise
            self.over = True

    return guarded


class _Sequences(RuleBasedStateMachine):
    """The state: which adapters there are, which are active, whether they are on and merged."""

    dialect: Dialect
    cases: st.SearchStrategy[Case]
    excuse: Callable[[ContractBroken], bool]
    judged: Callable[[], None]

    def __init__(self) -> None:
        super().__init__()
        self.it: Experiment | None = None
        self.adapters: dict[str, Mapping[str, Term]] = {}
        self.drawn: dict[str, Case] = {}
        self.active: tuple[str, ...] = (FIRST,)
        self.enabled, self.merged = True, False
        self.roundings = 0
        self.remembered: dict[tuple[str, ...], torch.Tensor] = {}
        self.over = False

    # ------------------------------------------------------------------ steps

    @initialize(data=st.data())
    @_guarded
    def start(self, data: st.DataObject) -> None:
        case = data.draw(self.cases)
        self.it = Experiment(LAW, self.dialect, case)
        self.it.attach()
        self._remember(FIRST, case)

    @property
    def _experiment(self) -> Experiment:
        assert self.it is not None
        return self.it

    @property
    def _plain(self) -> bool:
        return self.dialect.plain and self._experiment.reference is not None

    def _remember(self, name: str, case: Case) -> None:
        self.drawn[name] = case
        if not self._plain:
            self.adapters[name] = {}
            return
        if self.dialect.rewrites and name == FIRST and self._experiment.reference:
            self._experiment.reference.rebase(self._experiment.own)
        self.adapters[name] = self._experiment.terms(name, case)

    def _do(self, operation: str, *args: object) -> bool:
        """Whether it was done: what cannot be done must leave everything as it was.

        In a plain state (nothing merged, nothing off) it has to be possible.
        """
        try:
            if self.merged or not self.enabled:
                return self._experiment.may(operation, *args)
            self._experiment.say(operation, *args)
        except NotApplicable:
            return False
        return True

    def _step(self) -> None:
        """Once something was merged, every operation may merge or unmerge behind the scenes."""
        if self.roundings or self.merged:
            self.roundings += max(len(self.adapters), 1)

    @precondition(lambda self: len(self.adapters) < len(NAMES) and not self.merged)
    @rule(seed=st.integers(1, 99), more=st.integers(1, 5), part=st.sampled_from([None, 0, -1]))
    @_guarded
    def add(self, seed: int, more: int, part: int | None) -> None:
        """One more, of one of the modules only or of all of them."""
        it = self._experiment
        name = next(name for name in NAMES if name not in self.adapters)
        chosen = () if part is None else (it.case.net.targets[part],)
        case = replace(it.case, seed=seed, alpha=it.case.alpha + more, chosen=chosen)
        if not self._do("add", name, case):
            return
        if self._do("activate", name):
            self.dialect.fill(it.trial, name, seed)
            self.active = (name,)
        self._remember(name, case)
        self._step()

    @rule(data=st.data())
    @_guarded
    def activate(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        if self._do("activate", name):
            self.active, self.merged = (name,), False
        self._step()

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(data=st.data())
    @_guarded
    def activate_both(self, data: st.DataObject) -> None:
        names = data.draw(st.permutations(sorted(self.adapters)).map(lambda order: order[:2]))
        if self._do("activate", list(names)):
            self.active, self.merged = tuple(names), False
        self._step()

    @precondition(lambda self: len(self.adapters) > len(self.active))
    @rule(data=st.data())
    @_guarded
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.adapters) - set(self.active))))
        if self._do("delete", name):
            del self.adapters[name]
            self.remembered = {k: v for k, v in self.remembered.items() if name not in k}
        self._step()

    @rule()
    @_guarded
    def disable(self) -> None:
        if self._do("disable"):
            self.enabled = False
        self._step()

    @precondition(lambda self: not self.enabled)
    @rule()
    @_guarded
    def enable(self) -> None:
        if self._do("enable"):
            self.enabled = True
        self._step()

    @precondition(lambda self: self._plain and self.enabled)
    @rule()
    @_guarded
    def merge(self) -> None:
        if self._do("merge"):
            self.merged = True
        self._step()

    @precondition(lambda self: self._plain and self.enabled and self.merged)
    @rule()
    @_guarded
    def unmerge(self) -> None:
        if self._do("unmerge"):
            self.merged = False
        self._step()

    @precondition(lambda self: self._plain and not self.merged and self.enabled)
    @rule(factor=st.sampled_from([0.5, 3.0]))
    @_guarded
    def scale(self, factor: float) -> None:
        if len(self.active) > 1 or not self._do("scale", self.active[0], factor):
            return
        name = self.active[0]
        original = self._experiment.terms(name, self.drawn[name])
        if self._experiment.is_peft:  # which says what the scaling is
            self.adapters[name] = original
        else:
            self.adapters[name] = {key: term.scaled(factor) for key, term in original.items()}

    # ------------------------------------------------------------------ what has to hold

    @invariant()
    @_guarded
    def output_is_the_references(self) -> None:
        if self.it is None:
            return
        at_work = self.active if self.enabled else ()
        if self._plain:
            terms = [self.adapters[name] for name in at_work]
            self.it.expect(terms, self._state(), merges=self.roundings)
            type(self).judged()
        else:
            self._expect_memory(at_work)
        if not self.enabled:
            self.merged = False  # running it switched off takes the merge out

    def _expect_memory(self, at_work: tuple[str, ...]) -> None:
        it = self._experiment
        if not at_work and not self.dialect.rewrites:
            it.expect_bits(it.base, "base", self._state())
            type(self).judged()
        elif at_work in self.remembered:
            it.expect_bits(self.remembered[at_work], _name(at_work), self._state())
            type(self).judged()
        else:
            it.output()
            name = _name(at_work)
            it.trial.run(f"{name} = y.clone()")
            self.remembered[at_work] = it.trial.names[name]

    def _state(self) -> str:
        on = ", ".join(self.active) if self.enabled else "all off"
        return f"adapters at work: {on}{', merged' if self.merged else ''}"


def _name(at_work: tuple[str, ...]) -> str:
    """What the script calls the output first seen with these adapters."""
    return "with_" + ("_".join(at_work) or "none")


def machine_for(
    dialect: Dialect,
    cases: st.SearchStrategy[Case],
    excuse: Callable[[ContractBroken], bool],
    judged: Callable[[], None],
) -> type[RuleBasedStateMachine]:
    """The machine for one implementation, on networks drawn from ``cases``.

    ``excuse`` says whether a failure is a known deviation, at which the sequence just ends;
    ``judged`` is called whenever an output was compared.
    """
    names = {"dialect": dialect, "cases": cases, "excuse": staticmethod(excuse),
             "judged": staticmethod(judged)}  # fmt: skip
    return type("Sequences", (_Sequences,), names)
