"""From what the user wrote after ``--lora-adapter`` to adapter directories.

A directory, a glob, a training output folder with its checkpoints, a weights file beside its
configuration, or a hub id ``org/name[/subfolder][@revision]``.  What exists locally always wins
over the hub.  Nothing is opened here, let alone loaded.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_lora.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "PICKLE_NAME",
    "WEIGHTS_NAME",
    "AdapterLocation",
    "is_there",
    "locate_adapters",
    "locate_all",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PICKLE_NAME = "adapter_model.bin"

_WEIGHTS = (WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME, "pytorch_lora_weights.safetensors")
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?P<subfolder>(?:/[^/@\s]+)*)/?(?:@(?P<revision>[^\s]+))?"
)
_TEXTS = (".json", ".txt", ".model", ".jinja", ".md")


@dataclass(frozen=True, slots=True)
class AdapterLocation:
    """One adapter to judge.

    Attributes:
        path: its directory.
        weights: the weights file, where the user named one other than the usual.
        name: what it is called in reports; unique within a run.
        source: hub id (and subfolder) it came from; None for a local one.
        revision: commit the hub files are of; None for a local one.
        listed: names of files the hub repository holds but that were not fetched.
    """

    path: Path
    weights: Path | None
    name: str
    source: str | None = None
    revision: str | None = None
    listed: tuple[str, ...] = ()

    @classmethod
    def at(cls, path: Path, *, start: Path | None = None) -> AdapterLocation:
        """The location of a directory or weights file that the caller knows to be an adapter."""
        return _location(path, start or Path.cwd())


def locate_all(specs: Iterable[str], *, start: Path) -> tuple[AdapterLocation, ...]:
    """Every adapter the ``specs`` name, each once, under names that tell them apart.

    Raises:
        UsageError: one of ``specs`` names no adapter.
    """
    found: dict[tuple[str, str], AdapterLocation] = {}
    for spec in specs:
        for location in locate_adapters(spec, start=start):
            key = (os.path.realpath(location.path), os.path.realpath(location.weights or ""))
            found.setdefault(key, location)
    return _with_distinct_names(tuple(found.values()))


def locate_adapters(spec: str, *, start: Path) -> list[AdapterLocation]:
    """The adapters one ``spec`` names; relative paths count from ``start``.

    Raises:
        UsageError: it names none; the message says what was looked for.
    """
    if not spec.strip():
        raise UsageError("an empty adapter path was given")
    path = start / Path(spec).expanduser()
    if is_there(path):
        return _at_path(path, start)
    if glob.has_magic(spec):
        return _at_glob(str(path), spec, start)
    match = _HUB.fullmatch(spec)
    if match:
        return [_on_hub(spec, match, start)]
    raise UsageError(
        f"no adapter at {spec!r}: nothing exists at {path}, "
        "and it is no hub id of the form org/name[/subfolder][@revision]"
    )


def is_there(path: Path) -> bool:
    """Whether something is at ``path``, a link that leads nowhere included."""
    try:
        return path.is_symlink() or path.exists()
    except (OSError, ValueError):  # too long a name, a null byte
        return False


def _at_path(path: Path, start: Path) -> list[AdapterLocation]:
    if path.is_dir():
        return _in_directory(path, start)
    if path.name == CONFIG_NAME:
        return _in_directory(path.parent, start)
    if not path.exists():
        raise UsageError(f"no adapter at {path}: a symbolic link that leads nowhere")
    if path.suffix in _WEIGHTS_SUFFIXES:
        return [_location(path, start)]
    raise UsageError(
        f"no adapter at {path}: give its directory, its {CONFIG_NAME} or its weights file"
    )


def _in_directory(folder: Path, start: Path) -> list[AdapterLocation]:
    found = [folder] if _is_adapter(folder) else []
    found += sorted((sub for sub in _subfolders(folder) if _is_checkpoint(sub)), key=_natural_order)
    if not found and any(is_there(folder / name) for name in _WEIGHTS):
        found = [folder]  # an adapter that lost its configuration is for the file check to fail
    if not found:
        raise UsageError(_nothing_in(folder))
    return [_location(path, start) for path in found]


def _is_adapter(folder: Path) -> bool:
    return is_there(folder / CONFIG_NAME)


def _is_checkpoint(folder: Path) -> bool:
    return folder.name.startswith("checkpoint-") and _is_adapter(folder)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if entry.is_dir()]
    except OSError as error:
        raise UsageError(f"no adapter at {folder}: {error.strerror or error}") from error


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """``checkpoint-9`` before ``checkpoint-10``."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", path.name)
    ]


def _nothing_in(folder: Path) -> str:
    message = (
        f"no adapter in {folder}: neither {CONFIG_NAME} nor {WEIGHTS_NAME} there, "
        f"nor checkpoint-*/{CONFIG_NAME}"
    )
    nested = sorted(sub.name for sub in _subfolders(folder) if _is_adapter(sub))
    if nested:
        message += f"; there is one in its folder {nested[0]!r}, give {folder / nested[0]}"
    return message


