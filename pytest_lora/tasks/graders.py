"""Graders: pure functions from an answer and its item to a score in [0, 1].

What a grader cannot read is wrong, never skipped: an answer without a number scores 0.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol

from pytest_lora.errors import UsageError
from pytest_lora.patterns import PatternError, compile_pattern
from pytest_lora.tasks.records import Length

if TYPE_CHECKING:
    from pytest_lora.tasks.records import TaskItem

__all__ = [
    "GRADERS",
    "Exact",
    "FinalNumber",
    "FirstLabel",
    "Grader",
    "Normalised",
    "RegexAnswer",
    "best_choice",
    "choice_lengths",
    "final_number",
    "normalise",
    "score_of",
]

MOST_READ = 20_000
"""Characters of an answer that are searched, from its end: no pattern meets more than this."""


class Grader(Protocol):
    """Judges one answer."""

    @property
    def name(self) -> str:
        """What results and settings call it."""
        ...

    def __call__(self, answer: str, item: TaskItem) -> bool | float:
        """The score of ``answer``: a truth value, or a number from 0 to 1."""
        ...


def score_of(grader: Callable[[str, TaskItem], bool | float], answer: str, item: TaskItem) -> float:
    """What the grader says, as a float in [0, 1].

    Raises:
        UsageError: it returned something else, or raised.
    """
    try:
        score = grader(answer, item)
        value = float(score)
    except Exception as error:  # a user's grader may raise anything
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"the grader failed on item {item.id}: {what}") from error
    if not 0 <= value <= 1:
        raise UsageError(f"the grader gave item {item.id} {value}, expected 0 to 1")
    return value


# ------------------------------------------------------------------------------------- texts


@dataclass(frozen=True, slots=True)
class Exact:
    """The answer is the reference, apart from white space around either."""

    name: str = "exact"

    def __call__(self, answer: str, item: TaskItem) -> bool:
        """Whether the two are equal."""
        return answer.strip() == item.answer.strip()


@dataclass(frozen=True, slots=True)
class Normalised:
    """The answer is the reference after :func:`normalise`; what normalises to nothing is wrong."""

    name: str = "normalised"

    def __call__(self, answer: str, item: TaskItem) -> bool:
        """Whether the two are equal once normalised."""
        given = normalise(answer)
        return bool(given) and given == normalise(item.answer)


_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_IN_NUMBER = re.compile(r"(?<=\d)[.,](?=\d)|(?<![^\W_])-(?=\.?\d)|(?<!\d)\.(?=\d)")


def normalise(text: str) -> str:
    """The text as short answers are compared.

    In this order: Unicode NFKC; minus signs as ``-``; case folded; punctuation dropped, except a
    decimal point, a thousands separator or a leading minus of a number (``-3`` is not ``3``); the
    words a, an, the dropped; runs of white space made one space, none at the ends.  For ASCII text
    without numbers this is the normalisation of SQuAD's evaluation (Rajpurkar et al., 2016).
    """
    folded = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    kept = {match.start() for match in _IN_NUMBER.finditer(folded)}
    plain = "".join(
        character
        for place, character in enumerate(folded)
        if place in kept or not _is_punctuation(character)
    )
    return " ".join(_ARTICLE.sub(" ", plain).split())


def _is_punctuation(character: str) -> bool:
    if character.isascii():
        return not character.isalnum() and not character.isspace()
    return unicodedata.category(character).startswith("P")


@dataclass(frozen=True, slots=True)
class RegexAnswer:
    """The last match of a pattern in the answer is the reference, apart from white space.

    Its first group counts where it has groups.  Make one with :meth:`of`.
    """

    pattern: re.Pattern[str]

    @classmethod
    def of(cls, pattern: str) -> RegexAnswer:
        """A grader for the pattern.

        Raises:
            UsageError: no regular expression, or one that might never finish.
        """
        try:
            return cls(compile_pattern(pattern))
        except PatternError as error:
            raise UsageError(f"the pattern {pattern!r}: {error}") from None

    @property
    def name(self) -> str:
        """The grader with its pattern."""
        return f"regex {self.pattern.pattern}"

    def __call__(self, answer: str, item: TaskItem) -> bool:
        """Whether the last match is the reference."""
        found = None
        for match in self.pattern.finditer(answer[-MOST_READ:]):
            found = match
        if found is None:
            return False
        text = found[1] if self.pattern.groups else found[0]
        return text is not None and text.strip() == item.answer.strip()


@dataclass(frozen=True, slots=True)
class FirstLabel:
    """The first of the item's labels in the answer is the right one (``answer3``, ``true``).

    The labels are ``item.extra["labels"]``.  This is how the instruction-tuning papers that answer
    multiple choice in words grade it (Hu et al., "LLM-Adapters", 2023).
    """

    name: str = "label"

    def __call__(self, answer: str, item: TaskItem) -> bool:
        """Whether the first label named is the reference."""
        labels = item.extra.get("labels", ())
        if not labels:
            raise UsageError(f"item {item.id} has no labels to look for")
        either = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
        found = re.search(rf"(?<!\w)(?:{either})(?!\w)", answer, re.IGNORECASE)
        return found is not None and found[0].casefold() == item.answer.casefold()


# ----------------------------------------------------------------------------------- numbers

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus behind a word, a number or a bracket subtracts or joins.
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:[$\u20ac\u00a3] ?-?)?(?:{_DIGITS})")
_MARK = "####"
_LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3})")


@dataclass(frozen=True, slots=True)
class FinalNumber:
    """The answer's final number equals the reference's (GSM8K): see :func:`final_number`."""

    name: str = "gsm8k"

    def __call__(self, answer: str, item: TaskItem) -> bool:
        """Whether both have a final number and it is the same."""
        given, right = final_number(answer), final_number(item.answer)
        if right is None:
            raise UsageError(f"item {item.id}: there is no number in {item.answer[:80]!r}")
        return given is not None and given == right


def final_number(text: str) -> Decimal | None:
    """The first number behind the last ``####``, or the last number where there is none there.

    Thousands separators (LaTeX's ``1{,}450``, too), decimals, a minus sign and a currency sign are
    understood, and a full stop after a number is none of it: ``$1,450,000.`` is 1450000, ``-0.50``
    is -0.5.  A minus right behind a digit, a letter or a bracket subtracts: ``10-6`` ends in 6.
    """
    text = _LATEX_COMMA.sub(",", text[-MOST_READ:].replace("\u2212", "-"))
    before, mark, behind = text.rpartition(_MARK)
    if mark:
        found = _numbers(behind)
        if found:
            return found[0]
    found = _numbers(before + behind)
    return found[-1] if found else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal("-" * ("-" in match[0]) + re.sub(r"[^\d.]", "", match[0]))
        for match in _NUMBER.finditer(text)
    ]


# ----------------------------------------------------------------------------------- choices


def choice_lengths(item: TaskItem, tokens: Sequence[int], length: Length) -> list[float]:
    """What each choice's log-likelihood is divided by (``tokens``: the tokens scored of each)."""
    if length is Length.TOKENS:
        return [float(count) for count in tokens]
    if length is Length.BYTES:
        return [float(len(choice.encode("utf-8", "surrogatepass"))) for choice in item.choices]
    if length is Length.CHARACTERS:
        return [float(len(choice)) for choice in item.choices]
    return [1.0] * len(item.choices)


def best_choice(loglikelihoods: Sequence[float], lengths: Sequence[float]) -> int | None:
    """Index of the largest log-likelihood per length, the first of equals.

    None where one is NaN: a model that says NaN has chosen nothing.
    """
    if any(math.isnan(value) for value in loglikelihoods):
        return None
    scores = [value / max(size, 1.0) for value, size in zip(loglikelihoods, lengths, strict=True)]
    return max(range(len(scores)), key=lambda index: (scores[index], -index))


GRADERS: Mapping[str, Any] = {
    "exact": Exact(),
    "normalised": Normalised(),
    "gsm8k": FinalNumber(),
    "label": FirstLabel(),
}
"""Graders by name; ``regex`` needs a pattern and is made by :meth:`RegexAnswer.of`."""
