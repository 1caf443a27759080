"""Switching adapters off, on and about: what was there before has to be there again.

All comparisons are of outputs in one process and one batch, so there is no rounding to allow for:
they are equal bit for bit, or something else was computed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.adapter import read_adapter
from pytest_lora.attach import ADAPTER_NAME, loadable_directory, own_randomness
from pytest_lora.checks.bits import how_different, same_bits
from pytest_lora.errors import NotApplicable
from pytest_lora.fresh import scratch
from pytest_lora.loading import one_line, quiet
from pytest_lora.locate import AdapterLocation
from pytest_lora.records import Measurement, Problem
from pytest_lora.subject import Subject, lora_layers

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter

__all__ = ["measure_adapter_isolation", "measure_disable_equals_base"]

SECOND = "default2"
"""Name of the second adapter.  That it begins with the first one's name is on purpose: matching
names by substring is a fault PEFT has had more than once."""

NOISE = 0.5
FLOOR = 0.02
SEED = 4711

REFUSALS = (
    AttributeError,
    KeyError,
    NameError,  # a name that is set on another path only
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# ------------------------------------------------------------------------------ disable


def measure_disable_equals_base(subject: Subject) -> Measurement:
    """Count how often the adapter is not out, or not back, around ``disable_adapter()``.

    Inside the block the output has to be that of the base model before any adapter came near it,
    after the block that of the adapted model before the block, both bit for bit.

    Raises:
        NotApplicable: the adapter changes nothing in the probe output, so that being off could not
            be told from being on; or PEFT cannot switch this method off.
    """
    watch = _Watch(subject)
    with subject.attached() as model:
        before = watch.start()
        with disabled(model):
            watch.expect("inside disable_adapter()", subject.base_output(),
                         "the untouched base model's output")  # fmt: skip
        if watch.problems:
            watch.blame(_why_not_base(subject, model))
        watch.expect("after disable_adapter()", before, "the output before")
    return watch.measurement()


class _Watch:
    """Compares the subject's output now with what it should be, and remembers what was wrong."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.compared = 0

    def start(self) -> torch.Tensor:
        """The adapted output; raises NotApplicable if it is the base's."""
        output = self.subject.output()
        if same_bits(output, self.subject.base_output()):
            raise NotApplicable(
                "the adapter does not change the probe output at all, so on and off, or one adapter"
                " and another, could not be told apart"
            )
        return output

    def expect(self, when: str, expected: torch.Tensor, meaning: str, fix: str = "") -> None:
        """Note a problem unless the output now is ``expected``, bit for bit."""
        self.compared += expected.numel()
        difference = how_different(self.subject.output(), expected)
        if difference:
            self.problems.append(Problem(when, f"output: {difference}", meaning, fix))

    def blame(self, fix: str) -> None:
        """Give the problems found so far their likely cause."""
        self.problems = [
            Problem(item.where, item.found, item.expected, fix) for item in self.problems
        ]

    def measurement(self) -> Measurement:
        """What was found."""
        return Measurement.of_problems(self.problems, count=self.compared, notes=self.notes)


@contextlib.contextmanager
def disabled(model: Any) -> Iterator[None]:
    """``model.disable_adapter()``; raises NotApplicable where PEFT cannot."""
    with contextlib.ExitStack() as stack:
        try:
            with quiet():  # it has a word of warning where biases are trained
                stack.enter_context(model.disable_adapter())
        except REFUSALS as error:
            raise NotApplicable(f"PEFT cannot switch this method off: {one_line(error)}") from None
        yield


