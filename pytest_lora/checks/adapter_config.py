"""Is ``adapter_config.json`` a configuration PEFT can use, and does PEFT know all of it?"""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from pytest_lora.locate import CONFIG_NAME
from pytest_lora.patterns import PatternError, compile_pattern
from pytest_lora.peft_tables import (
    FOREIGN_KEYS,
    METHODS,
    NEWEST,
    TASK_TYPES,
    key_span,
    minor_version,
)
from pytest_lora.records import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_lora.adapter import Adapter

__all__ = ["Findings", "inspect_config"]

MAX_RANK = 1 << 20
"""Largest believable rank: no layer of any known model is a million wide."""

TRUSTED_LIBRARIES = ("transformers", "peft", "diffusers", "sentence_transformers")
"""Packages ``auto_mapping.parent_library`` may name; PEFT's auto classes import what it names."""


@dataclass(slots=True)
class Findings:
    """Problems and notes as they are found."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, key: str, found: str, expected: str = "", fix: str = "") -> None:
        """Add a problem with the configuration key ``key``."""
        where = f"{CONFIG_NAME}: {key}" if key else CONFIG_NAME
        self.problems.append(Problem(where, found, expected, fix))


def inspect_config(
    adapter: Adapter,
    findings: Findings,
    *,
    newer_writer: str = "fail",
    installed: str | None = None,
) -> None:
    """Add everything wrong and everything worth knowing about the configuration alone.

    Args:
        adapter: the adapter; its configuration must have been readable.
        findings: where to add it.
        newer_writer: ``fail`` or ``note``, what a configuration of a newer PEFT is.
        installed: version of the PEFT that will read it; None judges by the newest known rules.
    """
    if _check_method(adapter.config, findings):
        _check_age(adapter.peft_type, findings, installed)
        _check_values(adapter, findings)
        _check_writer(adapter, findings, newer_writer, installed)
        _check_keys(adapter, findings, installed)
    _check_code(adapter.config, findings)
    _check_base(adapter, findings)


def _check_method(config: Mapping[str, Any], findings: Findings) -> bool:
    """Whether the method is known; without it no other key means anything."""
    method = config.get("peft_type")
    if isinstance(method, str) and method in METHODS:
        return True
    if "peft_type" not in config and {"fine_tune_type", "lora_parameters"} & config.keys():
        findings.fail(
            "", "the configuration of an MLX adapter", "a PEFT configuration", "convert it to PEFT"
        )
    elif "peft_type" not in config:
        findings.fail("peft_type", "missing", "a PEFT method such as LORA", "add the key")
    elif isinstance(method, str) and method.upper() in METHODS:
        findings.fail("peft_type", repr(method), repr(method.upper()), "write it in upper case")
    else:
        newest = ".".join(map(str, NEWEST))
        findings.fail(
            "peft_type", f"{method!r:.60}", f"a method of PEFT up to {newest}, such as LORA"
        )
    return False


def _check_age(method: str, findings: Findings, installed: str | None) -> None:
    """A method may be newer than the PEFT that is to load it, or already gone from it."""
    reader, known = _reader(installed), METHODS[method]
    name = f"PEFT {installed}" if installed else "PEFT {}.{}".format(*reader)
    since, gone = minor_version(known.since), minor_version(known.gone)
    if since and since > reader:
        findings.fail(
            "peft_type",
            f"{method} is known since PEFT {known.since}, not to {name}",
            fix=f"pip install -U 'peft>={known.since}'",
        )
    if gone and gone <= reader:
        findings.fail(
            "peft_type",
            f"{method} is gone since PEFT {known.gone}, and so from {name}",
            fix=f"pip install 'peft<{known.gone}', or convert it (MISS followed BONE)",
        )


# -- values --------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1e300


def _is_dropout(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(test(item) for item in value)


def _is_map_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(test(item) for item in value.values())


def _either(*tests: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(test(value) for test in tests)


_NAMES = _is_list_of(_is_text)
_INTS = _is_list_of(_is_int)
_FLAG = (_is_flag, "true or false")
_NAMES_OR_PATTERN = (_either(_is_text, _NAMES), "a list of module names, or one pattern")
_RANK = (_is_rank, f"an integer from 1 to {MAX_RANK}")
_ALPHA = (_is_alpha, "a finite number above 0")
_DROPOUT = (_is_dropout, "a number from 0 to 1")

_COMMON_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "task_type": (lambda value: value in TASK_TYPES, f"one of {', '.join(TASK_TYPES)}, or null"),
    "base_model_name_or_path": (_is_text, "a hub id or a path"),
    "revision": (_is_text, "a branch, tag or commit"),
    "inference_mode": _FLAG,
    "peft_version": (_is_text, "a version"),
    "target_modules": _NAMES_OR_PATTERN,
    "exclude_modules": _NAMES_OR_PATTERN,
    "modules_to_save": (_NAMES, "a list of module names"),
    "layers_to_transform": (_either(_is_int, _INTS), "a layer index or a list of them"),
    "layers_pattern": (_either(_is_text, _NAMES), "a name or a list of names"),
    "fan_in_fan_out": _FLAG,
}
_LORA_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "lora_dropout": _DROPOUT,
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "use_qalora": _FLAG,
    "ensure_weight_tying": _FLAG,
    "rank_pattern": (_is_map_of(_is_rank), "a map of patterns to ranks"),
    "alpha_pattern": (_is_map_of(_is_alpha), "a map of patterns to numbers above 0"),
    "init_lora_weights": (_either(_is_flag, _is_text), "true, false or a name"),
    "target_parameters": (_NAMES, "a list of parameter names"),
    "trainable_token_indices": (
        _either(_INTS, _is_map_of(_INTS)),
        "a list of token ids, or a map of layer names to such lists",
    ),
    "loftq_config": (lambda value: isinstance(value, dict), "a map"),
}
_VALUES: Mapping[str, Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "LORA": _LORA_VALUES,
    "LOHA": {"r": _RANK, "alpha": _ALPHA},
    "LOKR": {"r": _RANK, "alpha": _ALPHA},
    "VERA": {"r": _RANK, "vera_dropout": _DROPOUT},
    "HIRA": {"r": _RANK},
    "HRA": {"r": _RANK},
}
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "LORA": ("r", "lora_alpha"),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
}
_NEVER_NULL = {"r", "lora_alpha", "alpha", "bias", "rank_pattern", "alpha_pattern"}
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _check_values(adapter: Adapter, findings: Findings) -> None:
    config = adapter.config
    for key in _REQUIRED.get(adapter.peft_type, ()):
        if key not in config:
            findings.fail(
                key, "missing (PEFT would take its default, 8)", "the value used in training"
            )
    rules = {**_COMMON_VALUES, **_VALUES.get(adapter.peft_type, {})}
    for key, (test, expected) in rules.items():
        value = config.get(key)
        if key in config and not test(value) and (value is not None or _must_be_set(key, config)):
            findings.fail(key, f"{_short(value)}", expected)
    _check_patterns(adapter, findings)
    _check_targets(adapter, findings)


def _must_be_set(key: str, config: Mapping[str, Any]) -> bool:
    # Old writers left the patterns null; PEFT takes null for "none" in everything optional.
    return key in _NEVER_NULL and key not in _PATTERNS


def _check_patterns(adapter: Adapter, findings: Findings) -> None:
    """Every regular expression in the configuration must be one."""
    whole = ((key, adapter.config.get(key)) for key in ("target_modules", "exclude_modules"))
    patterns = [(key, value) for key, value in whole if isinstance(value, str)]
    for key in _PATTERNS:
        table = adapter.config.get(key)
        patterns += [(key, pattern) for pattern in table] if isinstance(table, dict) else []
    for key, pattern in patterns:
        try:
            compile_pattern(pattern)
        except PatternError as error:
            findings.fail(key, f"the pattern {pattern:.80} is {error}", "a regular expression")


def _check_targets(adapter: Adapter, findings: Findings) -> None:
    config = adapter.config
    if adapter.peft_type != "LORA":
        return
    if config.get("target_modules") == [] and not config.get("target_parameters"):
        findings.fail("target_modules", "an empty list", "the modules the adapter was trained on")
    layers = config.get("layers_to_transform")
    if isinstance(config.get("target_modules"), str) and layers is not None:
        findings.fail(
            "layers_to_transform",
            "set although target_modules is a pattern (PEFT refuses the pair)",
            "null, or target_modules as a list",
        )


# -- keys and versions ---------------------------------------------------------------------------


def _check_writer(
    adapter: Adapter, findings: Findings, newer_writer: str, installed: str | None
) -> None:
    """A newer PEFT may have written settings that change the arithmetic and are dropped here."""
    written = adapter.config.get("peft_version")
    if not isinstance(written, str):
        return
    writer, reader = minor_version(written), _reader(installed)
    if writer is None:
        findings.notes.append(f"peft_version {written[:40]!r} is no version; it was not compared")
        return
    if writer <= reader:
        return
    known = (
        f"PEFT {installed} installed here"
        if installed
        else f"PEFT {reader[0]}.{reader[1]}, the newest whose rules are known here"
    )
    if newer_writer == "note":
        findings.notes.append(f"written by PEFT {written}, newer than {known}")
        return
    wanted = ".".join(map(str, writer))
    findings.fail(
        "peft_version",
        f"written by PEFT {written}",
        f"at most {known}",
        f"pip install -U 'peft>={wanted}', or set lora_newer_writer = note once you know that "
        "nothing it added matters",
    )


def _reader(installed: str | None) -> tuple[int, int]:
    return (minor_version(installed) if installed else None) or NEWEST


_JUDGED_ELSEWHERE = frozenset({"auto_map", "peft_version"})
"""Keys that have a question of their own: which code could run, and which PEFT wrote them."""


def _check_keys(adapter: Adapter, findings: Findings, installed: str | None) -> None:
    """PEFT drops keys it does not know with a warning; one that is in use changes the result."""
    reader = _reader(installed)
    silent: list[str] = []
    for key, value in adapter.config.items():
        complaint = _why_unread(adapter.peft_type, key, reader, installed)
        if not complaint or key in _JUDGED_ELSEWHERE:
            continue
        if key in FOREIGN_KEYS:
            findings.notes.append(f"{key!r} is a setting of {FOREIGN_KEYS[key]} that PEFT ignores")
        elif _is_idle(adapter.config, key):
            silent.append(repr(key))
        else:
            found, fix = complaint
            findings.fail(key, f"{found}, and it is in use ({_short(value)})", "a known key", fix)
    if silent:
        findings.notes.append(f"keys PEFT will not read, none of them in use: {', '.join(silent)}")


def _is_idle(config: Mapping[str, Any], key: str) -> bool:
    """Whether a key's value asks for nothing."""
    if key == "qalora_group_size":
        return not config.get("use_qalora")
    return key == "runtime_config" or config[key] in (None, False, "", [], {})


