"""Generation: batches answer as single rows do, rows end where they should, samples obey seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny
import torch
from example import FIXTURES, NEEDS_EXAMPLE
from peft.tuners.lora.layer import Linear as LoraLinear
from tiny_chat import example_subject

from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.subject import Subject
from pytest_lora.tasks import generate
from pytest_lora.tasks.formats import read_task
from pytest_lora.tasks.generate import Answer, Generator, sample_seed
from pytest_lora.tasks.prompting import Prompter, TaskTokenizer, task_tokenizer

pytestmark = NEEDS_EXAMPLE

TASK = read_task(FIXTURES / "data" / "target_tasks.jsonl")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return example_subject("attention-lora")


@pytest.fixture(scope="module")
def tokens(subject: Subject) -> TaskTokenizer:
    return task_tokenizer(subject)


@pytest.fixture(scope="module")
def prompts(tokens: TaskTokenizer) -> list[list[int]]:
    return [Prompter(TASK, tokens).prompt_ids(i) for i in range(12)]


def make(subject: Subject, tokens: TaskTokenizer, **options: Any) -> Generator:
    return Generator(subject.model, tokens, **{"max_new_tokens": 24, **options})


def test_rows_in_a_batch_answer_as_they_do_alone(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    assert len({len(prompt) for prompt in prompts}) > 1
    together = make(subject, tokens, batch_size=12)
    alone = make(subject, tokens, batch_size=1)
    assert together.answers(prompts) == alone.answers(prompts)
    assert (together.batch_size, together.notes) == (12, [])


def test_answers_are_those_of_a_plain_loop(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    model: Any = subject.model
    answers = make(subject, tokens).answers(prompts[:3])
    for prompt, answer in zip(prompts, answers, strict=False):
        ids = list(prompt)
        with torch.inference_mode():
            while len(ids) < len(prompt) + 24:
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == tokens.tokenizer.eos_token_id:
                    break
                ids.append(token)
        assert answer.tokens == tuple(ids[len(prompt) :])
        assert answer.ended == "eos"


def test_stop_strings_end_each_row_by_itself(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    whole = make(subject, tokens).answers(prompts[:6])
    cut = make(subject, tokens, stop=("####", "= 7")).answers(prompts[:6])
    for before, after in zip(whole, cut, strict=True):
        place = min(p for p in (before.text.find("####"), before.text.find("= 7")) if p >= 0)
        assert after.text == before.text[:place]
        assert after.ended == "stop"
        assert after.tokens == before.tokens[: len(after.tokens)]


def test_the_limit_of_tokens_is_no_end(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    [answer] = make(subject, tokens, max_new_tokens=3).answers(prompts[:1])
    assert (answer.ended, answer.stopped, len(answer.tokens)) == ("length", False, 3)


def test_what_the_models_folder_says_of_generation_changes_nothing(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    module: Any = subject.base.module
    expected = make(subject, tokens).answers(prompts[:2])
    before = module.generation_config
    bent = type(before)(do_sample=True, temperature=9.0, repetition_penalty=5.0, num_beams=3)
    bent.eos_token_id, bent.pad_token_id = before.eos_token_id, before.pad_token_id
    module.generation_config = bent
    try:
        assert make(subject, tokens).answers(prompts[:2]) == expected
        assert module.generation_config is bent
    finally:
        module.generation_config = before


def test_with_and_without_the_adapter(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    adapted = make(subject, tokens).answers(prompts[:4])
    with subject.base.bare() as module:
        base = Generator(module, tokens, max_new_tokens=24).answers(prompts[:4])
    assert base != adapted
    assert make(subject, tokens).answers(prompts[:4]) == adapted
    assert subject.base.verify() == ()


# ------------------------------------------------------------------------------ batching


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any, Any], Any]], None]:
    def apply(act: Callable[[Any, Any], Any]) -> None:
        forward = LoraLinear.forward

        def faulty(self: Any, x: Any, *args: Any, **options: Any) -> Any:
            return act(x, forward(self, x, *args, **options))

        monkeypatch.setattr(LoraLinear, "forward", faulty)

    return apply


def test_where_batching_changes_answers_rows_are_answered_alone(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]], spoil: Any
) -> None:
    """A layer that reads the whole batch, as a norm over the wrong dimension does."""
    spoil(lambda x, result: result + 0.5 * (x.mean((0, 1)) - x[0].mean(0)).mean())
    generator = make(subject, tokens, batch_size=6)
    answers = generator.answers(prompts[:6])
    assert generator.batch_size == 1
    assert "the first logits differ by" in generator.notes[0]
    assert answers == make(subject, tokens, batch_size=1).answers(prompts[:6])


def test_ties_are_told_from_faults(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    generator = make(subject, tokens)
    [answer] = generator.answers(prompts[:1])
    assert generator._same_or_tied(prompts[0], answer, answer)
    other = Answer("", (answer.tokens[0] + 1, *answer.tokens[1:]), "eos")
    assert not generator._same_or_tied(prompts[0], answer, other)
    shorter = Answer("", answer.tokens[:-1], "eos")
    assert not generator._same_or_tied(prompts[0], answer, shorter)
    assert not generator._same_or_tied(prompts[0], answer, Answer("", answer.tokens, "length"))
    assert not generator._same_or_tied(prompts[0], answer, Answer("", (), "length"))


def test_a_tie_within_rounding_is_let_pass(
    subject: Subject, tokens: TaskTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make(subject, tokens)
    gaps = iter([1e-7, *(1e-6 * (-1) ** i for i in range(generate.DRAWS))])
    monkeypatch.setattr(generator, "_gap", lambda prompt, pair: next(gaps))
    assert generator._same_or_tied([1], Answer("", (5, 6), "eos"), Answer("", (5, 7), "eos"))
    assert generator.notes == ["two tokens were as good as equal, so batching chose between them"]


# ------------------------------------------------------------------------------ sampling


def test_samples_depend_on_their_seed_alone(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    def sampled(rows: list[list[int]], seeds: list[int], size: int) -> list[Answer]:
        return make(subject, tokens, temperature=1.0, batch_size=size, max_new_tokens=8).answers(
            rows, seeds
        )

    batch = sampled(prompts[:4], [1, 2, 3, 4], 4)
    assert sampled(prompts[2:3], [3], 1) == batch[2:3]
    assert sampled(prompts[:4], [1, 2, 3, 4], 2) == batch
    assert sampled(prompts[:4], [5, 6, 7, 8], 4) != batch
    cold = make(subject, tokens, temperature=1e-6).answers(prompts[:2], [1, 2])
    assert cold == make(subject, tokens).answers(prompts[:2])


def test_samples_have_the_models_own_probabilities(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    """A chi-squared test at 1 in 1,000,000, with fixed seeds: it cannot flake."""
    draws = 240
    generator = make(subject, tokens, temperature=1.5, max_new_tokens=1, batch_size=60)
    answers = generator.answers(
        [prompts[0]] * draws, [sample_seed(0, "x", i) for i in range(draws)]
    )
    eos = tokens.tokenizer.eos_token_id
    seen = Counter(answer.tokens[0] if answer.tokens else eos for answer in answers)
    with torch.inference_mode():
        model: Any = subject.model
        logits = model(torch.tensor([prompts[0]])).logits[0, -1].double()
    chances = (logits / 1.5).softmax(0)
    common = [token for token in range(len(chances)) if chances[token] * draws >= 5]
    rest = 1 - sum(float(chances[token]) for token in common)
    cells = [(seen[token], float(chances[token]) * draws) for token in common]
    cells.append((draws - sum(count for count, _ in cells), rest * draws))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells if mean > 0)
    freedom = len(cells) - 1
    assert freedom >= 2
    assert statistic < freedom + 4.75 * (2 * freedom) ** 0.5 + 4.75**2


def test_seeds_of_samples_differ() -> None:
    seeds = {sample_seed(seed, item, sample) for seed in (0, 1) for item in ("a", "b", "a\n1")
             for sample in range(5)}  # fmt: skip
    assert len(seeds) == 30
    assert all(0 <= seed < 2**63 for seed in seeds)


# -------------------------------------------------------------------------- what is wrong


def test_logits_that_are_no_numbers_are_noticed(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]], spoil: Any
) -> None:
    assert all(answer.finite for answer in make(subject, tokens).answers(prompts[:2]))
    spoil(lambda x, result: result * float("nan"))
    answers = make(subject, tokens, batch_size=1, max_new_tokens=3).answers(prompts[:2])
    assert not any(answer.finite for answer in answers)


def test_a_single_row_of_nan_is_told_apart(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    def break_second(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1] = float("nan")
        return output

    handle = subject.base.module.get_output_embeddings().register_forward_hook(break_second)  # type: ignore[operator]
    try:
        generator = make(subject, tokens, max_new_tokens=2)
        generator._proven = True
        assert [a.finite for a in generator.answers(prompts[:3])] == [True, False, True]
    finally:
        handle.remove()


def test_prompts_that_do_not_fit_lose_their_beginning(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]]
) -> None:
    generator = make(subject, tokens, max_new_tokens=250)
    generator.max_new_tokens = 240  # of a window of 256
    [answer] = generator.answers([prompts[0] * 3])
    assert generator.notes == ["prompts of more than 16 tokens had their beginning cut off"]
    assert answer == make(subject, tokens, max_new_tokens=240).answers([(prompts[0] * 3)[-16:]])[0]
    with pytest.raises(CannotRun, match="max_new_tokens = 256 leaves no room"):
        make(subject, tokens, max_new_tokens=256).answers(prompts[:1])


def test_a_tokenizer_of_another_model_is_found_out(subject: Subject, tokens: TaskTokenizer) -> None:
    with pytest.raises(CannotRun, match="gives token 5000, but the model knows 768"):
        make(subject, tokens).answers([[1, 5000]])


@pytest.mark.parametrize("kind", ["t5", "cnn"])
def test_models_that_do_not_continue_a_text(kind: str, tokens: TaskTokenizer) -> None:
    with pytest.raises(NotApplicable, match="does not continue a text"):
        Generator(getattr(tiny, kind)(), tokens, max_new_tokens=1)


def test_a_model_that_fails_is_one_clear_error(
    subject: Subject, tokens: TaskTokenizer, prompts: list[list[int]], spoil: Any
) -> None:
    def fail(x: Any, result: Any) -> Any:
        raise RuntimeError("out of luck")

    spoil(fail)
    with pytest.raises(CannotRun, match="generation fails: RuntimeError: out of luck"):
        make(subject, tokens).answers(prompts[:1])


@pytest.fixture(autouse=True)
def _as_it_was(subject: Subject) -> Iterator[None]:
    yield
    assert not any(module._forward_hooks for module in subject.base.module.modules())
