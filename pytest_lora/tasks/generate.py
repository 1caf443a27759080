"""Answers written by a model, in batches, with proof that batching does not change them.

transformers' own ``generate`` does the work (it knows every architecture's cache); what is ours is
what happens around it: a configuration that nothing on disk can bend, stop strings and EOS per row,
samples that depend on a seed and nothing else, and the watch for logits that are no numbers.

*Batching.*  Rows of different length are padded on the left.  Before the first batch's answers are
believed, its shortest and its longest row are answered alone as well.  Their first logits may
differ by no more than the rounding bound that noise measures on the model itself
(:mod:`pytest_lora.numerics.noise`), and their tokens must be the same, or part at a tie: the
gap between the two candidates lies within what noise does to it, by Student's t at 1 in 1000.
Where that does not hold, every row is answered alone, and the result says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.loading import one_line, quiet
from pytest_lora.numerics.noise import rounding_noise
from pytest_lora.tasks.models import known_tokens, window

if TYPE_CHECKING:
    from pytest_lora.tasks.prompting import TaskTokenizer

__all__ = ["Answer", "Generator", "sample_seed"]

EOS, STOP, LENGTH = "eos", "stop", "length"
DRAWS = 16
"""Noisy looks at a gap between two tokens."""
STUDENT = 4.015
"""Two-sided quantile of Student's t with :data:`DRAWS` degrees of freedom at 1 in 1000."""
SEED = 9973

ANSWER = 256
"""Tokens an answer may have where nobody says so."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote for one prompt.

    Attributes:
        text: without special tokens, and without the stop string and what follows it.
        tokens: ids as generated, the EOS left out.
        ended: ``"eos"``, ``"stop"`` (a stop string) or ``"length"`` (the limit of tokens).
        finite: whether every logit that decided a token was a number.
    """

    text: str
    tokens: tuple[int, ...]
    ended: str
    finite: bool = True

    @property
    def stopped(self) -> bool:
        """Whether the model ended the answer by itself."""
        return self.ended != LENGTH