def _why_not_base(subject: Subject, model: Any) -> str:
    config = model.peft_config[ADAPTER_NAME]
    changed = subject.base.verify()
    initialisation = str(getattr(config, "init_lora_weights", "")).lower()
    if changed and subject.adapter.bias != "none":
        return (
            f"bias={subject.adapter.bias!r}: loading writes the trained biases into the base model,"
            " and disabling does not take them out; train with bias='none', or load the base"
            " separately where it serves as reference"
        )
    if changed and initialisation.startswith(_REWRITES_BASE):
        return (
            f"init_lora_weights={initialisation!r} rewrites base weights on loading; convert the"
            " adapter with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if changed:
        return (
            f"loading overwrote {len(changed)} tensors of the base model, first {changed[0].where}"
        )
    wrapped = ", ".join(_auxiliary(config))
    if wrapped:
        return f"the trained copies of {wrapped} stay in use (PEFT before 0.6 does that)"
    return ""


def _writes_base(adapter: Adapter) -> bool:
    """Whether loading it changes the base, so that another adapter beside it has another base."""
    initialisation = str(adapter.config.get("init_lora_weights", "")).lower()
    return adapter.bias != "none" or initialisation.startswith(_REWRITES_BASE)


def _auxiliary(config: Any) -> list[str]:
    """Modules the adapter replaces or patches beside its own layers."""
    saved = list(getattr(config, "modules_to_save", None) or ())
    tokens = getattr(config, "trainable_token_indices", None)
    rows = list(tokens) if isinstance(tokens, Mapping) else ["the embedding"] if tokens else []
    return [str(name) for name in (*saved, *rows)]


# ------------------------------------------------------------------------------ isolation


def measure_adapter_isolation(subject: Subject) -> Measurement:
    """Count the ways in which a second adapter disturbs the first.

    The second has the first one's configuration but another ``lora_alpha``, and the first one's
    tensors plus normal noise (seeded).  It is added, switched to and back twice, deleted; the
    adapter's own folder is loaded under another name; where modules are saved or token rows
    trained, an adapter without them comes and goes; the second is hot-swapped in and out, where
    PEFT can, and must be refused while the first is merged.  Every output is compared bit for bit
    with what the adapter in question gives alone.

    Raises:
        NotApplicable: the adapter changes nothing in the probe output, or PEFT takes no second
            adapter of this method.
    """
    watch = _Watch(subject)
    with scratch("second") as folder:
        with subject.attached() as model:
            first = watch.start()
            second = _come_and_go(watch, model, first, folder)
        other = Subject(_second_on_disk(subject, folder), subject.base, subject.inputs)
        with other.attached():
            _alone(watch, other, second)
        with subject.attached() as model:
            _load_twin(watch, model, first)
        with subject.attached() as model:
            _plain_comes_and_goes(watch, model, first)
        with subject.attached() as model:
            swapped = _hot_swap(watch, model, first, second, other.adapter)
        if swapped:
            with subject.attached() as model:
                _hot_swap_merged(watch, model, second, other.adapter)
    return watch.measurement()


def _come_and_go(watch: _Watch, model: Any, first: torch.Tensor, folder: Path) -> torch.Tensor:
    """Add a second adapter, switch back and forth, save it to ``folder``, delete it."""
    alone, before = set(_saved(model, ADAPTER_NAME)), _tensor_names(model)
    _add(model, SECOND, _altered(model))
    _fill(model)
    watch.expect("after add_adapter", first, "the output before")
    _same_keys(watch, model, alone)
    _switch(model, SECOND)
    second = watch.subject.output()
    _require_other(watch, second, first)
    _switch(model, ADAPTER_NAME)
    watch.expect("after switching to the second adapter and back", first, "the output before")
    _switch(model, SECOND)
    watch.expect("after switching to the second adapter again", second,
                 "its output the first time")  # fmt: skip
    with quiet():
        model.save_pretrained(folder, selected_adapters=[SECOND], save_embedding_layers=False)
    _switch_inside(watch, model, first, second)
    _switch(model, ADAPTER_NAME)
    if _delete(watch, model, SECOND):
        watch.expect("after deleting the second adapter", first, "the output before")
        _expect_gone(watch, model, before)
    return second


def _switch_inside(watch: _Watch, model: Any, first: torch.Tensor, second: torch.Tensor) -> None:
    """The way that several adapters are activated switches one like the usual way does."""
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model.base_model, BaseTuner):  # virtual tokens: there is the bare model
        return
    for name, expected in ((ADAPTER_NAME, first), (SECOND, second)):
        with quiet():
            model.base_model.set_adapter(name)
        watch.expect(f"after base_model.set_adapter({name!r})", expected,
                     "what model.set_adapter gives")  # fmt: skip


def _tensor_names(model: Any) -> set[str]:
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


def _expect_gone(watch: _Watch, model: Any, before: set[str]) -> None:
    """What stays of a deleted adapter takes memory, and comes back under its name."""
    left = sorted(name for name in _tensor_names(model) - before if SECOND in name.split("."))
    if left:
        watch.problems.append(
            Problem("after deleting the second adapter", f"{left[0]} and {len(left) - 1} more of"
                    " its tensors are still there", "none of them")
        )  # fmt: skip


