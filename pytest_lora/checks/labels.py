"""What a batch teaches a causal language model: its labels beside its tokens.

A label belongs to the token at its own place; the model shifts by one itself.  What is ignored
teaches nothing: where the end of a text is ignored with the padding, nobody learns to stop.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pytest_lora.checks.steps import is_trainer
from pytest_lora.errors import UsageError
from pytest_lora.records import Measurement, Problem

__all__ = ["measure_labels_sound"]

_SHOWN = 8
"""Token ids shown of a place at fault."""

_NO_END = (
    "append the end token before cutting to length, take a batch of texts that are not cut, or say"
    " trailing=1 where the template writes a token after it"
)
_END_IGNORED = (
    "mask padding by its place rather than by its token, or use a padding token that is not the end"
    " token"
)
_BEGUN = (
    "a template that writes the token and a tokenizer that adds it make two: one of them has to"
    " leave it out"
)
_ANSWER_IGNORED = "the mask of the answer begins too late, or leaves tokens out by their kind"


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of the batch, or one text of a row that holds several.

    Attributes:
        name: which one.
        tokens, labels: of the whole row, padding included.
        kept: where the text is; everywhere in a batch without a mask.
        taught: where a label is not ignored.
        packed: whether it follows another text in its row.
    """

    name: str
    tokens: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor
    taught: torch.Tensor
    packed: bool = False

    @property
    def text(self) -> torch.Tensor:
        """The places of the text, in order."""
        return self.kept.nonzero()[:, 0]

    def at(self, places: torch.Tensor) -> str:
        """Where in the row that is, and the tokens there."""
        shown = self.tokens[places][:_SHOWN].tolist()
        more = ", ..." if len(places) > _SHOWN else ""
        listed = ", ".join(map(str, shown))
        return f"{self.name}, from place {int(places[0])} (tokens {listed}{more})"


def measure_labels_sound(
    batch: Any,
    *,
    end: int | Collection[int] | None = None,
    trailing: int = 0,
    begin: int | None = None,
    prompts: Sequence[int] | None = None,
    answers: Sequence[int] | None = None,
    ignored: int = -100,
) -> Measurement:
    """Count the rows of a batch whose labels teach something else than the text.

    Args:
        batch: ``input_ids`` and ``labels`` as the model is given them, ``attention_mask`` where
            there is padding, ``position_ids`` or a mask that counts the texts where a row holds
            several; or a Trainer, whose first training batch is looked at.
        end: the token that ends a text, or several; the last token of each text has to be one of
            them, and taught.
        trailing: how many tokens a template writes after it (a line break).
        begin: the token that begins a text, once.
        prompts: how many tokens at the beginning of each text are its prompt; these have to be
            ignored, and all others taught.
        answers: the tokens that open each answer of a chat; what follows them, up to the end token
            and with it, has to be taught, and all else ignored but ``trailing`` tokens after it.
        ignored: the label that stands for none.

    Raises:
        UsageError: no such batch, or no end for the answers.
    """
    if answers is not None and (not len(answers) or end is None or prompts is not None):
        raise UsageError("answers are the tokens that open one: with end, and without prompts")
    rows = list(_rows(batch, ignored))
    texts = [text for row, segments in rows for text in _texts(row, segments)]
    if prompts is not None and len(prompts) != len(texts):
        raise UsageError(f"prompts has {len(prompts)} numbers for {len(texts)} texts")
    ends = {end} if isinstance(end, int) else set(end or ())
    problems = [problem for row, _ in rows for problem in _wrong_labels(row)]
    for number, text in enumerate(texts):
        problems += _wrong_beginning(text)
        problems += _wrong_end(text, ends, trailing, told=answers is not None) if ends else []
        problems += _wrong_begin(text, begin) if begin is not None else []
        problems += _wrong_prompt(text, prompts[number]) if prompts is not None else []
        problems += _wrong_chat(text, answers, ends, trailing) if answers is not None else []
    places = sum(row.labels.numel() for row, _ in rows)
    taught = sum(int(row.taught.sum()) for row, _ in rows)
    return Measurement.of_problems(
        problems, count=places, rows=len(rows), texts=len(texts), taught=taught
    )


def _rows(batch: Any, ignored: int) -> Iterator[tuple[_Row, torch.Tensor]]:
    """Each row with the number of the text that each of its places belongs to."""
    if is_trainer(batch):
        batch = next(iter(batch.get_train_dataloader()))
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        raise UsageError("a batch is a mapping with input_ids and labels, or comes of a Trainer")
    tokens, labels = torch.as_tensor(batch["input_ids"]), torch.as_tensor(batch["labels"])
    if tokens.dim() != 2 or tokens.shape != labels.shape or not tokens.numel():
        raise UsageError(
            f"input_ids {list(tokens.shape)} and labels {list(labels.shape)}: expected both of one"
            " shape, (rows, places), as a causal language model takes them"
        )
    mask = batch.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else torch.as_tensor(mask)
    if mask.shape != tokens.shape:
        raise UsageError(f"attention_mask {list(mask.shape)}: expected the shape of input_ids")
    positions = batch.get("position_ids")
    positions = None if positions is None else torch.as_tensor(positions)
    if positions is None or positions.shape != tokens.shape:  # some models count in three ways
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    for number in range(len(tokens)):
        taught = labels[number] != ignored
        row = _Row(f"row {number}", tokens[number], labels[number], mask[number].bool(), taught)
        yield row, _segments(mask[number], positions[number])


