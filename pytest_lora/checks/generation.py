"""What an adapter can break in how a model writes: endings, loops, silence, leaks; and variety.

*Health.*  Answers to the same prompts, greedily, with the adapter and without.  A symptom counts
against the adapter where it comes more often than with the base model, by the exact sign test on
the prompts in which the two differ (one-sided; the error rate alpha is shared equally between the
four symptoms), or more often than a limit the user has set.  Logits that are no numbers need no
statistics.

*Diversity.*  Several samples of each answer, with the same seeds for both models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.baseline import FACTS, digest_of
from pytest_lora.errors import CannotRun, NotApplicable, UsageError
from pytest_lora.names import meant
from pytest_lora.records import Json, Measurement, Problem
from pytest_lora.stats.distributions import binomial_cdf
from pytest_lora.stats.order import seeded_order
from pytest_lora.tasks.formats import read_task
from pytest_lora.tasks.generate import Generator, sample_seed
from pytest_lora.tasks.graders import score_of
from pytest_lora.tasks.humaneval import pass_at_k
from pytest_lora.tasks.prompting import Prompter, task_tokenizer
from pytest_lora.tasks.records import Task, TaskItem
from pytest_lora.tasks.scoring import excerpt

if TYPE_CHECKING:
    from pytest_lora.subject import Subject
    from pytest_lora.tasks.generate import Answer
    from pytest_lora.tasks.prompting import TaskTokenizer

__all__ = [
    "ALPHA",
    "SYMPTOMS",
    "distinct",
    "is_loop",
    "measure_generation_diversity",
    "measure_generation_health",
    "repetition",
]

ALPHA = 0.001
"""Probability of calling an adapter ill that is as well as its base, over all symptoms."""
SYMPTOMS = ("unstopped", "looping", "empty", "leaking")
BROKEN = "broken"
ROUNDS = 3
"""Times a block has to come in a row to be a loop: twice is a figure of speech."""
_MARKER = 3
"""Characters of scaffolding that are told apart from ordinary text."""

Prompts = Task | Path | str | Sequence[str]


# ---------------------------------------------------------------------------------- health


def measure_generation_health(
    subject: Subject,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    count: int = 32,
    max_new_tokens: int | None = None,
    limits: Mapping[str, float] | None = None,
    alpha: float = ALPHA,
    batch_size: int = 8,
    seed: int = 0,
) -> Measurement:
    """Number of symptoms in the adapted model's answers that are not the base model's own.

    Symptoms of an answer: *unstopped*, it ran into the limit of tokens; *looping*, it did so going
    round in circles (:func:`is_loop`); *empty*, white space only; *leaking*, it holds special
    tokens or pieces of the template around the prompt; and *broken*, a logit behind it is NaN or
    infinite.

    Args:
        subject: the adapter on its base model, a causal language model.
        prompts: a task, a file of items, or texts (not a single one: that is a file's name).
        tokenizer: None takes the adapter folder's own, else the base model's.
        count: prompts at most, the first of a seeded order.
        max_new_tokens: tokens an answer may have; None takes the task's, for texts 256 or half of
            a smaller window.
        limits: for each symptom named, the share of prompts that may show it, whatever the base
            model does: ``{"unstopped": 0}`` for an adapter trained to end every answer.
        alpha: error rate of the comparison with the base model.
        batch_size: rows run together.
        seed: of the order.

    Raises:
        NotApplicable: the base model does not continue a text.
        CannotRun: too few prompts for the comparison to decide at this alpha, and no limits.
        UsageError: an argument cannot be meant.
    """
    limits = _limits(limits)
    tokens = task_tokenizer(subject, tokenizer)
    asked = _Asked(prompts, tokens, count, seed, max_new_tokens)
    few = _left_open(len(asked.ids), limits, alpha)
    ours, our_notes = asked.answers(subject.model, batch_size)
    with subject.base.bare() as module:
        theirs, their_notes = asked.answers(module, batch_size)
    mine, base = asked.symptoms(ours), asked.symptoms(theirs)
    table: dict[str, Any] = {}
    problems = list(_broken(asked, mine, base))
    for name in SYMPTOMS:
        found = _Compared.of(name, mine, base, limits.get(name), alpha / len(SYMPTOMS))
        table[name] = found.to_dict()
        if found.ill:
            problems.append(found.problem(asked, ours, mine))
    return Measurement.of_problems(
        problems,
        count=len(asked.ids),
        unit="symptoms",
        notes=[*few, *our_notes, *(f"base model: {note}" for note in their_notes)],
        symptoms=table,
        alpha=alpha,
        repetition={"adapter": _mean_of(ours, repetition), "base": _mean_of(theirs, repetition)},
        tokenizer=tokens.source,
        max_new_tokens=asked.max_new_tokens,
    )


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether the sequence ends in a block that fills at least half of it in a row.

    The block comes at least :data:`ROUNDS` times; its last round may be cut off.  Linear in time:
    the periods of a suffix are the borders of the reversed sequence (Knuth, Morris, Pratt, 1977).
    """
    backwards = list(reversed(tokens))
    border = [0] * len(backwards)
    length = 0
    for place in range(1, len(backwards)):
        while length and backwards[place] != backwards[length]:
            length = border[length - 1]
        length += backwards[place] == backwards[length]
        border[place] = length
        size = place + 1
        period = size - length
        if 2 * size >= len(backwards) and size >= ROUNDS * period:
            return True
    return False


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that came before: seq-rep-n (S. Welleck et al., 2020); 0 if too short."""
    total = len(tokens) - n + 1
    if total < 1:
        return 0.0
    return 1 - len({tuple(tokens[i : i + n]) for i in range(total)}) / total


@dataclass(frozen=True, slots=True)
class _Compared:
    """One symptom, prompt by prompt, with the adapter and without."""

    name: str
    adapter: int
    base: int
    count: int
    worse: int
    better: int
    limit: float | None
    alpha: float

    @classmethod
    def of(
        cls,
        name: str,
        mine: Sequence[frozenset[str]],
        base: Sequence[frozenset[str]],
        limit: float | None,
        alpha: float,
    ) -> _Compared:
        pairs = [(name in ours, name in theirs) for ours, theirs in zip(mine, base, strict=True)]
        return cls(
            name,
            sum(ours for ours, _ in pairs),
            sum(theirs for _, theirs in pairs),
            len(pairs),
            sum(ours and not theirs for ours, theirs in pairs),
            sum(theirs and not ours for ours, theirs in pairs),
            limit,
            alpha,
        )

    @property
    def p_value(self) -> float:
        """One-sided: as many or more of the differing prompts would be worse by chance."""
        return binomial_cdf(self.better, self.worse + self.better, 0.5)

    @property
    def ill(self) -> bool:
        if self.limit is not None:
            return self.adapter > self.limit * self.count
        return self.worse > self.better and self.p_value <= self.alpha

    def problem(
        self, asked: _Asked, ours: Sequence[Answer], mine: Sequence[frozenset[str]]
    ) -> Problem:
        first = next(i for i, found in enumerate(mine) if self.name in found)
        allowed = (
            f"at most {self.limit:.3g} of the prompts"
            if self.limit is not None
            else f"no more than without the adapter ({self.base})"
        )
        said = excerpt(ours[first].text)
        return Problem(
            self.name,
            f"{self.adapter} of {self.count} answers; {asked.names[first]}: {said!r}",
            allowed,
            _FIXES[self.name],
        )

    def to_dict(self) -> dict[str, Json]:
        return {
            "adapter": self.adapter,
            "base": self.base,
            "worse": self.worse,
            "better": self.better,
            "p_value": self.p_value,
            "limit": self.limit,
        }


_FIXES = {
    "unstopped": "train with an EOS at the end of each answer that the loss sees: with pad_token ="
    " eos_token, collators mask it as padding",
    "looping": "train on answers that end with EOS, fewer steps or at a lower learning rate",
    "empty": "look whether the training data begins its answers with EOS, or masks them whole",
    "leaking": "mask the prompt and its template in the labels, and end answers with EOS",
    BROKEN: "load the base model in bfloat16 or float32, and look at the adapter's scale",
}


def _broken(
    asked: _Asked, mine: Sequence[frozenset[str]], base: Sequence[frozenset[str]]
) -> list[Problem]:
    """One NaN is one too many, where the base model has none on the same prompt."""
    new = [i for i, (ours, theirs) in enumerate(zip(mine, base, strict=True))
           if BROKEN in ours and BROKEN not in theirs]  # fmt: skip
    if not new:
        return []
    found = (
        f"{len(new)} of {len(mine)} answers rest on NaN or infinite logits; {asked.names[new[0]]}"
    )
    return [Problem(BROKEN, found, "numbers, as without the adapter", _FIXES[BROKEN])]


def _limits(limits: Mapping[str, float] | None) -> dict[str, float]:
    given = dict(limits or {})
    for name, value in given.items():
        if name not in SYMPTOMS:
            raise UsageError(
                f"limits: there is no symptom {name!r}{meant(name, SYMPTOMS)}; there are"
                f" {', '.join(SYMPTOMS)}"
            )
        if isinstance(value, bool) or not 0 <= value <= 1:
            raise UsageError(f"limits: {name} = {value} is no share of prompts from 0 to 1")
    return given


def _left_open(count: int, limits: Mapping[str, float], alpha: float) -> list[str]:
    """What too few prompts leave open: even the worst adapter could not be told from chance."""
    if not 0 < alpha < 1:
        raise UsageError(f"alpha={alpha} is no probability between 0 and 1")
    least = math.ceil(math.log2(len(SYMPTOMS) / alpha) - 1e-9)
    unlimited = [name for name in SYMPTOMS if name not in limits]
    if count >= least or not unlimited:
        return []
    if not limits:
        raise CannotRun(
            f"{count} prompts cannot decide at an error rate of {alpha:g}: it takes {least}, or a"
            f" limit for each of {', '.join(SYMPTOMS)}",
            missing=True,
        )
    return [
        f"not judged: {', '.join(unlimited)}; {count} prompts cannot decide at an error rate of"
        f" {alpha:g}, it takes {least}"
    ]


# ------------------------------------------------------------------------------- diversity


def measure_generation_diversity(
    subject: Subject,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    count: int = 16,
    samples: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Measurement:
    """How much of the base model's variety is left in the adapted model's samples.

    ``(u - 1) / (u_base - 1)``, with u the mean number of different answers among the samples of a
    prompt: 1 where the adapter leaves variety alone, 0 where every answer is always the same.
    Beside it distinct-1 and distinct-2 (:func:`distinct`) and, where the task has a grader, pass@1
    and pass@k for k up to ``samples``, by the unbiased estimator of Chen et al. (2021): a model
    that only repeats itself has pass@k = pass@1.

    Arguments as for :func:`measure_generation_health`; ``samples``: answers for each prompt;
    ``temperature``: what logits are divided by.

    Raises:
        NotApplicable: the base model does not continue a text, or always gives the same answer.
        UsageError: an argument cannot be meant.
    """
    if samples < 2 or not 0 < temperature < math.inf:
        raise UsageError(
            f"samples={samples}, temperature={temperature}: variety takes two samples at least, and"
            " a temperature above 0"
        )
    tokens = task_tokenizer(subject, tokenizer)
    asked = _Asked(prompts, tokens, count, seed, max_new_tokens)
    seeds = [[sample_seed(seed, text, sample) for sample in range(samples)] for text in asked.texts]
    ours, our_notes = asked.samples(subject.model, batch_size, temperature, seeds)
    with subject.base.bare() as module:
        theirs, their_notes = asked.samples(module, batch_size, temperature, seeds)
    mine, base = asked.variety(ours), asked.variety(theirs)
    if base["unique"] <= 1:
        raise NotApplicable(
            f"the base model gives the same answer to every prompt each time at temperature"
            f" {temperature:g}: there is no variety to lose"
        )
    fewest = min(range(len(ours)), key=lambda i: len(_different(ours[i])))
    number = len(_different(ours[fewest]))
    return Measurement(
        value=(mine["unique"] - 1) / (base["unique"] - 1),
        unit="of the base model's variety",
        count=len(ours) * samples,
        where=f"{asked.names[fewest]}: {number} of {samples} answers differ",
        details={
            "adapter": mine,
            "base": base,
            "samples": samples,
            "temperature": temperature,
            "tokenizer": tokens.source,
            FACTS: {
                "prompts": digest_of(asked.texts),
                "samples": samples,
                "temperature": temperature,
                "seed": seed,
                "max_new_tokens": asked.max_new_tokens,
                "stop": list(asked.task.stop),
            },
            "notes": [*our_notes, *(f"base model: {note}" for note in their_notes)],
        },
    )


def distinct(answers: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of the answers (J. Li et al., 2016); 0 where none is."""
    grams = Counter(
        tuple(tokens[i : i + n]) for tokens in answers for i in range(len(tokens) - n + 1)
    )
    return len(grams) / grams.total() if grams else 0.0


def _different(answers: Sequence[Answer]) -> set[str]:
    return {answer.text.strip() for answer in answers}


def _mean_of(answers: Sequence[Answer], measure: Callable[[Sequence[int]], float]) -> float:
    return _mean([measure(answer.tokens) for answer in answers])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# --------------------------------------------------------------------------------- prompts


class _Asked:
    """The prompts of a check, as texts and as token ids, and both models' answers to them."""

    def __init__(
        self,
        prompts: Prompts,
        tokens: TaskTokenizer,
        count: int,
        seed: int,
        max_new_tokens: int | None,
    ) -> None:
        if count < 1 or (max_new_tokens is not None and max_new_tokens < 1):
            raise UsageError(f"count={count}, max_new_tokens={max_new_tokens}: 1 or more each")
        task = _as_task(prompts)
        self.task, self.tokens = task, tokens
        self.max_new_tokens = max_new_tokens or task.max_new_tokens
        prompter = Prompter(task, tokens)
        chosen = seeded_order(len(task), seed, task.name)[:count]
        self.items = [task.items[index] for index in chosen]
        self.names = [f"item {item.id} ({excerpt(item.prompt)!r})" for item in self.items]
        self.texts = [prompter.prompt(index) for index in chosen]
        self.ids = [prompter.prompt_ids(index) for index in chosen]
        self._markers = self._scaffolding()
        self._special = _special_tokens(tokens)

    def _generator(self, model: Any, batch_size: int, temperature: float = 0.0) -> Generator:
        generator = Generator(
            model,
            self.tokens,
            max_new_tokens=self.max_new_tokens,
            stop=self.task.stop,
            batch_size=batch_size,
            temperature=temperature,
        )
        self.max_new_tokens = generator.max_new_tokens
        return generator

    def answers(self, model: Any, batch_size: int) -> tuple[list[Answer], list[str]]:
        """Greedy answers and notes."""
        generator = self._generator(model, batch_size)
        return generator.answers(self.ids), generator.notes

    def samples(
        self, model: Any, batch_size: int, temperature: float, seeds: Sequence[Sequence[int]]
    ) -> tuple[list[list[Answer]], list[str]]:
        """Sampled answers of each prompt, and notes."""
        generator = self._generator(model, batch_size, temperature)
        rows = [ids for ids, chosen in zip(self.ids, seeds, strict=True) for _ in chosen]
        flat = iter(generator.answers(rows, [seed for chosen in seeds for seed in chosen]))
        return [[next(flat) for _ in chosen] for chosen in seeds], generator.notes

    # ------------------------------------------------------------------------- symptoms

    def symptoms(self, answers: Sequence[Answer]) -> list[frozenset[str]]:
        """What is wrong with each answer."""
        return [frozenset(self._of(answer)) for answer in answers]

    def _of(self, answer: Answer) -> list[str]:
        found = [] if answer.finite else [BROKEN]
        if not answer.stopped:
            found.append("unstopped")
            if is_loop(answer.tokens):
                found.append("looping")
        if not answer.text.strip():
            found.append("empty")
        if self._leaks(answer):
            found.append("leaking")
        return found

    def _leaks(self, answer: Answer) -> bool:
        if self._special & set(answer.tokens):
            return True
        return any(marker in answer.text for marker in self._markers)

    def _scaffolding(self) -> tuple[str, ...]:
        """Text that the template puts around prompts and answers, stop strings left out."""
        if self.task.chat:
            marks = ("\u2402user\u2403", "\u2402answer\u2403")
            talk = [
                {"role": "user", "content": marks[0]},
                {"role": "assistant", "content": marks[1]},
                {"role": "user", "content": marks[0]},
            ]
            pieces = self.tokens.chat(talk).replace(marks[1], marks[0]).split(marks[0])
        else:
            pieces = self.task.template.split("{prompt}")
        texts = {piece.strip() for piece in pieces}
        return tuple(sorted(text for text in texts
                            if len(text) >= _MARKER and text not in self.task.stop))  # fmt: skip

    # -------------------------------------------------------------------------- variety

    def variety(self, answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
        """Means over prompts: different answers, distinct-n, and pass@k where there is a grader."""
        written = [[answer.tokens for answer in each] for each in answers]
        found: dict[str, Any] = {
            "unique": _mean([len(_different(each)) for each in answers]),
            "distinct_1": _mean([distinct(each, 1) for each in written]),
            "distinct_2": _mean([distinct(each, 2) for each in written]),
        }
        if self.task.grader is not None:
            found["pass_at"] = self._pass_at(answers)
        return found

    def _pass_at(self, answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
        grader: Any = self.task.grader
        samples = len(answers[0])
        right = [
            sum(score_of(grader, answer.text, item) == 1 for answer in each)
            for item, each in zip(self.items, answers, strict=True)
        ]
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < samples] + [samples]
        return {str(k): _mean([pass_at_k(samples, c, k) for c in right]) for k in ks}


def _special_tokens(tokens: TaskTokenizer) -> frozenset[int]:
    """Ids that are no text; without the one that fills rows up once they have stopped."""
    added = getattr(tokens.tokenizer, "added_tokens_decoder", {})
    marked = {token for token, entry in added.items() if getattr(entry, "special", False)}
    return frozenset({*tokens.tokenizer.all_special_ids, *marked} - {tokens.pad})


def _as_task(prompts: Prompts) -> Task:
    if isinstance(prompts, Task):
        return prompts
    if isinstance(prompts, str | Path):
        return read_task(prompts)
    items = tuple(TaskItem(str(number), text) for number, text in enumerate(prompts, 1))
    return Task("prompts", items)
