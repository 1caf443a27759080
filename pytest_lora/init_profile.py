"""A first profile for the adapters at hand: what ``--lora-init`` writes.

What the adapter's files tell is filled in; what only its owner knows (the texts, the bounds) stands
there commented out, ready to be filled in.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pytest_lora.adapter import Adapter
from pytest_lora.atomic import usual_mode
from pytest_lora.errors import UsageError

__all__ = ["SCHEMA_URL", "profile_text", "write_profile"]

SCHEMA_URL = (
    "https://raw.githubusercontent.com/pytest-lora/pytest-lora/main/pytest_lora/lora.schema.json"
)

_HEAD = f"""\
#:schema {SCHEMA_URL}
# What an adapter has to keep before it ships. `pytest --lora-adapter=PATH` reads this file from
# the project's root directory; docs/settings.md explains every key.

# A source domain: text the base model is good at and must stay good at, held out from all training.
# [sources.general]
# path = "data/general.jsonl"        # .txt, .jsonl, .parquet or a saved dataset
# max_drift = "0.05 nats"            # per token; or "5%" of the perplexity

# A target task: what the adapter was trained for.
# [tasks.arithmetic]
# path = "data/arithmetic.jsonl"     # prompt and answer, or a known format (docs/tasks.md)
# min_accuracy = "80%"               # or relative to the base model, as in "base + 10%"

# Settings of every adapter.
# [defaults]
# dtype = "bfloat16"
# target = ["vllm:max_lora_rank=64"] # servers that have to take it, at the right scale
"""


def profile_text(adapters: Iterable[Adapter]) -> str:
    """The profile: TOML, valid as it is and with every commented key uncommented."""
    return "\n".join([_HEAD, *(_section(adapter) for adapter in adapters)])


def _section(adapter: Adapter) -> str:
    lines = [f"# {_words(adapter)}", f"[adapters.{_quoted(adapter.name)}]"]
    if adapter.peft_type == "LORA":
        divisor = math.sqrt(adapter.r) if adapter.use_rslora else adapter.r
        scaling = adapter.lora_alpha / divisor if divisor else math.nan
        if math.isfinite(scaling):
            lines.append(f"scaling = {scaling!r}  # as its configuration has it: kept from now on")
    if adapter.base_model:
        lines.append(f"# base_model = {_quoted(adapter.base_model)}")
    return "\n".join(lines) + "\n"


def _words(adapter: Adapter) -> str:
    rank = f", r={adapter.r}" if adapter.r else ""
    base = adapter.base_model or "no named base model"
    return _one_line(f"{adapter.peft_type or 'unknown type'}{rank}, on {base}")


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _quoted(text: str) -> str:
    """A TOML basic string; names are the adapter author's to choose."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(_escape(char) for char in escaped) + '"'


def _escape(char: str) -> str:
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def write_profile(path: Path, adapters: Iterable[Adapter]) -> None:
    """Write a new profile, whole or not at all.

    Raises:
        UsageError: there is a file already, which is never overwritten, or it cannot be written.
    """
    text = profile_text(adapters)
    if path.exists():
        raise UsageError(f"{path}: is there already; remove it, or add to it by hand")
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, usual_mode())  # not for its writer's eyes alone
        os.link(temporary, path)  # unlike a rename, fails where somebody was faster
    except OSError as error:
        raise UsageError(f"{path}: cannot write the profile: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
