"""The hooks of the plugin, and nothing but hooks: each hands over to a plain function.

Loaded in every pytest run of an environment that has us, so nothing heavy is imported here and
every hook returns at once in a run that does not use us.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora import fixtures
from pytest_lora._argv import join_values
from pytest_lora.carried import arrived, attach
from pytest_lora.errors import CannotRun, CheckFailed, LoraError, NotApplicable, UsageError
from pytest_lora.fixtures import PARTS, RUN
from pytest_lora.settings import Layer, ini_name, option_name, table

if TYPE_CHECKING:
    from pytest_lora.collection import SuitePlan
    from pytest_lora.records import CheckResult
    from pytest_lora.run import Run

_MENDED = pytest.StashKey[tuple[list[str], str]]()
_PLAN: pytest.StashKey[SuitePlan] = pytest.StashKey()
_MARKERS = (
    "lora: a test about a LoRA adapter; every test of the built-in suite has it",
    "lora_adapter(path, ...): run the test for the adapters at these paths",
    "lora_bounds(check=limit, ...): bounds for this test, for example "
    "lora_bounds(merge_equivalence=2)",
    'limit_gpu_memory("14 GiB", predicted=None): fail a test that takes more on a GPU; without one '
    "a prediction, where the marker names a function that makes it, is judged instead",
)
_UPDATES = ("--lora-update-baseline", "--lora-update-baseline-in-ci")
_GPU_MARKERS = ("limit_gpu_memory", "gpu")


# ---------------------------------------------------------------------------------- configuration


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    # Not by `pytest_plugins`: pytest 8 warns that it cannot rewrite a module we have imported.
    pluginmanager.register(fixtures, fixtures.__name__)
    group = parser.getgroup("lora", "LoRA adapters")
    for name, setting in table():
        if setting.flag:
            kind: dict[str, Any] = {"action": "store_const", "const": True}
        else:
            kind = {"action": "append" if setting.many else "store", "metavar": setting.metavar}
        group.addoption(
            option_name(name),
            dest=ini_name(name),
            default=None,
            help=f"{setting.help} [ini: {ini_name(name)}]",
            **kind,
        )
        parser.addini(ini_name(name), setting.help, type=setting.ini, default=None)  # type: ignore[arg-type]
    group.addoption(
        "--lora-list-checks", action="store_true", help="list the checks of the suite and exit"
    )
    group.addoption(
        "--lora-init",
        action="store_true",
        help="write a commented lora.toml for the adapters given, and exit",
    )
    group.addoption(
        "--lora-update-baseline",
        action="store_true",
        help="record what is measured in the file of --lora-baseline; refused where CI is set",
    )
    group.addoption(
        "--lora-update-baseline-in-ci",
        action="store_true",
        help="the same, also where CI is set",
    )
    group.addoption(
        "--lora-contract",
        nargs="?",
        const="",
        metavar="MODULE:CLASS",
        help="hold the installed PEFT, or the class after the = sign, against the laws of LoRA "
        "(docs/contract.md)",
    )
    group.addoption(
        "--lora-contract-depth",
        choices=("quick", "full"),
        default="quick",
        help="how many examples of each law, unless --hypothesis-profile says so (default: quick)",
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, args: list[str]
) -> Generator[None, None, None]:
    """The last moment before anything of an adapter could be taken for the project's own."""
    mended = _mend(early_config)
    if mended is not None:
        # Pytest has looked for its configuration in the wrong place by now, but has not read a
        # conftest yet, and shall not: pytest_cmdline_main starts over.
        early_config.stash[_MENDED] = mended
        early_config.known_args_namespace.noconftest = True
    values = getattr(early_config.known_args_namespace, "lora_adapter", None) or ()
    if values and mended is None:
        _refuse_adapter_as_project(early_config, values)
    return (yield)


