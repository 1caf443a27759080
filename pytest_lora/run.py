"""One run: which adapters, under which settings, and what has been found so far.

Everything the hooks and fixtures share, without pytest: it can be built and used from anywhere.
Heavy libraries are imported when the first base model is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.catalog import CHECKS, CheckSpec, Need, find_check
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.quantities import Margin, needs_baseline
from pytest_lora.records import Bound, CheckResult, Outcome, collecting
from pytest_lora.settings import (
    Layer,
    Settings,
    bound_for,
    require_per_adapter,
    resolve,
    without_baseline,
)

if TYPE_CHECKING:
    import torch

    from pytest_lora.adapter import Adapter
    from pytest_lora.baseline import Baseline, Reference, RelativeBound
    from pytest_lora.data import SourceDomain, TargetTask
    from pytest_lora.locate import AdapterLocation
    from pytest_lora.nll_cache import NllCache
    from pytest_lora.profile import Entry, Profile
    from pytest_lora.subject import BaseModel, BasePool, Subject
    from pytest_lora.tasks.progress import Progress
    from pytest_lora.tasks.records import Task
    from pytest_lora.tasks.texts import Texts

__all__ = ["MODEL_LIBRARIES", "Run", "missing_libraries", "versions"]

MODEL_LIBRARIES = ("torch", "transformers", "peft")
_BLOCKING = (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)


def missing_libraries() -> tuple[str, ...]:
    """The model libraries that are not installed (found without importing them)."""
    return tuple(name for name in MODEL_LIBRARIES if util.find_spec(name) is None)


def versions() -> dict[str, str | None]:
    """Installed versions of everything a result can depend on."""
    from pytest_lora.installed import installed_version  # an idle run has no use for it

    names = ("pytest-lora", "pytest", "safetensors", *MODEL_LIBRARIES)
    return {name: installed_version(name) for name in names}


@contextmanager
def _in_the_table_of(entry: Entry) -> Iterator[None]:
    """What is wrong with data is told with the line of the profile that asks for them."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{entry.place}: {error}") from None


