"""The console script ``pytest-lora``: what is useful outside of a test run, and a short way in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.memory_command import add_options, predict_memory_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 4 for a wrong request.

    ``predict-memory`` has one more, 3: too close to call.
    """
    parser = _parser()
    given, further = parser.parse_known_args(arguments)
    if further and given.command != "check":
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    # A name that this terminal cannot show must not end in a traceback.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if given.command == "check":
            return _check(given.adapter, further)
        if given.command == "predict-memory":
            return predict_memory_command(given)
        return _inspect(given.adapter) if given.command == "inspect" else _compare(given)
    except (CannotRun, UsageError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return int(pytest.ExitCode.USAGE_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pytest-lora", description="Tests of LoRA adapters.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="run the suite; further options go to pytest")
    inspect = commands.add_parser("inspect", help="say what the files of an adapter tell")
    for command in (check, inspect):
        command.add_argument("adapter", nargs="+", help="as --lora-adapter takes it")
    compare = commands.add_parser(
        "compare", help="say what changed between two JSON reports; exit 1 if anything got worse"
    )
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument(
        "--across", action="append", default=[], metavar="FIELD", help="a field that may differ"
    )
    compare.add_argument(
        "--error-rate",
        type=float,
        default=0.001,
        metavar="P",
        help="chance that items compared in pairs call anything worse that is not (default: 0.001)",
    )
    predict = commands.add_parser(
        "predict-memory",
        help="say whether a training step, inference, a load or a merge fits a GPU, without one",
        description="Exit status: 0 it fits, 1 it does not, 3 too close to call, 4 not to be said.",
    )
    add_options(predict)
    return parser


def _check(adapters: Sequence[str], further: Sequence[str]) -> int:
    named = dict.fromkeys(_folder(adapter) for adapter in adapters)
    words = [f"--lora-adapter={adapter}" for adapter in named]
    return int(pytest.main(["-m", "lora", *words, *further]))


def _folder(adapter: str) -> str:
    """The adapter of a file in it: pre-commit names the files that were changed."""
    path = Path(adapter)
    inside = path.name.startswith(("adapter_config.", "adapter_model")) and path.is_file()
    return str(path.parent) if inside else adapter


def _inspect(specs: Sequence[str]) -> int:
    from pytest_lora.adapter import read_adapter
    from pytest_lora.inspection import describe
    from pytest_lora.locate import locate_all

    for location in locate_all(specs, start=Path.cwd()):
        print(describe(read_adapter(location)))
    return 0


def _compare(given: argparse.Namespace) -> int:
    from pytest_lora.comparison import compare_reports, table_of

    changes = compare_reports(
        given.before, given.after, across=given.across, error_rate=given.error_rate
    )
    print(table_of(changes))
    return int(any(change.regression for change in changes))
