"""The baseline file: what becomes a reference, what it looks like, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.baseline import (
    FACTS,
    ITEMS,
    Baseline,
    Reference,
    is_recorded,
    with_facts,
    with_remark,
)
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome

MADE = {"base": "ab12", "dtype": "float32", "versions": {"torch": "2.13.0"}}
FLAT = {"base": "ab12", "dtype": "float32", "versions.torch": "2.13.0"}


def result(
    value: float = 0.2,
    *,
    check: str = "perplexity_drift",
    part: str = "wiki",
    adapter: str = "out/a",
    outcome: Outcome = Outcome.PASSED,
    **details: Any,
) -> CheckResult:
    measured = Measurement(value, "nats per token", 24, details=details)
    bound = Bound.at_most(1.0, "lora.toml")
    return CheckResult(check, adapter, outcome, measurement=measured, bound=bound, part=part)


def of(*results: CheckResult) -> Baseline:
    return Baseline("b.json").updated(results)


def read(path: Path) -> Baseline:
    return Baseline.read(path, shown=path.name)


# ------------------------------------------------------------------------------------ recording


def test_what_passed_becomes_the_reference() -> None:
    found = of(result(0.25, **{FACTS: MADE, ITEMS: {"0": 3.5, "1": 4.25}}))
    reference = found.reference("out/a", "perplexity_drift[wiki]")
    assert (reference.value, reference.unit, reference.count) == (0.25, "nats per token", 24)
    assert (reference.facts, reference.items) == (FLAT, {"0": 3.5, "1": 4.25})


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.PASSED])
def test_of_what_did_not_pass_the_old_reference_stays(outcome: Outcome) -> None:
    again = of(result(0.2)).updated([result(0.9, outcome=outcome)])
    assert again.reference("out/a", "perplexity_drift[wiki]").value == 0.2
    assert "not what did not pass: out/a perplexity_drift[wiki]" in again.told(
        [result(0.9, outcome=outcome)]
    )


def test_an_update_leaves_what_it_did_not_measure() -> None:
    first = of(result(0.2), result(0.3, adapter="out/b"))
    again = first.updated([result(0.1)])
    assert again.reference("out/a", "perplexity_drift[wiki]").value == 0.1
    assert again.reference("out/b", "perplexity_drift[wiki]").value == 0.3


def test_counts_of_faults_and_checks_of_others_are_not_recorded() -> None:
    faults = CheckResult(
        "generation_health",
        "out/a",
        Outcome.PASSED,
        measurement=Measurement(0, "symptoms", 8),
        bound=Bound.at_most(0, "by definition"),
        part="qa",
    )
    assert is_recorded(result())
    assert not is_recorded(faults)
    assert not is_recorded(result(check="adapter_files", part=""))
    assert not is_recorded(result(check="of_ones_own"))
    assert not is_recorded(result(float("nan")))
    assert not is_recorded(CheckResult("perplexity_drift", "out/a", Outcome.SKIPPED, "why"))


# --------------------------------------------------------------------------------------- the file


def test_the_file_is_sorted_and_gives_back_what_was_written(tmp_path: Path) -> None:
    one, two = result(0.25, **{FACTS: MADE, ITEMS: {"1": 2.0, "0": 0.1}}), result(3, adapter="ä")
    path = tmp_path / "deep" / "b.json"
    Baseline("b.json").record(path, [one, two])
    assert path.read_text("utf-8") == of(two, one).text()
    assert read(path).text() == path.read_text("utf-8")
    assert read(path).reference("ä", "perplexity_drift[wiki]").value == 3


def test_what_another_run_recorded_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    early = Baseline("b.json")
    Baseline("b.json").record(path, [result(0.3, adapter="out/b")])
    early.record(path, [result(0.2)])
    assert sorted(read(path).adapters) == ["out/a", "out/b"]


def test_a_baseline_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the baseline"):
        Baseline("b.json").record(tmp_path / "file" / "b.json", [result()])


def test_one_measurement_more_is_a_few_lines_more() -> None:
    before = of(result(0.1), result(0.3, part="stories")).text().splitlines()
    after = of(result(0.1), result(0.2, part="code"), result(0.3, part="stories"))
    assert len(after.text().splitlines()) == len(before) + 6
    assert set(before) <= set(after.text().splitlines())


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.dictionaries(
        NAMES,
        st.dictionaries(
            NAMES, st.tuples(NUMBERS, st.dictionaries(NAMES, NUMBERS, max_size=3)), max_size=3
        ),
        max_size=3,
    )
)
def test_any_baseline_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, data: Mapping[str, Any]
) -> None:
    adapters = {
        name: {
            label: Reference(value, "units", 3, {"base": name}, items)
            for label, (value, items) in entries.items()
        }
        for name, entries in data.items()
    }
    path = tmp_path_factory.getbasetemp() / "law-of-baselines.json"
    known = Baseline("b.json", adapters)
    path.write_text(known.text(), encoding="utf-8")
    again = read(path)
    assert again.text() == known.text()
    assert _numbers(again) == _numbers(known)


def _numbers(baseline: Baseline) -> Any:
    return {
        name: {label: (found.value, found.items) for label, found in entries.items()}
        for name, entries in baseline.adapters.items()
    }


def test_a_name_that_is_no_unicode_is_kept(tmp_path: Path) -> None:
    name = b"out/\xff".decode("utf-8", "surrogateescape")
    path = tmp_path / "b.json"
    Baseline("b.json").record(path, [result(adapter=name)])
    assert read(path).reference(name, "perplexity_drift[wiki]").value == 0.2


WHOLE = json.loads(of(result()).text())


def broken(**entry: Any) -> str:
    text = json.loads(json.dumps(WHOLE))
    text["adapters"]["out/a"]["perplexity_drift[wiki]"] |= entry
    return json.dumps(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("{", "not JSON"),
        ("[]", "an object was expected"),
        ('{"schema": "pytest-lora/report/1"}', "schema 'pytest-lora/report/1', expected"),
        ('{"schema": "pytest-lora/baseline/1"}', "no 'adapters'"),
        ('{"schema": "pytest-lora/baseline/1", "adapters": {"a": 3}}', "'a' holds no measurements"),
        ('{"schema": "pytest-lora/baseline/1", "adapters": {"a": {"b": 3}}}', "is no measurement"),
        (broken(value="0.2"), "out/a perplexity_drift.wiki.' is no measurement"),
        (broken(value=True), "is no measurement"),
        (broken(unit=3), "is no measurement"),
        (broken(count=None), "is no measurement"),
        (broken(count=0), "is no measurement"),
        (broken(count=True), "is no measurement"),
        (broken(count=10**400), "is no measurement"),
        (broken(value=10**400), "is no measurement"),
        (broken(by_item={"0": 10**400}), "is no measurement"),
        (broken(facts=[]), "is no measurement"),
        (broken(by_item={"0": "x"}), "is no measurement"),
    ],
)
def test_what_is_no_baseline_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=f"^b.json: not a baseline: .*{says}"):
        read(path)


def test_a_baseline_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no baseline yet: record it with --lora-update-baseline"):
        read(tmp_path / "b.json")


# --------------------------------------------------------------------------------------- refusals


def test_an_unlike_comparison_names_what_differs_and_says_more_than_a_digest() -> None:
    reference = of(result(**{FACTS: MADE})).reference("out/a", "perplexity_drift[wiki]")
    reference.require(MADE)
    with pytest.raises(CannotRun, match=r"dtype was 'float32' and is 'bfloat16' \(and base\)"):
        reference.require({**MADE, "dtype": "bfloat16", "base": "cd34"})


@pytest.mark.parametrize("name", sorted(FLAT))
def test_any_fact_that_differs_refuses(name: str) -> None:
    reference = of(result(**{FACTS: MADE})).reference("out/a", "perplexity_drift[wiki]")
    missing = {key: value for key, value in FLAT.items() if key != name}
    for facts in (missing, {**FLAT, name: "another"}):
        with pytest.raises(CannotRun, match=f"not comparable: {name} was "):
            reference.require(facts)
    with pytest.raises(CannotRun, match="window was absent and is 512"):
        reference.require({**FLAT, "window": 512})


def test_what_is_known_before_anything_is_measured_is_compared_then() -> None:
    facts = {FACTS: {**MADE, "cycles": 3}}
    reference = of(result(**facts)).reference("out/a", "perplexity_drift[wiki]")
    reference.require_shared(MADE)
    with pytest.raises(CannotRun, match="dtype was 'float32' and is 'bfloat16'; record"):
        reference.require_shared({**MADE, "dtype": "bfloat16"})


def test_another_quantity_of_the_same_check_is_refused() -> None:
    reference = of(result(**{FACTS: MADE})).reference("out/a", "perplexity_drift[wiki]")
    reference.require(MADE, "nats per token")
    with pytest.raises(CannotRun, match="unit was 'nats per token' and is 'accuracy'"):
        reference.require(MADE, "accuracy")


def test_what_was_not_recorded_is_no_pass() -> None:
    known = of(result())
    with pytest.raises(CannotRun, match="nothing recorded of out/new, only of out/a; record"):
        known.reference("out/new", "perplexity_drift[wiki]")
    with pytest.raises(CannotRun, match=r"no perplexity_drift\[code\] recorded of out/a"):
        known.reference("out/a", "perplexity_drift[code]")


def test_no_name_is_a_command_to_terminals_or_to_a_runner(tmp_path: Path) -> None:
    name = "out/\x1b[2J\n##[error]x"
    failed = result(adapter=name, outcome=Outcome.FAILED)
    known = of(result(adapter=name, **{FACTS: MADE}))
    (tmp_path / "b.json").write_text(known.text().replace('"unit"', '"units"'), encoding="utf-8")
    said = [known.told([failed])]
    asked: list[Callable[[], object]] = [
        lambda: known.reference("v2", "delta_spectrum"),
        lambda: known.reference(name, "delta_spectrum"),
        lambda: of(result()).reference(name, "delta_spectrum"),
        lambda: read(tmp_path / "b.json"),
        lambda: replace(
            known.reference(name, "perplexity_drift[wiki]"), where=name, facts={name: name}
        ).require({}),
    ]
    for call in asked:
        with pytest.raises((CannotRun, UsageError)) as caught:
            call()
        said.append(str(caught.value))
    for text in said:
        assert "error]x" in text
        assert text.isprintable()
        assert "##[" not in text


def test_one_adapter_is_compared_with_the_only_one_whatever_its_name() -> None:
    assert of(result()).reference("v2", "perplexity_drift[wiki]", alone=True).value == 0.2
    two = of(result(), result(adapter="out/b"))
    with pytest.raises(CannotRun, match="only of out/a, out/b"):
        two.reference("v2", "perplexity_drift[wiki]", alone=True)


# ---------------------------------------------------------------------------------------- remarks


def test_results_say_how_they_compare_and_judge_nothing() -> None:
    reference = of(result(0.2, **{FACTS: MADE})).reference("out/a", "perplexity_drift[wiki]")
    for value, note in (
        (0.2, "baseline: 0.2 (n=24), unchanged"),
        (0.25, "baseline: 0.2 (n=24), +0.05 since"),
    ):
        noted = with_remark(with_facts(result(value), MADE), reference)
        assert noted.measurement is not None
        assert noted.measurement.notes == (note,)
        assert noted.outcome is Outcome.PASSED
    changed = result(-0.05)
    assert changed.measurement is not None
    paired = replace(changed.measurement, unit=f"{reference.unit}, since the baseline")
    noted = with_remark(with_facts(replace(changed, measurement=paired), MADE), reference)
    assert noted.measurement is not None
    assert noted.measurement.notes == ("baseline: 0.2 (n=24), -0.05 since",)
    other = with_remark(with_facts(result(), {**MADE, "dtype": "float16"}), reference)
    assert other.measurement is not None
    assert other.measurement.notes == (
        "not comparable with the baseline: dtype was 'float32' and is 'float16'",
    )
