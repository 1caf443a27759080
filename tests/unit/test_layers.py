"""The floors of docs/architecture.md, enforced: who may import whom, and which library where."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import pytest_lora

PACKAGE = Path(pytest_lora.__file__).parent
MODEL = frozenset({"torch", "transformers", "peft", "safetensors"})
NUMBERS = frozenset({"torch", "numpy"})
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Room:
    """A module, or a folder of modules, on a floor, and the libraries it may use."""

    floor: int
    libraries: frozenset[str] = NOTHING


# The checks that have to work where none of the model libraries is installed.
FILE_CHECKS = (
    "checks.adapter_config",
    "checks.config",
    "checks.files",
    "checks.finite",
    "checks.layers",
    "checks.serving",
    "checks.targets",
    "checks.tensor_names",
    "checks.witness",
)
# Records, tables and pictures of memory: no tensors.
PLAIN_MEMORY = ("advice", "allocator", "golden", "patching", "plot", "profiles", "records")
# A module may import from its own floor and from those below.  The longest prefix counts, so that
# a module can be placed apart from its folder.
ROOMS = {
    "": Room(0),
    "errors": Room(0),
    "records": Room(0),
    "catalog": Room(0),
    "quantities": Room(0),
    "settings": Room(0),
    "profile": Room(0),
    "toml_places": Room(0),
    "names": Room(0),
    "installed": Room(0),
    "sizes": Room(0),
    "_argv": Room(0),
    "atomic": Room(0),
    "strict_json": Room(1),
    "safetensors_header": Room(1),
    "locate": Room(1, frozenset({"huggingface_hub"})),
    "patterns": Room(1),
    "peft_tables": Room(1),
    "inspection": Room(1),
    "adapter": Room(1, frozenset({"safetensors"})),
    "init_profile": Room(1),
    "numerics": Room(1, NUMBERS),
    "stats": Room(1, frozenset({"numpy"})),
    "report": Room(1),
    "memory": Room(2, MODEL | {"bitsandbytes"}),
    **{f"memory.{name}": Room(1) for name in PLAIN_MEMORY},
    "structure": Room(2, MODEL),
    "offload": Room(2, MODEL | {"accelerate"}),
    "loading": Room(2, MODEL | {"huggingface_hub"}),
    "probe": Room(2, MODEL),
    "attach": Room(2, MODEL),
    "data": Room(2, MODEL),
    "subject": Room(2, MODEL),
    "fresh": Room(2, MODEL),
    "_fresh_job": Room(2, MODEL),
    "_fresh_main": Room(2, MODEL),
    "tasks": Room(2, MODEL),
    "tasks.texts": Room(2, frozenset({"pyarrow"})),
    "tasks.likelihood": Room(2, MODEL),
    "nll_cache": Room(2, frozenset({"filelock"})),
    "tasks._jail": Room(2),
    "tasks._referee": Room(2),
    "tasks.sandbox": Room(2),
    "tasks.humaneval": Room(2),
    "tasks.lm_eval_bridge": Room(2, MODEL | {"lm_eval"}),
    "checks": Room(3, MODEL | NUMBERS),
    **dict.fromkeys(FILE_CHECKS, Room(3)),
    "assertions": Room(4, MODEL),
    "memory_assertions": Room(4, frozenset({"torch"})),
    "memory_command": Room(4, frozenset({"peft"})),
    "run": Room(4, MODEL),
    "training": Room(4, MODEL),
    "parity": Room(4, MODEL),
    "baseline": Room(1),
    "folders": Room(1, frozenset({"torch", "safetensors"})),
    "tiny_models": Room(2, MODEL),
    "strategies": Room(4, frozenset({"hypothesis"}) | MODEL),
    "provenance": Room(4),
    "annotations": Room(4),
    "comparison": Room(4),
    "contract": Room(4, frozenset({"hypothesis"}) | MODEL),
    "fixtures": Room(5, frozenset({"pytest", "torch"})),
    "suite": Room(5, frozenset({"pytest"})),
    "collection": Room(5, frozenset({"pytest"})),
    "devices": Room(0),
    "distribution": Room(5, frozenset({"pytest", "xdist"})),
    "progress": Room(5, frozenset({"pytest"})),
    "contract_suite": Room(5, frozenset({"pytest", "hypothesis"})),
    "running": Room(5, frozenset({"pytest"})),
    "carried": Room(5, frozenset({"pytest"})),
    "gpu_tests": Room(5, frozenset({"pytest", "torch"})),
    "plugin": Room(6, frozenset({"pytest"})),
    "cli": Room(6, frozenset({"pytest"})),
}
# The same holds for what leads to them.
FILE_TIER = (*FILE_CHECKS, "adapter", "run", "settings")
IMPORT_FREE = ("numerics", "memory", "checks", "report", "suite")


@dataclass(frozen=True)
class Import:
    """One imported module: a path below the package, or the name of a library."""

    name: str
    line: int
    ours: bool
    when: str
    """"load" at the top of the module, "call" inside a function, "type" for annotations only."""
    source: str = ""
    """What stands after ``import`` or ``from``."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name below the package; the package itself is ``""``."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {_name_of(path): path for path in paths}


def _name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(name: str) -> tuple[Import, ...]:
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    return tuple(_walk(tree, "load", name))


def _walk(node: ast.AST, when: str, module: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from _resolve(child, when, module)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _walk(ast.Module([statement], []), "type", module)
            for statement in child.orelse:
                yield from _walk(ast.Module([statement], []), when, module)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, "call" if when == "load" else when, module)
        else:
            yield from _walk(child, when, module)


