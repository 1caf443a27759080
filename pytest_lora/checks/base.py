"""Whether an adapter fits a base model, from the base's configuration alone.

Judged twice and independently: by the rules PEFT documents, applied here to the module tree on the
meta device, and by the installed PEFT, which is let loose on a copy of that tree.  Where the two
differ, the adapter means something else to this PEFT than its configuration says.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.adapter import BASE_PREFIX, lora_modules, pattern_names
from pytest_lora.checks.base_injection import PeftView, inject
from pytest_lora.checks.base_shapes import BaseModule, BaseShapes
from pytest_lora.checks.deltas import kind_of
from pytest_lora.checks.tensor_names import explain_names, is_vocabulary
from pytest_lora.errors import CannotRun
from pytest_lora.loading import one_line, resolve_base, weight_headers
from pytest_lora.patterns import PatternError, layer_index, matching_key, names_match
from pytest_lora.peft_tables import HEADS, METHODS
from pytest_lora.records import Measurement, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_lora.adapter import Adapter, LoraModule
    from pytest_lora.checks.tensor_names import NamedTensor

__all__ = ["measure_base_compatibility"]

_CONFIG = "adapter_config.json"
_GIVE_BASE = "give the base model the adapter was trained on: --lora-base-model=PATH"
_OWN_TARGETS = ("ADAPTION_PROMPT", "SHADOW", "UNILORA", "XLORA")
"""Methods that read ``target_modules`` in a way of their own."""
_ALL_HEADS = tuple(sorted({name for names in HEADS.values() for name in names}))
_COMMIT = re.compile(r"[0-9a-f]{40}")


def measure_base_compatibility(
    adapter: Adapter, base: Path | str | torch.nn.Module | None = None
) -> Measurement:
    """Count what of an adapter does not land on its base model.

    Args:
        adapter: the adapter; only its configuration and its tensors' shapes are looked at.
        base: directory or hub id of the base (None: the one the adapter names), of which only the
            configuration and the names of its weights are read; or a model, of which only the
            modules are looked at.

    Returns:
        ``count``: tensors and patterns looked at.  A base that most tensors do not fit is one
        problem, not one per tensor.

    Raises:
        CannotRun: the adapter's tensors cannot be read, or the base model cannot be found, or it
            cannot be understood without running its code.
    """
    if not adapter.tensors:
        raise CannotRun(f"{adapter.path}: no tensors that could be read, so none can be placed")
    shapes, source = _shapes(adapter, base)
    fit = _Fit(adapter, shapes)
    fit.notes += shapes.notes
    fit.land()
    fit.check_vocabulary()
    if not fit.misfits:
        fit.check_patterns()
        fit.ask_peft()
    if not fit.problems:
        fit.check_head(source)
    fit.check_origin(source)
    return Measurement.of_problems(
        fit.problems,
        count=len(fit.tensors) + len(list(fit.patterns())),
        notes=fit.notes,
        base=shapes.title,
        modules=len(fit.touched),
    )


def _shapes(
    adapter: Adapter, base: Path | str | torch.nn.Module | None
) -> tuple[BaseShapes, Path | None]:
    if isinstance(base, torch.nn.Module):
        return BaseShapes.from_model(base, f"the {type(base).__name__} passed in"), None
    path = resolve_base(adapter, explicit=base)
    return BaseShapes.from_directory(path, adapter), path


@dataclass
class _Fit:
    """One adapter against one base model."""

    adapter: Adapter
    base: BaseShapes
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    resized: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self.adapter.peft_type in METHODS
        self.tensors: list[NamedTensor] = explain_names(self.adapter) if known else []
        self.modules: tuple[LoraModule, ...] = lora_modules(self.adapter)
        self.touched = {t.module for t in self.tensors if t.module}

    # -------------------------------------------------------------------------- tensors

    def land(self) -> None:
        """Every tensor on a module of the right shape; one problem for all that do not."""
        if self.adapter.config.get("layer_replication"):
            self.notes.append("layer_replication: only PEFT's own view of the base was asked")
            return
        for module in self.modules:
            self.misfits += self._misfits_of(module)
        for tensor in self.tensors:
            if tensor.role != "factor":
                self.misfits += self._misfits_of_tensor(tensor)
        self.misfits += self._prompt_misfits()
        if self.misfits:
            self.problems.append(self._summary())

    def _prompt_misfits(self) -> Iterator[str]:
        """Learned prompts are as wide as the input embedding."""
        learned = self.adapter.tensors.get("prompt_embeddings")
        home = self.base.modules.get(self.base.input or "")
        width = home.shapes.get("weight", ())[-1:] if home else ()
        if learned is None or not width or self.adapter.peft_type == "PREFIX_TUNING":
            return
        if learned.shape[-1:] != width:
            yield f"prompt_embeddings is {list(learned.shape)}, the base embeds in {width[0]}"

    def _summary(self) -> Problem:
        shown = "; ".join(self.misfits[:3]) + ("; ..." if len(self.misfits) > 3 else "")
        number = f"{len(self.misfits)} of {len(self.tensors)} tensors"
        found = f"{number} do{'es' * (len(self.misfits) == 1)} not fit: {shown}"
        fix = self._elsewhere() or _GIVE_BASE
        return Problem(self.base.title, found, "a place of the same shape for each", fix)

    def _elsewhere(self) -> str:
        """What to do if all that has no place has one under another beginning of its name."""
        homeless = [m for m in self.modules if _place_of(m) not in self.base.modules]
        moves = {self._moved(module) for module in homeless}
        if len(moves) != 1 or None in moves:
            return ""
        [(given, there)] = (move for move in moves if move)
        placed = {_place_of(module) for module in self.modules} & set(self.base.modules)
        if not placed:
            return (
                f"the base has all of them under {there!r} in place of {given!r}: it is another"
                " class of the model than it was trained on; load that one, or rename the keys"
            )
        if {there + _place_of(module).removeprefix(given) for module in homeless} <= placed:
            return f"those under {given!r} are in the file as {there!r} as well: remove them"
        return ""

    def _moved(self, module: LoraModule) -> tuple[str, str] | None:
        """How the module's name begins, and that of the one module of the base that ends as it does
        and takes its factors.
        """
        name = _place_of(module)
        steps = name.split(".")
        for cut in range(len(steps)):
            if any(step.isdecimal() for step in steps[:cut]):
                return None  # another layer is another place
            end = ".".join(steps[cut:])
            same = [
                other
                for other, home in self.base.modules.items()
                if f".{other}".endswith(f".{end}") and _takes(home, module)
            ]
            if same:
                there = same[0].removesuffix(end)
                return (name.removesuffix(end), there) if len(same) == 1 else None
        return None

    def _misfits_of(self, module: LoraModule) -> Iterator[str]:
        """What is wrong with the factors of one LoRA module."""
        home = self.base.modules.get(_place_of(module))
        parts = {"lora_A": module.a, "lora_B": module.b, "magnitude": module.magnitude}
        held = {name: info.shape for name, info in parts.items() if info is not None}
        if home is None:
            for name in held:
                yield f"{module.name}.{name}: the base has no such module"
            return
        if module.kind == "embedding":
            yield from self._embedding_misfits(home, held)
            return
        sizes = _sizes(home)
        if module.kind == "parameter" or not sizes:
            return  # the shape of a fused parameter is PEFT's to judge
        yield from min((_linear_misfits(module.name, held, size) for size in sizes), key=len)

    def _embedding_misfits(
        self, home: BaseModule, held: dict[str, tuple[int, ...]]
    ) -> Iterator[str]:
        rows, width = home.shapes.get("weight", (0, 0))
        a, b = held.get("lora_A", ()), held.get("lora_B", ())
        if a and a[-1] != rows and a[-1] not in self._saved_rows():
            yield f"{home.name}.lora_embedding_A is for {a[-1]} tokens, the base has {rows}"
        if b and b[0] != width:
            yield f"{home.name}.lora_embedding_B gives {b[0]} features, the base's has {width}"

    def _saved_rows(self) -> set[int]:
        """Rows of the embeddings the adapter brings whole."""
        whole = [t for t in self.tensors if t.part == "weight" and is_vocabulary(_owner(t))]
        return {t.info.shape[0] for t in whole if len(t.info.shape) == 2}

    def _misfits_of_tensor(self, tensor: NamedTensor) -> Iterator[str]:
        """What is wrong with a tensor that is no factor."""
        name = _owner(tensor)
        if tensor.role in ("saved", "vocabulary", "bias"):
            yield from self._whole_misfit(tensor, name)
        elif tensor.role == "tokens":
            yield from self._token_misfit(tensor, name)
        elif tensor.role == "part" and tensor.module and name not in self.base.modules:
            yield f"{name}.{tensor.part}: the base has no such module"

    def _whole_misfit(self, tensor: NamedTensor, name: str) -> Iterator[str]:
        home = self.base.modules.get(name)
        shape = home.shapes.get(tensor.part) if home else None
        given = tensor.info.shape
        if shape is None and self.base.model is None:
            self.notes.append(
                f"{name}.{tensor.part} is not among the base's weights: a fresh head?"
            )
        elif shape is None:
            yield f"{name}.{tensor.part}: the base has no such parameter"
        elif given != shape and is_vocabulary(name) and given[1:] == shape[1:]:
            self.resized[name] = given[0]
        elif given != shape:
            yield f"{name}.{tensor.part} is {list(given)}, the base's is {list(shape)}"

    def _token_misfit(self, tensor: NamedTensor, name: str) -> Iterator[str]:
        home = self.base.modules.get(name)
        shape = home.shapes.get("weight", ()) if home else ()
        if not shape:
            yield f"{name}: the base has no such embedding"
        elif tensor.info.shape[-1:] != shape[-1:]:
            yield f"{name}: token rows of {tensor.info.shape[-1]} features, the base's {shape[-1]}"

    # -------------------------------------------------------------------------- vocabulary

    def check_vocabulary(self) -> None:
        """Saved rows, trained rows and the tokenizer's ids against the base's embedding."""
        rows = self.base.vocabulary
        if rows is None:
            return
        available = max([rows, *self.resized.values()])
        self._check_resized(rows)
        for token in _trained_tokens(self.adapter):
            if token >= available:
                where = f"{_CONFIG}: trainable_token_indices"
                self.problems.append(Problem(where, f"token {token}", f"below {available}"))
                break
        top = _highest_id(self.adapter.path)
        if top is not None and top >= available:
            self.problems.append(
                Problem("tokenizer beside the adapter", f"gives ids up to {top}",
                        f"ids below {available}, the rows of the embedding",
                        "save the resized embedding with the adapter, or ship the base's tokenizer")
            )  # fmt: skip
        self._note_tying()

    def _check_resized(self, rows: int) -> None:
        sizes = sorted(set(self.resized.values()))
        if len(sizes) > 1:
            found = f"the adapter brings embeddings of {sizes} rows"
            self.problems.append(Problem("vocabulary", found, "one size for both"))
        elif lacking := self._not_resized():
            found = f"{', '.join(self.resized)} has {sizes[0]} rows, {lacking} keeps the base's"
            fix = "save it again with save_embedding_layers=True, from the model it was trained on"
            self.problems.append(Problem("vocabulary", f"{found} {rows}", "one size for both", fix))
        elif sizes:
            self.notes.append(
                f"the vocabulary was resized from {rows} to {sizes[0]} tokens; call"
                f" model.resize_token_embeddings({sizes[0]}) before loading the adapter"
            )

    def _new_rows(self) -> int | None:
        return min(self.resized.values(), default=None)

    def _not_resized(self) -> str:
        """The embedding that stays as it was while the other one was resized; "" if none does."""
        if not self.resized or self.base.tied:
            return ""
        both = (self.base.input, self.base.output)
        return next((name for name in both if name and name not in self.resized), "")

    def _note_tying(self) -> None:
        if not self.base.tied:
            return
        names = {self.base.input, self.base.output}
        touched = sorted(name for name in names if name and name in self._own_weights())
        if len(touched) == 1:
            self.notes.append(
                f"the base ties {self.base.input} and {self.base.output}, the adapter changes only"
                f" {touched[0]}: merged weights cannot stay tied"
            )

    def _own_weights(self) -> set[str]:
        return {_owner(tensor) for tensor in self.tensors}

    # -------------------------------------------------------------------------- patterns

    def patterns(self) -> Iterator[tuple[str, str]]:
        """``(configuration key, entry)`` of everything that names modules."""
        keys = ["target_parameters", "modules_to_save"]
        if self.adapter.peft_type not in _OWN_TARGETS:
            keys.append("target_modules")
        for key in keys:
            for entry in self.adapter.names(key):
                if entry.lower() != "all-linear":
                    yield key, entry
        for key in ("rank_pattern", "alpha_pattern"):
            table = self.adapter.config.get(key)
            yield from ((key, entry) for entry in table or ())
        layers = self.adapter.config.get("layers_to_transform")
        for layer in [layers] if isinstance(layers, int) else layers or ():
            yield "layers_to_transform", str(layer)

    def check_patterns(self) -> None:
        """Every entry that names modules names at least one."""
        targets = self.targets()
        dead: dict[str, list[str]] = {}
        for key, entry in self.patterns():
            if not self._matches_safely(key, entry, targets):
                dead.setdefault(key, []).append(entry)
        for key, entries in dead.items():
            found = f"{', '.join(map(repr, entries))} match{'es' * (len(entries) == 1)} nothing"
            self.problems.append(
                Problem(f"{_CONFIG}: {key}", found, f"a module of {self.base.title}",
                        "correct the spelling, or remove the entry")
            )  # fmt: skip
        self.notes += [
            f"exclude_modules: {entry!r} excludes nothing in this base"
            for entry in self.adapter.names("exclude_modules")
            if not self._matches_safely("exclude_modules", entry, targets)
        ]

    def _matches_safely(self, key: str, entry: str, targets: set[str]) -> bool:
        """Whether an entry matches; broken patterns are for adapter_files to name."""
        try:
            return self._matches(key, entry, targets)
        except PatternError:
            return True

    def _matches(self, key: str, entry: str, targets: set[str]) -> bool:
        if key in ("target_modules", "exclude_modules"):
            names = entry if isinstance(self.adapter.config.get(key), str) else (entry,)
            return any(names_match(names, name) for name in self.base.modules)
        if key == "modules_to_save":
            usual = HEADS.get(self.adapter.task_type or "", ())  # PEFT adds all, a model has one
            saved = self.base.modules
            return entry in usual or any(names_match((entry,), name) for name in saved)
        if key == "target_parameters":
            return any(names_match((entry,), name) for name in self._parameters())
        if key == "layers_to_transform":
            return any(self._layer_of(name) == int(entry) for name in targets)
        adapted = [name for module in self.modules for name in self._pattern_names(module)]
        return any(matching_key((entry,), name) for name in adapted or targets)

    def _pattern_names(self, module: LoraModule) -> list[str]:
        return pattern_names(self.adapter, module.path, module.kind)

    def _parameters(self) -> Iterator[str]:
        for name, module in self.base.modules.items():
            yield from (f"{name}.{leaf}" for leaf in module.shapes)

    def _layer_of(self, name: str) -> int | None:
        return layer_index(name, self.adapter.names("layers_pattern"))

    def targets(self) -> set[str]:
        """Modules the configuration selects, by PEFT's documented rules."""
        try:
            return {name for name in self.base.modules if self._selects(name)}
        except PatternError:
            return set()

    def _selects(self, name: str) -> bool:
        config = self.adapter
        excluded = config.config.get("exclude_modules")
        if excluded and names_match(_as_names(excluded), name):
            return False
        if any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in config.modules_to_save):
            return False
        wanted = config.target_modules
        if wanted is None:
            return False
        if isinstance(wanted, str):
            return self._selects_by_pattern(wanted, name)
        return names_match(wanted, name) and self._in_chosen_layer(name)

    def _selects_by_pattern(self, wanted: str, name: str) -> bool:
        if wanted.lower() == "all-linear":
            return self.base.modules[name].kind in ("linear", "conv1d") and name != self.base.output
        return names_match(wanted, name)

    def _in_chosen_layer(self, name: str) -> bool:
        chosen = self.adapter.config.get("layers_to_transform")
        if chosen is None or chosen == []:
            return True
        return self._layer_of(name) in ([chosen] if isinstance(chosen, int) else chosen)

    # -------------------------------------------------------------------------- PEFT's opinion

    def ask_peft(self) -> None:
        """Compare with what the installed PEFT does with this configuration on this model."""
        if self.base.model is None:
            return
        try:
            view = inject(self.adapter, self.base.model, rows=self._new_rows())
        except Exception as error:  # PEFT's own words for what it cannot do
            self._peft_refuses(one_line(error))
            return
        self._compare_tensors(view)
        self._compare_modules(view)
        self._compare_scalings(view)

    def _peft_refuses(self, why: str) -> None:
        if self.adapter.peft_type == "LORA":
            fix = "load it with the PEFT that wrote it, or correct the configuration"
            self.problems.append(Problem(f"PEFT {_peft_version()}", f"refuses it: {why}", fix=fix))
        else:
            self.notes.append(f"PEFT's own view could not be had without weights: {why}")

    def _compare_tensors(self, view: PeftView) -> None:
        findings = (
            (view.missing, "not in the file: PEFT leaves them at their initial values",
             "saved incompletely, or the base has modules the adapter was not made for"),
            (view.homeless, "in the file, but PEFT has no place for them and ignores them",
             "target_modules and modules_to_save have to cover every tensor in the file"),
            (view.misshapen, "of another shape than PEFT expects", _GIVE_BASE),
        )  # fmt: skip
        for keys, what, fix in findings:
            if keys:
                found = f"{len(keys)} tensor{'s' * (len(keys) > 1)} {what}: {_by_kind(keys)}"
                self.problems.append(Problem(self.base.title, found, fix=fix))

    def _compare_modules(self, view: PeftView) -> None:
        wanted = self.targets()
        special = ("layer_replication", "target_parameters", "trainable_token_indices")
        if (
            self.adapter.peft_type in _OWN_TARGETS
            or not wanted
            or any(self.adapter.config.get(key) for key in special)
        ):
            return
        for names, what in (
            (wanted - view.modules, "leaves out what the configuration selects"),
            (view.modules - wanted, "adapts what the configuration does not select"),
        ):
            if names:
                found = f"{what}: {len(names)} modules, {_by_kind(names)}"
                fix = "train and load with PEFT >= 0.20, or list the modules by their full names"
                self.problems.append(Problem(f"PEFT {_peft_version()}", found, fix=fix))

    def _compare_scalings(self, view: PeftView) -> None:
        """PEFT's scaling of each module against alpha / r (or alpha / sqrt(r))."""
        for module in self.modules:
            applied = view.scalings.get(module.name)
            if applied is None or module.kind == "parameter":
                continue
            if not abs(applied - module.scaling) <= 1e-12 * abs(module.scaling):
                self.problems.append(
                    Problem(module.name, f"PEFT {_peft_version()} scales it by {applied:g}",
                            f"{module.scaling:g}, by rank and alpha of the configuration",
                            "rank_pattern and alpha_pattern are read differently by this PEFT")
                )  # fmt: skip
                break

    # -------------------------------------------------------------------------- origin

    def check_head(self, source: Path | None) -> None:
        """A task's head has values in the adapter or in the base; else every load draws others."""
        if source is None:
            return
        try:
            stored = {name for header in weight_headers(source) for name in header.tensors}
        except CannotRun:
            return  # no weights to look at; whoever loads the base says so
        heads = HEADS.get(self.adapter.task_type or "", _ALL_HEADS)
        there = {
            head: home.name
            for home in self.base.modules.values()
            for head in heads
            if home.shapes and head in home.name.split(".")
        }
        brought = {key for key in self.adapter.tensors if "lora_" not in key}
        for head, name in there.items():
            if not any(head in key.split(".") for key in (*stored, *brought)):
                self.problems.append(
                    Problem(
                        name,
                        "neither the base's weights nor the adapter have values for it",
                        "the values it was trained with, or beside",
                        f"train it and save it with the adapter (modules_to_save=[{head!r}])",
                    )
                )

    def check_origin(self, source: Path | None) -> None:
        """The recorded base model and revision against the ones that were used."""
        if source is None:
            return
        name, revision = self.adapter.base_model, self.adapter.revision
        commit = _commit_of(source)
        if revision and commit and _COMMIT.fullmatch(revision) and revision != commit:
            self.problems.append(
                Problem(f"{_CONFIG}: revision", f"trained on {revision}", commit, _GIVE_BASE)
            )
        elif revision and not commit:
            self.notes.append(f"revision {revision} is recorded, but the base's cannot be told")
        if name and Path(name).name != _name_of(source):
            self.notes.append(f"recorded base model: {name}; used: {source}")