def _mend(config: pytest.Config) -> tuple[list[str], str] | None:
    """Arguments and PYTEST_ADDOPTS with ``--lora-adapter PATH`` joined, if that changes them.

    Only finds something where the command line was not mended at start-up, see
    :mod:`pytest_lora._argv`: in ``pytest.main([...])``, ``PYTEST_ADDOPTS`` and ``python -I``.
    """
    import shlex

    given = [str(argument) for argument in config.invocation_params.args]
    added = shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))
    joined, mended = join_values(given), join_values(added)
    return None if (joined, mended) == (given, added) else (joined, shlex.join(mended))


def _start_over(config: pytest.Config, arguments: list[str], added: str) -> int:
    """Run pytest anew with the mended arguments, as if they had been given."""
    folders = [
        (config.invocation_params.dir / argument.partition("=")[2]).resolve()
        for argument in (*arguments, *added.split())
        if argument.startswith("--lora-adapter=")
    ]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in folders]
    before = os.environ.get("PYTEST_ADDOPTS")
    os.environ["PYTEST_ADDOPTS"] = added
    try:
        return int(pytest.main(arguments, list(config.invocation_params.plugins or ())))
    finally:
        os.environ.pop("PYTEST_ADDOPTS")
        if before is not None:
            os.environ["PYTEST_ADDOPTS"] = before


def _refuse_adapter_as_project(config: pytest.Config, values: Iterable[str]) -> None:
    """Stop when an adapter's folder would be read as the project or as a folder of tests."""
    start = config.invocation_params.dir
    folders = [(start / value).resolve() for value in values if (start / value).is_dir()]
    given = [
        (start / arg.split("::")[0]).resolve() for arg in config.known_args_namespace.file_or_dir
    ]
    places = {
        "pytest's configuration": config.inipath,
        "the current directory": start.resolve(),
        **{f"the test path {path}": path for path in given},
    }
    for folder in folders:
        if not _holds_code(folder):
            continue
        if folder.parent == start.resolve() and folder.name.startswith("test"):
            places[f"a folder pytest reads conftest.py from, {folder.name}"] = folder
        for what, place in places.items():
            if place is not None and (place == folder or folder in place.parents):
                raise pytest.UsageError(
                    f"{what} lies in the adapter {folder}, which holds Python code or pytest "
                    "configuration that would be run; start pytest from your project and leave "
                    "the adapter out of its test paths"
                )


def _holds_code(folder: Path) -> bool:
    from pytest_lora._argv import CONFIGS

    named = any((folder / name).exists() for name in CONFIGS)
    return named or next(folder.rglob("*.py"), None) is not None


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if _MENDED in config.stash:
        return _start_over(config, *config.stash[_MENDED])
    if config.getoption("--lora-list-checks"):
        from pytest_lora.report.text import check_list

        print(check_list())
        return 0
    return _init_profile(config) if config.getoption("--lora-init") else None


def _init_profile(config: pytest.Config) -> int:
    from pytest_lora.init_profile import write_profile
    from pytest_lora.profile import FILE_NAME

    with _as_usage_error():
        run = _make_run(config)
        path = run.start / (run.settings.profile or run.root / FILE_NAME)
        if not run.locate():
            raise UsageError("--lora-init: name the adapters to write a profile for")
        write_profile(path, [run.adapter(name) for name in run.locate()])
    print(f"wrote {path}")
    return 0


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    with _as_usage_error():
        run = config.stash[RUN] = _make_run(config)
        _require_baseline(config, run)
        if run.settings.adapter:
            run.require_libraries()
            run.require_profile()
            _require_writable(run)
            _watch_rootdir(config)

    _add_contract(config)


def _watch_rootdir(config: pytest.Config) -> None:
    from pytest_lora.collection import RootDirectory

    if RootDirectory.NEEDED:
        config.pluginmanager.register(RootDirectory(), RootDirectory.NAME)


