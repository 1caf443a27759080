"""How each operation is said: for PEFT, and for a class with a few functions of your own.

A dialect turns operations into lines of Python.  What it cannot say has no meaning for the
implementation, and the laws that need it do not apply (:class:`~pytest_lora.errors.NotApplicable`).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_lora.contract.methods import Method
from pytest_lora.contract.networks import NETWORKS, Network
from pytest_lora.contract.trial import Trial
from pytest_lora.errors import NotApplicable, UsageError
from pytest_lora.loading import one_line

__all__ = ["FIRST", "SECOND", "Case", "Dialect", "OwnClass", "Peft", "load_implementation"]

FIRST, SECOND = "one", "one2"
"""Names of the first and second adapter.  The second's begins with the first's on purpose: matching
names by substring is a fault that PEFT has had more than once."""

OPERATIONS = (
    "attach",
    "factors",
    "merge",
    "unmerge",
    "disable",
    "enable",
    "add",
    "activate",
    "activate_all",
    "delete",
    "scale",
    "combine",
    "mixed",
    "save",
    "load",
)


@dataclass(frozen=True, slots=True)
class Case:
    """What Hypothesis draws for one example.

    Attributes:
        network: a key of :data:`NETWORKS`.
        sizes: inputs k and outputs d and e of its layers.
        bias: whether every layer has one.
        seed: what all tensors follow from.
        r, alpha: of the first adapter.
        dtype: of the base.
        dropout: of the adapters.
        options: further settings of the configuration, as source code.
        chosen: those of the network's targets that are adapted; all of them if empty.
    """

    network: str = "linear"
    sizes: tuple[int, int, int] = (16, 24, 32)
    bias: bool = True
    seed: int = 0
    r: int = 2
    alpha: int = 3
    dtype: str = "float32"
    dropout: float = 0.0
    options: Mapping[str, str] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()

    def other(self) -> Case:
        """That of a second adapter: another scaling (and rank, where any rank will do)."""
        return replace(self, seed=self.seed + 1, alpha=self.alpha + 2)

    @property
    def dropped(self) -> float:
        """The share of inputs that dropout leaves out in training."""
        return max(self.dropout, float(self.options.get("lora_dropout", 0.0)))

    @property
    def net(self) -> Network:
        """The network."""
        return NETWORKS[self.network]

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules to adapt."""
        return self.chosen or self.net.targets


class Dialect:
    """Says the operations; the base of both.

    Attributes:
        name: of what is held against the contract.
    """

    name: str
    plain: bool
    """Whether every layer computes ``W x + sum of s B A x``."""
    rewrites: bool = False
    bare: str | None = None
    """What stands for the base alone where a mixed batch names adapters."""
    device: str = "cpu"
    """Where the networks and their inputs are."""

    def begin(self, trial: Trial, case: Case) -> None:
        """The bare network ``net``, its inputs ``x``, and ``run``."""
        k, d, e = case.sizes
        sizes = {"k": k, "d": d, "e": e, "bias": case.bias, "dtype": f"torch.{case.dtype}"}
        trial.run("import torch")
        for line in self.imports():
            trial.run(line)
        trial.run(case.net.source.format(**sizes))
        self.build(trial, case)
        trial.run(f"x = {case.net.inputs.format(**sizes)}{self._moved()}")
        trial.run(f"@torch.no_grad()\ndef run():\n    return {case.net.call}")

    def build(self, trial: Trial, case: Case) -> None:
        """The bare network, once more if there is one."""
        trial.run(f"torch.default_generator.manual_seed({case.seed})")
        trial.run(f"net = model = Net().to(torch.{case.dtype}){self._moved()}.eval()")

    def _moved(self) -> str:
        """What takes a network or a tensor to the device."""
        return "" if self.device == "cpu" else f".to({self.device!r})"

    def seeded(self, seed: int) -> str:
        """The line that seeds what draws on the device."""
        # torch.manual_seed notes where it was called from for every kind of device that is absent.
        generator = "torch.default_generator" if self.device == "cpu" else "torch"
        return f"{generator}.manual_seed({seed})"

    def paths(self) -> tuple[str, ...]:
        """What a fresh process needs on its path to run the script.

        Raises:
            NotApplicable: it cannot.
        """
        return ()

    def imports(self) -> Sequence[str]:
        """Lines that make the implementation known."""
        raise NotImplementedError

    def attach(self, trial: Trial, case: Case) -> None:
        """The adapter :data:`FIRST` as ``model``, at its initial values, in eval mode."""
        raise NotImplementedError

    def fill(self, trial: Trial, name: str, seed: int) -> None:
        """Give the adapter ``name`` values it might have after training."""
        raise NotImplementedError

    def factors(self, trial: Trial, name: str) -> dict[str, tuple[Any, Any, float]]:
        """``B``, ``A`` and the scaling of each adapted module; only where :attr:`plain`."""
        raise NotImplementedError

    def live(self, name: str) -> str:
        """The expression for the parameters (A, B) of the adapter ``name`` by module; only where
        :attr:`plain`.
        """
        raise NotImplementedError

    def shown(self, name: str) -> str:
        """The line that prints what the adapter ``name`` adapts."""
        return "print(model.targeted_module_names)"

    def say(self, trial: Trial, operation: str, *args: Any) -> None:
        """Carry out one of the operations after ``attach``.

        Raises:
            NotApplicable: the implementation has no such thing.
            Refused: it has, and raised.
        """
        raise NotImplementedError


