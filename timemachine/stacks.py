"""Releases of PEFT and transformers side by side, and Python processes that see one pair of them.

Each release lies in a folder of its own, with none of its dependencies, and is put before the
environment's own packages by PYTHONPATH.  torch and everything else are the environment's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NEWEST", "Stack", "install", "run", "stream", "version_key"]

ROOT = Path(__file__).parents[1]

NEWEST, NEWEST_TRANSFORMERS = "0.21.2", "5.23.0"
"""What the environment itself has to hold."""

_HTTP = ("requests==2.34.2", "urllib3==2.8.0", "idna==3.20", "certifi", "charset-normalizer")
_WITH_TRANSFORMERS: Mapping[str, Sequence[str]] = {
    "4.49.0": ("tokenizers==0.21.4", "huggingface_hub==0.30.2", "accelerate==1.5.2", *_HTTP),
    "4.50.3": ("tokenizers==0.21.4", "huggingface_hub==0.30.2", "accelerate==1.5.2", *_HTTP),
    "4.57.6": ("tokenizers==0.22.2", "huggingface_hub==0.36.2", "accelerate==1.5.2", *_HTTP),
}
"""What else each release needs of its own time; the environment fits the newest."""


@dataclass(frozen=True)
class Stack:
    """A release of PEFT with a release of transformers of its time, or with another one."""

    peft: str
    other: str = ""

    @classmethod
    def parse(cls, text: str) -> Stack:
        """From "PEFT" or "PEFT/transformers"."""
        peft, _, other = text.partition("/")
        return cls(peft, other)

    @property
    def transformers(self) -> str:
        """The release it runs with: PEFT up to 0.17 needs an old one, 0.21.2 takes the newest."""
        if self.other:
            return self.other
        if self.peft == NEWEST:
            return NEWEST_TRANSFORMERS
        return "4.49.0" if version_key(self.peft) < (0, 17) else "4.57.6"

    def __str__(self) -> str:
        return f"peft {self.peft}, transformers {self.transformers}"

    @property
    def name(self) -> str:
        """What files about it are called."""
        return f"peft-{self.peft}-transformers-{self.transformers}"

    def folders(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Names of the folders it takes, and the requirements that fill them."""
        if self.peft != NEWEST:
            yield f"peft-{self.peft}", (f"peft=={self.peft}",)
        if self.transformers == NEWEST_TRANSFORMERS:
            return
        name = f"transformers-{self.transformers}"
        yield name, (name.replace("-", "=="), *_WITH_TRANSFORMERS[self.transformers])


def version_key(version: str) -> tuple[int, ...]:
    """The numbers of a release, to compare it with others; suffixes do not count."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def install(stacks: Iterable[Stack], folder: Path) -> None:
    """Fill ``folder`` with the releases that ``stacks`` are made of and that are not there yet."""
    wanted = {name: what for stack in stacks for name, what in stack.folders()}
    for name, requirements in sorted(wanted.items()):
        if not (folder / name).is_dir():
            _install(requirements, folder / name)


def _install(requirements: Sequence[str], target: Path) -> None:
    part = target.with_name(f"{target.name}.part")  # a broken download is no release
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile",
         "--upgrade", "--target", str(part), *requirements],
        check=True,
    )  # fmt: skip
    part.rename(target)


def run(stack: Stack, folder: Path, *arguments: str) -> str:
    """What ``python -m timemachine`` with these arguments prints under ``stack``.

    Raises:
        subprocess.CalledProcessError: it failed; its stderr went to ours.
    """
    return "".join(stream(stack, folder, *arguments))


def stream(stack: Stack, folder: Path, *arguments: str) -> Iterator[str]:
    """Likewise, line by line, as they are printed."""
    command = [sys.executable, "-P", "-m", "timemachine", *arguments]
    with subprocess.Popen(
        command, env=_environment(stack, folder), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _environment(stack: Stack, folder: Path) -> dict[str, str]:
    paths = [str(folder / name) for name, _ in stack.folders()]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
        "PYTHONHASHSEED": "0",  # faults that depend on it come and go otherwise
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
