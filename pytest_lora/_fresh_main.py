"""The first file of a fresh process; run by its path, never imported by the package.

``python -P _fresh_main.py HOME [--job DIRECTORY] [--path DIRECTORY]...``

Without ``--job`` it imports the libraries once and then serves jobs from standard input, each in a
fork of its own: a process that has never seen a model, ready in milliseconds.  A parent that is
done with it kills it.  When its input ends instead, the parent is gone: then it ends as well,
whatever it is doing, and removes HOME, which the parent can no longer do; a HOME without the mark
that the parent left in its own is refused at the start, so that a wrong path removes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_OURS = ".pytest-lora-scratch"  # as in fresh.py


def main() -> None:
    """Import, report what was imported, work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--job", type=Path)
    parser.add_argument("--path", action="append", default=[])
    options = parser.parse_args()
    if not (options.home / _OURS).is_file():
        parser.error(f"{options.home} is not a directory that pytest-lora made for itself")
    read, write = _take_over_streams()
    # Behind everything else, so that nothing there can stand in for a standard module.
    sys.path += [entry for entry in options.path if entry not in sys.path]
    libraries = _import_libraries()
    if options.job:
        threading.Thread(target=_watch, args=(read, options.home), daemon=True).start()
        (options.job / "libraries.json").write_text(json.dumps(libraries), encoding="utf-8")
        _perform(options.job)
    else:
        # A fork's collections would touch, and so copy, every page of what is imported here.
        gc.collect()
        gc.freeze()
        _serve(read, write, options.home, libraries)


def _serve(read: int, write: int, home: Path, libraries: dict[str, str]) -> None:
    _say(write, libraries)
    for line in _lines(read):
        status = _in_child(Path(line.decode()), read, write)
        if status is None:
            break
        _say(write, status)
    shutil.rmtree(home, ignore_errors=True)


def _watch(read: int, home: Path) -> None:
    """End this process when its input does."""
    if not os.read(read, 1):
        shutil.rmtree(home, ignore_errors=True)
    os._exit(1)


def _perform(job: Path) -> None:
    from pytest_lora._fresh_job import perform

    perform(job)


def _take_over_streams() -> tuple[int, int]:
    """Keep the two pipes to ourselves: what libraries print goes to stderr, they read nothing."""
    read, write = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return read, write


def _import_libraries() -> dict[str, str]:
    import peft
    import safetensors.torch
    import torch
    import transformers

    # Reached lazily otherwise, once per job.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    with contextlib.suppress(Exception):  # a thousand regular expressions; older releases have none
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")

    import pytest_lora
    import pytest_lora._fresh_job

    modules = (torch, transformers, peft, safetensors, pytest_lora)
    return {module.__name__: str(module.__file__) for module in modules}


def _say(write: int, what: object) -> None:
    # The record separator tells this line from what a start-up file may have printed before it.
    os.write(write, f"\x1e{json.dumps(what)}\n".encode())


def _lines(read: int) -> Iterator[bytes]:
    buffer = b""
    while chunk := os.read(read, 65536):
        buffer += chunk
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            yield line


def _in_child(job: Path, parent: int, write: int) -> int | None:
    """Exit status of a forked process that does ``job``; None if the parent went away."""
    alive, held = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - ends without a chance to write down what it covered
        status = 1
        try:
            _die_with_the_server()
            os.close(write)  # the parent sees the end of it when the server dies
            _perform(job)
            status = 0
        except BaseException:  # nothing may get back into the server's loop
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(held)  # the child's copy is the last one, so `alive` reports its end
    ready, _, _ = select.select([alive, parent], [], [])
    orphaned = alive not in ready
    if orphaned:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(alive)
    return None if orphaned else os.waitstatus_to_exitcode(status)


def _die_with_the_server() -> None:  # pragma: no cover - in the fork only
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
