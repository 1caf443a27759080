"""``pytest-lora predict-memory``: will it fit, from configurations alone, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.errors import UsageError
from pytest_lora.names import meant
from pytest_lora.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from pytest_lora.memory.records import MemoryPrediction

__all__ = ["FITS_NOT", "TOO_CLOSE", "add_options", "predict_memory_command"]

FITS_NOT, TOO_CLOSE = 1, 3
"""Exit statuses: something does not fit; nothing does not, but something is too close to call."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a prediction can be asked; the names are those of ``predict_memory``."""
    parser.add_argument("model", help="folder of a model (its config.json is enough), or a hub id")
    adapter = parser.add_mutually_exclusive_group()
    adapter.add_argument("--adapter", type=Path, metavar="FOLDER", help="an adapter's folder")
    adapter.add_argument("--rank", type=int, metavar="R", help="a LoRA of that rank")
    parser.add_argument("--targets", default="all-linear", metavar="NAMES",
                        help="modules of --rank, by comma (default: all-linear)")  # fmt: skip
    parser.add_argument("--dora", action="store_true", help="with --rank: DoRA")
    parser.add_argument("--job", default="train_step",
                        choices=("train_step", "inference", "load", "merge"))  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="ROWS",
                        help="of a batch; several make several lines (default: 1)")  # fmt: skip
    parser.add_argument("--sequence", type=int, default=1024, metavar="TOKENS",
                        help="tokens of a row (default: 1024)")  # fmt: skip
    parser.add_argument("--new-tokens", type=int, default=0, metavar="TOKENS",
                        help="of inference: tokens to generate (default: one pass)")  # fmt: skip
    for name, default in (("dtype", "bfloat16"), ("adapter-dtype", "auto"), ("attention", "sdpa"),
                          ("optimizer", "adamw"), ("padding", "padded"), ("autocast", ""),
                          ("checkpointing", ""), ("quantisation", "")):  # fmt: skip
        shown = default or "none"
        parser.add_argument(f"--{name}", default=default, help=f"(default: {shown})")
    parser.add_argument("--accumulation", type=int, default=1, metavar="BATCHES")
    parser.add_argument("--card", default="h100-80gb", help="name or class, such as 24gb")
    parser.add_argument("--max-memory", metavar="SIZE", help="ceiling (default: what the card has)")


def predict_memory_command(given: argparse.Namespace) -> int:
    """Predict, print, and say by the exit status whether it fits.

    Raises:
        CannotRun: it cannot be predicted; the message names what.
        UsageError: an option cannot be meant.
    """
    ceiling = parse_bytes(given.max_memory) if given.max_memory else None
    found = [(batch, _predict(given, batch)) for batch in given.batch]
    for line in _table(given, found, ceiling):
        print(line)
    fits = {prediction.fit(ceiling).name for _, prediction in found}
    return FITS_NOT if "DOES_NOT_FIT" in fits else TOO_CLOSE if "TOO_CLOSE" in fits else 0


def _require_targets(given: argparse.Namespace, names: list[str]) -> None:
    """Every name of ``--targets`` is a module's: PEFT is content if one of them is, and a name that
    was mistyped would make the prediction smaller, without a word.
    """
    from pytest_lora.memory.predict import make_workload
    from pytest_lora.memory.workload import make_base

    workload = make_workload(given.model, None, dtype=given.dtype, batch=1, sequence=1)
    there = [name for name, _ in make_base(workload, "meta").named_modules()]
    known = sorted({name.rpartition(".")[2] for name in there if not name[-1:].isdigit()} - {""})
    for wanted in names:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in there):
            raise UsageError(f"--targets: the model has no module {wanted!r}{meant(wanted, known)}")


def _predict(given: argparse.Namespace, batch: int) -> MemoryPrediction:
    from pytest_lora.loading import quiet
    from pytest_lora.memory.predict import predict_memory

    with quiet():
        return predict_memory(
            given.model,
            _adapter(given),
            job=given.job,
            batch=batch,
            sequence=given.sequence,
            new_tokens=given.new_tokens,
            dtype=given.dtype,
            adapter_dtype=given.adapter_dtype,
            autocast=given.autocast,
            attention=given.attention,
            checkpointing=given.checkpointing,
            quantisation=given.quantisation,
            optimizer=given.optimizer,
            padding=given.padding,
            accumulation=given.accumulation,
            profile=given.card,
        )


def _adapter(given: argparse.Namespace) -> Any:
    """The adapter's folder, a LoRA of the rank given, or None for training everything."""
    if given.rank is None:
        if given.dora or given.targets != "all-linear":
            raise UsageError("--targets and --dora describe the adapter of --rank: give --rank")
        return given.adapter
    from peft import LoraConfig

    if given.rank < 1:
        raise UsageError(f"--rank {given.rank} is not a positive whole number")
    names = [name.strip() for name in given.targets.split(",") if name.strip()]
    targets = "all-linear" if names == ["all-linear"] else names
    if targets != "all-linear":
        _require_targets(given, names)
    return LoraConfig(r=given.rank, target_modules=targets, use_dora=given.dora)


def _table(
    given: argparse.Namespace, found: list[tuple[int, MemoryPrediction]], ceiling: int | None
) -> Iterator[str]:
    last = found[-1][1]
    limit = last.usable if ceiling is None else ceiling
    whose = f"what the {last.profile} has" if ceiling is None else "the ceiling given"
    work = given.job.replace("_", " ")
    yield f"{work} of {given.model} on {last.profile}, against {format_bytes(limit)}, {whose}"
    yield ""
    yield "| rows | predicted | with margin | verdict |"
    yield "| --: | --: | --: | --- |"
    for batch, one in found:
        sizes = f"{format_bytes(one.predicted)} | {format_bytes(one.at_most)}"
        yield f"| {batch} | {sizes} | {one.fit(ceiling)} |"
    yield ""
    yield from last.lines()
    if str(last.fit(ceiling)) != "fits":
        from pytest_lora.memory.advice import advice

        yield from (f"what helps: {line}" for line in advice(last.peak, last.request)[:3])