# ------------------------------------------------------------------------------ small things


def _owner(tensor: NamedTensor) -> str:
    return tensor.module.removesuffix(".base_layer")


def _as_names(value: Any) -> str | Sequence[str]:
    return value if isinstance(value, str) else tuple(value)


def _sizes(home: BaseModule) -> list[tuple[tuple[int, ...], int]]:
    """``(shape of an input feature map, out)`` for each reading of the module's weight."""
    shape = home.shapes.get("weight", ())
    if home.kind == "conv":
        return [(shape[1:], shape[0])]
    return [((inputs,), outputs) for inputs, outputs in home.features]


def _linear_misfits(
    name: str, held: dict[str, tuple[int, ...]], size: tuple[tuple[int, ...], int]
) -> list[str]:
    inputs, outputs = size
    found = []
    a, b, m = held.get("lora_A", ()), held.get("lora_B", ()), held.get("magnitude", ())
    if a and a[1:] != inputs:
        found.append(f"{name}.lora_A takes {_sides(a[1:])} inputs, the base's has {_sides(inputs)}")
    if b and b[0] != outputs:
        found.append(f"{name}.lora_B gives {b[0]} outputs, the base's has {outputs}")
    if m and outputs not in m:
        found.append(f"{name}.lora_magnitude_vector is {list(m)}, the base's has {outputs} outputs")
    return found


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _trained_tokens(adapter: Adapter) -> list[int]:
    """Token ids the configuration says are trained one by one, the highest first."""
    declared = adapter.config.get("trainable_token_indices") or adapter.config.get("token_indices")
    groups = declared.values() if isinstance(declared, dict) else [declared]
    ids = [token for group in groups if isinstance(group, list) for token in group]
    return sorted({token for token in ids if type(token) is int}, reverse=True)