def _add_contract(config: pytest.Config) -> None:
    value = config.getoption("--lora-contract")
    if value is None:
        return
    if value and ":" not in value:
        raise pytest.UsageError(
            "--lora-contract takes package.module:Class after a = sign, or nothing, got "
            f"{value!r}; write test paths before the option"
        )
    try:
        from pytest_lora.contract_suite import ContractPlugin
    except ImportError as error:
        raise pytest.UsageError(
            f"--lora-contract needs pip install 'pytest-lora[model,hypothesis]': {error}"
        ) from None
    depth = config.getoption("--lora-contract-depth")
    device = config.stash[RUN].settings.device
    plugin = ContractPlugin(config, value, depth, device)
    config.pluginmanager.register(plugin, "pytest_lora_contract")


def _make_run(config: pytest.Config) -> Run:
    from pytest_lora.run import Run

    recording = any(config.getoption(option) for option in _UPDATES)
    return Run(
        list(_layers(config)),
        start=config.invocation_params.dir,
        root=config.rootpath,
        recording=recording,
    )


def _require_baseline(config: pytest.Config, run: Run) -> None:
    """Read the baseline before any work is done, and refuse to write one unasked."""
    if run.recording:
        path, (quiet, loud) = run.settings.baseline, _UPDATES
        if path is None:
            raise UsageError(f"{quiet}: name the file with --lora-baseline=FILE")
        _refuse_folder(run.start / path, run.settings.origin("baseline"))
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        if in_ci and not config.getoption(loud):
            raise UsageError(
                f"{quiet}: CI is set, and a baseline is recorded where somebody reviews it; "
                f"{loud} does it nevertheless"
            )
    if run.settings.baseline is not None:
        _ = run.baseline


def _layers(config: pytest.Config) -> Iterable[Layer]:
    folder = config.inipath.parent if config.inipath else config.rootpath
    ini = {}
    for name, setting in table():
        try:
            value = config.getini(ini_name(name))
        except (TypeError, ValueError) as error:
            raise UsageError(f"ini key {ini_name(name)}: {error}") from None
        if value is not None and value != []:
            ini[name] = _anchored(value, folder) if setting.path else value
    given = {name: config.getoption(ini_name(name)) for name, _ in table()}
    yield Layer(ini, lambda name: f"ini {ini_name(name)}")
    yield Layer({name: value for name, value in given.items() if value is not None}, option_name)


def _anchored(value: Any, folder: Path) -> Any:
    """Paths from an ini file, relative to it; what is no path there (a hub id) stays as it is."""
    if isinstance(value, list):
        return [_anchored(item, folder) for item in value]
    path = folder / os.path.expanduser(value)
    is_here = path.parent.is_dir() or any(folder.glob(value)) if not path.is_absolute() else True
    return str(path) if is_here else value


def _require_writable(run: Run) -> None:
    from pytest_lora.report.output import SUFFIXES

    settings = run.settings
    for path in map(run.start.joinpath, settings.report):
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"{settings.origin('report')}: {path.name} is not a .json file, nor .md or .html"
            )
        _refuse_folder(path, settings.origin("report"))
    if settings.pr_comment:
        _refuse_folder(run.start / settings.pr_comment, settings.origin("pr_comment"))
    cache = run.start / Path(settings.cache_dir or ".").expanduser()
    if cache.exists() and not cache.is_dir():
        raise UsageError(f"{settings.origin('cache_dir')}: {cache} is not a folder")


def _refuse_folder(path: Path, origin: str) -> None:
    if path.is_dir():
        raise UsageError(f"{origin}: {path} is a folder")