def _resolve(node: ast.Import | ast.ImportFrom, when: str, module: str) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        sources = [(alias.name, None) for alias in node.names]
    else:
        assert not node.level, f"{module}:{node.lineno}: imports here are absolute"
        sources = [(str(node.module), alias.name) for alias in node.names]
    for source, member in sources:
        top, _, below = source.partition(".")
        ours = top == "pytest_lora"
        yield Import(_ours(below, member) if ours else top, node.lineno, ours, when, source)


def _ours(source: str, member: str | None) -> str:
    """The module that ``from pytest_lora.source import member`` really takes from."""
    if member is not None:
        if f"{source}.{member}".lstrip(".") in modules():
            return f"{source}.{member}".lstrip(".")
        if not source:
            return pytest_lora._HOMES[member]
    return source


def room_of(name: str) -> Room:
    prefix = name
    while prefix and prefix not in ROOMS:
        prefix = prefix.rpartition(".")[0]
    if prefix not in ROOMS or (not prefix and name):
        pytest.fail(f"{name} has no floor: place it in the table of {Path(__file__).name}")
    return ROOMS[prefix]


def reachable(name: str, whens: tuple[str, ...]) -> dict[str, list[str]]:
    """Modules of ours that ``name`` pulls in, each with the chain of imports that leads there."""
    chains = {name: [name]}
    todo = [name]
    while todo:
        current = todo.pop()
        for found in imports(current):
            if found.ours and found.when in whens and found.name not in chains:
                chains[found.name] = [*chains[current], found.name]
                todo.append(found.name)
    return chains


EVERY = [name for name in modules() if name]


@pytest.mark.parametrize("name", EVERY)
def test_every_module_stands_on_a_floor_and_imports_only_from_its_own_and_below(name: str) -> None:
    floor = room_of(name).floor
    above = [
        f"line {found.line}: {found.name} (floor {room_of(found.name).floor})"
        for found in imports(name)
        if found.ours and room_of(found.name).floor > floor
    ]
    assert not above, f"{name} is on floor {floor} and imports upwards: {above}"


@pytest.mark.parametrize("name", EVERY)
def test_libraries_are_used_only_where_the_table_says(name: str) -> None:
    allowed = room_of(name).libraries | sys.stdlib_module_names
    foreign = {found.name for found in imports(name) if not found.ours} - allowed
    assert not foreign, f"{name} may not use {sorted(foreign)}"


@pytest.mark.parametrize("name", EVERY)
def test_no_module_imports_itself_in_a_circle(name: str) -> None:
    chains = {
        tuple(reachable(found.name, ("load",))[name])
        for found in imports(name)
        if found.ours and found.when == "load" and name in reachable(found.name, ("load",))
    }
    assert not chains


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith("suite.")])
def test_the_suite_is_written_with_the_public_names_only(name: str) -> None:
    assert {found.source for found in imports(name) if found.ours} <= {"pytest_lora"}


def test_pytest_is_known_only_from_the_fifth_floor_up() -> None:
    knowing = {name for name in EVERY if any(found.name == "pytest" for found in imports(name))}
    assert {room_of(name).floor for name in knowing} == {5, 6}


@pytest.mark.parametrize("name", [name for name in FILE_TIER if name in modules()])
def test_what_reads_files_loads_no_model_library(name: str) -> None:
    """Neither when loaded nor, for the checks themselves, when called."""
    lazily = name.startswith("checks") or name == "adapter"
    whens = ("load", "call") if lazily else ("load",)
    heavy = {
        found.name: " > ".join(chain)
        for module, chain in reachable(name, whens).items()
        for found in imports(module)
        if not found.ours and found.when in whens
        if found.name not in sys.stdlib_module_names | {"safetensors", "huggingface_hub"}
    }
    assert not heavy


@pytest.mark.parametrize("name", IMPORT_FREE)
def test_packages_that_import_nothing(name: str) -> None:
    assert not [found for found in imports(name) if found.name != "__future__"]


def test_importing_the_package_loads_only_the_standard_library() -> None:
    assert {found.name for found in imports("") if found.when != "type"} == {
        "__future__",
        "importlib",
        "typing",
    }


def test_every_public_name_is_where_the_package_says() -> None:
    typed = {found.name for found in imports("") if found.when == "type" and found.ours}
    assert typed <= set(pytest_lora._HOMES.values())
    for name, home in pytest_lora._HOMES.items():
        tree = ast.parse(modules()[home].read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if hasattr(node, "name")}
        passed_on = {
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert name in defined | passed_on, f"{home} lacks {name}"


def test_no_entry_of_the_table_is_dead() -> None:
    planned = {"stats", "tasks", "baseline"}
    here = set(modules())
    dead = {room for room in ROOMS if room not in here and room not in planned}
    assert not dead


SAMPLE = """
from typing import TYPE_CHECKING
import torch
if TYPE_CHECKING:
    import numpy
else:
    import peft
def f():
    import pytest
    from pytest_lora import records, assert_adapter_files
class C:
    from pytest_lora.plugin import RUN
"""


def test_the_reader_of_imports_sees_them_all() -> None:
    seen = {(found.name, found.when) for found in _walk(ast.parse(SAMPLE), "load", "sample")}
    assert seen == {
        ("typing", "load"),
        ("torch", "load"),
        ("numpy", "type"),
        ("peft", "load"),
        ("pytest", "call"),
        ("records", "call"),
        ("assertions", "call"),
        ("plugin", "load"),
    }