def _why_unread(
    method: str, key: str, reader: tuple[int, int], installed: str | None
) -> tuple[str, str] | None:
    """``(what is wrong, what to do)`` about a key that PEFT ``reader`` drops, else None."""
    span = key_span(method, key)
    name = f"PEFT {installed}" if installed else "PEFT {}.{}".format(*reader)
    if span is None:
        if reader > NEWEST and _mentioned_in_peft(key):
            return None
        return (
            f"{name} does not know this key of a {method} configuration and drops it",
            "correct its spelling, remove it, or use the PEFT that wrote it",
        )
    since, until = (minor_version(text) for text in span)
    if since and since > reader:
        return f"known since PEFT {span[0]}, {name} drops it", f"pip install -U 'peft>={span[0]}'"
    if until and until <= reader:
        return f"no longer read since PEFT {span[1]}", "train or convert with a current PEFT"
    return None


def _mentioned_in_peft(key: str) -> bool:
    """Whether the installed PEFT, newer than our table, declares ``key`` as a field somewhere."""
    spec = importlib.util.find_spec("peft")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    declared = re.compile(rf"^    {re.escape(key)}\s*:", re.MULTILINE)
    files = (file for root in roots for file in (root / "config.py", *_tuner_configs(root)))
    return any(declared.search(_source(file)) for file in files)


