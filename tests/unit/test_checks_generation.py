"""generation_health and generation_diversity: what is broken on purpose is named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from example import FIXTURES, NEEDS_EXAMPLE
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat import example_subject, head_of, mutated

from pytest_lora.assertions import assert_generation_diversity, assert_generation_health
from pytest_lora.checks.generation import (
    distinct,
    is_loop,
    measure_generation_diversity,
    measure_generation_health,
    repetition,
)
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.subject import Subject
from pytest_lora.tasks.configure import task_from_config

pytestmark = NEEDS_EXAMPLE

TASK = task_from_config(
    "problems",
    {"path": "target_tasks.jsonl", "grader": "gsm8k", "max_new_tokens": 20},
    FIXTURES / "data",
)
SOURCE = FIXTURES / "data" / "source_choices.jsonl"
EOS, SIGN = "</s>", "\u0120="


@pytest.fixture(scope="module")
def subject() -> Subject:
    return example_subject("saved-head")


def spoilt(subject: Subject, folder: Path, change: Any) -> Subject:
    """The adapter with another output layer; ``change`` gets it and the base's tokenizer."""
    tokenizer: Any = subject.base.tokenizer
    ill = mutated("saved-head", folder, lambda tensors: change(head_of(tensors), tokenizer))
    return example_subject(ill, subject.base)


def symptoms(subject: Subject, prompts: Any = TASK, **options: Any) -> set[str]:
    measured = measure_generation_health(subject, prompts, **{"count": 12, **options})
    assert measured.value == len(measured.problems)
    return {problem.where for problem in measured.problems}


# ------------------------------------------------------------------------------- health


def test_a_sound_adapter_is_well(subject: Subject) -> None:
    measured = assert_generation_health(subject, TASK, count=12)
    assert measured.count == 12
    table: Any = measured.details["symptoms"]
    assert all(found["worse"] == 0 for found in table.values())
    assert measured.notes == ()


def test_an_adapter_that_never_ends_is_found(subject: Subject, tmp_path: Path) -> None:
    """What training with pad_token = eos_token leaves: an EOS that is never likely."""

    def never(head: torch.Tensor, tokenizer: Any) -> None:
        head[tokenizer.convert_tokens_to_ids(EOS)] = 0

    ill = spoilt(subject, tmp_path / "a", never)
    with pytest.raises(CheckFailed, match="pad_token = eos_token"):
        assert_generation_health(ill, TASK, count=12, limits={"unstopped": 0})
    # The base ends most of these answers within so many tokens.
    found = measure_generation_health(ill, TASK, count=24, max_new_tokens=48)
    assert {problem.where for problem in found.problems} >= {"unstopped"}


def test_silence_and_loops_are_found(subject: Subject, tmp_path: Path) -> None:
    """All logits equal: the first token for ever, which is padding and so no text."""
    ill = spoilt(subject, tmp_path / "a", lambda head, _: head.zero_())
    assert symptoms(ill) >= {"empty", "looping"}


def test_leaks_are_found(subject: Subject, tmp_path: Path) -> None:
    def leak(head: torch.Tensor, tokenizer: Any) -> None:
        token = tokenizer.convert_tokens_to_ids("<|answer|>")
        head[token] = 2 * head[tokenizer.convert_tokens_to_ids(SIGN)]

    assert "leaking" in symptoms(spoilt(subject, tmp_path / "a", leak))


def test_template_pieces_are_leaks_too(subject: Subject) -> None:
    """The adapter answers with ``####``; were that in the template, it would repeat it."""
    task = TASK.with_rules(template="####\n{prompt}")
    measured = measure_generation_health(subject, task, count=12, limits={"leaking": 0})
    assert [problem.where for problem in measured.problems] == ["leaking"]
    stopping = task.with_rules(stop=("####",))
    assert symptoms(subject, stopping, limits={"leaking": 0}) == set()


def test_nan_is_found(subject: Subject, tmp_path: Path) -> None:
    ill = spoilt(subject, tmp_path / "a", lambda head, _: head.fill_(float("nan")))
    measured = measure_generation_health(ill, TASK, count=12, max_new_tokens=4)
    assert measured.problems[0].where == "broken"
    assert "12 of 12 answers rest on NaN" in measured.problems[0].found


def test_what_the_base_does_itself_is_not_held_against_the_adapter(
    subject: Subject, tmp_path: Path
) -> None:
    """In three tokens nobody comes to an end."""
    assert symptoms(subject, max_new_tokens=3) == set()
    assert symptoms(subject, max_new_tokens=3, limits={"unstopped": 0.5}) == {"unstopped"}


def test_too_few_prompts_decide_nothing(subject: Subject) -> None:
    with pytest.raises(CannotRun, match=r"11 prompts cannot decide .*: it takes 12"):
        measure_generation_health(subject, TASK, count=11)
    limits = {"unstopped": 0.0, "looping": 0.0, "empty": 0.0, "leaking": 0.0}
    assert symptoms(subject, count=2, limits=limits) == set()


