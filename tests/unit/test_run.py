"""One run: its adapters and their settings, what blocks what, and which base is held."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from adapter_maker import lora_tensors, write_adapter

from pytest_lora import run as run_module
from pytest_lora.catalog import CHECKS, Need, find_check
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome
from pytest_lora.run import MODEL_LIBRARIES, Run, missing_libraries, versions
from pytest_lora.settings import Layer

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter
    from pytest_lora.subject import BaseModel


def layer(place: str, **values: Any) -> Layer:
    return Layer(values, lambda name: f"{place} {name}")


def make(folder: Path, **values: Any) -> Run:
    return Run([layer("cli", **values)], start=folder, root=folder)


def write_baseline(path: Path, **adapters: Any) -> None:
    path.write_text(json.dumps({"schema": "pytest-lora/baseline/1", "adapters": adapters}))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapters" / "good")


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Every number fine, but one tensor that the configuration does not promise."""
    tensors = lora_tensors()
    tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"] = ((2, 6), 1.0)
    return write_adapter(tmp_path / "adapters" / "bad", tensors=tensors)


# ---------------------------------------------------------------------------------- libraries


def test_versions_name_what_is_installed_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert set(found) == {"pytest-lora", "pytest", "safetensors", *MODEL_LIBRARIES}
    assert found["pytest"] == pytest.__version__
    monkeypatch.setattr(run_module, "MODEL_LIBRARIES", ("no-such-library",))
    assert versions()["no-such-library"] is None


def test_missing_libraries_are_found_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"torch", "peft"}
    monkeypatch.setattr(util, "find_spec", lambda name: name if name in present else None)
    assert missing_libraries() == ("transformers",)


@pytest.mark.parametrize(
    ("checks", "missing", "stops"),
    [
        ([], ("peft",), True),
        (["merge_equivalence"], ("peft", "torch"), True),
        (["files"], ("peft",), False),
        ([], (), False),
    ],
)
def test_a_run_that_lacks_a_library_stops_unless_nothing_needs_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checks: list[str],
    missing: tuple[str, ...],
    stops: bool,
) -> None:
    monkeypatch.setattr(run_module, "missing_libraries", lambda: missing)
    run = make(tmp_path, checks=checks)
    if not stops:
        run.require_libraries()
        return
    with pytest.raises(UsageError) as caught:
        run.require_libraries()
    message = str(caught.value)
    needy = [spec for spec in CHECKS if spec.need > Need.FILES and run.settings.selected(spec)]
    assert message.startswith(f"{len(needy)} of the selected checks need {', '.join(missing)}")
    assert "pip install 'pytest-lora[model]'" in message
    assert "--lora-checks=files" in message


# ----------------------------------------------------------------------------------- adapters


def test_adapters_are_located_once_in_the_order_given(
    tmp_path: Path, good: Path, bad: Path
) -> None:
    run = make(tmp_path, adapter=["adapters/good", "adapters/*"])
    assert run.locate() == ("adapters/good", "adapters/bad")
    assert run.locate() is run.locate()
    assert set(run.folders()) == {good.resolve(), bad.resolve()}
    assert run.adapter("adapters/good") is run.adapter("adapters/good")
    assert run.adapter("adapters/good").path == good


def test_without_adapters_there_is_nothing_to_locate(tmp_path: Path, good: Path) -> None:
    run = make(tmp_path)
    assert run.locate() == ()
    assert run.adapter("adapters/good").r == 2
    assert run.locate() == (), "an adapter a marker names is not one the run was given"


def test_shares_of_devices_without_a_map_of_them_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cli max_memory says what --lora-device-map may use"):
        make(tmp_path, max_memory=["cpu=1GiB"])
    assert make(tmp_path, max_memory=["cpu=1GiB"], device_map="auto").settings.device_map == "auto"


