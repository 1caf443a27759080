"""Graders: each says right to what is right, and wrong to what only looks so."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest

from pytest_lora.errors import UsageError
from pytest_lora.tasks.graders import (
    GRADERS,
    RegexAnswer,
    best_choice,
    choice_lengths,
    final_number,
    normalise,
    score_of,
)
from pytest_lora.tasks.records import Length, TaskItem


def item(answer: str = "", **more: Any) -> TaskItem:
    return TaskItem("7", "a question", answer, **more)


@pytest.mark.parametrize(
    ("grader", "answer", "reference", "right"),
    [
        ("exact", " Paris\n", "Paris", True),
        ("exact", "paris", "Paris", False),
        ("exact", "", "Paris", False),
        ("normalised", "The answer, Paris!", "answer paris", True),
        ("normalised", "-3", "3", False),
        ("normalised", "1.5", "15", False),
        ("normalised", "x", "y", False),
        ("normalised", "...", "!", False),
        ("gsm8k", "so 5 + 3 = 8\n#### 8", "#### 8", True),
        ("gsm8k", "the total is $1,234.50.", "1234.5", True),
        ("gsm8k", "#### 8 apples, not 9", "8", True),
        ("gsm8k", "#### 9\nQuestion: ...\n#### 8", "8", True),
        ("gsm8k", "80", "8", False),
        ("gsm8k", "-8", "8", False),
        ("gsm8k", "eight", "8", False),
        ("gsm8k", "", "8", False),
    ],
)
def test_texts_and_numbers(grader: str, answer: str, reference: str, right: bool) -> None:
    assert score_of(GRADERS[grader], answer, item(reference)) == right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### -10", "-10"),
        ("#### 1,450,000", "1450000"),
        (r"\\boxed{1{,}450{,}000}", "1450000"),
        (r"the profit is $70\,000$", "70000"),
        (r"$70,\!000$", "70000"),
        (r"take 3\,5 or 1{,}20", "20"),
        ("\u2212 and \u22123", "-3"),
        ("it is -$3.50", "-3.50"),
        ("it is $-3", "-3"),
        ("it is -$-3", "-3"),
        ("it costs $ 5.", "5"),
        ("10 - 6", "6"),
        ("10-6", "6"),
        ("(2)-6", "6"),
        ("costs .5", "0.5"),
        ("12,34", "34"),
        ("3, 4 and 5.", "5"),
        ("4 #### none", "4"),
    ],
)
def test_final_numbers(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


def test_a_reference_without_a_number_is_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(UsageError, match="item 7: there is no number in 'eight'"):
        GRADERS["gsm8k"]("8", item("eight"))


def test_final_numbers_of_huge_answers_take_no_time() -> None:
    assert final_number("9" * 200_000) is not None
    assert final_number("-$,." * 200_000) is None
    assert final_number("1," * 200_000) == 1


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The  U.S.A. ", "usa"),
        ("An apple a day", "apple day"),
        ("well-known \u2014 fact", "wellknown fact"),
        ("\uff21\uff22", "ab"),
        ("STRASSE stra\u00dfe", "strasse strasse"),
        ("\u22121,000.5.", "-1,000.5"),
        ("x-1 x -1", "x1 x -1"),
        ("a_b c", "ab c"),
    ],
)
def test_normalisation_is_as_defined(text: str, plain: str) -> None:
    assert normalise(text) == plain
    assert normalise(plain) == plain


def test_patterns_take_the_last_match_and_its_first_group() -> None:
    grader = RegexAnswer.of(r"answer is (\w+)")
    assert grader("the answer is B, no, the answer is C.", item("C")) is True
    assert grader("the answer is B, no, the answer is C.", item("B")) is False
    assert grader("C", item("C")) is False
    assert RegexAnswer.of(r"\d+")("7 or 8", item("8")) is True
    assert RegexAnswer.of(r"(x)?\d")("8", item("8")) is False
    assert grader.name == r"regex answer is (\w+)"


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|b)*c", "(", "x" * 70_000])
def test_patterns_that_may_never_end_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="the pattern"):
        RegexAnswer.of(pattern)


def test_the_first_label_counts() -> None:
    one = item("answer1", extra={"labels": ["answer1", "answer2", "answer10"]})
    grade = GRADERS["label"]
    assert grade("the correct answer is Answer1", one) is True
    assert grade("answer2, not answer1", one) is False
    assert grade("answer10", one) is False
    assert grade("answers", one) is False
    with pytest.raises(UsageError, match="item 7 has no labels"):
        grade("answer1", item("answer1"))


def test_callables_grade_too_and_what_they_do_wrong_is_said() -> None:
    assert score_of(lambda answer, item: 0.25, "x", item()) == 0.25
    assert score_of(lambda answer, item: answer == item.prompt, "a question", item()) == 1
    with pytest.raises(UsageError, match=r"gave item 7 1\.5, expected 0 to 1"):
        score_of(lambda answer, item: 1.5, "x", item())
    with pytest.raises(UsageError, match="gave item 7 nan"):
        score_of(lambda answer, item: math.nan, "x", item())
    with pytest.raises(UsageError, match="failed on item 7: KeyError: 'depth'"):
        score_of(lambda answer, item: item.extra["depth"], "x", item())
    with pytest.raises(UsageError, match="failed on item 7: TypeError"):
        score_of(lambda answer, item: None, "x", item())  # type: ignore[arg-type, return-value]


def test_choices_by_length() -> None:
    question = item(choices=("ab", "\u00e4\u00f6\u00fc"), correct=0)
    assert choice_lengths(question, [5, 1], Length.NONE) == [1, 1]
    assert choice_lengths(question, [5, 1], Length.CHARACTERS) == [2, 3]
    assert choice_lengths(question, [5, 1], Length.BYTES) == [2, 6]
    assert choice_lengths(question, [5, 1], Length.TOKENS) == [5, 1]


def test_the_best_choice() -> None:
    assert best_choice([-4.0, -3.0], [1, 1]) == 1
    assert best_choice([-4.0, -3.0], [4, 1]) == 0
    assert best_choice([-1.0, -1.0], [1, 1]) == 0
    assert best_choice([-math.inf, -9.0], [1, 1]) == 1
    assert best_choice([math.nan, -9.0], [1, 1]) is None
