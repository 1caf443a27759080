"""What is run on this project, each in an environment of its own: ``nox -l`` lists it.

Everything is installed under ``constraints.txt``, so that a run tomorrow is the run of today;
``minimums`` and ``pytest8`` show that older releases do as well.
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
nox.options.sessions = ["lint", "types", "tests", "minimums", "files_only", "docs", "build"]

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
    session.install(*PINNED, "-e", ".[model,test]")
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
def pytest8(session: nox.Session) -> None:
    """The plugin's tests with the oldest supported pytest and everything else as pinned."""
    session.install(*PINNED, "-e", ".[model,test]")
    session.install("pytest==8.4.0")
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
    session.install(*PINNED, "ruff", "zizmor")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    places = ("action.yml", ".github/workflows")
    session.run("zizmor", "--offline", "--config", ".github/zizmor.yml", *places)


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


@nox.session(default=False)
def html(session: nox.Session) -> None:
    """The HTML report in headless Chromium, which has to be installed (Debian: chromium)."""
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        session.error("no Chromium here; on Debian: apt-get install chromium")
    session.install(*PINNED, "-e", ".", "hypothesis", "jsonschema", "pytest-xdist")
    session.run("python", "-m", "pytest", "tests/unit/test_report_html.py", *session.posargs)


@nox.session(default=False)
def timemachine(session: nox.Session) -> None:
    """Known faults of PEFT under the releases that had them: are they caught, and only they?"""
    session.install(*PINNED, "-e", ".[model]")
    releases = Path(session.create_tmp()).resolve() / "releases"
    arguments = session.posargs or ["--table=docs/timemachine.md"]
    session.run("python", "-m", "timemachine", f"--folder={releases}", *arguments)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """The tests that need a CUDA device."""
    session.install(*PINNED, "-e", ".[model,test]")
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The measurements behind docs/performance.md."""
    session.install(*PINNED, "-e", ".[model,test]")
    for script in sorted((HERE / "benchmarks").glob("[a-z]*.py")):
        session.run("python", os.fspath(script.relative_to(HERE)), *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """20,000 hostile adapter folders against the file checks; about four minutes."""
    session.install(*PINNED, "-e", ".[model,test]")
    path = "tests/property/test_hostile_folders.py"
    session.run("python", "-m", "pytest", path, env={"LORA_FUZZ_EXAMPLES": "4000"})
