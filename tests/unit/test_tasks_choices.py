"""Likelihoods of choices equal a plain loop's, whichever way they were computed."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny
import torch
from example import FIXTURES, NEEDS_EXAMPLE
from tiny_chat import example_subject

from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.numerics.noise import rounding_noise
from pytest_lora.subject import Subject
from pytest_lora.tasks import choices
from pytest_lora.tasks.choices import ChoiceScorer, Pair
from pytest_lora.tasks.formats import read_task
from pytest_lora.tasks.prompting import Prompter, TaskTokenizer, task_tokenizer

pytestmark = NEEDS_EXAMPLE

TASK = read_task(FIXTURES / "data" / "source_choices.jsonl")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return example_subject("attention-lora")


@pytest.fixture(scope="module")
def tokens(subject: Subject) -> TaskTokenizer:
    return task_tokenizer(subject)


@pytest.fixture(scope="module")
def pairs(tokens: TaskTokenizer) -> list[Pair]:
    return [pair for index in range(8) for pair in Prompter(TASK, tokens).choices(index)]


def plain(model: Any, pairs: list[Pair]) -> list[float]:
    found = []
    for context, continuation in pairs:
        with torch.inference_mode():
            logp = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
        picked = [logp[len(context) - 1 + i, token] for i, token in enumerate(continuation)]
        found.append(float(sum(picked)))
    return found


def rms(found: list[float], expected: list[float]) -> float:
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(found, expected, strict=True)))


def moved_by_rounding(model: Any, pairs: list[Pair], expected: list[float]) -> float:
    """How far the plain loop's own rounding may move it, on any processor."""
    with rounding_noise(model, 0):
        return rms(plain(model, pairs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("worth", [0, 10**9])
def test_values_are_those_of_a_plain_loop(
    subject: Subject,
    tokens: TaskTokenizer,
    pairs: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    worth: int,
    dtype: torch.dtype,
) -> None:
    """Up to rounding, which the shape of a batch changes: to 1e-10 in float64."""
    monkeypatch.setattr(choices, "WORTH", worth)
    model = subject.model.to(dtype)
    try:
        scorer = ChoiceScorer(model, tokens, batch_size=batch_size)
        found = scorer.likelihoods(pairs)
        expected = plain(model, pairs)
        allowed = moved_by_rounding(model, pairs, expected)
    finally:
        model.to(torch.float32)
    values = [item.value for item in found]
    assert rms(values, expected) <= allowed
    if dtype == torch.float64:
        assert values == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert [item.tokens for item in found] == [len(tail) for _, tail in pairs]
    assert scorer.notes == []


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_other_models_and_the_base(kind: str, tokens: TaskTokenizer) -> None:
    model = getattr(tiny, kind)()
    made = [([5, 9, 3], [7, 8]), ([5, 9, 3], [7]), ([4], [1, 2, 3, 4, 5]), ([5, 9, 3], [8])]
    found = [item.value for item in ChoiceScorer(model, tokens).likelihoods(made)]
    expected = plain(model, made)
    assert rms(found, expected) <= moved_by_rounding(model, made, expected)


def test_the_wrong_tokens_have_other_likelihoods(
    subject: Subject, tokens: TaskTokenizer, pairs: list[Pair]
) -> None:
    """Scores one position early, as without a shift, are nowhere near."""
    scorer = ChoiceScorer(subject.model, tokens)
    right = [item.value for item in scorer.likelihoods(pairs)]
    early = [(context[:-1], continuation) for context, continuation in pairs]
    wrong = [item.value for item in scorer.likelihoods(early)]
    assert min(abs(a - b) for a, b in zip(right, wrong, strict=True)) > 1e-3


class Counting:
    """A model that counts what it is given and what it gives."""

    def __init__(self, model: Any) -> None:
        self.model, self.inputs, self.logits = model, 0, 0
        self.peft_config = model.peft_config

    def get_base_model(self) -> Any:
        return self.model.get_base_model()

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        self.inputs += inputs["input_ids"].numel()
        self.logits = max(self.logits, output.logits.shape[:-1].numel())
        return output


def test_only_the_positions_that_count_get_logits(
    subject: Subject, tokens: TaskTokenizer, pairs: list[Pair]
) -> None:
    counting = Counting(subject.model)
    ChoiceScorer(counting, tokens, batch_size=4).likelihoods(pairs)
    assert counting.logits <= 4 * max(len(tail) for _, tail in pairs)


def test_logits_at_a_time_are_bounded(
    subject: Subject, tokens: TaskTokenizer, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "LOGIT_BYTES", 768 * 4 * 5)
    counting = Counting(subject.model)
    found = ChoiceScorer(counting, tokens, batch_size=8).likelihoods(pairs)
    longest = max(len(tail) for _, tail in pairs)
    assert counting.logits <= max(5, longest)
    expected = plain(subject.model, pairs)
    allowed = moved_by_rounding(subject.model, pairs, expected)
    assert rms([f.value for f in found], expected) <= allowed


def test_equal_inputs_are_run_once(subject: Subject, tokens: TaskTokenizer) -> None:
    counting = Counting(subject.model)
    asked = [([1, 20, 30, 40], [token]) for token in range(50, 60)]
    found = ChoiceScorer(counting, tokens).likelihoods(asked)
    assert counting.inputs == 4
    assert [f.value for f in found] == pytest.approx(plain(subject.model, asked), rel=1e-6)


def test_long_contexts_are_run_once(subject: Subject, tokens: TaskTokenizer) -> None:
    counting = Counting(subject.model)
    context = list(range(10, 160))
    asked = [(context, [token, token + 1, token + 2]) for token in (200, 300, 400, 500)]
    found = ChoiceScorer(counting, tokens).likelihoods(asked)
    assert counting.inputs == 149 + 4 * 3
    assert [f.value for f in found] == pytest.approx(plain(subject.model, asked), rel=1e-6)


def test_contexts_that_do_not_fit_lose_their_beginning(
    subject: Subject, tokens: TaskTokenizer
) -> None:
    scorer = ChoiceScorer(subject.model, tokens)
    context = [10 + i % 500 for i in range(400)]
    [found] = scorer.likelihoods([(context, [7, 8])])
    assert scorer.notes == ["contexts had their beginning cut off to fit 256 tokens"]
    # The last token is never an input, so the window holds 256 others.
    assert found.value == pytest.approx(
        plain(subject.model, [(context[-255:], [7, 8])])[0], rel=1e-6
    )
    with pytest.raises(CannotRun, match="a choice of 300 tokens exceeds"):
        scorer.likelihoods([([1], [9] * 300)])


def test_what_is_no_language_model_or_not_its_tokenizer(
    subject: Subject, tokens: TaskTokenizer
) -> None:
    for model in (tiny.t5(), tiny.cnn()):
        with pytest.raises(NotApplicable, match="gives no likelihood"):
            ChoiceScorer(model, tokens)
    with pytest.raises(CannotRun, match="gives token 5000, but the model knows 768"):
        ChoiceScorer(subject.model, tokens).likelihoods([([1], [5000])])


def test_a_model_that_fails_is_one_clear_error(subject: Subject, tokens: TaskTokenizer) -> None:
    class Failing(Counting):
        def __call__(self, **inputs: Any) -> Any:
            raise RuntimeError("out of luck")

    with pytest.raises(CannotRun, match="the model fails: RuntimeError: out of luck"):
        ChoiceScorer(Failing(subject.model), tokens).likelihoods([([1], [2])])