# ------------------------------------------------------------------------------ PEFT

_FILL = """
@torch.no_grad()
def fill(seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += {size} * noise.to(parameter)
"""
_PEFT_LINES: Mapping[str, str] = {
    "merge": "model.merge_adapter()",
    "unmerge": "model.unmerge_adapter()",
    "disable": "model.base_model.disable_adapter_layers()",
    "enable": "model.base_model.enable_adapter_layers()",
    "activate": "model.set_adapter({0!r})",
    "activate several": "model.base_model.set_adapter({0!r})",
    "delete": "model.delete_adapter({0!r})",
    "mixed": "with torch.no_grad():\n    y = model(x, adapter_names={0!r})",
    "scale": (
        "for layer in model.modules():\n"
        "    if hasattr(layer, 'set_scale'):\n"
        "        layer.set_scale({0!r}, {1!r})"
    ),
}


class Peft(Dialect):
    """A method of the installed PEFT."""

    bare = "__base__"

    def __init__(self, method: Method, size: float = 0.3) -> None:
        self.method, self.size = method, size
        self.name, self.plain, self.rewrites = method.name, method.plain, method.rewrites

    def imports(self) -> Sequence[str]:
        """PEFT itself, or the class."""
        return ["import peft"]

    def config(self, case: Case) -> str:
        """The configuration as source code."""
        options = dict(self.method.options)
        if self.method.accepts("target_modules"):
            options["target_modules"] = repr(list(case.targets))
        if case.net.parameters:
            options["target_parameters"] = repr(list(case.net.parameters))
        if case.net.saved:
            options["modules_to_save"] = repr(list(case.net.saved))
        options |= case.options
        last = repr(list(case.targets[-1:]))
        drawn = {"{r}": str(case.r), "{alpha}": str(case.alpha), "{last}": last}
        written = [f"{key}={drawn.get(code, code)}" for key, code in options.items()]
        return f"peft.{self.method.config}({', '.join(written)})"

    def attach(self, trial: Trial, case: Case, name: str = FIRST) -> None:
        """Attach the first adapter, with what its initialisation needs before and after."""
        trial.run(f"config = {self.config(case)}")
        for line in self.method.before:
            trial.run(line)
        trial.run(f"model = peft.get_peft_model(net, config, adapter_name={name!r}).eval()")
        for line in self.method.after:
            trial.run(line)
        trial.run(_FILL.format(size=self.size))

    def fill(self, trial: Trial, name: str, seed: int) -> None:
        """Add noise to everything that trains, or write the factors."""
        trial.run(f"fill({seed})")

    def factors(self, trial: Trial, name: str) -> dict[str, tuple[Any, Any, float]]:
        """From PEFT's layers, or from the class; NaN for a scaling only the case knows."""
        model = trial.value("model")
        found = {}
        for target in trial.value("net").state_dict():
            module = target.partition(".")[0]
            layer = model.get_submodule(f"base_model.model.{module}")
            if name in getattr(layer, "lora_A", {}):
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                found[module] = (b.detach(), a.detach(), float(layer.scaling[name]))
        return found

    def live(self, name: str) -> str:
        """From PEFT's layers."""
        pair = f"layer.lora_A[{name!r}].weight, layer.lora_B[{name!r}].weight"
        return (
            f"{{key: ({pair}) for key, layer in net.named_children()"
            f" if {name!r} in getattr(layer, 'lora_A', ())}}"
        )

    def say(self, trial: Trial, operation: str, *args: Any) -> None:
        """Carry out one operation."""
        if operation == "add":
            name, case = args
            # Any other initialisation would rewrite the base that both share.
            kept = dict(case.options)
            if "init_lora_weights" in self.method.options:
                kept["init_lora_weights"] = "True"
            code = self.config(replace(case, options=kept))
            trial.run(f"model.add_adapter({name!r}, {code})\nmodel.eval()")
            return
        if operation == "activate" and isinstance(args[0], list):
            operation = "activate several"
        if operation not in _PEFT_LINES:
            raise NotApplicable(f"PEFT has no {operation}")
        trial.run(_PEFT_LINES[operation].format(*args))


# ------------------------------------------------------------------------------ a class of yours


