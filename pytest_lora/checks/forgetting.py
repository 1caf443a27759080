"""What an adapter forgot: how much worse it predicts texts of the domains it was not trained on.

The *drift* of a collection of documents is the mean negative log-likelihood per token with the
adapter minus that of the base model, on the same windows, in nats per token; its exponential is the
ratio of the two perplexities.  With token counts t_i, and a_i and b_i the negative log-likelihoods
of document i under either model,

    drift = sum_i (a_i - b_i) / sum_i t_i = mean_i  N (a_i - b_i) / T,      T = sum_i t_i,

so that it is the plain mean of one number per document, which is what a sequential verdict takes
(:mod:`pytest_lora.stats.sequential`).  No document's number is below -N b_i / T, for no likelihood
exceeds 1: with the base known everywhere, what the unseen documents could still improve is bounded,
and a failure is never declared on hope.

Against a recorded drift of the same documents, with c_i their likelihoods then,

    drift = drift then + mean_i  N (a_i - c_i) / T :

what two releases of an adapter share cancels document by document, and what is left varies less.

Drift averages: what a model loses on some tokens it may win back on others.  KL(base || adapted)
and the share of tokens at which both put the same token first do not cancel and stand beside it.
"""

from __future__ import annotations

import array
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.baseline import FACTS, ITEMS, MOST_ITEMS, Reference, flat
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.nll_cache import NllCache
from pytest_lora.records import Json, Measurement
from pytest_lora.stats.distributions import t_quantile
from pytest_lora.stats.familywise import SequentialHolm
from pytest_lora.stats.histogram import distribution
from pytest_lora.stats.sequential import SequentialMean, Verdict
from pytest_lora.tasks.definition import define
from pytest_lora.tasks.evaluation import Evaluation, base_facts
from pytest_lora.tasks.likelihood import Likelihoods
from pytest_lora.tasks.progress import Pace
from pytest_lora.tasks.texts import Texts, open_texts

if TYPE_CHECKING:
    from pytest_lora.subject import Subject
    from pytest_lora.tasks.definition import Definition
    from pytest_lora.tasks.evaluation import Collection, Document
    from pytest_lora.tasks.progress import Progress

__all__ = ["ALPHA", "measure_perplexity_drift"]

ALPHA = 0.001
"""Probability of a wrong verdict before all documents were seen, over all domains together."""
CONFIDENCE = 0.95
"""Of the interval for the domain the documents come from, which decides nothing."""
DIVERGENCE = 32
"""Documents, the first of the seeded order, on which KL and agreement are taken."""
WORST = 5
_ENDS = ("estimate", "low", "high")
_EXCERPT = 80

Source = str | Path | Sequence[str]