def _tuner_configs(root: Path) -> Iterator[Path]:
    return root.glob("tuners/**/config.py")


def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


# -- code and base -------------------------------------------------------------------------------


def _check_code(config: Mapping[str, Any], findings: Findings) -> None:
    if config.get("auto_map"):
        findings.fail(
            "auto_map",
            f"names code to import ({_short(config['auto_map'])})",
            "no auto_map",
            "remove the key",
        )
    mapping = config.get("auto_mapping")
    if mapping is None:
        return
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if not isinstance(library, str):
        findings.fail("auto_mapping", _short(mapping), "null, or a class and its library")
    elif library == "__main__":
        findings.notes.append(
            "auto_mapping names a class of the training script itself: load the base model "
            "yourself, AutoPeftModel cannot"
        )
    elif library.split(".")[0] not in TRUSTED_LIBRARIES:
        findings.fail(
            "auto_mapping.parent_library",
            f"{library[:80]!r}, which PEFT's auto classes would import and thereby run",
            f"one of {', '.join(TRUSTED_LIBRARIES)}",
            "set auto_mapping to null (PeftModel.from_pretrained does not need it)",
        )


def _check_base(adapter: Adapter, findings: Findings) -> None:
    base = adapter.base_model
    if base is None:
        findings.notes.append(
            "no base model is recorded (base_model_name_or_path): nobody can tell which it was"
        )
    elif _is_private_path(base):
        findings.notes.append(
            f"the base model is a path of the machine that trained ({base}): "
            "write its hub id before you publish"
        )
    elif adapter.revision in (None, "main"):
        findings.notes.append(
            f"the base model's revision is not pinned (revision of {base}): "
            "it may change under the adapter"
        )


def _is_private_path(base: str) -> bool:
    return (
        PurePosixPath(base).is_absolute()
        or PureWindowsPath(base).is_absolute()
        or base.startswith(("~", ".", "\\"))
        or base.count("/") > 1
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
