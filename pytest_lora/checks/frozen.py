"""Every weight and buffer of the base model, before and after each thing PEFT does to it.

Nothing is copied to compare with: each tensor's position-dependent fingerprint
(:mod:`pytest_lora.numerics.fingerprint`) is taken before and after, and a tensor that changed is
then compared with the file it came from to say where.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_lora.attach import ADAPTER_NAME, own_randomness
from pytest_lora.loading import one_line, quiet
from pytest_lora.numerics.fingerprint import Fingerprint, fingerprint
from pytest_lora.records import Measurement, Problem
from pytest_lora.structure import on_clones
from pytest_lora.subject import lora_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from pytest_lora.subject import BaseModel, Subject

__all__ = ["measure_frozen_weights"]

SECOND = "pytest_lora_second"

_FIXES = {
    "as loaded": "the model in memory is not the one on disk: look for code that edits weights "
    "while it loads",
    "delete while merged": "call unmerge_adapter() before delete_adapter(), or use PEFT >= 0.21",
}
_OWN_VALUES = (
    "the adapter's file holds values for the base's own tensor (bias='all' or 'lora_only', a saved "
    "embedding), which PEFT loads in place: give it a base model of its own"
)
_AT_ATTACH = (
    "loading edits the base (init_lora_weights such as pissa or olora): save the adapter with "
    "path_initial_model_for_weight_conversion"
)


def measure_frozen_weights(subject: Subject) -> Measurement:
    """Count base tensors that an operation changed, each under the first operation that did.

    The operations: attach, forward, merge and unmerge (module by module, on copies of the module's
    own tensors, so that what counts is what else was written to), disable and enable, switch to a
    second adapter and back, delete that, unload; and, on another attachment, delete while merged.
    Before them, the tensors as loaded are compared with the files on disk.

    Returns:
        ``value``: changed tensors.  ``count``: tensors times operations compared.  ``details``:
        ``operations`` carried out, ``tensors``, ``on_disk`` (tensors compared with the files) and
        ``not_on_disk`` (tensors without a counterpart there).

    Raises:
        CannotRun: the adapter cannot be attached, or the model cannot run.
    """
    _mend(subject.base)
    try:
        return _Watch(subject).measure()
    finally:
        _mend(subject.base)


def _mend(base: BaseModel) -> None:
    """What others did is not this adapter's doing, and what it did is not the next one's."""
    base.release()
    if base.spec is not None and base.verify():
        base.reload()


@dataclass
class _Watch:
    """Fingerprints before, operations, fingerprints after."""

    subject: Subject
    state: Mapping[str, Fingerprint] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def measure(self) -> Measurement:
        base = self.subject.base
        self.state = base.state()
        compared = self._against_disk()
        self._operations()
        self._delete_while_merged()
        tensors = len(base.fingerprints)
        return Measurement.of_problems(
            self.problems,
            count=tensors * len(self.done),
            unit="changed tensors",
            notes=self.notes,
            operations=list(self.done),
            tensors=tensors,
            on_disk=compared,
            not_on_disk=tensors - compared,
        )

    def _look(self, operation: str) -> None:
        """Compare with the last state, so that each change is laid at one operation's door."""
        found, self.state = self.subject.base.changes(self.state)
        for problem in found:
            fix = self._fix(operation, problem.where)
            where = f"{operation}: {problem.where}"
            self.problems.append(replace(problem, where=where, fix=fix))
        self.done.append(operation)

    def _fix(self, operation: str, tensor: str) -> str:
        if operation != "attach":
            return "load the base model again after this operation"
        own = self.subject.base.overwritten_by(self.subject.adapter)
        return _OWN_VALUES if tensor in own else _AT_ATTACH

    def _operations(self) -> None:
        with self.subject.attached() as model, quiet(), own_randomness():
            self._look("attach")
            self.subject.output(model)
            self._look("forward")
            for operation, act in _OPERATIONS.items():
                try:
                    remark = act(self.subject, model)
                except Exception as error:  # what PEFT cannot do with this adapter
                    remark = f"left out, PEFT refuses: {one_line(error)}"
                if remark:
                    self.notes.append(f"{operation}: {remark}")
                self._look(operation)

    def _against_disk(self) -> int:
        """Compare every tensor that has a counterpart on disk; how many there were."""
        base = self.subject.base
        tensors = dict(base.tensors())
        compared = 0
        for name, tensor in tensors.items():
            stored = base.on_disk(name, tensor)
            if stored is None:
                continue
            compared += 1
            if fingerprint(stored) != base.fingerprints[name].digest:
                self._differs_from_disk(name, tensor, stored)
        if base.spec is None:
            self.notes.append("the base model was passed in: there are no files to compare with")
        elif compared < len(tensors):
            kinds = "buffers, tied, fresh or quantised tensors"
            self.notes.append(
                f"{len(tensors) - compared} tensors are not on disk as such ({kinds})"
            )
        return compared

    def _differs_from_disk(self, name: str, tensor: torch.Tensor, stored: torch.Tensor) -> None:
        from pytest_lora.numerics.fingerprint import locate_difference
        from pytest_lora.subject import describe

        found = describe(locate_difference(tensor, stored), tensor.numel())
        self.problems.append(
            Problem(f"as loaded: {name}", found, "the bits on disk", _FIXES["as loaded"])
        )

    def _delete_while_merged(self) -> None:
        """Deleting a merged adapter has to be refused or to take its delta along."""
        operation = "delete while merged"
        with self.subject.attached() as model, quiet():
            layers = list(_mergeable(model))
            if not layers:
                return
            name, layer = min(layers, key=lambda pair: _size(pair[1]))
            with on_clones(layer):
                found = _deltas_left(model, layer)
        self.problems += [
            Problem(
                f"{operation}: {name}.{leaf}",
                "the adapter is gone and its delta still there",
                "refused, or the weight as before",
                _FIXES[operation],
            )
            for leaf in found
        ]
        self.done.append(operation)


