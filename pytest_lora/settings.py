"""Every setting in one table, and where each value came from.

One field of :class:`Settings` is one setting: option ``--lora-<name>``, ini key ``lora_<name>``,
profile key ``<name>``.  Values are taken from the first place that has one --

    marker > command line > ini file > profile file > default

-- and each knows that place, so that a verdict can say who set its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from pytest_lora.catalog import CHECKS, CheckSpec, Need, expand_selection, find_check
from pytest_lora.errors import UsageError
from pytest_lora.names import meant
from pytest_lora.quantities import Margin, parse_drift, parse_limit
from pytest_lora.records import Bound
from pytest_lora.sizes import GIB, parse_bytes

__all__ = [
    "Layer",
    "Setting",
    "Settings",
    "bound_for",
    "choice",
    "ini_name",
    "option_name",
    "require_per_adapter",
    "resolve",
    "table",
    "without_baseline",
]

DEFAULT = "default"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


@dataclass(frozen=True, slots=True)
class Setting:
    """How one setting is written and read.

    Attributes:
        help: one sentence for ``pytest --help``.
        parse: turns what the user wrote into the value; raises ``ValueError`` with what is valid.
        metavar: placeholder in help.
        many: may be given several times, and a list in ini and profile.
        flag: takes no value on the command line.
        per_adapter: may differ between adapters (profile sections).
        ini: type of the ini key, as pytest names it.
        path: a relative path in an ini file is meant relative to that file.
        schema: JSON Schema of the profile key, for editors; only where ``per_adapter``.
    """

    help: str
    parse: Callable[[Any], Any]
    metavar: str = ""
    many: bool = False
    flag: bool = False
    per_adapter: bool = False
    ini: str = "string"
    path: bool = False
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string", "minLength": 1})


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place, and how that place spells a setting (for messages)."""

    values: Mapping[str, Any]
    spell: Callable[[str], str]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty text")
    return value.strip()


def choice(*valid: str) -> Callable[[Any], str]:
    """A parser that takes one of ``valid`` and nothing else."""

    def parse(value: Any) -> str:
        if value not in valid:
            raise ValueError("one of " + ", ".join(valid))
        return str(value)

    return parse


def _dtype(value: Any) -> str:
    return choice(*DTYPES)(_SHORT_DTYPES.get(value, value))