def test_an_adapter_at_a_path_is_read_beside_those_given(
    tmp_path: Path, good: Path, bad: Path
) -> None:
    run = make(tmp_path, adapter=["adapters/good"])
    other = run.adapter(str(bad))
    assert other.path == bad
    assert run.adapter(str(bad)) is other
    assert run.locate() == ("adapters/good",)


@pytest.mark.usefixtures("good", "bad")
def test_a_name_for_several_adapters_is_refused_where_one_is_meant(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapters/\*: 2 adapters are there.*name one of them"):
        make(tmp_path).adapter("adapters/*")


def test_a_missing_adapter_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        make(tmp_path, adapter=["nowhere"]).locate()


# ----------------------------------------------------------------------------------- settings


def test_a_marker_may_only_set_what_may_differ(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.settings_for("a", layer("marker", cycles=9)).cycles == 9
    with pytest.raises(UsageError, match="marker strict: 'strict' holds for the whole run"):
        run.settings_for("a", layer("marker", strict=True))


def test_bounds_name_who_set_them(tmp_path: Path) -> None:
    run = make(tmp_path, merge_equivalence=2, adapter_effect=0.1, cycles=4)
    assert run.bounds_for(run.settings_for("a")) == {
        "merge_equivalence": Bound.at_most(2, "cli merge_equivalence"),
        "adapter_effect": Bound.at_least(0.1, "cli adapter_effect"),
    }


def test_a_bound_relative_to_what_each_source_had_is_for_tests_about_one(tmp_path: Path) -> None:
    recorded = {"value": 0.5, "unit": "times the rounding bound", "count": 9, "facts": {"seed": 1}}
    entries = {"dtype_stability[wiki]": recorded}
    write_baseline(tmp_path / "b.json", a=entries)
    run = make(tmp_path, baseline="b.json", dtype_stability="baseline + 0.25")
    with pytest.raises(UsageError, match=r"cli dtype_stability is relative to .* sources, and"):
        run.bounds_for(run.settings, "a").get("dtype_stability")
    bound = run.bounds_for(run.settings, "a", parts={"sources": "wiki"})["dtype_stability"]
    assert (bound.low, bound.high) == (None, 0.75)
    assert bound.origin == "cli dtype_stability: baseline + 0.25"
    alike = Measurement(0.75, "times the rounding bound", 3, details={"facts": {"seed": 1}})
    assert bound.judge(alike) is Outcome.PASSED
    for other, says in (
        (replace(alike, details={"facts": {"seed": 2}}), "seed was 1 and is 2"),
        (replace(alike, details={}), "seed was 1 and is absent"),
        (replace(alike, unit="nats per token"), "unit was 'times the rounding bound'"),
    ):
        with pytest.raises(CannotRun, match=says):
            bound.judge(other)
    with pytest.raises(CannotRun, match=r"no dtype_stability\[code\] recorded"):
        run.bounds_for(run.settings, "a", parts={"sources": "code"}).get("dtype_stability")


def test_only_the_single_adapter_of_a_run_is_compared_whatever_its_name(
    tmp_path: Path, good: Path, bad: Path
) -> None:
    recorded = {"value": 0.5, "unit": "times the rounding bound", "count": 9}
    write_baseline(tmp_path / "b.json", **{"out/v1": {"merge_equivalence": recorded}})
    run = make(tmp_path, baseline="b.json", adapter=["adapters/good"])
    assert run.reference("adapters/good", "merge_equivalence", "").value == 0.5
    run.adapter(str(bad))  # as a marker names one
    with pytest.raises(CannotRun, match=r"nothing recorded of .*bad, only of out/v1"):
        run.reference(str(bad), "merge_equivalence", "")


def test_each_test_gets_its_source_with_its_own_bound(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "texts.txt").write_text("Once upon a time.\n")
    (tmp_path / "lora.toml").write_text('[sources.stories]\npath = "texts.txt"\n')
    run = make(tmp_path, profile="lora.toml", no_cache=True)

    def limit(drift: Any) -> float | None:
        marked = run.settings_for("a", layer("marker", perplexity_drift=drift))
        return run.source("a", "stories", marked).max_drift.high

    assert (limit(50), limit(0.0001), limit(50)) == (50, 0.0001, 50)


def test_the_profile_is_found_from_where_pytest_was_started(tmp_path: Path) -> None:
    (tmp_path / "lora.toml").write_text('[adapters."math-*"]\ncycles = 8\n')
    run = make(tmp_path, profile="lora.toml")
    assert run.settings_for("math-1").cycles == 8
    assert run.settings_for("code-1").cycles == 3


# ------------------------------------------------------------------------ one defect, one failure


@pytest.mark.usefixtures("good", "bad")
def test_a_failed_prerequisite_blocks_even_if_it_was_not_asked_for(tmp_path: Path) -> None:
    run = make(tmp_path, adapter=["adapters/*"])
    run.locate()
    for spec in CHECKS:
        assert run.blocked_by(spec, "adapters/good") is None
        blocked = "config_matches_weights" in spec.after
        expected = "config_matches_weights" if blocked else None
        assert run.blocked_by(spec, "adapters/bad") == expected
    assert run.outcomes["adapters/bad", "config_matches_weights"] is Outcome.FAILED
    assert run.outcomes["adapters/good", "finite_weights"] is Outcome.PASSED


@pytest.mark.parametrize("outcome", Outcome)
def test_what_did_not_pass_blocks_and_what_was_skipped_does_not(
    tmp_path: Path, outcome: Outcome
) -> None:
    run = make(tmp_path)
    spec = find_check("merge_equivalence")
    for needed in spec.after:
        run.outcomes["a", needed] = Outcome.PASSED
    run.outcomes["a", "adapter_effect"] = outcome
    blocks = outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)
    assert run.blocked_by(spec, "a") == ("adapter_effect" if blocks else None)


def test_what_needs_a_model_is_not_judged_ahead_of_its_turn(tmp_path: Path, good: Path) -> None:
    run = make(tmp_path, adapter=["adapters/good"])
    run.locate()
    assert run.blocked_by(find_check("merge_equivalence"), "adapters/good") is None
    judged = {check for _, check in run.outcomes}
    assert judged == {"adapter_files", "config_matches_weights", "finite_weights"}


def test_every_check_of_the_files_can_be_judged_ahead(tmp_path: Path, good: Path) -> None:
    run = make(tmp_path, adapter=["adapters/good"])
    [name] = run.locate()
    for spec in CHECKS:
        if spec.need is Need.FILES:
            run._judge_files(spec.id, name)
    assert {check for _, check in run.outcomes} == {
        spec.id for spec in CHECKS if spec.need is Need.FILES
    }


# ---------------------------------------------------------------------------------- the report


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "LORA, r=2, on nowhere/base"),
        ({"dtype": "bf16"}, "LORA, r=2, on nowhere/base, dtype=bfloat16"),
        ({"device": "cpu"}, "LORA, r=2, on nowhere/base, device=cpu"),
        ({"base_model": "org/other"}, "LORA, r=2, on org/other"),
    ],
)
def test_an_adapter_is_described_in_a_line(
    tmp_path: Path, values: dict[str, str], text: str
) -> None:
    assert make(tmp_path, **values).about("adapters/good") == text


