"""Settings: who wins, who is named, and what is refused in which words."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from pytest_lora.catalog import CHECKS, Need
from pytest_lora.errors import UsageError
from pytest_lora.profile import Profile
from pytest_lora.records import Bound
from pytest_lora.run import Run
from pytest_lora.settings import (
    Layer,
    Setting,
    Settings,
    bound_for,
    ini_name,
    option_name,
    require_per_adapter,
    resolve,
    table,
)

TABLE = dict(table())
MOVABLE = [spec for spec in CHECKS if spec.limit]


def layer(place: str, **values: Any) -> Layer:
    return Layer(values, lambda name: f"{place}:{name}")


def profile(tmp_path: Path, text: str) -> Profile:
    path = tmp_path / "lora.toml"
    path.write_text(text, encoding="utf-8")
    return Profile.read(path)


# -------------------------------------------------------------------------------- precedence

PLACES = ("profile", "ini", "option", "marker")


@pytest.mark.parametrize(
    "given",
    [chosen for n in range(5) for chosen in itertools.combinations(PLACES, n)],
    ids=lambda given: "+".join(given) or "none",
)
@pytest.mark.parametrize("name", ["cycles", "merge_equivalence"])
def test_the_strongest_place_wins_and_is_named(
    tmp_path: Path, given: tuple[str, ...], name: str
) -> None:
    """Every combination of places, for a setting with a field and for a bound."""
    values = {place: position + 2 for position, place in enumerate(PLACES)}
    path = tmp_path / "lora.toml"
    path.write_text(f"[defaults]\n{name} = {values['profile']}\n" if "profile" in given else "")
    run = Run(
        [
            layer("ini", profile=str(path), **({name: values["ini"]} if "ini" in given else {})),
            layer("option", **({name: str(values["option"])} if "option" in given else {})),
        ],
        start=tmp_path,
        root=tmp_path,
    )
    marker = layer("marker", **{name: values["marker"]}) if "marker" in given else None
    settings = run.settings_for("adapters/a", marker)
    strongest = given[-1] if given else None
    origin = {"profile": f"{name} in {path.name}:2", None: "default"}
    assert settings.origin(name) == origin.get(strongest, f"{strongest}:{name}")
    if name == "cycles":
        assert settings.cycles == (values[strongest] if strongest else 3)
    elif strongest is None:
        assert run.bounds_for(settings) == {}
    else:
        bound = Bound.at_most(float(values[strongest]), settings.origin(name))
        assert run.bounds_for(settings) == {name: bound}


def test_later_layers_replace_lists_and_leave_other_settings_alone() -> None:
    settings = resolve(
        [layer("ini", target=["vllm", "lorax"], cycles="5"), layer("cli", target="sglang")]
    )
    assert settings.target == ("sglang",)
    assert (settings.cycles, settings.origin("cycles")) == (5, "ini:cycles")


def test_resolving_on_top_keeps_what_was_there() -> None:
    below = resolve([layer("ini", cycles=5, merge_equivalence=2)])
    above = resolve([layer("marker", unmerge_restoration=3)], over=below)
    assert above.cycles == 5
    assert above.bounds == {"merge_equivalence": 2.0, "unmerge_restoration": 3.0}
    assert above.origin("unmerge_restoration") == "marker:unmerge_restoration"


def test_without_layers_everything_is_at_its_default() -> None:
    assert resolve([]) == Settings()
    assert {Settings().origin(name) for name in TABLE} == {"default"}


# ------------------------------------------------------------------------------------- values

GOOD: list[tuple[str, Any, Any]] = [
    ("adapter", " a b ", ("a b",)),
    ("adapter", ["a", "b"], ("a", "b")),
    ("base_model", "org/name", "org/name"),
    ("device", "cuda:1", "cuda:1"),
    ("dtype", "bf16", "bfloat16"),
    ("dtype", "float64", "float64"),
    ("checks", "files,merge_equivalence", ("files", "merge_equivalence")),
    ("checks", ["base", "files weights"], ("base", "files", "weights")),
    ("target", ["vllm:max_lora_rank=64, lorax"], ("vllm:max_lora_rank=64", "lorax")),
    ("strict", True, True),
    ("strict", "Off", False),
    ("strict", 1, True),
    ("inconclusive", "skip", "skip"),
    ("newer_writer", "note", "note"),
    ("scaling", "0.5", 0.5),
    ("scaling", 0, 0.0),
    ("cycles", "7", 7),
    ("cycles", 7.0, 7),
    ("hash_seeds", 4, (4,)),
    ("hash_seeds", "0,1 4294967295", (0, 1, 2**32 - 1)),
    ("hash_seeds", [1, "2"], (1, 2)),
    ("process_timeout", 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "value"), GOOD)
def test_what_can_be_meant_is_understood(name: str, raw: Any, value: Any) -> None:
    assert getattr(resolve([layer("x", **{name: raw})]), name) == value


BAD: list[tuple[str, Any, str]] = [
    ("adapter", "  ", "a non-empty text"),
    ("adapter", [""], "a non-empty text"),
    ("adapter", 3, "the wrong type"),
    ("base_model", "", "a non-empty text"),
    ("base_model", 3, "a non-empty text"),
    ("dtype", "int8", "one of auto, float32, bfloat16, float16, float64"),
    ("dtype", ["fp32"], "the wrong type"),
    ("checks", "merge", "'merge' is neither"),
    ("checks", "filess", "did you mean 'files'?"),
    ("checks", None, "the wrong type"),
    ("target", 3, "the wrong type"),
    ("strict", "perhaps", "true or false"),
    ("inconclusive", "pass", "one of fail, skip"),
    ("newer_writer", True, "one of fail, note"),
    ("scaling", "two", "a finite number"),
    ("scaling", math.nan, "a finite number"),
    ("scaling", math.inf, "a finite number"),
    ("scaling", -1, "a finite number"),
    ("scaling", True, "a finite number"),
    ("scaling", 10**400, "a finite number"),
    ("scaling", [1], "a finite number"),
    ("cycles", 0, "a whole number, 1 or more"),
    ("cycles", "2.5", "a whole number, 1 or more"),
    ("cycles", 2.5, "a whole number, 1 or more"),
    ("cycles", math.inf, "a whole number, 1 or more"),
    ("cycles", math.nan, "a whole number, 1 or more"),
    ("cycles", True, "a whole number, 1 or more"),
    ("cycles", [1], "a whole number, 1 or more"),
    ("hash_seeds", "", "whole numbers from 0"),
    ("hash_seeds", "-1", "whole numbers from 0"),
    ("hash_seeds", str(2**32), "whole numbers from 0"),
    ("hash_seeds", "9" * 5000, "whole numbers from 0"),
    ("hash_seeds", "\u00b2", "whole numbers from 0"),
    ("hash_seeds", [1.5], "whole numbers from 0"),
    ("hash_seeds", True, "whole numbers from 0"),
    ("process_timeout", "soon", "a whole number, 1 or more"),
    ("merge_equivalence", "-0.5", "a finite number, 0 or more"),
    ("merge_equivalence", None, "a finite number, 0 or more"),
]


@pytest.mark.parametrize(("name", "raw", "expected"), BAD)
def test_what_cannot_be_meant_is_refused_with_place_value_and_remedy(
    name: str, raw: Any, expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve([layer("ini", **{name: raw})])
    message = str(caught.value)
    assert message.startswith(f"ini:{name}: got {raw!r}")
    assert expected in message


@pytest.mark.parametrize("name", TABLE)
def test_no_value_breaks_a_parser(name: str) -> None:
    """Whatever a TOML file can hold is either understood or refused in words."""
    values = ["", "x", 0, -1, 2.5, math.inf, math.nan, True, [], [[]], {}, {"a": 1}, [1, "a", None]]
    values += [None, datetime.date(2026, 1, 1), "9" * 400, 10**400, "\x00", "\ud800", b"x"]
    for value in values:
        with contextlib.suppress(UsageError):
            resolve([layer("x", **{name: value})])


# ------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cycle", "there is no setting 'cycle' (did you mean 'cycles'?"),
        ("merge_equivalance", "did you mean 'merge_equivalence'?"),
        ("lora_dtype", "did you mean 'dtype'?"),
        ("qqqq", "docs/settings.md lists them"),
        ("frozen_weights", "the check 'frozen_weights' has no bound to move"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve([layer("marker", **{name: 1})])
    assert str(caught.value).startswith(f"marker:{name}: ")
    assert hint in str(caught.value)


def test_only_what_may_differ_between_adapters_can_be_set_for_one() -> None:
    require_per_adapter(["dtype", "merge_equivalence"], str)
    with pytest.raises(UsageError, match="x: 'strict' holds for the whole run"):
        require_per_adapter(["strict"], lambda name: "x")
    with pytest.raises(UsageError, match="did you mean 'cycles'"):
        require_per_adapter(["cycle"], lambda name: "x")


def test_every_setting_has_one_spelling_per_place() -> None:
    for name in TABLE:
        assert option_name(name) == "--" + ini_name(name).replace("_", "-")
    assert option_name("base_model") == "--lora-base-model"
    assert ini_name("base_model") == "lora_base_model"


@pytest.mark.parametrize("name", TABLE)
def test_the_table_is_consistent(name: str) -> None:
    setting: Setting = TABLE[name]
    assert setting.help[0].islower() or setting.help.startswith("TOML")
    assert bool(setting.metavar) != setting.flag
    assert (setting.ini == "bool") == setting.flag
    assert (setting.ini == "linelist") == setting.many
    if setting.many:
        assert isinstance(getattr(Settings(), name), tuple)


def test_each_movable_bound_is_a_setting_that_states_its_default() -> None:
    for spec in MOVABLE:
        assert spec.limit in TABLE[spec.id].help
        assert spec.unit in TABLE[spec.id].help
        default = f"{spec.default:g}" if spec.default else "more than nothing"
        default = "reported, not judged" if math.isinf(spec.default) else default
        default = "not checked" if spec.opt_in else default
        assert f"; default: {default})" in TABLE[spec.id].help
    assert not {spec.id for spec in CHECKS if not spec.limit} & set(TABLE)


# ------------------------------------------------------------------------ bounds and selection


@pytest.mark.parametrize("spec", MOVABLE, ids=lambda spec: spec.id)
def test_a_bound_points_the_way_the_check_says(spec: Any) -> None:
    given = "256 MiB" if spec.opt_in else "0.25"
    settings = resolve([layer("cli", **{spec.id: given})])
    bound = bound_for(settings, spec.id)
    maker = {"at most": Bound.at_most, "at least": Bound.at_least}[spec.limit]
    assert bound == maker(0.25, f"cli:{spec.id}")
    assert bound_for(Settings(), spec.id) is None


@pytest.mark.parametrize(
    "size", [14, 14.0, "14", "0 GiB", "14 gigs", True, "1" + "0" * 340 + " GiB"]
)
def test_a_ceiling_on_memory_has_a_unit(size: Any) -> None:
    with pytest.raises(UsageError, match="a size with its unit"):
        resolve([layer("cli", memory_load=size)])


def test_a_memory_workload_is_words_with_values() -> None:
    words = ["batch=4, sequence=2048", "checkpointing=reentrant batch=2"]
    settings = resolve([layer("ini", memory_workload=words)])
    assert dict(settings.memory_workload) == {
        "batch": 2,
        "sequence": 2048,
        "checkpointing": "reentrant",
    }


@pytest.mark.parametrize("word", ["batch", "batch=two", "batch=-1", "rows=2", "batch=1.5"])
def test_other_words_of_a_memory_workload_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="batch=4 sequence=2048"):
        resolve([layer("cli", memory_workload=word)])


def test_without_a_selection_every_check_is_selected() -> None:
    assert all(Settings().selected(spec) for spec in CHECKS)
    only = resolve([layer("cli", checks=["files"])])
    assert {spec.id for spec in CHECKS if only.selected(spec)} == {
        spec.id for spec in CHECKS if spec.need is Need.FILES
    }


# ----------------------------------------------------------------------------------- profiles

SOUND = """
[defaults]
cycles = 4
merge_equivalence = 2