def sample_seed(seed: int, item: str, sample: int) -> int:
    """The seed of one sample of one item: 63 bits that depend on these three alone."""
    digest = hashlib.sha256(f"{seed}\n{sample}\n{item}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Generator:
    """Generation with one model.

    Attributes:
        batch_size: rows answered together; 1 once batching was found to change answers.
        notes: what a reader of the results has to know.
    """

    def __init__(
        self,
        model: Any,
        tokens: TaskTokenizer,
        *,
        max_new_tokens: int | None,
        stop: Sequence[str] = (),
        batch_size: int = 8,
        temperature: float = 0.0,
    ) -> None:
        """``temperature`` 0 is greedy; above, tokens are sampled from logits divided by it.

        Raises:
            NotApplicable: the model does not write text after a prompt.
        """
        self.model, self.tokens = model, tokens
        self.stop = tuple(stop)
        self.batch_size, self.temperature = batch_size, temperature
        self.notes: list[str] = []
        self._proven = False
        self._bare = getattr(model, "get_base_model", lambda: model)()
        config = getattr(self._bare, "config", None)
        if not hasattr(self._bare, "generate") or getattr(config, "is_encoder_decoder", False):
            raise NotApplicable(f"{type(self._bare).__name__} does not continue a text")
        self._ends = _end_tokens(self._bare, tokens)
        self._window = window(self._bare)
        self.max_new_tokens = max_new_tokens or self._usual_length()
        self._vocabulary = known_tokens(self._bare)

    def _usual_length(self) -> int:
        """:data:`ANSWER`, or half of a window that is smaller: the other half is the prompt's."""
        length = max(1, min(ANSWER, self._window // 2))
        if length < ANSWER:
            self.notes.append(
                f"answers have at most {length} tokens, half of the model's window;"
                " max_new_tokens allows others"
            )
        return length

    def answers(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> list[Answer]:
        """An answer for each prompt, in order; ``seeds``: one per prompt, when sampling.

        Raises:
            CannotRun: the model fails, or a token id is beyond its vocabulary.
        """
        rows = [self._fitted(list(prompt)) for prompt in prompts]
        found: list[Answer] = []
        while len(found) < len(rows):
            part = slice(len(found), len(found) + self.batch_size)
            batch = rows[part]
            if len(batch) > 1 and not self._proven:
                greedy = self._prove(batch)
                found += greedy if self.temperature == 0 else []
                continue  # the size of a batch may be another now
            chosen = None if seeds is None else list(seeds[part])
            found += self._run(batch, chosen).answers
        return found

    def _fitted(self, prompt: list[int]) -> list[int]:
        """The prompt, its beginning cut off where it and an answer exceed the model's window."""
        if max(prompt) >= self._vocabulary:
            raise CannotRun(
                f"the tokenizer ({self.tokens.source}) gives token {max(prompt)}, but the model"
                f" knows {self._vocabulary}: they do not belong together"
            )
        room = self._window - self.max_new_tokens
        if room < 1:
            raise CannotRun(
                f"max_new_tokens = {self.max_new_tokens} leaves no room for a prompt: the model's"
                f" window is {self._window} tokens; set max_new_tokens to less"
            )
        if len(prompt) <= room:
            return prompt
        note = f"prompts of more than {room} tokens had their beginning cut off"
        if note not in self.notes:
            self.notes.append(note)
        return prompt[-room:]

    # ---------------------------------------------------------------------------- running

    def _run(
        self,
        rows: Sequence[list[int]],
        seeds: Sequence[int] | None = None,
        *,
        limit: int | None = None,
    ) -> _Run:
        """One call of ``generate``; ``limit``: tokens at most, instead of the generator's own."""
        most = limit or self.max_new_tokens
        ids, mask = _left_padded(rows, self.tokens.pad)
        device = next(self._bare.parameters()).device
        state = _State(self, width=ids.shape[1], rows=len(rows), seeds=seeds)
        with _configured(self._bare, self._configuration(most)):
            try:
                with quiet(), torch.inference_mode():
                    output = self.model.generate(
                        input_ids=ids.to(device),
                        attention_mask=mask.to(device),
                        logits_processor=state.processors(),
                        stopping_criteria=state.criteria(),
                    )
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise CannotRun(f"generation fails: {one_line(error)}") from error
        written = output[:, ids.shape[1] :].tolist()
        answers = [self._answer(row, state.broke[i]) for i, row in enumerate(written)]
        assert state.first is not None
        return _Run(answers, state.first)

    def _configuration(self, most: int) -> Any:
        """Greedy search and nothing else, whatever the model's folder says."""
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self.tokens.pad,
        )

    def _answer(self, written: list[int], broke: int | None) -> Answer:
        ended, kept = LENGTH, written
        for place, token in enumerate(written):
            if token in self._ends:
                ended, kept = EOS, written[:place]
                break
        text = self.tokens.decode(kept)
        cuts = [place for place in map(text.find, self.stop) if place >= 0]
        if cuts:
            ended, text = STOP, text[: min(cuts)]
            kept = _without_padding(kept, self.tokens.pad)
        finite = broke is None or broke > len(kept)
        return Answer(text, tuple(kept), ended, finite)

    # ------------------------------------------------------------------------------ proof

    def _prove(self, batch: Sequence[list[int]]) -> list[Answer]:
        """Answer two rows of the batch alone; fall back to single rows if that is not the same.

        Returns the batch's greedy answers if they can be believed, else none.
        """
        self._proven = True
        order = sorted(range(len(batch)), key=lambda i: (len(batch[i]), i))
        together = self._run(batch)
        with rounding_noise(self.model, SEED):
            noisy = self._run(batch, limit=1)
        for row in (order[0], order[-1]):
            alone = self._run([batch[row]])
            bound = _rms(noisy.first[row] - together.first[row])
            apart = _rms(alone.first[0] - together.first[row])
            if not apart <= bound:
                times = apart / bound if bound else apart
                return self._alone(f"the first logits differ by {times:.3g} rounding bounds")
            if not self._same_or_tied(batch[row], alone.answers[0], together.answers[row]):
                return self._alone("the tokens part where no tie explains it")
        return together.answers

    def _alone(self, why: str) -> list[Answer]:
        self.batch_size = 1
        self.notes.append(f"answered one row at a time, for batching changes answers: {why}")
        return []

    def _same_or_tied(self, prompt: list[int], alone: Answer, together: Answer) -> bool:
        """Whether the two answers agree up to a place where two tokens are as good as equal."""
        place = _parting(alone.tokens, together.tokens)
        if place is None:
            return alone.ended == together.ended
        pair = [_token_at(answer, place, self._ends) for answer in (alone, together)]
        if None in pair:
            return False
        start = [*prompt, *alone.tokens[:place]]
        gap = self._gap(start, pair)
        noise = []
        for draw in range(DRAWS):
            with rounding_noise(self.model, SEED + draw):
                noise.append(self._gap(start, pair) - gap)
        spread = math.sqrt(sum(value**2 for value in noise) / DRAWS)
        self.notes.append("two tokens were as good as equal, so batching chose between them")
        return abs(gap) <= STUDENT * spread

    def _gap(self, prompt: list[int], pair: Sequence[Any]) -> float:
        first = self._run([prompt], limit=1).first[0]
        return float(first[pair[0]] - first[pair[1]])


@dataclass(frozen=True, slots=True)
class _Run:
    """Answers of one batch, and the logits of each row's first token, ``(rows, vocabulary)``."""

    answers: list[Answer]
    first: torch.Tensor


class _State:
    """What happens to a batch while ``generate`` runs."""

    def __init__(
        self, owner: Generator, *, width: int, rows: int, seeds: Sequence[int] | None
    ) -> None:
        self.owner, self.width = owner, width
        self.first: torch.Tensor | None = None
        self.broke: list[int | None] = [None] * rows
        self._done = [False] * rows
        self._draws = None
        if owner.temperature > 0 and seeds is not None:
            self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._tail = 4 * max(map(len, owner.stop), default=0) + 1

    def processors(self) -> Any:
        """Our look at the logits, as transformers takes it."""
        from transformers import LogitsProcessorList

        return LogitsProcessorList([self.look])

    def criteria(self) -> Any:
        """Our stop strings, as transformers takes them."""
        from transformers import StoppingCriteriaList

        return StoppingCriteriaList([self.stop] if self.owner.stop else [])

    def look(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keep the first logits, note the first that are none, and sample."""
        if self.first is None:
            self.first = scores.detach().float().cpu().clone()
        broken = (scores.isnan() | scores.isposinf()).any(-1) | scores.isneginf().all(-1)
        for row in broken.nonzero().flatten().tolist():
            if self.broke[row] is None:
                self.broke[row] = input_ids.shape[1] - self.width
        return scores if self._draws is None else self._sampled(scores)

    def _sampled(self, scores: torch.Tensor) -> torch.Tensor:
        """Logits plus Gumbel noise: the largest is then a sample from their softmax (Gumbel, 1954).

        Each row has a generator of its own, so a sample depends on its seed and not on its batch;
        and two models asked with one seed get the same noise.
        """
        noisy = scores.detach().double().cpu() / self.owner.temperature
        for row, generator in enumerate(self._draws or ()):
            waiting = torch.empty(noisy.shape[1], dtype=torch.float64)
            noisy[row] -= waiting.exponential_(generator=generator).log()
        return noisy.to(scores.device)

    def stop(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which rows hold a stop string by now; only the end of a row is new."""
        written = input_ids[:, self.width :]
        for row, done in enumerate(self._done):
            if not done:
                text = self.owner.tokens.decode(written[row, -self._tail :].tolist())
                self._done[row] = any(stop in text for stop in self.owner.stop)
        return torch.tensor(self._done, device=input_ids.device)


# ------------------------------------------------------------------------------------ pieces


@contextlib.contextmanager
def _configured(module: Any, configuration: Any) -> Iterator[None]:
    """The module's own generation settings out of the way for a while."""
    before = getattr(module, "generation_config", None)
    module.generation_config = configuration
    try:
        yield
    finally:
        module.generation_config = before


def _left_padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _without_padding(tokens: list[int], pad: int) -> list[int]:
    """Without what ``generate`` fills a row up with that has stopped."""
    end = len(tokens)
    while end and tokens[end - 1] == pad:
        end -= 1
    return tokens[:end]


def _end_tokens(module: Any, tokens: TaskTokenizer) -> frozenset[int]:
    """Every token that ends a text for this model: the tokenizer's and its configurations'."""
    found: set[int] = set()
    for holder in (
        tokens.tokenizer,
        getattr(module, "generation_config", None),
        getattr(module, "config", None),
    ):
        value = getattr(holder, "eos_token_id", None)
        listed = value if isinstance(value, list | tuple) else [value]
        found.update(item for item in listed if isinstance(item, int) and item >= 0)
    return frozenset(found)


def _rms(difference: torch.Tensor) -> float:
    """Root mean square; NaN stays NaN, so that it is never within a bound."""
    return float(difference.double().square().mean().sqrt())


def _parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two answers differ; None where one is the other."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def _token_at(answer: Answer, place: int, ends: frozenset[int]) -> int | None:
    """The token chosen there; an end token where the answer had ended."""
    if place < len(answer.tokens):
        return answer.tokens[place]
    return min(ends) if answer.ended == EOS and ends else None