def _flag(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError("true or false")
    return words[str(value).lower()]


def _count(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or isinstance(value, bool) or (isinstance(value, float) and value != number):
        raise ValueError("a whole number, 1 or more")
    return number


def _words(value: Any) -> tuple[str, ...]:
    """Texts from a list, each of which may hold several, separated by commas or white space."""
    parts = [value] if isinstance(value, str) else list(value)
    return tuple(word for part in parts for word in str(part).replace(",", " ").split())


def _texts(value: Any) -> tuple[str, ...]:
    return (_text(value),) if isinstance(value, str) else tuple(_text(item) for item in value)


def _seeds(value: Any) -> tuple[int, ...]:
    words = _words([value] if isinstance(value, int) else value)
    if not words or not all(len(word) <= 10 and word.isdecimal() for word in words):
        words = ()
    if not words or max(map(int, words)) >= 2**32:
        raise ValueError("whole numbers from 0 to 4294967295")
    return tuple(int(word) for word in words)


def _shares(value: Any) -> tuple[str, ...]:
    """Texts ``device=size``, each device once."""
    words = _words(value)
    try:
        sizes = {device: parse_bytes(size) for device, _, size in (w.partition("=") for w in words)}
    except UsageError:
        sizes = {}
    known = all(device == "cpu" or device.isdecimal() for device in sizes)
    if not known or len(sizes) < len(words):
        raise ValueError("device=size for cpu or the numbers of GPUs, as in 0=20GiB,cpu=60GiB")
    return words


def _selection(value: Any) -> tuple[str, ...]:
    words = _words(value)
    try:
        expand_selection(words)
    except KeyError as unknown:
        groups = [need.label for need in Need]
        near = meant(unknown.args[0], (*groups, *(spec.id for spec in CHECKS)))
        raise ValueError(
            f"check ids or the groups {', '.join(groups)} ({unknown} is neither{near}; "
            "pytest --lora-list-checks lists the ids)"
        ) from None
    return words


def _limit(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError("a finite number, 0 or more")
    return number


_WORDS = {"type": ["string", "array"], "items": {"type": "string"}}
_LIMIT = {"type": "number", "minimum": 0}
_RELATIVE_LIMIT = {"anyOf": [_LIMIT, {"type": "string", "pattern": "^[Bb]aseline|^[0-9.]"}]}
_SEED = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
_SEEDS = {"anyOf": [_SEED, {"type": "array", "items": _SEED, "minItems": 1}]}


def _probability(value: Any) -> float:
    try:
        number = _limit(value)
    except ValueError:
        number = 1.0
    if not 0 < number < 0.5:
        raise ValueError("a probability above 0 and below 0.5")
    return number


def _seed(value: Any) -> int:
    [seed, *more] = _seeds(value)
    if more:
        raise ValueError("one whole number from 0 to 4294967295")
    return seed


MEMORY_WORDS = {
    "batch": int,
    "sequence": int,
    "new_tokens": int,
    "accumulation": int,
    "optimizer": str,
    "checkpointing": str,
    "quantisation": str,
    "padding": str,
    "attention": str,
    "autocast": str,
}
"""What ``memory_workload`` may say, and what each is."""


def _workload(value: Any) -> tuple[tuple[str, int | str], ...]:
    found: dict[str, int | str] = {}
    for word in _words(value):
        name, equals, text = word.partition("=")
        number = MEMORY_WORDS.get(name) is int
        if name not in MEMORY_WORDS or not equals or (number and not text.isdecimal()):
            raise ValueError(
                "words such as batch=4 sequence=2048 optimizer=adamw checkpointing=reentrant; "
                f"known are {', '.join(MEMORY_WORDS)} (not {word!r})"
            )
        found[name] = int(text) if number else text
    return tuple(found.items())


def _gib(value: Any) -> float:
    """A size with its unit, in GiB: exactly, since that is a division by a power of two."""
    try:
        if isinstance(value, str):
            return parse_bytes(value) / GIB
    except (UsageError, OverflowError):
        pass
    raise ValueError("a size with its unit, as in '14 GiB' or '500 MB'")


def _setting(default: Any, parse: Callable[[Any], Any], summary: str, **how: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(summary, parse, **how)})


@dataclass(frozen=True, slots=True)
class Settings:
    """The resolved value of every setting; :attr:`origins` says who set those not at default."""

    adapter: tuple[str, ...] = _setting(
        (),
        _texts,
        "adapter to check: a folder, a glob, a training output folder, a .safetensors file beside "
        "its configuration, or a hub id org/name[/subfolder][@revision]; may be repeated",
        metavar="PATH",
        many=True,
        ini="linelist",
        path=True,
    )
    base_model: str | None = _setting(
        None,
        _text,
        "base model folder or hub id (default: the one the adapter's configuration names)",
        metavar="PATH",
        per_adapter=True,
        path=True,
    )
    device: str = _setting(
        "auto",
        _text,
        "device to run the model on, as torch names it (default: auto, a GPU if there is one)",
        metavar="DEVICE",
        per_adapter=True,
    )
    dtype: str = _setting(
        "auto",
        _dtype,
        f"dtype to load the base model in: {', '.join(DTYPES)} (default: auto, the checkpoint's)",
        metavar="DTYPE",
        per_adapter=True,
        schema={"enum": [*DTYPES, *_SHORT_DTYPES]},
    )
    device_map: str | None = _setting(
        None,
        choice("auto", "balanced", "balanced_low_0", "sequential"),
        "spread a base model that is too large for one device over all GPUs, memory and disk, as "
        "accelerate does: auto, balanced, balanced_low_0 or sequential (default: one device)",
        metavar="MAP",
    )
    max_memory: tuple[str, ...] = _setting(
        (),
        _shares,
        "what --lora-device-map may use of a device, GPUs by number: as in 0=20GiB,cpu=60GiB "
        "(default: what is free); what fits nowhere is left on disk",
        metavar="SIZES",
        many=True,
        ini="linelist",
    )
    checks: tuple[str, ...] = _setting(
        (),
        _selection,
        "run only these checks: ids, or a group and all that needs less: "
        f"{', '.join(need.label for need in Need)} (default: all)",
        metavar="IDS",
        many=True,
        ini="linelist",
    )
    target: tuple[str, ...] = _setting(
        (),
        _words,
        "servers the adapter has to load on: vllm, sglang, lorax, llama.cpp, with options as in "
        "vllm:max_lora_rank=64 (default: report only)",
        metavar="SERVERS",
        many=True,
        ini="linelist",
        per_adapter=True,
        schema=_WORDS,
    )
    profile: str | None = _setting(
        None,
        _text,
        "TOML file with settings per adapter, source domains and tasks (default: lora.toml in the "
        "root directory, if it is there; docs/settings.md)",
        metavar="FILE",
        path=True,
    )
    report: tuple[str, ...] = _setting(
        (),
        _texts,
        "write the results to this file, in the format its suffix names: .json, .md or .html; may "
        "be repeated",
        metavar="FILE",
        many=True,
        ini="linelist",
        path=True,
    )
    pr_comment: str | None = _setting(
        None,
        _text,
        "write the verdicts to this file as a comment for a pull request, in Markdown and within "
        "GitHub's limit",
        metavar="FILE.md",
        path=True,
    )
    strict: bool = _setting(
        False, _flag, "a check of the suite that skips is a failure", flag=True, ini="bool"
    )
    inconclusive: str = _setting(
        "fail",
        choice("fail", "skip"),
        "what an inconclusive verdict is: fail or skip (default: fail)",
        metavar="WHAT",
    )
    newer_writer: str = _setting(
        "fail",
        choice("fail", "note"),
        "what an adapter is that a newer PEFT than the installed one wrote: fail or note "
        "(default: fail)",
        metavar="WHAT",
        per_adapter=True,
        schema={"enum": ["fail", "note"]},
    )
    scaling: float | None = _setting(
        None,
        _limit,
        "scaling every module outside alpha_pattern and rank_pattern must have, for example 2.0 "
        "(default: reported, not judged)",
        metavar="SCALING",
        per_adapter=True,
        schema=_LIMIT,
        ini="float",
    )
    safe_merge: bool = _setting(
        False,
        _flag,
        "merge with PEFT's safe_merge",
        flag=True,
        per_adapter=True,
        schema={"type": "boolean"},
        ini="bool",
    )
    cycles: int = _setting(
        3,
        _count,
        "merge and unmerge cycles of unmerge_restoration (default: 3)",
        metavar="N",
        per_adapter=True,
        schema={"type": "integer", "minimum": 1},
        ini="int",
    )
    hash_seeds: tuple[int, ...] = _setting(
        (0,),
        _seeds,
        "values of PYTHONHASHSEED to reload the adapter under (default: 0)",
        metavar="SEEDS",
        per_adapter=True,
        schema=_SEEDS,
    )
    process_timeout: int = _setting(
        600,
        _count,
        "seconds a fresh process may take for one job (default: 600)",
        metavar="SECONDS",
        ini="int",
    )
    error_rate: float = _setting(
        0.001,
        _probability,
        "probability, for all source domains and tasks of an adapter together, that an early "
        "verdict on data is not that of all of it (default: 0.001)",
        metavar="RATE",
        ini="float",
    )
    full_eval: bool = _setting(
        False, _flag, "evaluate all data, also where a verdict is early", flag=True, ini="bool"
    )
    order_seed: int = _setting(
        0,
        _seed,
        "seed of the order in which data is evaluated (default: 0)",
        metavar="SEED",
        ini="int",
    )
    cache_dir: str | None = _setting(
        None,
        _text,
        "folder to keep the base model's likelihoods and finished items in (default: "
        "$PYTEST_LORA_CACHE, or pytest-lora in the user's cache folder)",
        metavar="DIR",
        path=True,
    )
    cache_size: int = _setting(
        256,
        _count,
        "how many MiB the cache may hold; what was unused for longest goes first (default: 256)",
        metavar="MIB",
        ini="int",
    )
    no_cache: bool = _setting(
        False, _flag, "keep and use nothing from one run to the next", flag=True, ini="bool"
    )
    allow_code_execution: bool = _setting(
        False,
        _flag,
        "run the programs a model writes for HumanEval, each in a sandbox of its own",
        flag=True,
        ini="bool",
    )
    gpu_profile: str = _setting(
        "h100-80gb",
        _text,
        "the card that memory is predicted for where none is here, by name or class: 24gb, 40gb, "
        "48gb, 80gb, 141gb (default: h100-80gb; docs/memory.md lists them)",
        metavar="CARD",
        per_adapter=True,
    )
    memory_workload: tuple[tuple[str, int | str], ...] = _setting(
        (),
        _workload,
        "what the memory checks do, as in 'batch=4 sequence=2048 checkpointing=non-reentrant' "
        "(docs/memory.md; default: batch=1 sequence=1024)",
        metavar="WORDS",
        many=True,
        ini="linelist",
        per_adapter=True,
        schema=_WORDS,
    )
    baseline: str | None = _setting(
        None,
        _text,
        "file of recorded measurements that bounds may be relative to, as in "
        '"baseline + 0.01", and that results are compared with (docs/baselines.md)',
        metavar="FILE",
        path=True,
    )
    bounds: Mapping[str, float | Margin] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, name: str) -> str:
        """Who set the setting ``name``."""
        return self.origins.get(name, DEFAULT)

    def selected(self, spec: CheckSpec) -> bool:
        """Whether ``--lora-checks`` takes the check in."""
        return not self.checks or spec.id in expand_selection(self.checks)


def table() -> Iterator[tuple[str, Setting]]:
    """Every setting with its name, then one for each check whose bound the user may move."""
    for item in fields(Settings):
        if "setting" in item.metadata:
            yield item.name, _of(item)
    for spec in CHECKS:
        if spec.limit:
            yield spec.id, _bound_setting(spec)


def _of(item: Field[Any]) -> Setting:
    setting: Setting = item.metadata["setting"]
    return setting


def _bound_setting(spec: CheckSpec) -> Setting:
    default = f"{spec.default:g}" if spec.default else "more than nothing"
    if math.isinf(spec.default):
        default = "reported, not judged"
    if spec.opt_in:
        return Setting(
            help=f"bound of {spec.id}: {spec.limit} this much ({spec.unit}, as in '14 GiB'; "
            "default: not checked)",
            parse=_gib,
            metavar="SIZE",
            per_adapter=True,
        )
    drift = spec.unit == "nats per token"
    return Setting(
        help=f"bound of {spec.id}: {spec.limit} this much ({spec.unit}; default: {default})",
        parse=parse_drift if drift else parse_limit,
        metavar="LIMIT",
        per_adapter=True,
        schema={"type": ["number", "string"]} if drift else _RELATIVE_LIMIT,
        # pytest's own TOML knows types; a limit relative to a baseline is for the profile.
        ini="string" if drift else "float",
    )


def option_name(name: str) -> str:
    """The command line spelling of a setting."""
    return "--lora-" + name.replace("_", "-")


def ini_name(name: str) -> str:
    """The ini spelling of a setting."""
    return "lora_" + name


def resolve(layers: Iterable[Layer], *, over: Settings | None = None) -> Settings:
    """Settings from ``layers``, weakest first, on top of ``over`` (the defaults if None).

    Raises:
        UsageError: a value does not parse, or a layer holds a name that is no setting.
    """
    known = dict(table())
    result = over or Settings()
    for layer in layers:
        for name, raw in layer.values.items():
            origin = layer.spell(name)
            if name not in known:
                raise UsageError(f"{origin}: {_unknown(name, known)}")
            value = _parse(known[name], raw, origin)
            result = _with(result, name, value, origin)
    return result


def _unknown(name: str, known: Iterable[str]) -> str:
    if name in {spec.id for spec in CHECKS}:
        if find_check(name).per:
            return f"the bound of {name!r} is set where its data is declared, in a profile"
        return f"the check {name!r} has no bound to move: it counts faults, and allows none"
    return f"there is no setting {name!r}{meant(name, known, 'docs/settings.md lists them')}"


def require_per_adapter(names: Iterable[str], origin: Callable[[str], str]) -> None:
    """Raise UsageError for a setting that holds for a whole run, or is none."""
    known = dict(table())
    allowed = [name for name, setting in known.items() if setting.per_adapter]
    for name in names:
        if name not in known:
            raise UsageError(f"{origin(name)}: {_unknown(name, allowed)}")
        if name not in allowed:
            raise UsageError(
                f"{origin(name)}: {name!r} holds for the whole run and cannot be set per adapter"
            )


def _parse(setting: Setting, raw: Any, origin: str) -> Any:
    try:
        return setting.parse(raw)
    except ValueError as expected:
        near = meant(raw, setting.schema.get("enum", ())) if isinstance(raw, str) else ""
        raise UsageError(f"{origin}: got {raw!r}, expected {expected}{near}") from None
    except TypeError:
        raise UsageError(f"{origin}: got {raw!r}, which has the wrong type") from None


def _with(settings: Settings, name: str, value: Any, origin: str) -> Settings:
    origins = {**settings.origins, name: origin}
    if name in {spec.id for spec in CHECKS}:
        return replace(settings, bounds={**settings.bounds, name: value}, origins=origins)
    return replace(settings, origins=origins, **{name: value})


def without_baseline(origin: str) -> str:
    """What to say where a limit is relative to a baseline and none was given."""
    return f"{origin} is relative to a baseline: give --lora-baseline=FILE"


def bound_for(settings: Settings, check: str, *, recorded: float | None = None) -> Bound | None:
    """The user's bound for ``check``, or None where the check's own applies.

    Args:
        settings: of the adapter.
        check: its id.
        recorded: the baseline's measurement, for a bound that is relative to it.

    Raises:
        UsageError: the bound is relative to a baseline, and there is none.
    """
    limit, origin = settings.bounds.get(check), settings.origin(check)
    if limit is None:
        return None
    if isinstance(limit, Margin):
        if recorded is None:
            raise UsageError(without_baseline(origin))
        limit, origin = recorded + limit.value, f"{origin}: {limit}"
    maker = Bound.at_least if find_check(check).limit == "at least" else Bound.at_most
    return maker(limit, origin)
