"""The folder: complete, readable, and free of anything that could run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_lora.checks.adapter_config import Findings, inspect_config
from pytest_lora.checks.finite import measure_finite_weights
from pytest_lora.errors import UsageError
from pytest_lora.installed import installed_version
from pytest_lora.locate import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from pytest_lora.records import Measurement, Problem
from pytest_lora.safetensors_header import CONVERT, sniff

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_lora.adapter import Adapter

__all__ = ["measure_adapter_files", "measure_finite_weights"]

_MAX_ENTRIES = 10_000
_CODE = (".py", ".pyc", ".pyo", ".pyd", ".pyw", ".so", ".dll", ".dylib", ".egg", ".whl")
_SETTINGS = {
    "pytest.ini",
    ".pytest.ini",
    "pytest.toml",
    ".pytest.toml",
    "pyproject.toml",
    "tox.ini",
    "setup.cfg",
}
_PICKLED_WEIGHTS = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_SKIPPED = {".git", "wandb"}


def measure_adapter_files(
    adapter: Adapter, *, newer_writer: str = "fail", peft_version: str | None = None
) -> Measurement:
    """Count everything wrong with an adapter's folder, configuration and weights file.

    Opens ``adapter_config.json`` and the headers of safetensors files, and lists the folder;
    pickles and code are told by their names and first bytes and never loaded.

    Args:
        adapter: the adapter as :func:`~pytest_lora.adapter.read_adapter` read it.
        newer_writer: ``fail`` or ``note``: what a configuration of a newer PEFT is.
        peft_version: the PEFT to judge by; default the installed one, or the newest one whose
            rules are known where none is installed.

    Returns:
        The number of problems, among files, configuration keys and tensors looked at.

    Raises:
        UsageError: ``newer_writer`` is neither.
    """
    if newer_writer not in ("fail", "note"):
        raise UsageError(f"lora_newer_writer is {newer_writer!r}; give fail or note")
    findings = Findings(list(adapter.problems))
    if all(_is_about_weights(problem) for problem in adapter.problems):
        inspect_config(
            adapter,
            findings,
            newer_writer=newer_writer,
            installed=peft_version or installed_version("peft"),
        )
    files = list(_walk(adapter.path))
    _check_weights(adapter, findings)
    _check_folder(adapter.path, files, findings)
    return Measurement.of_problems(
        findings.problems,
        count=max(1, len(files) + len(adapter.config) + len(adapter.tensors)),
        notes=findings.notes,
        files=len(files),
        tensors=len(adapter.tensors),
        bytes=sum(info.nbytes for info in adapter.tensors.values()),
    )


# -- weights -------------------------------------------------------------------------------------


def _check_weights(adapter: Adapter, findings: Findings) -> None:
    own = {path.name for path in adapter.weights_files}
    chosen = adapter.location.weights
    names = _names(adapter.path) | set(adapter.location.listed)
    if chosen is not None and chosen.suffix != ".safetensors":
        findings.problems.append(_pickle_problem(chosen, "the only weights"))
        return
    if chosen is not None and own:
        findings.notes.append(
            f"the weights were read from {chosen.name}; PEFT itself looks for {WEIGHTS_NAME} only"
        )
    pickles = [name for name in _PICKLED_WEIGHTS if name in names]
    read = bool(own) or any(_is_about_weights(problem) for problem in adapter.problems)
    for name in pickles:
        role = "beside the safetensors weights" if read else "the only weights"
        findings.problems.append(_pickle_problem(adapter.path / name, role))
    if not read and not pickles:
        findings.problems.append(_no_weights(names))
    if own and not adapter.tensors:
        findings.problems.append(Problem(min(own), "holds no tensors", "the adapter's factors"))
    _check_other_weights(names, own, findings)


def _is_about_weights(problem: Problem) -> bool:
    return not problem.where.startswith(CONFIG_NAME)


def _pickle_problem(path: Path, role: str) -> Problem:
    what, fix = sniff(path)
    if "LFS" in what:
        return Problem(path.name, f"{what}, {role}", WEIGHTS_NAME, fix)
    if "safetensors" in role:
        return Problem(
            path.name,
            f"pickled weights {role}: some loaders read them instead, and loading runs their code",
            f"{WEIGHTS_NAME} alone",
            f"delete {path.name}",
        )
    return Problem(
        path.name,
        f"{role} are a pickle, which is never loaded here: loading one runs its code",
        WEIGHTS_NAME,
        CONVERT,
    )


def _no_weights(names: set[str]) -> Problem:
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        return Problem(
            WEIGHTS_NAME,
            f"missing; there is {', '.join(others[:5])}",
            "the adapter's weights under the name PEFT reads",
            "rename the file, or give its path",
        )
    return Problem(
        WEIGHTS_NAME, "missing", "the adapter's weights", "save or copy the adapter again"
    )


def _check_other_weights(names: set[str], own: set[str], findings: Findings) -> None:
    both = WEIGHTS_NAME in names and INDEX_NAME in names
    if both:
        findings.problems.append(
            Problem(
                INDEX_NAME,
                f"beside {WEIGHTS_NAME}: which of the two is meant is anyone's guess",
                "one of them",
                "delete the older",
            )
        )
    elif INDEX_NAME in names:
        findings.notes.append(
            f"the weights are in shards; PeftModel.from_pretrained reads {WEIGHTS_NAME} only"
        )
    others = sorted(name for name in names - own if name.endswith(".safetensors") and own)
    if others and not both:
        findings.notes.append(f"other weights in the folder were not read: {', '.join(others)}")


# -- folder --------------------------------------------------------------------------------------


def _check_folder(root: Path, files: list[str], findings: Findings) -> None:
    for name in files:
        problem = _file_problem(root, name)
        if problem:
            findings.problems.append(problem)
    _note(findings, "pickles, not opened", [name for name in files if _is_spare_pickle(name)])
    _note(findings, "notebooks", [name for name in files if name.endswith(".ipynb")])
    if len(files) >= _MAX_ENTRIES:
        findings.notes.append(f"only the first {_MAX_ENTRIES} files of the folder were looked at")


def _file_problem(root: Path, name: str) -> Problem | None:
    base = name.rpartition("/")[2]
    if base in _SETTINGS or base == "conftest.py":
        return Problem(
            name,
            "configuration that pytest may pick up and run",
            "weights and settings only",
            "move it out of the adapter's folder",
        )
    if base.lower().endswith(_CODE):
        return Problem(
            name,
            "code in the adapter's folder",
            "weights and settings only",
            "move it out of the adapter's folder",
        )
    return _link_problem(root, name)


def _link_problem(root: Path, name: str) -> Problem | None:
    """A link may lead anywhere in the folder, or into the hub cache the folder belongs to."""
    path = root / name
    if not path.is_symlink():
        return None
    real = os.path.realpath(path)
    if not os.path.exists(real):
        return Problem(name, f"a symbolic link to nothing ({os.readlink(path)})", "a file")
    allowed = [os.path.realpath(root), *_blob_folders(root)]
    if any(real.startswith(folder + os.sep) for folder in allowed):
        return None
    return Problem(
        name,
        f"a symbolic link that leaves the folder, to {real}",
        "a file of the adapter's own",
        "copy what it points to",
    )


def _blob_folders(root: Path) -> Iterator[str]:
    for parent in root.parents:
        if parent.name == "snapshots":
            yield os.path.realpath(parent.parent / "blobs")


def _is_spare_pickle(name: str) -> bool:
    return name.endswith(_PICKLES) and name not in _PICKLED_WEIGHTS


def _note(findings: Findings, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        findings.notes.append(f"{what}: {', '.join(names[:8])}{more}")


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _walk(root: Path) -> Iterator[str]:
    """Relative names of the files below ``root``; checkpoints are adapters of their own."""
    seen = 0
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not _is_skipped(name))
        inside = os.path.relpath(folder, root)
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files + links):
            seen += 1
            if seen > _MAX_ENTRIES:
                return
            yield name if inside == "." else f"{inside}/{name}".replace(os.sep, "/")


def _is_skipped(name: str) -> bool:
    return name in _SKIPPED or name.startswith("checkpoint-")