def _segments(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Which text of the row each place is of: where positions start over, or the mask holds another
    number, there begins another one.
    """
    mask = mask.long()
    segments, kept = torch.zeros_like(mask), mask.nonzero()[:, 0]
    begins = (positions[kept].diff() < 0) | (mask[kept].diff() != 0)
    segments[kept[1:]] = begins.long().cumsum(0)
    return segments


def _texts(row: _Row, segments: torch.Tensor) -> Iterator[_Row]:
    """The texts of a row; one text, which may be none, where it is not packed."""
    count = int(segments.max()) + 1
    if count == 1:
        yield row
        return
    for number in range(count):
        yield replace(
            row,
            name=f"{row.name}, text {number}",
            kept=row.kept & (segments == number),
            packed=number > 0,
        )


def _wrong_beginning(text: _Row) -> Iterator[Problem]:
    """Something to learn in every text, and no text's beginning from the one before."""
    if not bool((text.taught & text.kept).any()):
        yield Problem(text.name, "every label is ignored", "something to learn",
                      "the answer was cut off, or the mask found none in the text")  # fmt: skip
    elif text.packed and bool(text.taught[text.text[0]]):
        yield Problem(text.at(text.text[:1]), "its first token is taught", "ignored",
                      "it would be predicted from the text before it")  # fmt: skip


def _wrong_labels(row: _Row) -> Iterator[Problem]:
    padding = (row.taught & ~row.kept).nonzero()[:, 0]
    if len(padding):
        yield Problem(row.at(padding), f"{len(padding)} labels on padding", "ignored",
                      "set the labels to the ignored one where attention_mask is 0")  # fmt: skip
    wrong = (row.taught & row.kept & (row.labels != row.tokens)).nonzero()[:, 0]
    if len(wrong):
        yield Problem(row.at(wrong), f"{len(wrong)} labels are other tokens", "the tokens there",
                      _why_other(row))  # fmt: skip


def _why_other(row: _Row) -> str:
    places = row.taught[:-1].nonzero()[:, 0]
    if len(places) and bool((row.labels[places] == row.tokens[places + 1]).all()):
        return (
            "they are the next tokens: the model shifts the labels itself, so leave them in place"
        )
    return "labels and input_ids come of different texts, or were cut or padded differently"


def _wrong_end(
    row: _Row, ends: Collection[int], trailing: int, *, told: bool = False
) -> Iterator[Problem]:
    """``told``: whether each answer's end is looked at by itself."""
    last = row.text[-1 - trailing :]
    found = [place for place in last if int(row.tokens[place]) in ends]
    if not len(last):
        return  # all of it is padding, so that every label is ignored or on padding
    if not found:
        wanted = ", ".join(map(str, sorted(ends)))
        yield Problem(row.at(last), "the text ends without an end token", wanted, _NO_END)
    elif not told and not bool(row.taught[found[-1]]):
        place = row.at(found[-1][None])
        yield Problem(place, "the end token is ignored", "taught", _END_IGNORED)


def _wrong_begin(row: _Row, begin: int) -> Iterator[Problem]:
    found = row.tokens[row.text] == begin
    times = int(found.long().cumprod(0).sum())
    if times != 1:
        said = f"it begins with {times} times token {begin}"
        yield Problem(row.name, said, "once", _BEGUN)


def _wrong_prompt(row: _Row, length: int) -> Iterator[Problem]:
    prompt, answer = row.text[:length], row.text[max(length, int(row.packed)) :]
    taught = prompt[row.taught[prompt]]
    if len(taught):
        yield Problem(row.at(taught), f"{len(taught)} tokens of the prompt are taught", "ignored",
                      "the mask of the answer was lost, or counts from another place")  # fmt: skip
    lost = answer[~row.taught[answer]]
    if len(lost):
        said = f"{len(lost)} tokens of the answer are ignored"
        yield Problem(row.at(lost), said, "taught", _ANSWER_IGNORED)


def _wrong_chat(
    row: _Row, opening: Sequence[int], ends: Collection[int], trailing: int
) -> Iterator[Problem]:
    """Every answer taught to its end, and nothing between them."""
    spans = list(_answers(row.tokens[row.text].tolist(), opening, ends))
    if not spans:
        if len(row.text):
            shown = ", ".join(map(str, opening))
            yield Problem(row.name, f"no answer: the tokens {shown} are not in it", "one at least",
                          "take them from the template's output: tokens merge there")  # fmt: skip
        return
    outside = torch.ones_like(row.text, dtype=torch.bool)
    for number, (first, last) in enumerate(spans, start=1):
        outside[first : last + 1 + trailing] = False
        places = row.text[first : last + 1]
        lost = places[~row.taught[places]]
        if len(lost):
            which = f"answer {number} of {len(spans)}"
            if len(lost) == 1 < len(places) and int(row.tokens[lost[0]]) in ends:
                yield Problem(row.at(lost), f"the end token of {which} is ignored", "taught",
                              "the mask ends before it, and nobody learns to stop")  # fmt: skip
                continue
            all_of_it = "all" if len(lost) == len(places) else f"{len(lost)}"
            said = f"{all_of_it} tokens of {which} are ignored"
            yield Problem(row.at(lost), said, "taught", _ANSWER_IGNORED)
    between = row.text[outside]
    taught = between[row.taught[between]]
    if len(taught):
        yield Problem(row.at(taught), f"{len(taught)} tokens outside the answers are taught",
                      "ignored", _BETWEEN)  # fmt: skip


_BETWEEN = "the mask was not switched off after an answer, or is on from the template's opening on"


def _answers(
    tokens: Sequence[int], opening: Sequence[int], ends: Collection[int]
) -> Iterator[tuple[int, int]]:
    """The first and last place of each answer; of one that was cut, the text's last."""
    place, length = 0, len(opening)
    while place + length < len(tokens):
        if list(tokens[place : place + length]) != list(opening):
            place += 1
            continue
        first = place = place + length
        while place < len(tokens) - 1 and tokens[place] not in ends:
            place += 1
        yield first, place
        place += 1
