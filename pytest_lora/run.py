"""One run: which adapters, under which settings, and what has been found so far.

Everything the hooks and fixtures share, without pytest: it can be built and used from anywhere.
Heavy libraries are imported when the first base model is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.catalog import CHECKS, CheckSpec, Need, find_check
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.records import Bound, CheckResult, Outcome, collecting
from pytest_lora.settings import Layer, Settings, bound_for, require_per_adapter, resolve

if TYPE_CHECKING:
    import torch

    from pytest_lora.adapter import Adapter
    from pytest_lora.data import SourceDomain, TargetTask
    from pytest_lora.locate import AdapterLocation
    from pytest_lora.nll_cache import NllCache
    from pytest_lora.profile import Entry, Profile
    from pytest_lora.subject import BaseModel, BasePool, Subject
    from pytest_lora.tasks.progress import Progress

__all__ = ["MODEL_LIBRARIES", "Run", "missing_libraries", "versions"]

MODEL_LIBRARIES = ("torch", "transformers", "peft")
_BLOCKING = (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)


def missing_libraries() -> tuple[str, ...]:
    """The model libraries that are not installed (found without importing them)."""
    return tuple(name for name in MODEL_LIBRARIES if util.find_spec(name) is None)


def versions() -> dict[str, str | None]:
    """Installed versions of everything a result can depend on."""
    names = ("pytest-lora", "pytest", "safetensors", *MODEL_LIBRARIES)
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass
class Run:
    """The state of one pytest run in one process.

    Attributes:
        layers: settings from ini file and command line, weakest first.
        start: directory that relative adapter paths and names are relative to.
        root: the project's root directory.
        outcomes: verdicts so far, by adapter name and check.
        progress: is told how far a long evaluation has come.
    """

    layers: Sequence[Layer]
    start: Path
    root: Path
    settings: Settings = field(init=False)
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    _given: tuple[str, ...] = ()
    _locations: dict[str, AdapterLocation] = field(default_factory=dict)
    _adapters: dict[str, Adapter] = field(default_factory=dict)
    _subject: Subject | None = None
    _bases: list[BaseModel] = field(default_factory=list)
    _pool: BasePool | None = None
    _sources: dict[str, SourceDomain] = field(default_factory=dict)
    _tasks: dict[tuple[str, str], TargetTask] = field(default_factory=dict)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.settings = resolve(self.layers)

    @cached_property
    def profile(self) -> Profile | None:
        """The profile the settings name, else ``lora.toml`` in the root directory, if it is there.

        Raises:
            UsageError: it cannot be read, or says something no profile can.
        """
        from pytest_lora.profile import FILE_NAME, Profile

        named = self.settings.profile
        path = self.start / named if named else self.root / FILE_NAME
        if not named and not path.is_file():
            return None
        inside = path.is_relative_to(self.start)
        return Profile.read(path, shown=str(path.relative_to(self.start)) if inside else None)

    def locate(self) -> tuple[str, ...]:
        """Find every adapter the settings name; returns their names in order.

        Raises:
            UsageError: one of them is not there, or is no adapter.
        """
        from pytest_lora.locate import locate_all

        if self.settings.adapter and not self._given:
            found = locate_all(self.settings.adapter, start=self.start)
            self._given = tuple(location.name for location in found)
            self._locations.update({location.name: location for location in found})
        return self._given

    def require_libraries(self) -> None:
        """Raise UsageError when a selected check needs a library that is not installed."""
        missing = missing_libraries()
        needy = [spec for spec in CHECKS if spec.need > Need.FILES and self.settings.selected(spec)]
        if missing and needy:
            raise UsageError(
                f"{len(needy)} of the selected checks need {', '.join(missing)}, not installed "
                "here: pip install 'pytest-lora[model]', or limit the run to what the files tell "
                "with --lora-checks=files"
            )

    def folders(self) -> tuple[Path, ...]:
        """The directories of all adapters, resolved."""
        return tuple(location.path.resolve() for location in self._locations.values())

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name`` in this run, or the one at that path; read once."""
        if name not in self._adapters:
            from pytest_lora.adapter import read_adapter

            if name not in self._locations:
                self._locations[name] = self._locate_one(name)
            self._adapters[name] = read_adapter(self._locations[name])
        return self._adapters[name]

    def _locate_one(self, path: str) -> AdapterLocation:
        from pytest_lora.locate import locate_all

        first, *more = locate_all([path], start=self.start)
        if more:
            raise UsageError(
                f"{path}: {len(more) + 1} adapters are there, from {first.name} to "
                f"{more[-1].name}; name one of them"
            )
        return first

    def settings_for(self, adapter: str, marker: Layer | None = None) -> Settings:
        """The settings of one adapter: the profile below ini and command line, a marker on top."""
        if marker is not None:
            require_per_adapter(marker.values, marker.spell)
        below = self.profile.layers(adapter) if self.profile else []
        return resolve([*below, *self.layers, *([marker] if marker else [])])

    def bounds_for(self, settings: Settings) -> Mapping[str, Bound]:
        """The bounds the user set, by check."""
        bounds = {check: bound_for(settings, check) for check in settings.bounds}
        return {check: bound for check, bound in bounds.items() if bound is not None}

    # ------------------------------------------------------------------ data of the profile

    def entries(self, kind: str, adapter: str) -> tuple[Entry, ...]:
        """The source domains (``kind="sources"``) or tasks of an adapter."""
        return self.profile.entries(kind, adapter) if self.profile else ()

    def parts(self, spec: CheckSpec, adapter: str) -> tuple[str, ...]:
        """The names of what a check is made for, one by one; one empty name for most checks."""
        if not spec.per:
            return ("",)
        return tuple(entry.name for entry in self.entries(spec.per, adapter))

    def entry(self, kind: str, adapter: str, name: str) -> Entry:
        """The source domain or task of that name.

        Raises:
            UsageError: the profile declares none for this adapter.
        """
        known = {entry.name: entry for entry in self.entries(kind, adapter)}
        if name not in known:
            declared = ", ".join(known) or "none"
            raise UsageError(f"no [{kind}.{name}] for {adapter}; declared for it: {declared}")
        return known[name]

    def require_data(self, spec: CheckSpec, adapter: str) -> None:
        """Raise UsageError where data that a check is made for is not there."""
        for entry in self.entries(spec.per, adapter) if spec.per else ():
            path = entry.get("path")
            if path is not None and not path.exists():
                raise UsageError(f"{entry.origins['path']}: {path} is not there")

    def source(self, adapter: str, name: str, settings: Settings) -> SourceDomain:
        """A source domain of an adapter, open; the file is walked through once per run."""
        from pytest_lora.data import open_source

        entry = self.entry("sources", adapter, name)
        key = json.dumps([adapter, name, sorted(settings.origins.items())])
        if key not in self._sources:
            bound = bound_for(settings, "perplexity_drift")
            options = self.evaluation(adapter)
            self._sources[key] = open_source(entry, otherwise=bound, evaluation=options)
        return self._sources[key]

    def task(self, adapter: str, name: str) -> TargetTask:
        """A target task of an adapter; its file is read once per run."""
        from pytest_lora.data import open_task

        key = (adapter, name)
        if key not in self._tasks:
            self._tasks[key] = open_task(
                self.entry("tasks", adapter, name),
                evaluation=self.evaluation(adapter),
                allow_code_execution=self.settings.allow_code_execution,
            )
        return self._tasks[key]

    def written_tasks(self, adapter: str) -> tuple[str, ...]:
        """The names of an adapter's tasks in which answers are written, not chosen."""
        names = [entry.name for entry in self.entries("tasks", adapter)]
        return tuple(name for name in names if self.task(adapter, name).task.is_written)

    def evaluation(self, adapter: str) -> dict[str, Any]:
        """How all data of an adapter is evaluated.

        Each verdict gets an equal part of the error rate, whichever of them are selected, so that
        it takes the same documents alone as together with others (C. E. Bonferroni's inequality).
        """
        sources, tasks = self.entries("sources", adapter), self.entries("tasks", adapter)
        # A task is two: its accuracy, and the health of what is written.
        gates = len(sources) + 2 * len(tasks)
        return {
            "alpha": self.settings.error_rate / max(1, gates),
            "full": self.settings.full_eval,
            "seed": self.settings.order_seed,
            "cache": self.cache,
            "progress": self.tell,
        }

    def tell(
        self, done: int, total: int, estimate: float | None, seconds_left: float | None
    ) -> None:
        """Hand on how far a long evaluation has come to whoever shows it at the moment."""
        if self.progress is not None:
            self.progress(done, total, estimate, seconds_left)

    @cached_property
    def cache(self) -> NllCache:
        """Where likelihoods are kept from one run to the next."""
        from pytest_lora.nll_cache import NllCache, default_folder

        if self.settings.no_cache:
            return NllCache(None)
        given = self.settings.cache_dir
        folder = self.start / Path(given).expanduser() if given else default_folder()
        return NllCache(folder, limit=self.settings.cache_size << 20)

    # ------------------------------------------------------------------ base models

    def base_name(self, adapter: str) -> str:
        """What the base model of an adapter is called: what a run sorts and groups its tests by."""
        named = self.settings_for(adapter).base_model or self.adapter(adapter).base_model
        return named or adapter

    def base_source(self, adapter: Adapter, settings: Settings) -> Path:
        """Directory of the adapter's base model; see :func:`pytest_lora.loading.resolve_base`."""
        from pytest_lora.loading import resolve_base

        return resolve_base(adapter, explicit=self._explicit_base(settings), root=self.root)

    def _explicit_base(self, settings: Settings) -> str | Path | None:
        given = settings.base_model
        if given is not None and (self.start / given).exists():
            return self.start / given
        return given

    def base_model(self, adapter: Adapter, source: Path, *, device: str, dtype: str) -> BaseModel:
        """The base model in ``source``, loaded once for all adapters that share it.

        One base is held at a time: the suite runs base by base, and two may not fit the device.
        """
        from pytest_lora import loading
        from pytest_lora.subject import BasePool

        if self._pool is None:
            self._pool = BasePool()
        spec = loading.spec_for(source, adapter, device=device, dtype=dtype)
        for other in [base for base in self._bases if base.spec not in (None, spec)]:
            self._forget(other)
        base = self._pool.get(source, adapter=adapter, device=device, dtype=dtype)
        return self._remember(base)

    def _forget(self, base: BaseModel) -> None:
        base.release()
        self._bases.remove(base)
        self._subject = None
        if self._pool is not None:
            self._pool.drop(base)

    def wrap(self, module: torch.nn.Module) -> BaseModel:
        """The BaseModel around a module: the one it was loaded as, or a new one for a user's."""
        from pytest_lora.subject import BaseModel

        for base in self._bases:
            if base.module is module:
                return base
        return self._remember(BaseModel.from_module(module))

    def _remember(self, base: BaseModel) -> BaseModel:
        if base not in self._bases:
            self._bases.append(base)
        return base

    def subject(
        self, adapter: Adapter, base: BaseModel, inputs: Mapping[str, torch.Tensor] | None = None
    ) -> Subject:
        """The adapter on the base.  The last one is kept, so that its outputs are computed once."""
        from pytest_lora.subject import Subject

        last = self._subject
        if inputs is None and last is not None and (last.adapter, last.base) == (adapter, base):
            return last
        self._subject = Subject(adapter, base, inputs)
        return self._subject

    def prove_intact(self, base: BaseModel) -> None:
        """Raise CannotRun if the base's weights are not as loaded; it is then loaded again."""
        problems = base.verify()
        if not problems:
            return
        if base.source is None:
            self._bases.remove(base)
            after = "it was supplied by a fixture and is still in that state"
        else:
            base.reload()
            after = "it has been loaded again"
        first, more = problems[0], len(problems) - 1
        others = f" and {more} more" if more else ""
        raise CannotRun(f"the test left the base model changed ({after}): {first}{others}")

    def close(self) -> None:
        """Let go of every model."""
        for base in list(self._bases):
            self._forget(base)
        self._pool = None

    # ------------------------------------------------------------------ one defect, one failure

    def blocked_by(self, spec: CheckSpec, adapter: str) -> str | None:
        """The check whose failure makes ``spec`` meaningless for ``adapter``, if there is one.

        Cheap prerequisites that have not run in this process are judged here, so that a run of one
        check alone, or on another worker, does not report a defect under the wrong name.
        """
        for needed in spec.after:
            outcome = self.outcomes.get((adapter, needed))
            if outcome is None and find_check(needed).need <= Need.FILES:
                outcome = self._judge_files(needed, adapter)
            if outcome in _BLOCKING:
                return needed
        return None

    def _judge_files(self, check: str, name: str) -> Outcome:
        with collecting() as results, suppress(CheckFailed, NotApplicable, CannotRun):
            self._assertion(check)(self.adapter(name), self.settings_for(name))
        outcome = results[-1].outcome
        self.outcomes[name, check] = outcome
        return outcome

    def _assertion(self, check: str) -> Callable[[Adapter, Settings], object]:
        from pytest_lora import assertions

        calls: dict[str, Callable[[Adapter, Settings], object]] = {
            "adapter_files": lambda adapter, settings: assertions.assert_adapter_files(
                adapter, newer_writer=settings.newer_writer
            ),
            "config_matches_weights": lambda adapter, settings: (
                assertions.assert_config_matches_weights(adapter, scaling=settings.scaling)
            ),
            "finite_weights": lambda adapter, _: assertions.assert_finite_weights(adapter),
            "serving_profile": lambda adapter, settings: assertions.assert_serving_profile(
                adapter, targets=settings.target
            ),
        }
        return calls[check]

    # ------------------------------------------------------------------ what the report says

    def about(self, name: str) -> str:
        """One line on an adapter for the head of its table."""
        adapter = self.adapter(name)
        settings = self.settings_for(name)
        parts = [adapter.peft_type or "unknown type"]
        if adapter.r:
            parts.append(f"r={adapter.r}")
        parts.append(f"on {settings.base_model or adapter.base_model or 'no named base model'}")
        parts += [f"{key}={value}" for key, value in self._unusual(settings)]
        return ", ".join(parts)

    def _unusual(self, settings: Settings) -> list[tuple[str, str]]:
        shown = (("dtype", settings.dtype), ("device", settings.device))
        return [(key, value) for key, value in shown if value != "auto"]

    def planned_order(self, result: CheckResult) -> tuple[int, int, int]:
        """Sorting key: adapters as given, checks as in the catalog, parts as in the profile."""
        names = list(self._locations)
        ids = [spec.id for spec in CHECKS]
        adapter = names.index(result.adapter) if result.adapter in names else len(names)
        if result.check not in ids:
            return adapter, len(ids), 0
        parts = self.parts(find_check(result.check), result.adapter) if result.part else ()
        part = parts.index(result.part) if result.part in parts else len(parts)
        return adapter, ids.index(result.check), part