class _Bounds(Mapping[str, Bound]):
    """Bounds by check.  One relative to a baseline needs the base model's facts, so not before."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        adapter: str,
        base: Callable[[], BaseModel] | None,
        parts: Mapping[str, str],
    ) -> None:
        self._run, self._settings, self._adapter, self._base = run, settings, adapter, base
        self._parts = parts
        self._checks = [
            check
            for check, limit in settings.bounds.items()
            # While a baseline is recorded, nothing is judged by the one before.
            if not (isinstance(limit, Margin) and run.recording)
        ]

    def __getitem__(self, check: str) -> Bound:
        if check not in self._checks:
            raise KeyError(check)
        if isinstance(self._settings.bounds[check], Margin):
            return self._relative(check)
        bound = bound_for(self._settings, check)
        assert bound is not None
        return bound

    def _relative(self, check: str) -> RelativeBound:
        from pytest_lora.baseline import RelativeBound

        origin = self._settings.origin(check)
        reference = self._run.reference(self._adapter, self._label(check, origin), origin)
        facts: Mapping[str, Any] = {}
        if self._base is not None:
            facts = self._run.facts(self._base())
            reference.require_shared(facts)  # now, and not when the check has taken minutes
        bound = bound_for(self._settings, check, recorded=reference.value)
        assert bound is not None
        return RelativeBound(bound.low, bound.high, bound.origin, reference, facts)

    def _label(self, check: str, origin: str) -> str:
        kind = find_check(check).per
        if not kind:
            return check
        if kind not in self._parts:
            raise UsageError(
                f"{origin} is relative to what was recorded of each of the profile's {kind}, and "
                "this test is about none of them"
            )
        return f"{check}[{self._parts[kind]}]"

    def __iter__(self) -> Iterator[str]:
        return iter(self._checks)

    def __len__(self) -> int:
        return len(self._checks)


@dataclass
class Run:
    """The state of one pytest run in one process.

    Attributes:
        layers: settings from ini file and command line, weakest first.
        start: directory that relative adapter paths and names are relative to.
        root: the project's root directory.
        outcomes: verdicts so far, by adapter name and check.
        progress: is told how far a long evaluation has come.
        recording: whether this run's measurements become the baseline; bounds relative to the one
            before are then not judged, and all data is evaluated.
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
    _texts: dict[tuple[Any, ...], Texts] = field(default_factory=dict)
    _tasks: dict[tuple[Any, ...], Task] = field(default_factory=dict)
    progress: Progress | None = None
    recording: bool = False

    def __post_init__(self) -> None:
        self.settings = resolve(self.layers)
        if self.settings.max_memory and self.settings.device_map is None:
            raise UsageError(
                f"{self.settings.origin('max_memory')} says what --lora-device-map may use: give "
                "that as well, as in --lora-device-map=auto"
            )

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

    def require_profile(self) -> None:
        """Raise UsageError for what is wrong with the profile, before tests are made of it."""
        from pytest_lora.profile import KINDS

        for adapter in self.locate():
            self.settings_for(adapter)
            for kind in KINDS:
                self.entries(kind, adapter)

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

    def bounds_for(
        self,
        settings: Settings,
        adapter: str = "",
        base: Callable[[], BaseModel] | None = None,
        *,
        parts: Mapping[str, str] | None = None,
    ) -> Mapping[str, Bound]:
        """The bounds the user set, by check; those relative to the baseline are worked out when
        asked for.

        Args:
            settings: of the adapter.
            adapter: its name.
            base: gives its base model, which decides whether numbers are comparable.
            parts: the names of the source domain and the task that the test is about, by kind:
                what was recorded is recorded of each.
        """
        return _Bounds(self, settings, adapter, base, parts or {})

    # ------------------------------------------------------------------ baseline

    @cached_property
    def baseline(self) -> Baseline | None:
        """The recorded measurements to compare with, if a file of them was named.

        Raises:
            UsageError: it is no baseline, or is not there and not about to be recorded.
        """
        from pytest_lora.baseline import Baseline

        named = self.settings.baseline
        if named is None:
            return None
        path = self.start / named
        shown = str(path.relative_to(self.start)) if path.is_relative_to(self.start) else named
        if self.recording and not path.exists():
            return Baseline(shown)
        return Baseline.read(path, shown=shown)

    def reference(self, adapter: str, label: str, origin: str) -> Reference:
        """What was recorded of a measurement, which the bound that ``origin`` set is relative to.

        Raises:
            CannotRun: there is no baseline, or nothing in it about this.
        """
        if self.baseline is None:
            raise CannotRun(without_baseline(origin))
        return self.baseline.reference(adapter, label, alone=self.locate() == (adapter,))

    def placed(self, result: CheckResult) -> CheckResult:
        """A result with the facts that make it comparable, and what the baseline says of it."""
        from pytest_lora.baseline import is_recorded, with_facts, with_remark

        if self.baseline is None or not is_recorded(result):
            return result
        subject = self._subject
        if subject is not None and subject.adapter.name == result.adapter:
            result = with_facts(result, self.facts(subject.base))
        if self.recording:
            return result
        with suppress(CannotRun):  # nothing recorded of it
            reference = self.reference(result.adapter, result.label, "")
            return with_remark(result, reference)
        return result

    @staticmethod
    def facts(base: BaseModel) -> dict[str, Any]:
        """What all measurements with a base model depend on, besides adapters and data."""
        from pytest_lora.tasks.evaluation import base_facts

        return base_facts(base)

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
        """Raise UsageError where data that a check is made for, or a baseline, is not there."""
        settings = self.settings_for(adapter)
        if needs_baseline(settings.bounds.get(spec.id)) and self.baseline is None:
            raise UsageError(without_baseline(settings.origin(spec.id)))
        for entry in self.entries(spec.per, adapter) if spec.per else ():
            for key, limit in entry.values.items():
                if needs_baseline(limit) and self.baseline is None:
                    raise UsageError(without_baseline(entry.origins[key]))
            path = entry.get("path")
            if path is not None and not path.exists():
                raise UsageError(f"{entry.origins['path']}: {path} is not there")

    def source(self, adapter: str, name: str, settings: Settings) -> SourceDomain:
        """A source domain of an adapter, open."""
        from pytest_lora.data import open_source

        entry = self.entry("sources", adapter, name)
        limit = settings.bounds.get("perplexity_drift"), settings.origin("perplexity_drift")
        return open_source(
            entry,
            self._documents(entry),
            otherwise=limit,
            evaluation=self.evaluation(adapter),
            reference=self._recorded(adapter, f"perplexity_drift[{name}]"),
        )

    def _documents(self, entry: Entry) -> Texts:
        """The texts of a source domain; their file is walked through once for all adapters."""
        from pytest_lora.data import how_to_open
        from pytest_lora.tasks.texts import open_texts

        path, how = entry.values["path"], how_to_open(entry)
        key = (path, *sorted(how.items()))
        if key not in self._texts:
            with _in_the_table_of(entry):
                self._texts[key] = open_texts(path, **how)
        return self._texts[key]

    def task(self, adapter: str, name: str, *, judged: bool = True) -> TargetTask:
        """A target task of an adapter.

        Args:
            adapter: its name.
            name: the task's, in the profile.
            judged: whether its accuracy is; else no floor is looked up in a baseline.
        """
        from pytest_lora.data import open_task

        recorded = self._recorded(adapter, f"task_accuracy[{name}]")
        return open_task(
            self.entry("tasks", adapter, name),
            self._items(adapter, name),
            evaluation=self.evaluation(adapter),
            reference=recorded if judged else lambda _: None,
        )

    def _items(self, adapter: str, name: str) -> Task:
        """The items of a task; its file is read once for all adapters that are asked alike."""
        from pytest_lora.tasks.configure import HOW_TO_JUDGE, make_task

        entry, allowed = self.entry("tasks", adapter, name), self.settings.allow_code_execution
        asked = [item for item in entry.values.items() if item[0] not in HOW_TO_JUDGE]
        key = (name, *sorted(asked))
        if key not in self._tasks:
            with _in_the_table_of(entry):
                self._tasks[key] = make_task(name, entry.values, allow_code_execution=allowed)
        return self._tasks[key]

    def _recorded(self, adapter: str, label: str) -> Callable[[str], Reference | None]:
        """Gives what was recorded to whoever needs it, and None while it is being recorded."""

        def find(origin: str) -> Reference | None:
            return None if self.recording else self.reference(adapter, label, origin)

        return find

    def written_tasks(self, adapter: str) -> tuple[str, ...]:
        """The names of an adapter's tasks in which answers are written, not chosen."""
        entries = self.entries("tasks", adapter)
        # What lm-eval asks is lm-eval's; and learning its tasks takes seconds.
        names = [entry.name for entry in entries if entry.get("lm_eval") is None]
        return tuple(name for name in names if self._items(adapter, name).is_written)

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
            "full": self.settings.full_eval or self.recording,
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
        from pytest_lora.locate import is_there

        given = settings.base_model
        if given is not None and is_there(self.start / given):
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
        how: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "device_map": self.settings.device_map,
            "max_memory": self.settings.max_memory,
        }
        spec = loading.spec_for(source, adapter, **how)
        for other in [base for base in self._bases if base.spec not in (None, spec)]:
            self._forget(other)
        base = self._pool.get(source, adapter, **how)
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
        """The adapter on the base.  The last one is kept, so that its outputs are computed once;
        one with inputs of its own serves whoever gave them alone.
        """
        from pytest_lora.subject import Subject

        last = self._subject
        fits = last is not None and (last.adapter, last.base) == (adapter, base)
        if last is None or not fits or last.has_own_inputs or inputs is not None:
            last = self._subject = Subject(adapter, base, inputs)
        return last

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
        placed = [("device_map", settings.device_map)] if settings.device_map else []
        return [*((key, value) for key, value in shown if value != "auto"), *placed]

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