def measure_perplexity_drift(
    subject: Subject,
    texts: Source | Mapping[str, Source],
    *,
    tokenizer: Any = None,
    max_drift: float | None = None,
    max_document_drift: float | None = None,
    alpha: float = ALPHA,
    max_unseen: float = 1.0,
    full: bool = False,
    divergence: int = DIVERGENCE,
    prefix: str | int | None = "auto",
    special_tokens: bool = False,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    cache: NllCache | None = None,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Mean negative log-likelihood per token, adapted minus base, in nats per token.

    The value is the drift of the domain where it is largest.  With ``max_drift`` documents are
    taken in a seeded order until each domain's drift is known to be at most that, or above: wrongly
    with probability at most ``alpha`` over all domains (Holm's procedure; one such rate for wrong
    passes, one for wrong failures), never once all documents were seen.  Then the interval lies on
    one side of the bound.  The base model's likelihoods of all documents are needed for it, once:
    they are kept in ``cache``.

    Args:
        subject: the adapter on its base model, a causal language model.
        texts: a source for :func:`~pytest_lora.tasks.texts.open_texts`, or several by domain.
        tokenizer: the base model's; None takes the one in its folder.
        max_drift: the bound to decide about; None evaluates everything.
        max_document_drift: what the drift per token of a single document is declared never to
            exceed.  None: a limit is screened from the first documents, and the result states how
            many of the others could lie beyond it unseen.
        alpha: error rate of a verdict before the last document.
        max_unseen: no early verdict on a screened limit while a larger share of the documents may
            lie beyond it unseen.
        full: evaluate everything although there is a bound.
        divergence: KL divergence and agreement are taken on that many of the documents seen; 0 for
            none.  They need both models at once, and so the base again where it was cached.
        prefix: what stands before the first token, as in ``tasks.definition.define``.
        special_tokens: let the tokenizer add its own.
        window: tokens seen at a time.
        stride: tokens scored by each window after the first.
        batch_tokens: tokens of a pass; None suits the device.
        seed: of the order.
        cache: where likelihoods are kept; None keeps them for this call only.
        reference: a recorded drift of the same texts.  Where it has their likelihoods and no
            ``max_document_drift`` is declared, documents are compared with it pair by pair, which
            takes fewer of them, and the base's likelihoods only of those.
        progress: is told after every batch.

    Raises:
        NotApplicable: the base model is no causal language model.
        CannotRun: its likelihoods cannot be had, or are not finite without the adapter, or the
            reference was made under other facts.
        UsageError: texts, tokenizer or arguments cannot be meant.
    """
    domains = _open(texts)
    _check(max_drift, max_document_drift, alpha, max_unseen, divergence)
    tokenizer = subject.base.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise UsageError("texts need a tokenizer: pass tokenizer=..., the base model brings none")
    definition = define(
        subject,
        tokenizer,
        prefix=prefix,
        special_tokens=special_tokens,
        window=window,
        stride=stride,
        tokens=batch_tokens,
    )
    likelihoods = Likelihoods(subject, tokenizer, definition)
    cache = NllCache(None) if cache is None else cache
    facts = {**base_facts(subject.base), "definition": _rules(definition)}
    if reference is not None:
        reference.require({**facts, "texts": _only(domains).digest})
    limit = None if full else max_drift
    plan = _Plan(limit, max_document_drift, max_unseen, divergence, facts, reference)
    found = [
        _Domain(name, Evaluation(likelihoods, source, cache, seed), plan)
        for name, source in domains.items()
    ]
    pace = Pace(sum(domain.steps for domain in found), progress)
    family = SequentialHolm([domain.name for domain in found], alpha)
    for domain in found:
        domain.evaluate(pace, family.alpha_for(domain.name))
        family.update(domain.name, *domain.p_values())
    notes = [*likelihoods.notes, *cache.notes, *_open_questions(found, max_drift)]
    return _measurement(found, likelihoods, notes, family)


def _open(texts: Source | Mapping[str, Source]) -> dict[str, Texts]:
    if isinstance(texts, Mapping):
        if not texts:
            raise UsageError("no texts: there is no domain to look at")
        return {name: open_texts(source) for name, source in texts.items()}
    opened = open_texts(texts)
    return {opened.name: opened}


def _only(domains: Mapping[str, Texts]) -> Texts:
    if len(domains) != 1:
        raise UsageError(f"a reference is of one domain, and here are {', '.join(domains)}")
    return next(iter(domains.values()))


def _rules(definition: Definition) -> dict[str, Json]:
    """What a drift is defined by: all but what changes rounding only, and differs by device."""
    rules = definition.to_dict()
    return {
        key: value for key, value in rules.items() if key not in ("packing", "padding", "tokens")
    }


def _check(
    max_drift: float | None,
    max_document_drift: float | None,
    alpha: float,
    max_unseen: float,
    divergence: int,
) -> None:
    for name, value in (("max_drift", max_drift), ("max_document_drift", max_document_drift)):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{name}={value} is no number of nats per token")
    if not 0 < alpha < 1:
        raise UsageError(f"alpha={alpha} is no error rate between 0 and 1")
    if not 0 <= max_unseen <= 1:
        raise UsageError(f"max_unseen={max_unseen} is no share of the documents")
    if divergence < 0:
        raise UsageError(f"divergence={divergence} is no number of documents")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is asked of every domain.

    Attributes:
        limit: the drift to decide about; None evaluates everything.
        cap: declared most of a document's drift per token.
        max_unseen: share of the documents that may lie unseen beyond a screened limit.
        divergence: documents on which to take KL and agreement.
        facts: what another drift has to agree in to be comparable, besides the texts.
        reference: a recorded drift to compare with.
    """

    limit: float | None
    cap: float | None
    max_unseen: float
    divergence: int
    facts: Mapping[str, Any]
    reference: Reference | None


@dataclass(slots=True)
class _Sums:
    """Sums over documents."""

    documents: int = 0
    tokens: int = 0
    base: float = 0.0
    adapted: float = 0.0
    kl: float = 0.0
    agree: float = 0.0
    compared: int = 0
    """Tokens on which KL and agreement were taken."""

    def add(self, document: Document) -> None:
        self.documents += 1
        self.tokens += document.tokens
        self.base += document.base or 0.0
        self.adapted += document.adapted or 0.0
        if document.kl is not None and document.agree is not None:
            self.kl += document.kl
            self.agree += document.agree
            self.compared += document.tokens


@dataclass(order=True, slots=True)
class _Suspect:
    """A document by its drift per token."""

    drift: float
    index: int = field(compare=False)
    tokens: int = field(compare=False)


class _Domain:
    """One domain's documents, and what is known of its drift."""

    def __init__(self, name: str, evaluation: Evaluation, plan: _Plan) -> None:
        self.name, self._evaluation, self._plan = name, evaluation, plan
        self.collection = evaluation.collection
        self.seen = _Sums()
        self.worst: list[_Suspect] = []
        self.sequential: SequentialMean | None = None
        self.broken: _Suspect | None = None
        self._scale = len(self.collection) / self.collection.tokens
        self._drifts = array.array("d")
        self.spread, self.change = _Spread(), _Spread()
        self._items: dict[str, Json] = {}
        self._before = _recorded(plan.reference, self.collection)
        self._pairs = bool(self._before) and plan.cap is None
        self._shift = plan.reference.value if self._pairs and plan.reference else 0.0
        """Added to what pairs say of the change since the reference, to have the drift."""

    @property
    def steps(self) -> int:
        """Documents to look at, those looked at once for each model counted twice."""
        return len(self.collection) * (1 if self._plan.limit is None else 2)

    @property
    def drift(self) -> float:
        """Nats per token: of the whole set once it was seen, else the estimate of that."""
        if self.broken is not None:
            return self.broken.drift
        if self.sequential is not None:
            return self._shift + self.sequential.estimate
        return (self.seen.adapted - self.seen.base) / self.seen.tokens

    @property
    def exhausted(self) -> bool:
        """Whether all documents were seen."""
        return self.seen.documents == len(self.collection)

    def p_values(self) -> tuple[float, float]:
        """Anytime-valid p-values of a pass and of a failure, for the family of all domains."""
        if self.broken is not None:
            return 1.0, 0.0
        if self.sequential is None:
            return 1.0, 1.0  # nothing was asked
        if self.certain:
            return (0.0, 1.0) if self.sequential.verdict is Verdict.AT_MOST else (1.0, 0.0)
        return self.sequential.p_at_most, self.sequential.p_above

    @property
    def certain(self) -> bool:
        """Whether the verdict cannot be wrong."""
        known = self.sequential is not None and self.sequential.certain
        return known or self.exhausted or self.broken is not None

    def for_the_domain(self) -> tuple[float, float] | None:
        """Interval for other documents of the kind, at :data:`CONFIDENCE` for large numbers."""
        return None if self.broken is not None else self.spread.around(self.drift)

    def interval(self) -> tuple[float, float]:
        """Of the set's drift, at the verdict's own error rate, on the verdict's side."""
        sequential = self.sequential
        if sequential is None or self.exhausted:
            return self.drift, self.drift
        low, high = sequential.interval(1 - 2 * sequential.alpha)
        low, high = low + self._shift, high + self._shift
        limit = self._plan.limit
        assert limit is not None
        if sequential.verdict is Verdict.AT_MOST:
            high = min(high, limit)
            return min(low, high), high
        low = max(low, math.nextafter(limit, math.inf))
        return low, max(low, high)

    # ---------------------------------------------------------------------- evaluation

    def evaluate(self, pace: Pace, alpha: float) -> None:
        """Look at documents until the verdict is known, with that error rate."""
        if self._plan.limit is not None:
            self._begin(self._plan.limit, alpha, pace)
        numbers = range(len(self.collection.batches))
        for number in numbers:
            documents, computed = self._evaluation.batch(
                number, base=True, adapted=True, divergence=self._compares(number)
            )
            for document in documents:
                if self._decided:
                    break
                self._take(document)
            pace.step(len(documents), computed=computed, estimate=self.drift)
            if self._decided:
                rest = sum(len(self.collection.batches[n]) for n in numbers[number + 1 :])
                pace.skip(rest)
                return

    @property
    def _decided(self) -> bool:
        """At least one document is looked at, also where the base alone decides."""
        known = self.sequential is not None and self.sequential.verdict is not None
        return self.seen.documents > 0 and (known or self.broken is not None)

    def _compares(self, number: int) -> bool:
        """Whether the first documents, on which KL and agreement are taken, reach this batch."""
        before = sum(len(batch) for batch in self.collection.batches[:number])
        return before < self._plan.divergence

    def _begin(self, limit: float, alpha: float, pace: Pace) -> None:
        """What is subtracted from of all documents, and from it how low a difference can be."""
        largest = max(self._before.values()) if self._pairs else self._largest_of_the_base(pace)
        longest = max(tokens for batch in self.collection.batches for _, tokens in batch)
        cap = None if self._plan.cap is None else self._plan.cap * longest * self._scale
        floor = -largest * self._scale
        self.sequential = SequentialMean(
            len(self.collection),
            limit - self._shift,
            alpha=alpha,
            floor=floor,
            cap=None if cap is None else max(cap, floor),
            max_unseen=self._plan.max_unseen,
        )

    def _largest_of_the_base(self, pace: Pace) -> float:
        """The base's likelihoods of all documents; the largest of them, negative, in nats."""
        largest = 0.0
        for number in range(len(self.collection.batches)):
            documents, computed = self._evaluation.batch(number, base=True)
            largest = max(largest, *(_finite_base(document) for document in documents))
            pace.step(len(documents), computed=computed)
        return largest

    def _take(self, document: Document) -> None:
        base, adapted = _finite_base(document), document.adapted
        assert adapted is not None
        suspect = _Suspect((adapted - base) / document.tokens, document.number, document.tokens)
        if not math.isfinite(adapted):
            self.broken = suspect
            self.worst = [suspect]
        self.seen.add(document)
        if self.broken is not None:
            return
        self.spread.add(adapted - base, document.tokens)
        self._drifts.append(suspect.drift)
        before = self._before.get(document.number)
        if before is not None:
            self.change.add(adapted - before, document.tokens)
        if self.sequential is not None:
            ground = before if self._pairs and before is not None else base
            self.sequential.add((adapted - ground) * self._scale)
        if len(self.collection) <= MOST_ITEMS:
            self._items[str(document.number)] = adapted
        push = heapq.heappush if len(self.worst) < WORST else heapq.heappushpop
        push(self.worst, suspect)

    # ---------------------------------------------------------------------- report

    def where(self) -> str:
        """The worst document, in words."""
        suspect = max(self.worst)
        return f"{self.name}, {self._label(suspect)}: {suspect.drift:+.4g} nats per token"

    def _label(self, suspect: _Suspect) -> str:
        return self.collection.texts.label(suspect.index)

    def details(self) -> dict[str, Json]:
        """All there is to know, JSON-plain."""
        seen, low_high = self.seen, self.interval()
        found: dict[str, Json] = {
            "drift": self.drift,
            "perplexity_ratio": _exp(self.drift),
            "base_nll": seen.base / seen.tokens,
            "adapted_nll": seen.adapted / seen.tokens,
            "documents": {"seen": seen.documents, "all": len(self.collection)},
            "tokens": {"seen": seen.tokens, "all": self.collection.tokens},
            "without_a_token": self.collection.left_out,
            "standard_error": self.spread.standard_error(),
            "for_the_domain": self.for_the_domain(),
            "distribution": distribution(self._drifts),
            "worst": self._listed(),
            "texts": self.collection.texts.digest,
            "from_cache": dict(self._evaluation.hits),
            FACTS: flat({**self._plan.facts, "texts": self.collection.texts.digest}),
            ITEMS: self._items,
        }
        if self._plan.reference is not None:
            found["baseline"] = self._since(self._plan.reference)
        if seen.compared:
            found["kl"] = seen.kl / seen.compared
            found["same_top_token"] = seen.agree / seen.compared
            found["compared_tokens"] = seen.compared
        if self.sequential is not None and self.broken is None:
            found["interval"] = list(low_high)
            found["sequential"] = self._evidence(self.sequential)
        return found

    def _since(self, reference: Reference) -> dict[str, Json]:
        """What has changed since the reference, and how sure that is for the domain."""
        change = self.drift - reference.value
        return {
            "drift": reference.value,
            "change": change,
            "paired": self._pairs,
            "for_the_domain": self.change.around(change),
        }

    def _evidence(self, sequential: SequentialMean) -> dict[str, Json]:
        """What a verdict rests on; caps in the unit of the items, N/T nats."""
        path: list[Json] = [
            {"used": row["used"], **{name: self._drift_of(row[name]) for name in _ENDS}}
            for row in sequential.path(1 - 2 * sequential.alpha)
        ]
        ground = "c_i" if self._pairs else "b_i"
        return {"item": f"N (a_i - {ground}) / T", **sequential.evidence(), "path": path}

    def _drift_of(self, value: float | None) -> float | None:
        """What the sequential verdict knows, as a drift."""
        return None if value is None else value + self._shift

    def _listed(self) -> list[Json]:
        listed: list[Json] = []
        for suspect in sorted(self.worst, reverse=True):
            text = self.collection.texts[suspect.index]
            listed.append(
                {
                    "document": self._label(suspect),
                    "drift": suspect.drift,
                    "tokens": suspect.tokens,
                    "excerpt": _excerpt(text),
                }
            )
        return listed


class _Spread:
    """How far the drift of other documents of the kind would be from these'.

    The drift is a ratio of sums, y_i = a_i - b_i over t_i; its standard error is by linearisation
    (W. G. Cochran, Sampling Techniques, 3rd ed., section 6.4)

        sqrt(n / (n - 1)  sum_i (y_i - r t_i)^2) / sum_i t_i.
    """

    def __init__(self) -> None:
        self._count, self._y, self._t = 0, 0.0, 0.0
        self._yy, self._yt, self._tt = 0.0, 0.0, 0.0

    def add(self, y: float, t: float) -> None:
        self._count += 1
        self._y, self._t = self._y + y, self._t + t
        self._yy, self._yt, self._tt = self._yy + y * y, self._yt + y * t, self._tt + t * t

    def standard_error(self) -> float | None:
        """In nats per token; None for a single document."""
        if self._count < 2:
            return None
        r = self._y / self._t
        squares = max(0.0, self._yy - 2 * r * self._yt + r * r * self._tt)
        return math.sqrt(self._count / (self._count - 1) * squares) / self._t

    def around(self, value: float) -> tuple[float, float] | None:
        """Interval at :data:`CONFIDENCE` for large numbers; None for a single document."""
        error = self.standard_error()
        if error is None:
            return None
        reach = t_quantile((1 + CONFIDENCE) / 2, self._count - 1) * error
        return value - reach, value + reach


def _recorded(reference: Reference | None, collection: Collection) -> dict[int, float]:
    """The likelihoods of a reference by document; none where it has not all of them."""
    if reference is None or len(reference.items) != len(collection):
        return {}
    found = {int(name): nll for name, nll in reference.items.items() if name.isdecimal()}
    numbers = [number for batch in collection.batches for number, _ in batch]
    return found if all(number in found for number in numbers) else {}


def _finite_base(document: Document) -> float:
    if document.base is None or not math.isfinite(document.base):
        raise CannotRun(
            f"the base model's own likelihood of document {document.number} is {document.base};"
            " a wider --lora-dtype may help"
        )
    return document.base


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _excerpt(text: str) -> str:
    """The beginning of a document, on one line, with nothing in it that could steer a terminal."""
    short = text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def _open_questions(domains: Sequence[_Domain], limit: float | None) -> Iterator[str]:
    """Domains of which the documents are too few to say more than what they themselves show."""
    for domain in domains:
        around = domain.for_the_domain()
        if limit is None or around is None or not around[0] <= limit <= around[1]:
            continue
        gap = abs(domain.drift - limit)
        needed = (
            domain.seen.documents * ((around[1] - domain.drift) / gap) ** 2 if gap else math.inf
        )
        takes = f"about {math.ceil(needed):,}" if needed < 1e9 else "ever more"
        yield (
            f"{domain.name}: the verdict is about these documents; for the domain they come from"
            f" ({around[0]:.3g} to {around[1]:.3g} nats per token, {CONFIDENCE:.0%}) it is open,"
            f" and would take {takes} documents"
        )


def _measurement(
    domains: Sequence[_Domain],
    likelihoods: Likelihoods,
    notes: Sequence[str],
    family: SequentialHolm,
) -> Measurement:
    worst = max(domains, key=lambda domain: _rank(domain.drift))
    intervals = [domain.interval() for domain in domains]
    low, high = max(low for low, _ in intervals), max(high for _, high in intervals)
    estimated = not all(domain.exhausted for domain in domains)
    broken = any(domain.broken is not None for domain in domains)
    tokens = sum(domain.collection.tokens for domain in domains)
    pooled = sum(domain.drift * domain.collection.tokens for domain in domains) / tokens
    table = {domain.name: domain.details() for domain in domains}
    alone = {key: table[worst.name][key] for key in (FACTS, ITEMS)} if len(domains) == 1 else {}
    return Measurement(
        value=worst.drift,
        unit="nats per token",
        count=sum(domain.seen.documents for domain in domains),
        low=low if estimated and not broken else None,
        high=high if estimated and not broken else None,
        where=worst.where(),
        details={
            **alone,
            "perplexity_ratio": _exp(worst.drift),
            "pooled": {"drift": pooled, "perplexity_ratio": _exp(pooled)},
            "domains": table,
            "definition": likelihoods.definition.to_dict(),
            "alpha": family.alpha,
            "family": _family(domains, family),
            "certain": all(domain.certain for domain in domains),
            "confidence": CONFIDENCE,
            "notes": list(notes),
        },
    )


def _family(domains: Sequence[_Domain], family: SequentialHolm) -> dict[str, Json]:
    """Holm's adjusted p-values of the verdicts; those at most the family's alpha stand."""
    decided = [domain for domain in domains if domain.sequential is not None]
    adjusted: dict[str, Json] = {
        domain.name: min(family.adjusted(domain.name)) for domain in decided
    }
    return {"method": "Holm", "gates": len(domains), "adjusted_p": adjusted}


def _rank(drift: float) -> float:
    return math.inf if math.isnan(drift) else drift