class _as_usage_error:  # noqa: N801  (reads as a phrase at its uses)
    """Our UsageError, shown by pytest as its own: one line, exit status 4, no traceback."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UsageError):
            raise pytest.UsageError(str(error)) from None


def pytest_unconfigure(config: pytest.Config) -> None:
    run = config.stash.get(RUN, None)
    if run is not None:
        run.close()


def pytest_report_header(config: pytest.Config) -> list[str] | None:
    run = config.stash[RUN]
    names = run.locate()
    if not names:
        return None
    from pytest_lora.run import versions

    found = [f"{name} {version}" for name, version in versions().items() if version]
    counted = "1 adapter" if len(names) == 1 else f"{len(names)} adapters"
    lines = [f"lora: {counted}; {', '.join(found)}"]
    # A name in it that is spelt otherwise would leave an adapter without its bounds, unnoticed.
    unmatched = run.profile.unmatched(names) if run.profile else ()
    if unmatched:
        patterns = ", ".join(f"[adapters.{pattern!r}]" for pattern in unmatched)
        assert run.profile is not None
        lines.append(f"lora: no adapter of this run matches {patterns} in {run.profile.name}")
    return lines


# ------------------------------------------------------------------------------------- collection


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Nothing inside an adapter is ever collected: its conftest.py would run."""
    run = config.stash[RUN]
    if not run.settings.adapter:
        return None
    path = collection_path.resolve()
    inside = any(path == folder or folder in path.parents for folder in run.folders())
    return True if inside else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lora_adapter" not in metafunc.fixturenames:
        return
    run = metafunc.config.stash[RUN]
    marked = [
        path for mark in metafunc.definition.iter_markers("lora_adapter") for path in mark.args
    ]
    names = marked or list(run.locate())
    part = next((name for name in PARTS if name in metafunc.fixturenames), None)
    if part is None:
        if names:
            from pytest_lora.collection import asked_for

            names = asked_for(metafunc.definition, run, names)
        if names:
            metafunc.parametrize("lora_adapter", names, ids=names, indirect=True)
        return
    try:
        pairs = [(name, entry) for name in names for entry in _parts(metafunc, part, name)]
    except UsageError as error:  # pytest shows a UsageError from here with its own frames
        raise pytest.Collector.CollectError(str(error)) from None
    if pairs:
        ids = [f"{name}:{entry}" for name, entry in pairs]
        metafunc.parametrize(("lora_adapter", part), pairs, ids=ids, indirect=True)


