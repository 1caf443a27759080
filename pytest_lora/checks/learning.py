"""What an adapter learned: how many items of a task it gets right, and what the base makes of them.

*Accuracy* is the mean score of the task's items.  With a floor the items are taken in a seeded
order until it is known whether the accuracy over all of them reaches it
(:class:`~pytest_lora.stats.proportions.SequentialProportion`): wrongly with probability at most
alpha, never once the rest cannot change it.  What a finished set says about the domain it is a
sample of is another question, answered by intervals.

*Change* is the accuracy of the adapted model minus that of the untouched base on the same items.
Each item is a pair, what the base lost to the adapter -1, 0 or 1, and the mean of all pairs against
the limit is decided in the same order by :class:`~pytest_lora.stats.sequential.SequentialMean`:
floor and cap are known, so that its error rate holds for every set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.baseline import FACTS, ITEMS, MOST_ITEMS, Reference, since_baseline
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.records import TO_DECIDE, Json, Measurement
from pytest_lora.stats.order import seeded_order
from pytest_lora.stats.paired import (
    changes,
    difference_interval,
    mcnemar_exact,
    mean_interval,
    non_inferiority_p,
)
from pytest_lora.stats.proportions import (
    SequentialProportion,
    minimum_detectable_effect,
    needed_items,
    wilson_interval,
)
from pytest_lora.stats.sequential import SequentialMean, Verdict
from pytest_lora.tasks.evaluation import base_facts
from pytest_lora.tasks.formats import read_task
from pytest_lora.tasks.progress import Pace
from pytest_lora.tasks.prompting import task_tokenizer
from pytest_lora.tasks.records import Scoring, Task
from pytest_lora.tasks.scoring import ItemScorer, excerpt

if TYPE_CHECKING:
    from pytest_lora.subject import Subject
    from pytest_lora.tasks.progress import Progress
    from pytest_lora.tasks.prompting import TaskTokenizer
    from pytest_lora.tasks.scoring import ItemScore, Store

__all__ = ["ALPHA", "CONFIDENCE", "measure_task_accuracy", "measure_task_change"]

ALPHA = 0.001
"""Probability of a wrong verdict before all items were seen."""
CONFIDENCE = 0.95
"""Of intervals for the domain that the items are a sample of."""
UNIT = "accuracy"
EARLY = "known early; McNemar's test and the domain's interval need all items: --lora-full-eval"
FAILING = 5


def measure_task_accuracy(
    subject: Subject,
    task: Task | Path | str,
    *,
    tokenizer: Any = None,
    min_accuracy: float | None = None,
    full: bool = False,
    base: bool = False,
    domain: bool = False,
    alpha: float = ALPHA,
    confidence: float = CONFIDENCE,
    batch_size: int = 8,
    seed: int = 0,
    store: Store | None = None,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Accuracy of the adapted model on a task: the mean score of its items, from 0 to 1.

    With ``min_accuracy``, and where scores are 0 or 1, items are taken in a seeded order until the
    verdict on all of them is known, wrongly with probability at most ``alpha``; the measurement
    then holds an interval for all items, on one side of the floor.  Otherwise every item is scored
    and the value is exact for these items.

    Args:
        subject: the adapter on its base model, a causal language model.
        task: a task, or a file that :func:`~pytest_lora.tasks.formats.read_task` reads.
        tokenizer: None takes the adapter folder's own, else the base model's; the result says so.
        min_accuracy: the floor to decide about; None takes the task's, if it has one.
        full: score everything although there is a floor.
        base: score the untouched base on the same items too, all of them.
        domain: give the interval for the domain that the items are a sample of, so that a set too
            small to decide is inconclusive; scores everything.
        alpha: error rate of a verdict before the last item.
        confidence: of intervals for the domain.
        batch_size: rows run together.
        seed: of the order.
        store: keeps scores of finished items for the next run.
        reference: a recorded accuracy on the same task, which the result is compared with, item by
            item as far as both were scored.
        progress: is told after every batch.

    Raises:
        NotApplicable: the base model is no causal language model.
        CannotRun: there is no tokenizer, the model or its chat template fails, or the reference
            was made under other facts.
        UsageError: the task or an argument cannot be meant.
    """
    known = task if isinstance(task, Task) else read_task(task)
    floor = known.min_accuracy if min_accuracy is None else min_accuracy
    _check(floor, alpha, confidence, batch_size)
    tokens = task_tokenizer(subject, tokenizer)
    facts = _facts(subject, known)
    if reference is not None:
        reference.require(facts, UNIT)
    options: dict[str, Any] = {"batch_size": batch_size, "store": store}
    scorer = ItemScorer(subject, known, tokens, **options)
    whole = full or base or domain or floor is None
    rule = None if whole else SequentialProportion(len(known), float(floor or 0), alpha=alpha)
    pace = Pace(len(known) * (1 + base), progress)
    order = seeded_order(len(known), seed, known.name)
    found = _Found(known, tokens, list(_scored(scorer, order, rule, pace)), rule)
    details = {**_details(found, scorer, confidence, alpha), FACTS: facts}
    if reference is not None:
        since = _since(found, reference, 0.0, confidence)
        details["baseline"] = since if found.rule is None else _without_tests(since)
    if base:
        ground = ItemScorer(subject, known, tokens, base=True, **options)
        scores = list(_scored(ground, order, None, pace))
        details["base"] = _comparison(found.scores, scores, 0.0, confidence)
        details["notes"] += [f"base model: {note}" for note in ground.notes]
    if domain and floor is not None:
        values = [score.score for score in found.scores]
        details[TO_DECIDE] = _to_decide(values, floor, confidence)
    low, high = _interval(found, domain, confidence, alpha)
    return Measurement(
        value=found.accuracy,
        unit=UNIT,
        count=len(found.scores),
        low=low,
        high=high,
        where=_where(known, found.scores),
        details=details,
    )