def _altered(model: Any, **changes: Any) -> Any:
    """A copy of the adapter's configuration that starts from plain initial values."""
    config = copy.deepcopy(model.peft_config[ADAPTER_NAME])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # any other may rewrite the base
    if isinstance(getattr(config, "lora_alpha", None), int | float):
        config.lora_alpha = _other_alpha(config)
    if getattr(config, "bias", "none") != "none":
        config.bias = "none"  # PEFT allows one adapter with biases
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _other_alpha(config: Any) -> int:
    """Half as much again, but not the rank: with alpha = r a scaling left out would not show."""
    alpha = round(1.5 * config.lora_alpha) or 1
    return alpha + 1 if alpha in (config.r, config.lora_alpha) else alpha


def _add(model: Any, name: str, config: Any) -> None:
    try:
        with quiet(), own_randomness():
            model.add_adapter(name, config)
    except REFUSALS as error:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise NotApplicable(f"PEFT takes no second {kind} adapter: {one_line(error)}") from None
    model.eval()


def _fill(model: Any) -> None:
    """Give the second adapter the first one's tensors plus noise half as large.

    At least :data:`FLOOR`, a usual spread of weights, so that the second acts even where the first
    is all but zero.  The same numbers every time.
    """
    own = {name.replace(f".{SECOND}", f".{ADAPTER_NAME}"): tensor
           for name, tensor in _saved_parameters(model, SECOND)}  # fmt: skip
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name in own and tensor.is_floating_point() and tensor.numel():
                wide = tensor.detach().float().cpu()
                size = max(NOISE * float(wide.square().mean().sqrt()), FLOOR)
                noise = size * torch.randn(wide.shape, generator=generator)
                own[name].copy_((wide + noise).to(tensor.dtype))


def _saved_parameters(model: Any, adapter: str) -> list[tuple[str, torch.Tensor]]:
    """The adapter's parameters that saving keeps, by name; all where saving computes others."""
    kept = {tensor.data_ptr() for tensor in _saved(model, adapter).values()}
    own = [pair for pair in model.named_parameters() if adapter in pair[0].split(".")]
    return [pair for pair in own if pair[1].data_ptr() in kept] or own