class OwnClass(Dialect):
    """A class with functions of those names in :data:`OPERATIONS`; the first two are needed."""

    plain = True

    def __init__(self, place: str, cls: type) -> None:
        self.place, self.cls, self.name = place, cls, cls.__name__

    def offers(self, operation: str) -> bool:
        """Whether the class has a function of that name."""
        return callable(getattr(self.cls, operation, None))

    def require(self, *operations: str) -> None:
        """Raise NotApplicable unless the class offers all of them."""
        for operation in operations:
            if not self.offers(operation):
                raise NotApplicable(f"{self.name} has no {operation}")

    def paths(self) -> tuple[str, ...]:
        """Where its module was found, and what that one may import itself."""
        module = self.place.partition(":")[0]
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None or module == "__main__" or "<" in self.place:
            raise NotApplicable(f"a fresh process cannot import {self.place}; put it into a module")
        levels = module.count(".") + (Path(file).name == "__init__.py")
        return (str(Path(file).absolute().parents[levels]), *sys.path)

    def live(self, name: str) -> str:
        """The expression for the parameters of the adapter ``name``."""
        return f"lora.factors(model{self._named(name)})"

    def save(self, place: str) -> str:
        """The line that saves the adapter in use; ``place`` is an expression."""
        self.require("save", "load")
        return f"lora.save(model, {place})"

    def load(self, place: str) -> str:
        """The lines that load it onto the bare network."""
        # What a file maps may lie at odd addresses, where BLAS may sum in another order.
        aligned = "for t in (*model.parameters(), *model.buffers()):\n    t.data = t.data.clone()"
        return f"model = lora.load(net, {place}).eval()\n{aligned}"

    def imports(self) -> Sequence[str]:
        """PEFT itself, or the class."""
        module, _, name = self.place.partition(":")
        top = name.partition(".")[0]
        return [f"from {module} import {top}", f"lora = {name}()"]

    def attach(self, trial: Trial, case: Case) -> None:
        """Attach the first adapter, with what its initialisation needs before and after."""
        arguments = f"{list(case.targets)!r}, r={case.r}, alpha={case.alpha}"
        if "dropout" in inspect.signature(self.cls.attach).parameters:  # type: ignore[attr-defined]
            arguments += f", dropout={case.dropout}"
        trial.run(f"model = lora.attach(net, {arguments}).eval()")

    def fill(self, trial: Trial, name: str, seed: int) -> None:
        """Write the factors, in training mode as training does: a class may merge in eval mode."""
        trial.run(
            f"""
            model.train()
            generator = torch.Generator().manual_seed({seed})
            for A, B in {self.live(name)}.values():
                A.data.copy_(0.3 * torch.randn(A.shape, generator=generator))
                B.data.copy_(0.3 * torch.randn(B.shape, generator=generator))
            model.eval()
            """
        )

    def factors(self, trial: Trial, name: str) -> dict[str, tuple[Any, Any, float]]:
        """From PEFT's layers, or from the class; NaN for a scaling only the case knows."""
        found = trial.value(self.live(name))
        scale = float("nan")  # the case knows it: alpha / r
        return {key: (b.detach(), a.detach(), scale) for key, (a, b) in found.items()}

    def shown(self, name: str) -> str:
        """The line that prints what the adapter ``name`` adapts."""
        return f"for key, (A, B) in {self.live(name)}.items(): print(key, A.shape, B.shape)"

    def _named(self, name: str) -> str:
        takes = "name" in inspect.signature(self.cls.factors).parameters  # type: ignore[attr-defined]
        return f", {name!r}" if takes else ""

    def say(self, trial: Trial, operation: str, *args: Any) -> None:
        """Carry out one operation."""
        if operation == "activate" and isinstance(args[0], list):
            operation = "activate_all"
        self.require(operation)
        if operation == "mixed":
            trial.run(f"with torch.no_grad():\n    y = lora.mixed(model, x, {args[0]!r})")
            return
        if operation == "add":
            name, case = args
            targets = list(case.targets)
            trial.run(f"lora.add(model, {name!r}, {targets!r}, r={case.r}, alpha={case.alpha})")
            return
        given = args[-1:] if operation == "scale" else args  # there: of the adapter in use
        listed = "".join(f", {arg!r}" for arg in given)
        trial.run(f"lora.{operation}(model{listed})")


def load_implementation(place: str) -> OwnClass:
    """The class at ``package.module:Class``.

    Raises:
        UsageError: there is none, or it lacks a function that is needed.
    """
    module, colon, name = place.partition(":")
    if not colon or not module or not name:
        raise UsageError(f"--lora-contract takes package.module:Class, got {place!r}")
    try:
        cls: Any = importlib.import_module(module)
    except Exception as error:  # whatever a module of the user's raises while it is imported
        raise UsageError(
            f"--lora-contract={place}: cannot import {module}: {one_line(error)}"
        ) from error
    try:
        for part in name.split("."):
            cls = getattr(cls, part)
    except AttributeError:
        raise UsageError(f"--lora-contract={place}: {module} has no {name}") from None
    missing = [item for item in OPERATIONS[:2] if not callable(getattr(cls, item, None))]
    if missing or not isinstance(cls, type):
        raise UsageError(
            f"--lora-contract={place}: a class with at least the functions attach and factors is "
            f"needed (docs/contract.md); {', '.join(missing) or 'it is no class'}"
        )
    return OwnClass(place, cls)