def test_an_adapter_that_says_nothing_is_described_too(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text("{}")
    assert make(tmp_path).about("a") == "unknown type, on no named base model"


@pytest.mark.usefixtures("good", "bad")
def test_results_are_ordered_as_planned(tmp_path: Path) -> None:
    run = make(tmp_path, adapter=["adapters/good", "adapters/bad"])
    run.locate()
    pairs = [
        (adapter, check)
        for adapter in ("adapters/good", "adapters/bad", "elsewhere")
        for check in ("adapter_files", "finite_weights", "merged_reload", "my_own")
    ]
    planned = [CheckResult(check, adapter, Outcome.PASSED) for adapter, check in pairs]
    shuffled = planned[1::2] + planned[::2]
    assert sorted(shuffled, key=run.planned_order) == planned


# ---------------------------------------------------------------------------------- base models


@pytest.fixture
def adapters(tmp_path: Path) -> list[Adapter]:
    """Two adapters on one base, and one on another."""
    pytest.importorskip("torch")
    import tiny

    made = []
    for number, base in enumerate(("one", "one", "two")):
        model = tiny.llama()
        tiny.save_base(model, tmp_path / base)
        folder = tmp_path / f"adapter-{number}"
        tiny.save_adapter(model, folder)
        made.append(tiny.rewrite_config(read(folder), base_model_name_or_path=str(tmp_path / base)))
    return made


def read(folder: Path) -> Adapter:
    from pytest_lora.adapter import read_adapter

    return read_adapter(folder)


def load(run: Run, adapter: Adapter) -> BaseModel:
    source = run.base_source(adapter, run.settings_for(adapter.name))
    return run.base_model(adapter, source, device="cpu", dtype="float32")


def test_one_base_is_loaded_once_and_only_one_is_held(
    tmp_path: Path, adapters: list[Adapter]
) -> None:
    first, second, other = adapters
    run = make(tmp_path)
    base = load(run, first)
    assert load(run, second) is base
    assert run.wrap(base.module) is base
    assert load(run, other) is not base
    assert run.wrap(base.module) is not base, "the first base was let go"
    run.close()


def test_the_last_subject_is_kept(tmp_path: Path, adapters: list[Adapter]) -> None:
    first, second, _ = adapters
    run = make(tmp_path)
    base = load(run, first)
    subject = run.subject(first, base)
    assert run.subject(first, base) is subject
    assert run.subject(second, base) is not subject
    given = dict(subject.inputs)
    own = run.subject(second, base, given)
    assert run.subject(second, base, given) is not own
    assert not run.subject(second, base).has_own_inputs, "they are not another test's"
    run.close()


def test_a_given_base_wins_and_may_be_relative_to_the_start(
    tmp_path: Path, adapters: list[Adapter]
) -> None:
    run = make(tmp_path, base_model="two")
    source = run.base_source(adapters[0], run.settings_for(adapters[0].name))
    assert source == (tmp_path / "two").resolve()
    absent = make(tmp_path, base_model="./none")
    with pytest.raises(UsageError, match="none"):
        absent.base_source(adapters[0], absent.settings_for(adapters[0].name))


def damage(base: BaseModel) -> str:
    import torch

    name, parameter = next(iter(base.module.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[3] += 1
    return name


def test_a_base_left_changed_is_reported_and_loaded_again(
    tmp_path: Path, adapters: list[Adapter]
) -> None:
    run = make(tmp_path)
    base = load(run, adapters[0])
    run.prove_intact(base)
    name = damage(base)
    with pytest.raises(CannotRun, match="loaded again") as caught:
        run.prove_intact(base)
    assert re.search(rf"left the base model changed .*{re.escape(name)}", str(caught.value))
    run.prove_intact(base)
    run.close()


def test_a_base_of_the_users_own_is_reported_and_not_trusted_further(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import tiny

    run = make(tmp_path)
    module = tiny.llama()
    base = run.wrap(module)
    assert run.wrap(module) is base
    damage(base)
    with pytest.raises(CannotRun, match="supplied by a fixture and is still in that state"):
        run.prove_intact(base)
    again = run.wrap(module)
    assert again is not base
    run.prove_intact(again)
    run.close()


def test_several_changes_are_counted(tmp_path: Path) -> None:
    class Changed:
        source = Path("base")
        reloads = 0

        def verify(self) -> list[str]:
            return ["embed: 1 of 4 elements", "head: all", "norm: all"]

        def reload(self) -> None:
            self.reloads += 1

    base = Changed()
    with pytest.raises(CannotRun, match="embed: 1 of 4 elements and 2 more"):
        make(tmp_path).prove_intact(base)  # type: ignore[arg-type]
    assert base.reloads == 1
