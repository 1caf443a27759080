"""Makes ``--lora-adapter PATH`` mean ``--lora-adapter=PATH`` before pytest reads its arguments.

While pytest looks for its root directory and configuration it does not know plugin options yet,
so it takes the PATH after a space for a test path.  The project's own configuration is then
ignored without a word, and a ``pytest.ini`` inside the adapter is obeyed: with
``addopts = -p x`` and ``pythonpath = .`` it runs the adapter's code before any installed plugin
is even loaded (pytest 9.1 and later).  No plugin hook comes early enough to stop that, so one line
in ``pytest_lora_argv.pth`` calls :func:`repair` when Python starts, and only if the command line
holds that very spelling.

Standard library only, and as little of it as possible: this may run in any Python process.
"""

from __future__ import annotations

import os
import sys

__all__ = ["CONFIGS", "join_values", "repair"]

_OPTIONS = ("--lora-adapter",)
CONFIGS = (
    "pytest.toml",
    ".pytest.toml",
    "pytest.ini",
    ".pytest.ini",
    "pyproject.toml",
    "tox.ini",
    "setup.cfg",
)
_PROGRAMS = ("pytest", "py.test", "pytest.exe", "py.test.exe")


def join_values(arguments: list[str]) -> list[str]:
    """``arguments`` with ``--lora-adapter PATH`` written ``--lora-adapter=PATH``.

    A value that looks like an option stays apart: argparse would not take it as a value either.
    """
    joined: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*joined, argument, *rest]
        if argument not in _OPTIONS:
            joined.append(argument)
            continue
        value = next(rest, None)
        if value is None:
            joined.append(argument)
        elif value.startswith("-"):
            joined += [argument, value]
        else:
            joined.append(f"{argument}={value}")
    return joined


def shield(arguments: list[str]) -> list[str]:
    """Arguments that keep pytest from configuring itself from an adapter we are inside of.

    Empty unless the current directory lies in an adapter's folder that holds pytest configuration.
    The plugin then stops the run with an explanation; all that matters here is that nothing of the
    adapter is obeyed before it can.
    """
    here = os.path.realpath(os.curdir)
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option in _OPTIONS and os.path.isdir(value) and _configures(value, here):
            return [f"--rootdir={here}", "-c", os.devnull]
    return []


def _configures(adapter: str, here: str) -> bool:
    root = os.path.realpath(adapter)
    if here != root and not here.startswith(root + os.sep):
        return False
    levels = [here]
    while levels[-1] != root:
        levels.append(os.path.dirname(levels[-1]))
    return any(os.path.exists(os.path.join(level, name)) for level in levels for name in CONFIGS)


def repair() -> None:
    """Rewrite ``sys.argv`` in place, if it is pytest that is being started."""
    words = getattr(sys, "orig_argv", sys.argv)
    if any(os.path.basename(word) in _PROGRAMS for word in words):
        joined = join_values(sys.argv[1:])
        sys.argv[1:] = [*shield(joined), *joined]
    # Leave no module behind: pytest has to import the package itself, to rewrite its assertions.
    for name in (__name__, __name__.rpartition(".")[0]):
        sys.modules.pop(name, None)