def _highest_id(folder: Path) -> int | None:
    """The highest token id of the tokenizer in ``folder``; None without a readable one."""
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = data["model"]["vocab"]
        added = [entry["id"] for entry in data.get("added_tokens") or ()]
        known = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        return int(max([*known, *added, len(vocabulary) - 1]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _takes(home: BaseModule, module: LoraModule) -> bool:
    """Whether a linear module's weight has the sides of the factors; of others nothing is asked."""
    shape = home.shapes.get("weight", ())
    if module.kind != "linear" or len(shape) != 2 or module.a is None or module.b is None:
        return True
    return {module.b.shape[0], module.a.shape[-1]} == set(shape)


def _place_of(module: LoraModule) -> str:
    """The base's module: a second parameter's factors lie under the wrapper of the first."""
    return module.name.removesuffix(".base_layer") if module.kind == "parameter" else module.name


def _by_kind(names: Iterable[str]) -> str:
    """Names grouped by kind, the most frequent first: ``model.layers.*.mlp.up_proj (22)``.

    One alone keeps its number; those of the layers from some number on say which.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(name.removeprefix(BASE_PREFIX) for name in names):
        groups[kind_of(name)].append(name)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    shown = [f"{kind} ({len(found)}{_from(found)})" if len(found) > 1 else f"{found[0]} (1)"
             for kind, found in ordered[:3]]  # fmt: skip
    return ", ".join(shown) + (", ..." if len(ordered) > 3 else "")


def _from(names: Sequence[str]) -> str:
    """``: 16 to 31`` where these are the layers of all names, and not from the first on."""
    numbers = [re.findall(r"(?<=\.)\d+(?=\.|$)", name) for name in names]
    if any(len(found) != 1 for found in numbers):
        return ""
    layers = sorted({int(found[0]) for found in numbers})
    low, high = layers[0], layers[-1]
    return f": {low} to {high}" if low > 0 and high - low == len(layers) - 1 else ""


def _commit_of(path: Path) -> str | None:
    """The commit of a hub cache snapshot."""
    in_cache = path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name)
    return path.name if in_cache else None


def _name_of(path: Path) -> str:
    """The name a model directory goes by: of a hub cache snapshot, that of its repository."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def _peft_version() -> str:
    import peft

    return str(peft.__version__)