[adapters."math-*"]
cycles = 5
target = ["vllm"]

[adapters."*-v3"]
cycles = 6
"""


@pytest.mark.parametrize(
    ("adapter", "cycles", "target"),
    [("code", 4, ()), ("math-v2", 5, ("vllm",)), ("math-v3", 6, ("vllm",)), ("code-v3", 6, ())],
)
def test_matching_sections_apply_in_order(
    tmp_path: Path, adapter: str, cycles: int, target: tuple[str, ...]
) -> None:
    line = 1 + SOUND.splitlines().index(f"cycles = {cycles}")
    settings = resolve(profile(tmp_path, SOUND).layers(adapter))
    assert (settings.cycles, settings.target) == (cycles, target)
    assert settings.bounds == {"merge_equivalence": 2.0}
    assert settings.origin("cycles") == f"cycles in {tmp_path / 'lora.toml'}:{line}"


def test_an_empty_profile_says_nothing(tmp_path: Path) -> None:
    assert resolve(profile(tmp_path, "").layers("any")) == Settings()


def test_a_base_model_in_a_profile_is_found_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    [layer_] = profile(tmp_path, '[defaults]\nbase_model = "base"').layers("any")
    assert layer_.values == {"base_model": str(tmp_path / "base")}
    [layer_] = profile(tmp_path, '[defaults]\nbase_model = "org/base"').layers("any")
    assert layer_.values == {"base_model": "org/base"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cycles = 3", r":1: unknown table \[cycles\]; a profile has \[defaults\], \[sources"),
        ("[default]\ncycles = 3", r"unknown table \[default\]"),
        ("defaults = 3", "'defaults' must be a table"),
        ("adapters = 3", "'adapters' must be a table"),
        ("adapters = []", "'adapters' must be a table"),
        ("[adapters]\ncycles = 3", "'cycles' must be a table"),
        (
            "[defaults]\ncycle = 3",
            "cycle in .*: there is no setting 'cycle' .did you mean 'cycles'",
        ),
        ("[defaults]\nreport = 'a.json'", "'report' holds for the whole run"),
        ("[defaults]\ncycles = 0", "cycles in .*: got 0, expected a whole number"),
        ("[defaults]\ncycles = inf", "cycles in .*: got inf, expected a whole number"),
        ("[defaults]\nbase_model = 3", "base_model in .*: got 3, expected a non-empty text"),
        ('[adapters."a"]\ndtype = "int8"', "dtype in .*: got 'int8', expected one of auto"),
        ('[adapters."a"]\nfrozen_weights = 1', "'frozen_weights' has no bound to move"),
        ("[defaults", "not a TOML file"),
        ("\x00", "not a TOML file"),
    ],
)
def test_a_broken_profile_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        profile(tmp_path, text)
    assert str(tmp_path / "lora.toml") in str(caught.value)


def test_a_profile_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: cannot read the profile: No such file"):
        Profile.read(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'[defaults]\nbase_model = "\xe9"')
    with pytest.raises(UsageError, match=r"latin\.toml: not a TOML file"):
        Profile.read(tmp_path / "latin.toml")
