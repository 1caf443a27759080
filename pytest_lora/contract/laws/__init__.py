"""The laws: what must hold for every implementation, whatever is drawn.

A law takes an :class:`~pytest_lora.contract.experiment.Experiment` and does with it what a user
might; it raises :class:`~pytest_lora.contract.trial.ContractBroken` if the law does not hold and
``NotApplicable`` if it has no meaning.  Where the project has a check that states the law for an
adapter (merging, isolation, frozen weights, ...), that check is the law for PEFT; what is written
out here is for implementations that know nothing of PEFT, and what needs no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

from pytest_lora.contract.law import Law
from pytest_lora.contract.laws import (
    choosing,
    combining,
    computing,
    declared,
    kept,
    merging,
    names,
    saving,
    several,
)
from pytest_lora.contract.laws.steps import HASH_SEEDS

__all__ = ["HASH_SEEDS", "LAWS", "Law"]

_MODULES = (computing, merging, several, combining, kept, saving, choosing, declared, names)
LAWS: Mapping[str, Law] = {name: law for module in _MODULES for name, law in module.LAWS.items()}
"""By their names, in the order of the table."""