# ------------------------------------------------------------------------------ operations


def _merge_and_unmerge(subject: Subject, model: Any) -> str:
    """Every module in turn, on copies of its own tensors."""
    merged = 0
    refused = ""
    for name, layer in _mergeable(model):
        with on_clones(layer):
            try:
                layer.merge(adapter_names=[ADAPTER_NAME])
                layer.unmerge()
                merged += 1
            except Exception as error:  # merge_equivalence says what this means for the adapter
                refused = f"{name} cannot be merged: {one_line(error)}"
    return refused or ("" if merged else "left out, there is no module to merge")


def _disable_and_enable(subject: Subject, model: Any) -> str:
    with model.disable_adapter():
        subject.output(model)
    subject.output(model)
    return ""


def _switch(subject: Subject, model: Any) -> str:
    """To a second adapter of the same configuration and back."""
    config = copy.deepcopy(model.peft_config[ADAPTER_NAME])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the others edit the base on purpose
    model.add_adapter(SECOND, config)
    model.set_adapter(SECOND)
    subject.output(model)
    model.set_adapter(ADAPTER_NAME)
    subject.output(model)
    return ""


def _delete(subject: Subject, model: Any) -> str:
    if SECOND not in model.peft_config:
        return "left out, there is no second adapter"
    model.delete_adapter(SECOND)
    subject.output(model)
    return ""


def _unload(subject: Subject, model: Any) -> str:
    if not hasattr(model.base_model, "unload"):
        return "left out, nothing is wrapped"
    model.unload()
    return ""


_OPERATIONS: Mapping[str, Callable[[Subject, Any], str]] = {
    "merge and unmerge": _merge_and_unmerge,
    "disable and enable": _disable_and_enable,
    "switch": _switch,
    "delete": _delete,
    "unload": _unload,
}


def _mergeable(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in lora_layers(model):
        if hasattr(layer, "merge"):
            yield name, layer


def _size(layer: Any) -> int:
    return sum(parameter.numel() for parameter in layer.get_base_layer().parameters())


def _deltas_left(model: Any, layer: Any) -> list[str]:
    """Names of the layer's tensors that keep a delta nobody can take out any more."""
    own = dict(layer.get_base_layer().named_parameters(recurse=False))
    before = {name: fingerprint(tensor) for name, tensor in own.items()}
    try:
        layer.merge(adapter_names=[ADAPTER_NAME])
        merged = {name: fingerprint(tensor) for name, tensor in own.items()}
        model.delete_adapter(ADAPTER_NAME)
    except Exception:  # refused to merge, or, as it should be, to delete
        return []
    with contextlib.suppress(Exception):
        layer.unmerge()
    now = {name: fingerprint(tensor) for name, tensor in own.items()}
    return [name for name in own if now[name] == merged[name] != before[name]]