def _saved(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    with quiet():
        return dict(get_peft_model_state_dict(model, adapter_name=adapter,
                                              save_embedding_layers=False))  # fmt: skip


def _same_keys(watch: _Watch, model: Any, alone: set[str]) -> None:
    foreign = set(_saved(model, ADAPTER_NAME)) - alone
    if foreign:
        watch.notes.append(
            f"saved beside {SECOND!r}, {ADAPTER_NAME!r} would hold {len(foreign)} tensors of the"
            " former too, as PEFT before 0.20 takes any name that contains the other; choose names"
            " that do not"
        )


def _switch(model: Any, name: str) -> None:
    with quiet():
        model.set_adapter(name)


def _delete(watch: _Watch, model: Any, name: str) -> bool:
    """Whether PEFT could."""
    try:
        with quiet():
            model.delete_adapter(name)
    except REFUSALS as error:
        watch.notes.append(f"not deleted, as PEFT cannot: {one_line(error)}")
        return False
    return True


def _require_other(watch: _Watch, second: torch.Tensor, first: torch.Tensor) -> None:
    """The second adapter has to act, or every comparison around it would be void."""
    if same_bits(second, first):
        watch.problems.append(
            Problem("after set_adapter", "the first adapter's output", "the second adapter's")
        )
    elif same_bits(second, watch.subject.base_output()):
        watch.problems.append(
            Problem("after set_adapter", "the base model's output", "the second adapter's")
        )


def _second_on_disk(subject: Subject, folder: Path) -> Adapter:
    return read_adapter(AdapterLocation(folder / SECOND, None, f"{subject.adapter.name} (second)"))


def _alone(watch: _Watch, other: Subject, second: torch.Tensor) -> None:
    """The second adapter by itself gives what it gave beside the first."""
    watch.compared += second.numel()
    difference = how_different(second, other.output())
    if difference and not _writes_base(watch.subject.adapter):
        watch.problems.append(
            Problem("the second adapter beside the first", f"output: {difference}",
                    "its output when loaded alone")
        )  # fmt: skip


def _load_twin(watch: _Watch, model: Any, first: torch.Tensor) -> None:
    """The same folder under another name is the same adapter."""
    try:
        with quiet(), own_randomness(), loadable_directory(watch.subject.adapter) as directory:
            model.load_adapter(str(directory), "twin", torch_device=str(watch.subject.base.device))
    except REFUSALS as error:
        watch.notes.append(f"the folder cannot be loaded a second time: {one_line(error)}")
        return
    watch.expect("after load_adapter of the same folder", first, "the output before")
    _switch(model, "twin")
    watch.expect("under another name", first, "the output under the first name")
    _switch(model, ADAPTER_NAME)
    _delete(watch, model, "twin")
    watch.expect("after deleting the copy", first, "the output before")


def _plain_comes_and_goes(watch: _Watch, model: Any, first: torch.Tensor) -> None:
    """An adapter without saved modules and token rows must not take the first one's away."""
    config = model.peft_config[ADAPTER_NAME]
    if not _auxiliary(config) or not hasattr(config, "lora_alpha"):
        return
    changes = {name: None for name in ("modules_to_save", "trainable_token_indices")
               if hasattr(config, name)}  # fmt: skip
    _add(model, "plain", _altered(model, **changes))
    _switch(model, "plain")
    if not _auxiliary(model.peft_config["plain"]):  # a classifier's head is saved by every adapter
        watch.expect("an untrained adapter without saved modules", watch.subject.base_output(),
                     "the base model's output")  # fmt: skip
    _switch(model, ADAPTER_NAME)
    watch.expect("after switching to an adapter without saved modules and back", first,
                 "the output before", "use PEFT 0.15 or later")  # fmt: skip


# ------------------------------------------------------------------------------ hot swapping


def _hot_swap(
    watch: _Watch, model: Any, first: torch.Tensor, second: torch.Tensor, other: Adapter
) -> bool:
    """Swap the second adapter in and the first back; returns whether that could be done."""
    adapter = watch.subject.adapter
    if adapter.rank_pattern or adapter.alpha_pattern:
        watch.notes.append(
            "not hot-swapped: PEFT then leaves rank_pattern and alpha_pattern out of the scaling"
            " (up to 0.21.2 at least); load the adapter instead"
        )
        return False
    refusal = _swap(watch, model, other.path)
    if refusal:
        watch.notes.append(f"not hot-swapped, as PEFT cannot: {refusal}")
        return False
    watch.expect("after hot-swapping the second adapter in", second, "its output when loaded")
    with loadable_directory(adapter) as directory:
        if not _swap(watch, model, directory):
            watch.expect("after hot-swapping the first adapter back in", first, "the output before")
    return True


def _swap(watch: _Watch, model: Any, folder: Path) -> str:
    """Hot-swap; returns why PEFT would not, empty if it did."""
    try:
        from peft.utils.hotswap import hotswap_adapter
    except ImportError:
        return "this PEFT has no hot-swapping"
    try:
        with quiet():
            hotswap_adapter(model, str(folder), ADAPTER_NAME,
                            torch_device=str(watch.subject.base.device))  # fmt: skip
    except REFUSALS as error:
        return one_line(error)
    return ""


def _hot_swap_merged(watch: _Watch, model: Any, second: torch.Tensor, other: Adapter) -> None:
    """Swapping under a merged layer has to be refused, or to give the new adapter's output."""
    layer: Any = min((item for _, item in lora_layers(model)), key=_weight_count)
    with _own_weights(layer.get_base_layer()), quiet():
        try:
            layer.merge()
        except REFUSALS:
            return
        if not _swap(watch, model, other.path):
            watch.expect("after hot-swapping into a merged adapter", second,
                         "its output when loaded, or a refusal",
                         "unmerge before hot-swapping, or use PEFT 0.21 or later")  # fmt: skip


def _weight_count(layer: Any) -> int:
    return sum(item.numel() for item in layer.get_base_layer().parameters(recurse=False))


@contextlib.contextmanager
def _own_weights(module: torch.nn.Module) -> Iterator[None]:
    """Lend a module copies of its parameters, so that what is merged into them is merged into
    copies.
    """
    parameters = list(module.parameters(recurse=False))
    originals = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    try:
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