def test_a_limit_is_judged_on_few_prompts_too_and_what_is_left_open_is_said(
    subject: Subject,
) -> None:
    measured = measure_generation_health(subject, TASK, count=2, limits={"unstopped": 0})
    assert measured.problems == ()
    assert measured.notes == (
        "not judged: looping, empty, leaking; 2 prompts cannot decide at an error rate of 0.001,"
        " it takes 12",
    )
    assert symptoms(subject, count=2, max_new_tokens=3, limits={"unstopped": 0}) == {"unstopped"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {"unstoped": 0}}, r"no symptom 'unstoped' \(did you mean 'unstopped'\?\)"),
        ({"limits": {"empty": 2}}, "empty = 2 is no share"),
        ({"alpha": 0}, "alpha=0"),
        ({"count": 0}, "count=0"),
    ],
)
def test_arguments_that_cannot_be_meant(
    subject: Subject, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        measure_generation_health(subject, TASK, **options)


# --------------------------------------------------------------------------------- loops


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([], False),
        ([1, 1], False),
        ([1, 1, 1], True),
        ([1, 2, 3, 4, 5, 6], False),
        ([1, 2, 1, 2, 1, 2], True),
        ([9, 8, 7, 1, 2, 1, 2, 1, 2, 1], True),
        ([9, 8, 7, 6, 5, 4, 3, 1, 1, 1], False),
        ([1, 2, 3, 1, 2, 3], False),
    ],
)
def test_loops(tokens: list[int], loops: bool) -> None:
    assert is_loop(tokens) is loops


@given(st.lists(st.integers(0, 2), max_size=30))
def test_loops_are_what_a_plain_search_finds(tokens: list[int]) -> None:
    def periodic(tail: list[int], period: int) -> bool:
        return all(a == b for a, b in zip(tail, tail[period:], strict=False))

    plain = any(
        periodic(tokens[-size:], period)
        for size in range(max(3, -(-len(tokens) // 2)), len(tokens) + 1)
        for period in range(1, size // 3 + 1)
    )
    assert is_loop(tokens) is plain


def test_loops_of_long_answers_take_no_time() -> None:
    assert is_loop([1] * 100_000)
    assert not is_loop(list(range(100_000)))


def test_repetition_and_distinct() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1] * 7) == pytest.approx(3 / 4)
    assert distinct([[1, 2], [1, 2]], 1) == 0.5
    assert distinct([[1, 2], [3, 4]], 2) == 1
    assert distinct([[1], []], 2) == 0


# ----------------------------------------------------------------------------- diversity


def test_variety_beside_the_base(subject: Subject) -> None:
    measured = assert_generation_diversity(subject, TASK, count=3, samples=4)
    base: Any = measured.details["base"]
    mine: Any = measured.details["adapter"]
    assert measured.value == pytest.approx((mine["unique"] - 1) / (base["unique"] - 1))
    assert measured.count == 12
    chances = list(mine["pass_at"].values())
    assert list(mine["pass_at"]) == ["1", "2", "4"]
    assert all(a <= b for a, b in itertools.pairwise(chances))
    again = measure_generation_diversity(subject, TASK, count=3, samples=4)
    assert again == measured
    with pytest.raises(CheckFailed, match="answers differ"):
        assert_generation_diversity(subject, TASK, count=3, samples=4, bound=5.0)


def test_a_collapsed_adapter_is_found(subject: Subject, tmp_path: Path) -> None:
    """Logits a thousand times as large are a temperature of a thousandth."""
    ill = spoilt(subject, tmp_path / "a", lambda head, _: head.mul_(1000))
    with pytest.raises(CheckFailed, match="1 of 4 answers differ") as caught:
        assert_generation_diversity(ill, TASK, count=3, samples=4)
    measured = caught.value.result.measurement
    assert measured is not None
    assert measured.value == 0
    mine: Any = measured.details["adapter"]
    assert mine["pass_at"]["1"] == mine["pass_at"]["4"]


def test_variety_takes_some_to_lose(subject: Subject) -> None:
    with pytest.raises(NotApplicable, match="there is no variety to lose"):
        measure_generation_diversity(subject, TASK, count=2, samples=2, temperature=1e-6)
    for options in ({"samples": 1}, {"temperature": 0}):
        with pytest.raises(UsageError, match="variety takes two samples"):
            measure_generation_diversity(subject, TASK, **options)


def test_plain_texts_and_files_do_as_prompts(subject: Subject) -> None:
    texts = [f"Bella has {n} plums. How many plums has she?\n<|answer|>" for n in range(2, 8)]
    limits = {"unstopped": 1.0, "looping": 1.0, "empty": 1.0, "leaking": 1.0}
    assert symptoms(subject, texts, limits=limits, max_new_tokens=4) == set()
    assert symptoms(subject, SOURCE, limits=limits, max_new_tokens=4, count=2) == set()
    subject.release()
    assert subject.base.verify() == ()