def measure_task_change(
    subject: Subject,
    task: Task | Path | str,
    *,
    tokenizer: Any = None,
    min_change: float = 0.0,
    full: bool = False,
    domain: bool = False,
    alpha: float = ALPHA,
    confidence: float = CONFIDENCE,
    batch_size: int = 8,
    seed: int = 0,
    store: Store | None = None,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Accuracy with the adapter minus that of the untouched base, on the same items.

    Where scores are 0 or 1, items are taken in a seeded order, each with both models, until it is
    known whether the change over all of them is at least ``min_change``, wrongly with probability
    at most ``alpha``; the measurement then has an interval on one side of it.  With ``full`` every
    item is scored and the value is exact for these items; McNemar's exact test of any change and
    the non-inferiority p-value at ``min_change`` are in the details then: -0.02 asks whether less
    than two points were lost, a positive one whether at least so much was gained.  With ``domain``
    every item is scored, and the interval is that for the domain they are a sample of (Tango's, for
    paired 0/1 scores).

    With ``reference`` the recorded scores of an earlier adapter take the place of the base's, the
    base is not run, and every item is scored.

    Arguments and exceptions as for :func:`measure_task_accuracy`.
    """
    known = task if isinstance(task, Task) else read_task(task)
    if not -1 < min_change < 1:
        raise UsageError(f"min_change={min_change} is no difference of accuracies")
    _check(None, alpha, confidence, batch_size)
    tokens = task_tokenizer(subject, tokenizer)
    facts = _facts(subject, known)
    options: dict[str, Any] = {"batch_size": batch_size, "store": store}
    order = seeded_order(len(known), seed, known.name)
    scorer = ItemScorer(subject, known, tokens, **options)
    if reference is not None:
        reference.require(facts, UNIT)
        pace = Pace(len(known), progress)
        found = _Found(known, tokens, list(_scored(scorer, order, None, pace)), None)
        return _change_since(found, scorer, reference, min_change, domain, confidence, facts)
    ground = ItemScorer(subject, known, tokens, base=True, **options)
    rule = None if full or domain else _Loss(len(known), min_change, alpha)
    pairs = list(_scored_pairs(scorer, ground, order, rule, Pace(2 * len(known), progress)))
    found = _Found(known, tokens, [after for after, _ in pairs], None)
    before = [score for _, score in pairs]
    comparison = _comparison(found.scores, before, min_change, confidence)
    details = {**_details(found, scorer, confidence), "base": comparison, FACTS: facts}
    details["notes"] += [f"base model: {note}" for note in ground.notes]
    if domain:
        values = [after.score - base.score for after, base in pairs]
        details[TO_DECIDE] = _to_decide(values, min_change, confidence)
    low, high = comparison["interval"] if domain else (None, None)
    if rule is not None and len(pairs) < len(known):
        low, high = rule.interval()
        details |= {"certain": rule.mean.certain, "sequential": rule.evidence()}
        details["base"] = _without_tests(comparison)
        details["notes"].append(EARLY)
    return Measurement(
        value=comparison["change"],  # rounded once, unlike a difference of two means
        unit="accuracy, adapter minus base",
        count=len(found.scores),
        low=low,
        high=high,
        where=_lost(known, found.scores, before),
        details=details,
    )


class _Loss:
    """Whether the change over all items is at least a limit, pair by pair.

    In terms of what is lost, base minus adapter, that is a mean of at most minus the limit: so a
    set that loses exactly what may be lost passes, as on the whole set.
    """

    def __init__(self, size: int, min_change: float, alpha: float) -> None:
        self.mean = SequentialMean(size, -min_change, alpha=alpha, floor=-1.0, cap=1.0)

    def interval(self) -> tuple[float, float]:
        """Of the change over all items, at the verdict's error rate and on its side."""
        low, high = self.mean.interval(1 - 2 * self.mean.alpha)
        limit = self.mean.limit
        if self.mean.verdict is Verdict.AT_MOST:
            high = min(high, limit)
            return -high, -min(low, high)
        low = max(low, math.nextafter(limit, math.inf))
        return -max(low, high), -low

    def evidence(self) -> dict[str, Any]:
        """What a verdict rests on, in terms of what is lost; how it came about, as changes."""
        path = [
            {
                "used": row["used"],
                "estimate": _turned(row["estimate"]),
                "low": _turned(row["high"]),
                "high": _turned(row["low"]),
            }
            for row in self.mean.path(1 - 2 * self.mean.alpha)
        ]
        return {"item": "base - adapter", **self.mean.evidence(), "path": path}


def _turned(loss: float | None) -> float | None:
    """A loss as a change, or the other way round."""
    return None if loss is None else -loss


def _scored_pairs(
    scorer: ItemScorer, ground: ItemScorer, order: Sequence[int], rule: _Loss | None, pace: Pace
) -> Iterator[tuple[ItemScore, ItemScore]]:
    """Items in order with both models, until the rule knows; as :func:`_scored`."""
    begin, seen, total = 0, 0, 0.0
    while begin < len(order):
        part = order[begin : begin + min(scorer.batch_size, ground.batch_size)]
        begin += len(part)
        before = scorer.computed + ground.computed
        for pair in zip(scorer.scores(part), ground.scores(part), strict=True):
            yield pair
            after, base = (score.score for score in pair)
            seen, total = seen + 1, total + after - base
            if not {after, base} <= {0, 1}:
                rule = None
            if rule is not None:
                rule.mean.add(base - after)
                if rule.mean.verdict is not None:
                    pace.skip(2 * (len(order) - begin))
                    begin = len(order)
                    break
        computed = scorer.computed + ground.computed > before
        pace.step(2 * len(part), computed=computed, estimate=total / seen)


def _without_tests(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison on the items of an early verdict, which chose how many they are."""
    tests = ("mcnemar_p", "non_inferiority_p", "interval", "confidence")
    return {name: value for name, value in comparison.items() if name not in tests}


def _facts(subject: Subject, task: Task) -> dict[str, Any]:
    """What another accuracy has to agree in to be comparable."""
    return {**base_facts(subject.base), "task": task.digest, "rules": task.rules()}


def _since(
    found: _Found, reference: Reference, min_change: float, confidence: float
) -> dict[str, Any]:
    """How the scores compare with recorded ones, on the items that both have."""
    items = found.task.items
    pairs = [
        (reference.items[items[score.index].id], score.score)
        for score in found.scores
        if items[score.index].id in reference.items
    ]
    table: dict[str, Any] = {"accuracy": reference.value, "items": len(pairs)}
    return {**table, **_paired(pairs, min_change, confidence)} if pairs else table


def _change_since(
    found: _Found,
    scorer: ItemScorer,
    reference: Reference,
    min_change: float,
    domain: bool,
    confidence: float,
    facts: Mapping[str, Any],
) -> Measurement:
    comparison = _since(found, reference, min_change, confidence)
    if comparison["items"] < len(found.scores):
        raise CannotRun(
            f"{reference.where}: holds the scores of {comparison['items']} of "
            f"{len(found.scores)} items (at most {MOST_ITEMS:,} are kept), so what changed in the "
            'domain cannot be told; judge the items: about = "items"'
        )
    low, high = comparison["interval"] if domain else (None, None)
    details = {**_details(found, scorer, confidence), "baseline": comparison, FACTS: facts}
    if domain:
        items = found.task.items
        values = [score.score - reference.items[items[score.index].id] for score in found.scores]
        details[TO_DECIDE] = _to_decide(values, min_change, confidence)
    return Measurement(
        value=comparison["change"],
        unit=since_baseline(UNIT),
        count=len(found.scores),
        low=low,
        high=high,
        where=_where(found.task, found.scores),
        details=details,
    )


def _check(floor: float | None, alpha: float, confidence: float, batch_size: int) -> None:
    if floor is not None and not 0 <= floor <= 1:
        raise UsageError(f"min_accuracy={floor} is no accuracy from 0 to 1")
    for name, value in (("alpha", alpha), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UsageError(f"{name}={value} is no probability between 0 and 1")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} is no number of rows")


@dataclass(slots=True)
class _Found:
    """The scored items of a task, in the order they were taken."""

    task: Task
    tokens: TaskTokenizer
    scores: list[ItemScore]
    rule: SequentialProportion | None
    graded: bool = field(init=False)
    """Whether a score is neither 0 nor 1."""

    def __post_init__(self) -> None:
        self.graded = any(score.score not in (0, 1) for score in self.scores)
        if self.graded or len(self.scores) == len(self.task):
            self.rule = None  # exact, whatever stood before

    @property
    def accuracy(self) -> float:
        """Mean score of the items that were scored."""
        return _mean(self.scores)


def _mean(scores: Sequence[ItemScore]) -> float:
    return math.fsum(score.score for score in scores) / len(scores)


def _scored(
    scorer: ItemScorer, order: Sequence[int], rule: SequentialProportion | None, pace: Pace
) -> Iterator[ItemScore]:
    """Items in order until the rule knows; the last batch may have computed more than is used.

    A score between 0 and 1 ends the rule: everything is scored then.
    """
    begin, seen, total = 0, 0, 0.0
    while begin < len(order):
        part = order[begin : begin + scorer.batch_size]
        begin += len(part)
        before = scorer.computed
        for score in scorer.scores(part):
            yield score
            seen, total = seen + 1, total + score.score
            if rule is not None and score.score not in (0, 1):
                rule = None
            if rule is not None:
                rule.add(int(score.score))
                if rule.verdict is not None:
                    pace.skip(len(order) - begin)
                    begin = len(order)
                    break
        pace.step(len(part), computed=scorer.computed > before, estimate=total / seen)


def _interval(
    found: _Found, domain: bool, confidence: float, alpha: float
) -> tuple[float | None, float | None]:
    """Of the domain if asked for; of all items where not all were scored; else none is needed."""
    if domain:
        return _domain_interval(found.scores, confidence)
    rule = found.rule
    if rule is None:
        return None, None
    if rule.certain:
        right, size = rule.successes, rule.size
        return right / size, (right + size - rule.used) / size
    return rule.interval(1 - alpha)


def _domain_interval(scores: Sequence[ItemScore], confidence: float) -> tuple[float, float]:
    """Wilson's for 0/1 scores, Student's for the mean of others."""
    values = [score.score for score in scores]
    if all(value in (0, 1) for value in values):
        return wilson_interval(int(sum(values)), len(values), confidence)
    if len(values) < 2:
        return 0.0, 1.0
    low, high = mean_interval(values, confidence)
    return max(low, 0.0), min(high, 1.0)


def _to_decide(values: Sequence[float], limit: float, confidence: float) -> int | None:
    """How many items like these bring the limit out of the interval; None if none ever do.

    By the normal approximation: for planning.
    """
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / count
    deviation = math.sqrt(max(variance, 0.25 / count))  # all alike is no proof of no variance
    margin = abs(mean - limit)
    return (
        needed_items(margin, deviation, alpha=(1 - confidence) / 2, power=0.5) if margin else None
    )


def _evidence(rule: SequentialProportion, alpha: float) -> dict[str, Any]:
    """What a verdict rests on, and how it came about."""
    return {**rule.evidence(), "path": rule.path(1 - alpha)}


def _details(
    found: _Found, scorer: ItemScorer, confidence: float, alpha: float = ALPHA
) -> dict[str, Any]:
    task, scores = found.task, found.scores
    low, high = _domain_interval(scores, confidence)
    share = found.accuracy
    deviation = math.sqrt(max(share * (1 - share), 0.25 / len(scores)))
    details: dict[str, Any] = {
        "task": task.name,
        "task_digest": task.digest,
        "rules": task.rules(),
        "tokenizer": found.tokens.source,
        "chat_template": found.tokens.template_source if task.chat else None,
        "items": len(task),
        "scored": len(scores),
        "computed": scorer.computed,
        "certain": found.rule is None or found.rule.certain,
        "sequential": _evidence(found.rule, alpha) if found.rule else None,
        "domain": {
            "confidence": confidence,
            "low": low,
            "high": high,
            "minimum_detectable_effect": minimum_detectable_effect(len(scores), deviation),
            "items_for_two_points": needed_items(0.02, deviation),
        },
        "not_finite": sum(not score.finite for score in scores),
        "failing": _failing(task, scores),
        ITEMS: {task.items[s.index].id: s.score for s in scores[:MOST_ITEMS]},
        "notes": list(scorer.notes),
    }
    if details["not_finite"]:
        details["notes"].append(f"{details['not_finite']} answers rest on NaN; they count as wrong")
    if task.scoring is Scoring.CHOICES:
        details["by_length"] = _by_length(scores)
    return details


def _by_length(scores: Sequence[ItemScore]) -> dict[str, float]:
    """Accuracy by each way of normalising: ``none`` is acc, ``characters`` is acc_norm."""
    names = scores[0].lengths
    return {str(n): math.fsum(score.lengths[n] for score in scores) / len(scores) for n in names}


def _failing(task: Task, scores: Sequence[ItemScore]) -> list[Json]:
    wrong = [score for score in scores if score.score < 1]
    wrong.sort(key=lambda score: score.score)
    return [_shown(task, score) for score in wrong[:FAILING]]


def _shown(task: Task, score: ItemScore) -> dict[str, Json]:
    item = task.items[score.index]
    expected = item.answer if item.correct is None or item.answer else item.choices[item.correct]
    if item.contexts and item.correct is not None:
        expected = str(item.extra.get("options", item.choices)[item.correct])
    return {
        "id": item.id,
        "score": score.score,
        "prompt": excerpt(item.prompt),
        "answer": None if score.said is None else excerpt(score.said),
        "expected": excerpt(expected),
    }


def _where(task: Task, scores: Sequence[ItemScore]) -> str | None:
    """The first failing item in words."""
    wrong = [score for score in scores if score.score < 1]
    return _sentence(task, min(wrong, key=lambda score: score.score)) if wrong else None


def _lost(task: Task, after: Sequence[ItemScore], before: Sequence[ItemScore]) -> str | None:
    """The first item that the base alone gets right."""
    for score, ground in zip(after, before, strict=True):
        if score.score < ground.score:
            return f"{_sentence(task, score)}; the base model has it right"
    return None


def _sentence(task: Task, score: ItemScore) -> str:
    shown = _shown(task, score)
    said = "was wrong in an earlier run" if score.said is None else f"answered '{shown['answer']}'"
    text = f"item {shown['id']} ('{shown['prompt']}'): {said}"
    return f"{text}, expected '{shown['expected']}'" if shown["expected"] else text


def _comparison(
    after: Sequence[ItemScore], before: Sequence[ItemScore], min_change: float, confidence: float
) -> dict[str, Any]:
    """What the base makes of the same items, and how sure the difference is."""
    pairs = [(old.score, new.score) for old, new in zip(before, after, strict=True)]
    return {"accuracy": _mean(before), **_paired(pairs, min_change, confidence)}


def _paired(
    pairs: Sequence[tuple[float, float]], min_change: float, confidence: float
) -> dict[str, Any]:
    """The change of the mean between scores of the same items, and how sure it is."""
    change = math.fsum(part for old, new in pairs for part in (new, -old)) / len(pairs)
    table: dict[str, Any] = {"change": change}
    if not all(value in (0, 1) for pair in pairs for value in pair):
        if len(pairs) < 2:
            return {**table, "interval": (-1.0, 1.0), "confidence": confidence}
        low, high = mean_interval([new - old for old, new in pairs], confidence)
        return {**table, "interval": (low, high), "confidence": confidence}
    gained, lost = changes([int(old) for old, _ in pairs], [int(new) for _, new in pairs])
    n = len(pairs)
    table |= {
        "gained": gained,
        "lost": lost,
        "mcnemar_p": mcnemar_exact(gained, lost),
        "interval": difference_interval(gained, lost, n, confidence),
        "confidence": confidence,
        "min_change": min_change,
    }
    if min_change <= 0:
        table["non_inferiority_p"] = non_inferiority_p(gained, lost, n, -min_change)
    return table