def _parts(metafunc: pytest.Metafunc, part: str, adapter: str) -> Iterable[str]:
    """The entries of the profile that a fixture of an adapter goes through."""
    from pytest_lora.collection import is_left_out

    run = metafunc.config.stash[RUN]
    if part == "lora_written_task" and not is_left_out(metafunc.definition, run):
        return run.written_tasks(adapter)  # reads the tasks
    return [entry.name for entry in run.entries(PARTS[part], adapter)]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    run = config.stash[RUN]
    if not run.settings.adapter:
        return
    from pytest_lora.collection import collect_suite

    with _as_usage_error():
        chosen, left_out = collect_suite(session, run)
    items += chosen
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session: pytest.Session) -> None:
    run = session.config.stash[RUN]
    if run.settings.adapter and not hasattr(session.config, "workerinput"):
        from pytest_lora.collection import SuitePlan

        session.config.stash[_PLAN] = SuitePlan.of(item.nodeid for item in session.items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """On the controller, where nothing is collected: what the workers are going to run."""
    config: pytest.Config = node.config
    if config.stash[RUN].settings.adapter:
        from pytest_lora.collection import SuitePlan

        config.stash[_PLAN] = SuitePlan.of(ids)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    run = config.stash[RUN]
    ours = run.settings.adapter or config.getoption("--lora-contract") is not None
    if config.getvalue("dist") not in ("load", "loadgroup") or not ours:
        return None
    from pytest_lora.distribution import ByBase, place_of

    return ByBase(config, log, partial(place_of, run))


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """``-n auto``: one worker per GPU.  Asked before anything is configured."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    with _as_usage_error():
        run = _make_run(config)
    if not run.settings.adapter:
        return None
    from pytest_lora.distribution import gpu_workers

    return gpu_workers(run, os.environ)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    run = config.stash[RUN]
    on_gpus = config.getoption("--lora-contract") is not None and run.settings.device == "cuda"
    if run.settings.adapter or on_gpus:
        from pytest_lora.distribution import equip

        equip(run, specs, os.environ)


# ---------------------------------------------------------------------------------------- running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    if not _is_ours(item):
        return (yield)
    from pytest_lora.gpu_tests import refuse_lost_context
    from pytest_lora.running import skip_if_blocked, watch

    with watch(item, "setup"):
        skip_if_blocked(item)
        refuse_lost_context(item)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    if not _is_ours(item):
        return (yield)
    from pytest_lora.gpu_tests import judge_without_gpu, limited
    from pytest_lora.running import showing_progress, watch

    with watch(item, "call"), showing_progress(item), limited(item):
        if judge_without_gpu(item):
            # Not by pytest_pyfunc_call, which methods of unittest and other plugins go around.
            item.runtest = _judged_already  # type: ignore[method-assign]
        return (yield)


def _judged_already() -> None:
    """The body of a test with a memory ceiling that its prediction has judged."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    if not _is_ours(item):
        return (yield)
    from pytest_lora.running import watch

    with watch(item, "teardown"):
        return (yield)


def _is_ours(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    return "lora_run" in names or any(map(item.get_closest_marker, ("lora", *_GPU_MARKERS)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """What a test leaves on a GPU goes before the next one comes."""
    done = yield
    if "torch" in sys.modules:
        from pytest_lora.gpu_tests import clean_up

        clean_up()
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Our own exceptions are shown as their message: the evidence is in it, not in our frames."""
    report = yield
    attach(item, report)
    if call.excinfo is not None and report.failed and "torch" in sys.modules:
        from pytest_lora.gpu_tests import note_lost_context

        note_lost_context(item, call.excinfo.value)
    expected = (CheckFailed, CannotRun, NotApplicable, UsageError)
    if call.excinfo is not None and report.failed and isinstance(call.excinfo.value, expected):
        shown = call.excinfo.getrepr(style="value")
        if shown.reprcrash is not None:
            # What the short summary quotes; the name of the exception says nothing there.
            shown.reprcrash.message = str(call.excinfo.value)
        report.longrepr = shown
    if report.skipped and isinstance(report.longrepr, tuple) and _is_ours(item):
        # The place of a skip is the test that was skipped, not where the reason was found.
        path, line, _ = item.reportinfo()
        report.longrepr = (os.fspath(path), (line or 0) + 1, report.longrepr[2])
    return report


# ---------------------------------------------------------------------------------------- results


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        collected = _Collected(session.config)
        session.config.pluginmanager.register(collected, "pytest_lora_results")
        session.config.pluginmanager.register(_Finished(collected), "pytest_lora_finished")


class _Collected:
    """Gathers results from reports, so that it is all the same whether workers ran the tests."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.results: list[CheckResult] = []
        self.about: dict[str, str] = {}
        self.recorded = ""
        self._tests: dict[str, dict[str, list[CheckResult]]] = {}
        self._reruns: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = arrived(report)
        if data is not None:
            from pytest_lora.records import CheckResult

            self.about.update(data["about"])
            # A test that is run again (pytest-rerunfailures) replaces what it said before.
            found = [CheckResult.from_dict(item) for item in data["results"]]
            self._tests.setdefault(report.nodeid, {})[report.when] = found
        if str(report.outcome) == "rerun":
            self._tests.pop(report.nodeid, None)
            self._reruns[report.nodeid] += 1

    def complete(self) -> None:
        """All results in the order of the plan, those that never came as such."""
        self.results = [
            _after_reruns(result, self._reruns[name])
            for name, phases in self._tests.items()
            for results in phases.values()
            for result in results
        ]
        if _PLAN in self.config.stash and not self.config.getoption("collectonly"):
            self.results += self.config.stash[_PLAN].not_run(self.results)
        self.results.sort(key=self.config.stash[RUN].planned_order)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        run = self.config.stash[RUN]
        for write in self._writers(run, int(exitstatus)):
            try:
                write()
            except LoraError as error:
                # Raising here would be an internal error with a traceback; not saying it, a lie.
                session.exitstatus = pytest.ExitCode.USAGE_ERROR
                self._say(f"ERROR: {error}")

    def _writers(self, run: Run, exitstatus: int) -> Iterable[Callable[[], None]]:
        """What there is to write, each file on its own: one that fails must not cost the others."""
        settings, summary = run.settings, os.environ.get("GITHUB_STEP_SUMMARY")
        if run.recording:
            yield partial(self._record, run, exitstatus)
        wanted = bool(settings.report or settings.pr_comment)
        if not (self.results and (wanted or summary)) and not (settings.adapter and wanted):
            return
        from pytest_lora.provenance import environment_of
        from pytest_lora.report.github import append_summary, write_comment
        from pytest_lora.report.output import write_results

        given = self.results, environment_of(run, self.about, exitstatus)
        for path in settings.report:
            yield partial(write_results, run.start / path, *given)
        if settings.pr_comment:
            yield partial(write_comment, run.start / settings.pr_comment, *given)
        if self.results and summary:
            yield partial(append_summary, Path(summary), *given)

    def _record(self, run: Run, exitstatus: int) -> None:
        """The new baseline, unless the run was cut short and would be half of one."""
        name = run.settings.baseline
        assert run.baseline is not None
        assert name is not None
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.recorded = f"{run.baseline.name}: not written, for the run did not come to its end"
            return
        run.baseline.record(run.start / name, self.results)
        self.recorded = run.baseline.told(self.results)

    def _say(self, text: str) -> None:
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(text, red=True)

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        if not self.results:
            return
        self._annotate(terminalreporter)
        if config.getoption("no_summary", False):
            return
        from pytest_lora.report.terminal import summary_lines

        verbosity = config.get_verbosity()
        shown = (
            self.results if verbosity >= 0 else [r for r in self.results if r.outcome != "passed"]
        )
        if not shown:
            return
        terminalreporter.write_sep("=", "LoRA adapters")
        layout = {
            "width": terminalreporter._tw.fullwidth,
            "detail": max(verbosity, 0),
            "encoding": getattr(terminalreporter._tw._file, "encoding", None) or "utf-8",
        }
        for line, colour in summary_lines(shown, self.about, **layout):
            terminalreporter.write_line(line, **({colour: True} if colour else {}))
        if self.recorded:
            terminalreporter.write_line(f"baseline {self.recorded}")

    def junit(self) -> None:
        """The verdict, for the JUnit file; properties that workers record are lost."""
        from pytest_lora.report.junit import suite_properties

        for plugin in self.config.pluginmanager.get_plugins():
            if hasattr(plugin, "add_global_property"):  # pytest's writer of JUnit files
                for name, value in suite_properties(self.results):
                    plugin.add_global_property(name, value)

    def _annotate(self, terminalreporter: Any) -> None:
        """On GitHub only: lines that its runner takes for remarks at lines of files."""
        if os.environ.get("GITHUB_ACTIONS") != "true":
            return
        from pytest_lora.annotations import annotations_of
        from pytest_lora.report.github import workflow_command

        root = Path(os.environ.get("GITHUB_WORKSPACE") or os.curdir).resolve()
        terminalreporter.ensure_newline()
        for annotation in annotations_of(self.config.stash[RUN], self.results, root):
            terminalreporter.write_line(workflow_command(annotation))


def _after_reruns(result: CheckResult, reruns: int) -> CheckResult:
    """A verdict that took several attempts says so: the same adapter gave another one before."""
    if not reruns:
        return result
    said = f"attempt {reruns + 1}, the earlier ones failed"
    return replace(result, reason=f"{said}; {result.reason}" if result.reason else said)


class _Finished:
    """Completes the results before anybody, the writer of JUnit files for one, uses them."""

    def __init__(self, collected: _Collected) -> None:
        self.collected = collected

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.collected.complete()
        if self.collected.results:
            self.collected.junit()
