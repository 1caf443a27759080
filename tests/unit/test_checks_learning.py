"""task_accuracy: the adapter passes where the base fails; wrong evaluations are noticed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from example import FIXTURES, NEEDS_EXAMPLE
from peft import PeftModel
from tiny_chat import ADAPTERS, example_subject, head_of, mutated
from transformers import AutoModelForCausalLM

from pytest_lora.assertions import assert_task_accuracy
from pytest_lora.baseline import Baseline, Reference
from pytest_lora.checks.learning import _to_decide, measure_task_accuracy, measure_task_change
from pytest_lora.errors import CannotRun, CheckFailed, UsageError
from pytest_lora.loading import load_tokenizer, quiet
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, collecting
from pytest_lora.stats.proportions import wilson_interval
from pytest_lora.subject import Subject
from pytest_lora.tasks.configure import task_from_config
from pytest_lora.tasks.graders import GRADERS
from pytest_lora.tasks.records import Task, TaskItem
from pytest_lora.tasks.scoring import ItemScore, ItemScorer, excerpt

pytestmark = NEEDS_EXAMPLE

DATA = FIXTURES / "data"
PROBLEMS = task_from_config(
    "problems", {"path": "target_tasks.jsonl", "grader": "gsm8k", "max_new_tokens": 24}, DATA
)
FACTS = task_from_config("facts", {"path": "source_choices.jsonl"}, DATA)


def part(task: Task, count: int) -> Task:
    return task.with_rules(items=task.items[:count])


@pytest.fixture(scope="module")
def subject() -> Subject:
    return example_subject("attention-lora")


# ------------------------------------------------------------------------------ verdicts


def test_the_adapter_passes_with_few_items(subject: Subject) -> None:
    measured = assert_task_accuracy(subject, PROBLEMS, min_accuracy=0.5)
    assert measured.count < 40
    assert measured.low is not None
    assert measured.low >= 0.5
    assert measured.details["tokenizer"] == "the base model's"
    assert subject.base.verify() == ()


def test_the_base_fails_where_the_adapter_passes(subject: Subject) -> None:
    """An adapter evaluated without its adapter."""
    bare = mutable(subject)
    with pytest.raises(CheckFailed) as caught:
        assert_task_accuracy(bare, PROBLEMS, min_accuracy=0.5)
    measured = caught.value.result.measurement
    assert measured is not None
    assert measured.high is not None
    assert measured.high < 0.5
    assert "answered" in str(caught.value)


def mutable(subject: Subject) -> Subject:
    """The same subject, whose model is the untouched base."""

    class Bare(Subject):
        @property
        def model(self) -> Any:
            return self.base.module

    subject.release()
    return Bare(subject.adapter, subject.base)


def test_a_whole_evaluation_is_exact_and_agrees_with_the_sequential_one(subject: Subject) -> None:
    task = part(PROBLEMS, 20)
    whole = measure_task_accuracy(subject, task, min_accuracy=0.5, full=True)
    early = measure_task_accuracy(subject, task, min_accuracy=0.5)
    assert (whole.count, whole.low, whole.high) == (20, None, None)
    assert early.count < 20
    assert early.low is not None
    assert early.high is not None
    assert early.low <= whole.value <= early.high
    scores: Any = whole.details["by_item"]
    assert whole.value == sum(scores.values()) / 20
    subset: Any = early.details["by_item"]
    assert subset.items() <= scores.items()


def test_a_verdict_by_curtailment_is_certain(subject: Subject) -> None:
    task = part(PROBLEMS, 12)
    measured = measure_task_accuracy(subject, task, min_accuracy=0.5, alpha=1e-9)
    assert measured.count < 12
    assert measured.details["certain"] is True
    assert Bound.at_least(0.5, "test").judge(measured) is Outcome.PASSED
    high = measure_task_accuracy(subject, part(FACTS, 24), min_accuracy=0.99, alpha=1e-9)
    assert high.count < 24
    assert high.details["certain"] is True
    assert Bound.at_least(0.99, "test").judge(high) is Outcome.FAILED


def test_the_same_inputs_give_the_same_result(subject: Subject) -> None:
    def once(**options: Any) -> str:
        measured = measure_task_accuracy(subject, part(PROBLEMS, 16), min_accuracy=0.5, **options)
        return json.dumps(measured.to_dict())

    first = once()
    assert once() == first
    assert once(seed=1) != first
    # Another batch size is other arithmetic, but the same items decide.
    other = json.loads(once(batch_size=3))
    assert other["count"] == json.loads(first)["count"]


@pytest.mark.parametrize(
    ("grader", "passes"), [("gsm8k", True), ("exact", False), ("normalised", False)]
)
def test_a_wrong_grader_is_noticed(subject: Subject, grader: str, passes: bool) -> None:
    task = part(PROBLEMS, 16).with_rules(grader=GRADERS[grader], min_accuracy=0.5)
    if passes:
        assert_task_accuracy(subject, task)
        return
    with pytest.raises(CheckFailed, match="answered"):
        assert_task_accuracy(subject, task)


def test_shifted_answers_are_noticed(subject: Subject) -> None:
    items = part(PROBLEMS, 16).items
    shifted = tuple(
        TaskItem(item.id, item.prompt, other.answer)
        for item, other in zip(items, items[1:] + items[:1], strict=True)
    )
    with pytest.raises(CheckFailed):
        assert_task_accuracy(subject, PROBLEMS.with_rules(items=shifted), min_accuracy=0.5)


def test_shifted_choices_are_noticed(subject: Subject) -> None:
    items = tuple(
        TaskItem(i.id, i.prompt, choices=i.choices, correct=((i.correct or 0) + 1) % len(i.choices))
        for i in part(FACTS, 24).items
    )
    assert_task_accuracy(subject, part(FACTS, 24), min_accuracy=0.5)
    with pytest.raises(CheckFailed):
        assert_task_accuracy(subject, FACTS.with_rules(items=items), min_accuracy=0.5)


def test_nan_is_noticed_and_counts_as_wrong(tmp_path: Path, subject: Subject) -> None:
    broken = mutated("saved-head", tmp_path / "a", lambda t: head_of(t).fill_(float("nan")))
    ill = example_subject(broken, subject.base)
    for task in (
        part(FACTS, 12),
        part(PROBLEMS, 12).with_rules(grader=lambda answer, item: True, max_new_tokens=2),
    ):
        measured = measure_task_accuracy(ill, task)
        assert (measured.value, measured.details["not_finite"]) == (0.0, 12)
        assert "12 answers rest on NaN; they count as wrong" in measured.notes


# -------------------------------------------------------------------------- with the base


def test_a_gain_on_the_target_and_a_loss_on_the_source(subject: Subject) -> None:
    task = part(PROBLEMS, 12)
    gain = assert_task_accuracy(subject, task, min_change=0.2, domain=True)
    assert gain.low is not None
    assert gain.low > 0.2
    with pytest.raises(CheckFailed, match="the base model has it right") as caught:
        assert_task_accuracy(subject, part(FACTS, 48), min_change=-0.02, domain=True)
    loss = caught.value.result.measurement
    assert loss is not None
    base: Any = loss.details["base"]
    assert base["accuracy"] == 1.0
    assert base["lost"] == round(-loss.value * 48)
    assert base["mcnemar_p"] < 0.01
    assert base["non_inferiority_p"] > 0.99


def test_few_items_do_not_decide_about_a_domain(subject: Subject) -> None:
    """0.90 of twelve is no 0.85 of everything."""
    task = part(PROBLEMS, 12)
    with pytest.raises(CheckFailed) as caught:
        assert_task_accuracy(subject, task, min_accuracy=0.85, domain=True)
    assert caught.value.result.outcome is Outcome.INCONCLUSIVE
    measured = caught.value.result.measurement
    assert measured is not None
    assert measured.count == 12
    right = round(measured.value * 12)
    assert (measured.low, measured.high) == wilson_interval(right, 12, 0.95)
    assert re.search(r"give more items: about [\d,]+ would decide", str(caught.value))
    domain: Any = measured.details["domain"]
    assert domain["minimum_detectable_effect"] > 0.1
    assert domain["items_for_two_points"] > 500


@pytest.mark.parametrize(
    ("value", "limit", "needed"), [(0.9, 0.5, 3), (0.9, 0.88, 865), (0.9, 0.9, None)]
)
def test_how_many_items_would_decide(value: float, limit: float, needed: int | None) -> None:
    """1.96 standard errors, of 0.3 over the root of their number, are the distance to the limit."""
    scores = [1.0] * round(100 * value) + [0.0] * round(100 * (1 - value))
    assert _to_decide(scores, limit, 0.95) == needed
    if needed is not None:
        assert 1.96 * 0.3 / math.sqrt(needed) == pytest.approx(abs(value - limit), rel=0.2)


def test_changes_on_few_items_say_how_many_would_decide(
    subject: Subject, scripted: dict[bool, float]
) -> None:
    task = part(PROBLEMS, 40)
    scripted |= {False: 24, True: 20}
    with pytest.raises(CheckFailed, match=r"about [0-9,]+ would decide") as caught:
        assert_task_accuracy(subject, task, min_change=0.05, domain=True)
    assert caught.value.result.outcome is Outcome.INCONCLUSIVE
    reference = reference_of(measure_task_accuracy(subject, task))
    scripted[False] = 26
    with pytest.raises(CheckFailed, match=r"about [0-9,]+ would decide"):
        assert_task_accuracy(subject, task, min_change=0.0, domain=True, reference=reference)
    scripted[False] = 24
    with pytest.raises(CheckFailed, match="no number of items decides"):
        assert_task_accuracy(subject, task, min_change=0.0, domain=True, reference=reference)


def test_the_base_beside_the_adapter(subject: Subject) -> None:
    measured = measure_task_accuracy(subject, part(FACTS, 16), base=True, min_accuracy=0.5)
    base: Any = measured.details["base"]
    assert measured.count == 16
    assert base["change"] == pytest.approx(measured.value - 1.0)
    bare = measure_task_accuracy(mutable(subject), part(FACTS, 16))
    assert base["accuracy"] == bare.value


def test_lengths_of_choices(subject: Subject) -> None:
    measured = measure_task_accuracy(subject, part(FACTS, 24))
    by_length: Any = measured.details["by_length"]
    assert set(by_length) == {"none", "characters", "bytes", "tokens"}
    assert by_length["none"] == measured.value
    assert by_length["characters"] == by_length["bytes"]  # it is all ASCII


# ---------------------------------------------------------------------- grades and stores


def test_grades_between_wrong_and_right_need_every_item(subject: Subject) -> None:
    task = part(PROBLEMS, 9).with_rules(grader=lambda answer, item: 0.5 + 0.5 * ("9" in answer))
    measured = measure_task_accuracy(subject, task, min_accuracy=0.1)
    assert (measured.count, measured.low) == (9, None)
    assert 0.5 <= measured.value < 1
    change = measure_task_change(subject, task)
    base: Any = change.details["base"]
    assert "mcnemar_p" not in base
    assert change.value == pytest.approx(base["change"])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[bool, float]:
    """How many of the first items are right, with the base and without; no model is asked."""
    right: dict[bool, float] = {}

    class Scripted(ItemScorer):
        def __init__(self, *given: Any, base: bool = False, **options: Any) -> None:
            super().__init__(*given, base=base, **options)
            self.right = right[base]

        def scores(self, indices: Sequence[int]) -> list[ItemScore]:
            self.computed += len(indices)
            return [ItemScore(index, float(index < self.right), None) for index in indices]

    monkeypatch.setattr("pytest_lora.checks.learning.ItemScorer", Scripted)
    return right


def test_losing_exactly_what_may_be_lost_passes(
    subject: Subject, scripted: dict[bool, float]
) -> None:
    """7 of 10 after 8 of 10, in floats, is a loss of more than 0.1."""
    scripted |= {False: 7, True: 8}
    measured = assert_task_accuracy(subject, part(PROBLEMS, 10), min_change=-0.1, full=True)
    assert measured.value == -0.1
    assert_task_accuracy(subject, part(PROBLEMS, 10), min_change=-0.1)
    scripted[False] = 6
    for full in (True, False):
        with pytest.raises(CheckFailed):
            assert_task_accuracy(subject, part(PROBLEMS, 10), min_change=-0.1, full=full)


def test_a_change_is_known_before_every_item_was_asked(
    subject: Subject, scripted: dict[bool, float]
) -> None:
    task = PROBLEMS
    size = len(task)
    scripted |= {False: 0.9 * size, True: 0.2 * size}
    gain = assert_task_accuracy(subject, task, min_change=0.1)
    assert gain.count < size / 4
    assert gain.low is not None
    assert gain.high is not None
    assert 0.1 <= gain.low <= gain.value <= gain.high
    assert gain.low <= 0.7 <= gain.high
    base: Any = gain.details["base"]
    assert base["change"] == gain.value == (base["gained"] - base["lost"]) / gain.count
    assert not {"mcnemar_p", "non_inferiority_p", "interval"} & base.keys()
    assert any("--lora-full-eval" in note for note in gain.notes)
    sequential: Any = gain.details["sequential"]
    last = sequential["path"][-1]
    assert (last["used"], last["estimate"]) == (gain.count, pytest.approx(gain.value))
    assert last["low"] <= last["estimate"] <= last["high"]
    scripted |= {False: 0.2 * size, True: 0.9 * size}
    with pytest.raises(CheckFailed) as caught:
        assert_task_accuracy(subject, task, min_change=-0.02)
    loss = caught.value.result.measurement
    assert loss is not None
    assert loss.count < size / 4
    assert loss.high is not None
    assert loss.value <= loss.high < -0.02


@pytest.mark.parametrize(("right", "passes"), [(0.5, True), (0.4, False)])
def test_a_close_change_takes_the_whole_set_and_is_exact(
    subject: Subject, scripted: dict[bool, float], right: float, passes: bool
) -> None:
    """What lies on the limit cannot be known early."""
    task = part(PROBLEMS, 40)
    scripted |= {False: 40 * right, True: 20}
    measured = measure_task_change(subject, task, min_change=0.0)
    whole = measure_task_change(subject, task, min_change=0.0, full=True)
    assert whole.value == pytest.approx(right - 0.5)
    bound = Bound.at_least(0.0, "test")
    assert (bound.judge(measured) is Outcome.PASSED) is passes
    assert bound.judge(measured) is bound.judge(whole)


def test_an_early_change_is_the_same_each_time_and_however_it_is_cut(
    subject: Subject, scripted: dict[bool, float]
) -> None:
    scripted |= {False: 0.9 * len(PROBLEMS), True: 0.5 * len(PROBLEMS)}

    def once(**options: Any) -> str:
        measured = measure_task_change(subject, PROBLEMS, min_change=0.1, **options)
        return json.dumps({**measured.to_dict(), "details": {**measured.details, "computed": None}})

    assert once() == once() == once(batch_size=3)
    assert json.loads(once(alpha=1e-9))["count"] > json.loads(once())["count"]


class Kept(dict[str, float]):
    """The simplest store."""

    def put(self, key: str, score: float) -> None:
        self[key] = score


@pytest.mark.parametrize("task", [part(PROBLEMS, 16), part(FACTS, 16)], ids=["written", "chosen"])
def test_an_interrupted_run_goes_on(subject: Subject, task: Task) -> None:
    whole = measure_task_accuracy(subject, task)

    class Enough(Exception):
        pass

    def stop(done: int, total: int, estimate: float | None, seconds: float | None) -> None:
        assert total == 16
        if done >= 8:
            raise Enough

    store = Kept()
    with pytest.raises(Enough):
        measure_task_accuracy(subject, task, store=store, progress=stop)
    again = measure_task_accuracy(subject, task, store=store)
    assert again.details["computed"] == 8
    assert (again.value, again.details["by_item"]) == (whole.value, whole.details["by_item"])
    assert measure_task_accuracy(subject, task, store=store).details["computed"] == 0
    before = len(store)
    other = task.with_rules(template="{prompt} ")
    assert measure_task_accuracy(subject, other, store=store).details["computed"] == 16
    assert len(store) == 2 * before


def test_base_and_adapter_are_kept_apart(subject: Subject) -> None:
    store = Kept()
    first = measure_task_accuracy(subject, part(FACTS, 16), base=True, store=store)
    again = measure_task_accuracy(subject, part(FACTS, 16), base=True, store=store)
    assert first.details["base"] == again.details["base"]
    assert again.details["computed"] == 0
    other = example_subject("overtrained", subject.base)
    assert measure_task_accuracy(other, part(FACTS, 16), store=store).details["computed"] == 16


# -------------------------------------------------------------------- arguments and models


def test_a_live_model_is_judged_too() -> None:
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(FIXTURES / "base")
        model = PeftModel.from_pretrained(base, ADAPTERS / "attention-lora")
    with collecting() as results:
        measured = assert_task_accuracy(
            model,
            part(PROBLEMS, 16),
            min_accuracy=0.5,
            tokenizer=load_tokenizer(FIXTURES / "base"),
        )
    assert results[0].measurement == measured
    assert (results[0].check, results[0].outcome) == ("task_accuracy", Outcome.PASSED)
    assert measured.details["tokenizer"] == "given"
    Measurement.from_dict(json.loads(json.dumps(measured.to_dict())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no floor to judge by"),
        ({"min_accuracy": 50}, "min_accuracy=50"),
        ({"min_accuracy": Bound.at_most(1, "x")}, "min_accuracy is a lower limit"),
        ({"min_accuracy": 0.5, "min_change": 0}, "are two questions"),
        ({"min_change": -2}, "min_change=-2"),
        ({"min_accuracy": 0.5, "alpha": 0}, "alpha=0"),
        ({"min_accuracy": 0.5, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_arguments_that_cannot_be_meant(
    subject: Subject, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        assert_task_accuracy(subject, PROBLEMS, **options)


def test_programs_need_a_grader_that_runs_them(subject: Subject) -> None:
    task = Task("code", (TaskItem("1", "def one():"),), format="humaneval")
    with pytest.raises(UsageError, match=r"task code \(humaneval\) has no grader"):
        measure_task_accuracy(subject, task)


def test_excerpts_are_short_and_on_one_line() -> None:
    assert excerpt(" a\nb\x1b[31m ") == "a\\nb\\x1b[31m"
    assert len(excerpt("x" * 1000)) <= 120
    assert excerpt("x" * 1000).count(" ... ") == 1


def test_nothing_is_left_behind(subject: Subject) -> None:
    subject.release()
    assert subject.base.verify() == ()
    assert not any(m._forward_pre_hooks for m in subject.base.module.modules())
    assert torch.is_grad_enabled()


# ------------------------------------------------------------------------ against a baseline


def reference_of(measured: Measurement, **changes: Any) -> Reference:
    result = CheckResult(
        "task_accuracy",
        "a",
        Outcome.PASSED,
        measurement=measured,
        bound=Bound.at_least(0, "test"),
        part="problems",
    )
    found = Baseline("b.json").updated([result]).reference("a", "task_accuracy[problems]")
    return replace(found, **changes)


def test_a_recorded_accuracy_takes_the_place_of_the_base(subject: Subject) -> None:
    task = part(PROBLEMS, 16)
    reference = reference_of(measure_task_accuracy(subject, task))
    same = measure_task_change(subject, task, reference=reference, domain=True)
    assert (same.value, same.count) == (0, 16)
    assert same.low is not None
    assert same.high is not None
    assert same.low < 0 < same.high
    bare = measure_task_change(mutable(subject), task, reference=reference)
    assert bare.value < -0.5
    details: Any = bare.details["baseline"]
    assert details["gained"] == 0
    assert details["lost"] == round(-16 * bare.value)


def test_an_early_verdict_compares_the_items_it_saw(subject: Subject) -> None:
    task = part(PROBLEMS, 20)
    reference = reference_of(measure_task_accuracy(subject, task))
    early = measure_task_accuracy(subject, task, min_accuracy=0.5, reference=reference)
    assert early.count < 20
    details: Any = early.details["baseline"]
    assert details["items"] == early.count
    assert (details["gained"], details["lost"]) == (0, 0)
    assert details["accuracy"] == reference.value
    assert "mcnemar_p" not in details
    whole = measure_task_accuracy(subject, task, min_accuracy=0.5, reference=reference, full=True)
    details = whole.details["baseline"]
    assert details["mcnemar_p"] == 1


def test_another_task_or_rule_is_refused(subject: Subject) -> None:
    task = part(PROBLEMS, 4)
    reference = reference_of(measure_task_accuracy(subject, task))
    with pytest.raises(CannotRun, match=r"not comparable: rules\.max_new_tokens was 24 and is 25"):
        measure_task_accuracy(subject, task.with_rules(max_new_tokens=25), reference=reference)


def test_a_recorded_change_is_no_recorded_accuracy(subject: Subject) -> None:
    """A floor such as -0.07 - 0.05 would let everything pass."""
    task = part(PROBLEMS, 4)
    reference = reference_of(measure_task_change(subject, task))
    for measure in (measure_task_accuracy, measure_task_change):
        with pytest.raises(CannotRun, match="unit was 'accuracy, adapter minus base' and is"):
            measure(subject, task, reference=reference)


def test_a_change_in_the_domain_needs_every_score(subject: Subject) -> None:
    task = part(PROBLEMS, 4)
    kept = reference_of(measure_task_accuracy(subject, task), items={})
    with pytest.raises(CannotRun, match="holds the scores of 0 of 4 items"):
        measure_task_change(subject, task, reference=kept)
