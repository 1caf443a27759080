"""What trains, and whether it is what should: the table of ``requires_grad`` after every call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.attach import ADAPTER_NAME, loadable_directory, own_randomness
from pytest_lora.checks.switching import REFUSALS, disabled
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import one_line, quiet
from pytest_lora.records import Measurement, Problem

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["measure_requires_grad"]

SECOND, REFERENCE = "second", "ref"
_SHOWN = 3


def measure_requires_grad(subject: Subject) -> Measurement:
    """Count the parameters whose ``requires_grad`` is not what was declared, over all calls.

    Declared is: nothing, for an adapter loaded frozen; for one loaded trainable its own tensors --
    those its file holds -- and the base's biases that ``bias`` names; nothing else of the base.
    The calls are ``from_pretrained`` both ways, ``load_adapter`` of a second adapter both ways onto
    a frozen and a trainable first, ``add_adapter`` with an inference configuration,
    ``set_adapter``, ``disable_adapter`` and ``delete_adapter``.

    Raises:
        NotApplicable: PEFT loads adapters of this method for inference only.
        CannotRun: PEFT cannot load the adapter.
    """
    table = _Table(subject)
    with subject.attached() as model:
        if model.peft_config[ADAPTER_NAME].is_prompt_learning:
            raise NotApplicable(
                f"PEFT loads {subject.adapter.peft_type} adapters for inference only, so there is"
                " nothing it could set to trainable"
            )
    with loadable_directory(subject.adapter) as directory:
        with subject.attached() as model:
            _onto_frozen(table, model, directory)
        with subject.attached() as model:
            if table.load(model, directory, is_trainable=True):
                table.expect(
                    "after load_adapter(is_trainable=True) onto a frozen one", model, SECOND
                )
        with subject.attached(is_trainable=True) as model:
            _onto_trainable(table, model, directory)
        with subject.attached() as model:
            _note_thaw(table, model)
        with subject.attached() as model:
            _prepare_hot_swap(table, model)
    return table.measurement()


def _onto_frozen(table: _Table, model: Any, directory: Path) -> None:
    table.expect("after from_pretrained(is_trainable=False)", model)
    if table.load(model, directory, is_trainable=False):
        table.expect("after load_adapter(is_trainable=False) onto a frozen one", model)


def _onto_trainable(table: _Table, model: Any, directory: Path) -> None:
    table.expect("after from_pretrained(is_trainable=True)", model, ADAPTER_NAME)
    with disabled(model):
        table.expect("inside disable_adapter()", model)
    table.expect("after disable_adapter()", model, ADAPTER_NAME)
    if table.load(model, directory, is_trainable=False):
        table.expect("after load_adapter(is_trainable=False) onto a trainable one", model,
                     ADAPTER_NAME)  # fmt: skip
        _add_reference(table, model)
        _switch(table, model)


def _add_reference(table: _Table, model: Any) -> None:
    """A copy of the adapter that only serves as reference must not freeze the one in training."""
    config = copy.deepcopy(model.peft_config[ADAPTER_NAME])
    config.inference_mode = True
    with quiet(), own_randomness():
        model.add_adapter(REFERENCE, config)
    table.expect("after add_adapter with an inference configuration", model, ADAPTER_NAME)


def _switch(table: _Table, model: Any) -> None:
    with quiet():
        model.set_adapter(SECOND)
        table.expect("after set_adapter to the second", model, SECOND)
        model.set_adapter(ADAPTER_NAME)
        table.expect("after set_adapter back to the first", model, ADAPTER_NAME)
        try:
            model.delete_adapter(SECOND)
        except REFUSALS as error:
            table.note(f"not deleted, as PEFT cannot: {one_line(error)}")
        else:
            table.expect("after delete_adapter of the second", model, ADAPTER_NAME)
        if "inference_mode" in inspect.signature(model.set_adapter).parameters:
            model.set_adapter(ADAPTER_NAME, inference_mode=True)
            table.expect("after set_adapter(inference_mode=True)", model)


def _prepare_hot_swap(table: _Table, model: Any) -> None:
    """Making room for adapters of a larger rank must not thaw the one that is there."""
    config = model.peft_config[ADAPTER_NAME]
    try:
        from peft.utils.hotswap import prepare_model_for_compiled_hotswap
    except ImportError:
        return
    if not hasattr(config, "rank_pattern") or not isinstance(getattr(config, "r", None), int):
        return
    # AdaLoRA's holds a list of flags for each module, or nothing.
    ranks = [rank for rank in (config.rank_pattern or {}).values() if isinstance(rank, int)]
    rank = 2 * max(config.r, *ranks, 1)
    try:
        with quiet():
            prepare_model_for_compiled_hotswap(model, target_rank=rank)
    except REFUSALS as error:
        table.note(f"not prepared for hot-swapping, as PEFT cannot: {one_line(error)}")
        return
    table.expect("after prepare_model_for_compiled_hotswap", model)


def _note_thaw(table: _Table, model: Any) -> None:
    """Leaving ``disable_adapter()`` sets gradients on whatever was set before: worth knowing."""
    before = trainable(model)
    with disabled(model):
        pass
    if trainable(model) - before:
        table.note("a frozen adapter is trainable after disable_adapter() with this PEFT;"
                   " freeze it again where that matters")  # fmt: skip


def trainable(model: Any) -> set[str]:
    """Names of the parameters that require a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class _Table:
    """Holds the gradient flags of a model against what was declared."""

    def __init__(self, subject: Subject) -> None:
        self.adapter, self.base = subject.adapter, subject.base
        self.problems: list[Problem] = []
        self.notes: dict[str, None] = {}
        self.wrong = self.looked_at = 0

    def note(self, text: str) -> None:
        """Remember ``text``, once."""
        self.notes[text] = None

    def load(self, model: Any, directory: Path, *, is_trainable: bool) -> bool:
        """Load the adapter again as the second one; whether PEFT could."""
        try:
            with quiet(), own_randomness():
                model.load_adapter(str(directory), SECOND, is_trainable=is_trainable,
                                   torch_device=str(self.base.device))  # fmt: skip
        except REFUSALS as error:
            self.note(f"PEFT takes no second adapter like this one: {one_line(error)}")
            return False
        return True

    def expect(self, when: str, model: Any, *active: str) -> None:
        """Compare: exactly what belongs to the adapters ``active`` trains."""
        found, biases = trainable(model), self._biases(model)
        declared = {name for adapter in active for name in self._own(model, adapter)}
        declared |= biases if ADAPTER_NAME in active else set()
        extra = found - declared
        excused = self._excused(model, extra, biases)
        self.looked_at += sum(1 for _ in model.parameters())
        self._report(when, declared - found, "frozen", "trainable")
        self._report(when, extra - excused, "trainable", "frozen")

    def _own(self, model: Any, adapter: str) -> set[str]:
        """The adapter's parameters that its file holds; all of them where names do not match."""
        named = list(model.named_parameters(remove_duplicate=False))
        own = [(name, parameter) for name, parameter in named if adapter in name.split(".")]
        held = {id(parameter) for name, parameter in own if self._in_file(name, adapter)}
        first = {id(parameter): name for name, parameter in reversed(named)}
        return {first[key] for key in held or {id(parameter) for _, parameter in own}}

    def _in_file(self, name: str, adapter: str) -> bool:
        before, _, after = name.rpartition(f".{adapter}")
        key = before.removesuffix(".modules_to_save") + after
        return key in self.adapter.tensors or key.removesuffix(".weight") in self.adapter.tensors

    def _biases(self, model: Any) -> set[str]:
        """The base's biases that the configuration says were trained."""
        if self.adapter.bias == "none":
            return set()
        own = {name for name, _ in model.named_parameters()
               if name.endswith(".bias") and not _replaced(name)}  # fmt: skip
        if self.adapter.bias == "all":
            return own
        return {name for name in own if name.endswith(".base_layer.bias")}

    def _excused(self, model: Any, extra: set[str], biases: set[str]) -> set[str]:
        """Flags that every PEFT so far gets wrong whatever the adapter: a note each, no verdict."""
        if extra & biases:
            self.note("PEFT leaves the base's biases trainable whenever bias is set;"
                      " call requires_grad_(False) on them for inference")  # fmt: skip
        recast = {name for name in extra if self._recast(model, name)}
        if recast:
            self.note(
                "on a half precision base, casting to float32 makes every parameter trainable that"
                " PEFT keeps in a ParameterDict: token rows, embedding factors, vectors"
            )
        return (extra & biases) | recast

    def _recast(self, model: Any, name: str) -> bool:
        """Whether PEFT made a new parameter of it in casting, forgetting its flag on the way."""
        if self.base.dtype not in (torch.float16, torch.bfloat16):
            return False
        parent, _, adapter = name.rpartition(".")
        holder = model.get_submodule(parent)
        return isinstance(holder, torch.nn.ParameterDict) and holder[adapter].dtype == torch.float32

    def _report(self, when: str, names: Iterable[str], found: str, expected: str) -> None:
        wrong = sorted(names)
        if not wrong:
            return
        self.wrong += len(wrong)
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        shown = ", ".join(wrong[:_SHOWN]) + more
        self.problems.append(Problem(when, f"{found}: {shown}", expected,
                                     _fix(expected)))  # fmt: skip

    def measurement(self) -> Measurement:
        """What was found; the value counts parameters, the problems group them by call."""
        return Measurement(
            value=self.wrong,
            unit="wrong flags",
            count=self.looked_at,
            where=str(self.problems[0]) if self.problems else None,
            details={
                "problems": [problem.to_dict() for problem in self.problems],
                "notes": list(self.notes),
            },
        )


def _replaced(name: str) -> bool:
    """Whether a parameter is an adapter's own, or one that a saved module stands in for."""
    return any(part in name.split(".") for part in
               ("original_module", "modules_to_save", "lora_B", "lora_A"))  # fmt: skip


def _fix(expected: str) -> str:
    call = f"requires_grad_({expected == 'trainable'})"
    return f"call {call} on it before building the optimizer, or use PEFT 0.21 or later"