def _at_glob(pattern: str, spec: str, start: Path) -> list[AdapterLocation]:
    found: list[AdapterLocation] = []
    matches = sorted((Path(match) for match in glob.glob(pattern, recursive=True)), key=_by_parts)
    for path in matches:
        try:
            found += _at_path(path, start)
        except UsageError:
            continue  # a glob may well match other things too
    if not found:
        raise UsageError(
            f"no adapter at {spec!r}: the pattern matches {len(matches)} paths below {start}, "
            f"none of them a directory with {CONFIG_NAME} or a weights file"
        )
    return found


def _by_parts(path: Path) -> list[list[tuple[int, str]]]:
    return [_natural_order(Path(part)) for part in path.parts]


def _location(path: Path, start: Path) -> AdapterLocation:
    """The location of a directory, or of a weights file within its directory."""
    path = Path(os.path.abspath(path))
    if path.is_dir() or path.suffix not in _WEIGHTS_SUFFIXES:
        return AdapterLocation(path, None, _display_name(path, start))
    usual = path.name in (WEIGHTS_NAME, PICKLE_NAME)
    shown = path.parent if usual else path
    return AdapterLocation(path.parent, None if usual else path, _display_name(shown, start))


def _display_name(path: Path, start: Path) -> str:
    base = Path(os.path.abspath(start))
    if path == base:
        return path.name or "adapter"
    if path.is_relative_to(base):
        return path.relative_to(base).as_posix()
    return _last(path, 2)


def _last(path: Path, count: int) -> str:
    parts = path.parts[1:] if path.anchor else path.parts
    return "/".join(parts[-count:]) or "adapter"


def _with_distinct_names(locations: Sequence[AdapterLocation]) -> tuple[AdapterLocation, ...]:
    """Where two share a name, lengthen both by parent folders until they differ."""
    counts = Counter(location.name for location in locations)
    return tuple(
        replace(location, name=_longer_name(location, locations))
        if counts[location.name] > 1
        else location
        for location in locations
    )


def _longer_name(location: AdapterLocation, others: Sequence[AdapterLocation]) -> str:
    if location.source is not None:
        return f"{location.source}@{location.revision}"
    own = location.weights or location.path
    rivals = [
        other.weights or other.path
        for other in others
        if other is not location and other.name == location.name
    ]
    for count in range(3, len(own.parts)):
        name = _last(own, count)
        if all(_last(rival, count) != name for rival in rivals):
            return name
    return own.as_posix()


def _on_hub(spec: str, match: re.Match[str], start: Path) -> AdapterLocation:
    """The adapter in a hub repository, from the cache or fetched into it."""
    repo, subfolder = match["repo"], match["subfolder"].strip("/")
    folder, listed = _fetch(spec, repo, subfolder, match["revision"], start)
    path = folder / subfolder
    if not (_is_adapter(path) or any(is_there(path / name) for name in _WEIGHTS)):
        raise UsageError(_nothing_on_hub(spec, path, listed))
    source = f"{repo}/{subfolder}" if subfolder else repo
    outside = tuple(name for name in listed if not is_there(folder / name))
    return AdapterLocation(path, None, spec.rstrip("/"), source, folder.name, outside)


def _fetch(
    spec: str, repo: str, subfolder: str, revision: str | None, start: Path
) -> tuple[Path, tuple[str, ...]]:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise UsageError(
            f"no adapter at {spec!r}: nothing exists at {start / spec}, and reading hub ids needs "
            "huggingface_hub: pip install 'pytest-lora[hub]'"
        ) from error
    try:
        if constants.HF_HUB_OFFLINE:
            names: list[str] = []
        else:
            names = huggingface_hub.list_repo_files(repo, revision=revision)
        wanted = _wanted(names, subfolder)
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in wanted],
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    except Exception as error:  # the hub client raises whatever its transport raises
        raise UsageError(_hub_failure(spec, repo, subfolder, revision, error, start)) from error
    return Path(folder), tuple(sorted(names))


def _wanted(names: Sequence[str], subfolder: str) -> list[str]:
    """Of a repository's files those that are worth fetching: never code, never a pickle."""
    here = [name for name in names if os.path.dirname(name) == subfolder]
    weights = [name for name in here if name.endswith(".safetensors")]
    adapters = [name for name in weights if os.path.basename(name).startswith("adapter_model")]
    return (adapters or weights) + [name for name in here if name.endswith(_TEXTS)]


def _hub_failure(
    spec: str, repo: str, subfolder: str, revision: str | None, error: Exception, start: Path
) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    command = f"hf download {repo}"
    command += f" --revision {revision}" if revision else ""
    command += f' --include "{subfolder + "/" if subfolder else ""}*"'
    return (
        f"no adapter at {spec!r}: nothing exists at {start / spec}, and the hub's copy could not "
        f"be had ({type(error).__name__}: {reason}); to fill the cache: {command}"
    )


def _nothing_on_hub(spec: str, path: Path, listed: Sequence[str]) -> str:
    folders = sorted(
        os.path.dirname(name) for name in listed if os.path.basename(name) == CONFIG_NAME
    )
    message = f"no adapter at {spec!r}: no {CONFIG_NAME} in {path}"
    return f"{message}; the repository has one in {', '.join(folders)}" if folders else message
