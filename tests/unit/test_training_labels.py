"""What a batch teaches: a sound one passes, each mistake of collators and templates is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from training_loops import adapted, texts, trainer

import pytest_lora as lora
from pytest_lora.errors import CheckFailed, UsageError
from pytest_lora.loading import quiet

BEGIN, END, PAD, LINE = 1, 2, 0, 9
PROMPTS = [3, 4]
IDS = texts()["input_ids"]
Batch = dict[str, torch.Tensor]


def batch(*, side: str = "right", trailing: int = 0, **changes: Any) -> Batch:
    """Two texts, prompt and answer, of unequal length; the answers are taught."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for prompt, answer in (([BEGIN, 11, 12], [13, 14, 15]), ([BEGIN, 21, 22, 23], [24])):
        text = [*prompt, *answer, END, *[LINE] * trailing]
        labels = [*[-100] * len(prompt), *text[len(prompt) :]]
        room = 7 + trailing - len(text)
        before, after = (room, 0) if side == "left" else (0, room)
        rows.append((
            [PAD] * before + text + [PAD] * after,
            [-100] * before + labels + [-100] * after,
            [0] * before + [1] * len(text) + [0] * after,
        ))  # fmt: skip
    names = ("input_ids", "labels", "attention_mask")
    found = {n: torch.tensor(c) for n, c in zip(names, zip(*rows, strict=True), strict=True)}
    return {**found, **changes}


def check(found: Batch, **options: Any) -> Any:
    return lora.assert_labels_sound(found, end=END, begin=BEGIN, prompts=PROMPTS, **options)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sound_batch_passes(side: str) -> None:
    found = check(batch(side=side))
    assert found.count == 14
    assert found.details["taught"] == 6
    check(batch(side=side, trailing=1), trailing=1)
    assert lora.assert_labels_sound(batch(side=side)).value == 0  # with nothing declared


def edited(name: str, row: int, place: int | slice, value: Any) -> Batch:
    found = batch()
    found[name] = found[name].clone()
    found[name][row, place] = value
    return found


def _shifted() -> Batch:
    """The labels as the loss wants them, for a model that shifts them itself."""
    found = batch()
    moved = found["labels"].roll(-1, 1)
    moved[:, -1] = -100
    return {**found, "labels": moved}


FAULTS = {
    "all ignored": (lambda: edited("labels", 1, slice(None), -100), "every label is ignored"),
    "padding taught": (lambda: edited("labels", 1, 6, PAD), "1 labels on padding"),
    "end ignored": (lambda: edited("labels", 0, 6, -100), "the end token is ignored"),
    "end cut off": (lambda: edited("input_ids", 0, 6, 16), "the text ends without an end token"),
    "shifted twice": (_shifted, "the model shifts the labels itself"),
    "other texts": (lambda: edited("labels", 0, 4, 30), "come of different texts"),
    "prompt taught": (lambda: edited("labels", 0, slice(1, 3), torch.tensor([11, 12])),
                      "2 tokens of the prompt are taught"),
    "answer ignored": (lambda: edited("labels", 0, 3, -100), "1 tokens of the answer are ignored"),
    "begun twice": (lambda: edited("input_ids", 0, 1, BEGIN), "it begins with 2 times token 1"),
    "not begun": (lambda: edited("input_ids", 1, 0, 8), "it begins with 0 times token 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    make, says = FAULTS[fault]
    with pytest.raises(CheckFailed) as caught:
        check(make())
    assert says in str(caught.value)


def test_where_and_what_is_shown() -> None:
    with pytest.raises(CheckFailed, match=r"row 0, from place 1 \(tokens 11, 12\): 2 tokens"):
        check(FAULTS["prompt taught"][0]())


def test_a_line_break_after_the_end_has_to_be_declared() -> None:
    with pytest.raises(CheckFailed, match="trailing=1"):
        check(batch(trailing=1))
    ignored = batch(trailing=1)
    ignored["labels"] = ignored["labels"].where(ignored["input_ids"] != END, -100)
    with pytest.raises(CheckFailed, match="the end token is ignored"):
        check(ignored, trailing=1)


def test_a_row_of_padding_teaches_nothing() -> None:
    found = batch()
    for name, value in (("labels", -100), ("attention_mask", 0)):
        found[name][1] = value
    with pytest.raises(CheckFailed, match="row 1: every label is ignored"):
        lora.assert_labels_sound(found, end=END)


def test_the_collator_of_transformers_with_the_end_token_as_padding() -> None:
    """Everybody's first fine-tuning: the padding token is the end token, and both are masked."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w3"))
    found = {}
    for pad in ("w2", "w0"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token=pad)
        rows = [{"input_ids": [5, 6, 7, 2]}, {"input_ids": [8, 2]}]
        with quiet():
            found[pad] = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    lora.assert_labels_sound(found["w0"], end=2)
    with pytest.raises(CheckFailed, match="use a padding token that is not the end token"):
        lora.assert_labels_sound(found["w2"], end=2)


def test_a_trainer_is_asked_for_its_first_batch(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path)
    taught = lora.assert_labels_sound(made).details["taught"]
    assert isinstance(taught, int)
    assert 0 < taught < 2 * 12
    with pytest.raises(CheckFailed, match="ends without an end token"):
        lora.assert_labels_sound(made, end=62)  # no text of these has it


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        (IDS, {}, "a mapping with input_ids and labels"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, {}, "expected both of one shape"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, {}, "rows, places"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": IDS[:, 1:]}, {}, "attention_mask"),
        (texts(), {"prompts": [1]}, "1 numbers for 4 texts"),
        (texts(), {"answers": [7]}, "with end, and without prompts"),
        (texts(), {"answers": [], "end": 2}, "the tokens that open one"),
    ],
)
def test_what_is_no_batch(given: Any, options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        lora.assert_labels_sound(given, **options)


# ------------------------------------------------------------------------------ chats

OPENING = [5, 7]  # <turn> assistant
CHAT = [BEGIN, 5, 6, 11, 12, END, LINE, 5, 7, 13, 14, END, LINE, 5, 6, 15, END, LINE, 5, 7, 16, END]
TAUGHT = [9, 10, 11, 20, 21]


def chat(taught: list[int], cut: int = len(CHAT)) -> Batch:
    labels = [token if place in taught else -100 for place, token in enumerate(CHAT)]
    return {"input_ids": torch.tensor([CHAT[:cut]]), "labels": torch.tensor([labels[:cut]])}


def check_chat(found: Batch, **options: Any) -> Any:
    return lora.assert_labels_sound(found, end=END, answers=OPENING, **options)


def test_a_chat_whose_answers_are_taught_passes() -> None:
    assert check_chat(chat(TAUGHT)).details["taught"] == 5
    # The line break after an answer may be taught, where it is declared.
    check_chat(chat([*TAUGHT, 12]), trailing=1)
    check_chat(chat(TAUGHT), trailing=1)
    # A text that ends in the opening of an answer has no more than the first.
    check_chat({**chat(TAUGHT, 20), "attention_mask": torch.tensor([[1] * 12 + [0] * 8])})


@pytest.mark.parametrize(
    ("taught", "says"),
    [
        (range(9, 22), "from place 12 .*8 tokens outside the answers are taught"),
        ([20, 21], r"all tokens of answer 1 of 2 are ignored"),
        ([10, 11, 20, 21], r"from place 9 \(tokens 13\): 1 tokens of answer 1 of 2 are ignored"),
        (
            [9, 10, 20, 21],
            r"(?s)1 problem .*from place 11 \(tokens 2\): the end token of answer 1 of 2 is",
        ),
        ([7, 8, *TAUGHT], "from place 7 .*2 tokens outside the answers are taught"),
        ([*TAUGHT, 12], "from place 12 .*1 tokens outside the answers are taught"),
    ],
    ids=["on till the end", "last turn only", "first token", "no end", "opening", "line break"],
)
def test_a_chat_whose_mask_is_another(taught: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        check_chat(chat(list(taught)))


def test_a_chat_without_the_opening() -> None:
    with pytest.raises(CheckFailed, match="no answer: the tokens 5, 8 are not in it"):
        lora.assert_labels_sound(chat(TAUGHT), end=END, answers=[5, 8])


def test_an_answer_that_was_cut_is_taught_as_far_as_it_goes() -> None:
    from pytest_lora.checks.labels import measure_labels_sound

    found = measure_labels_sound(chat(TAUGHT, 21), end=END, answers=OPENING)
    assert [problem.found for problem in found.problems] == ["the text ends without an end token"]


# ------------------------------------------------------------------------------ packed rows


def packed(by: str) -> Batch:
    """Two texts in one row: a prompt of three tokens and its answer, and one of two."""
    tokens = torch.tensor([[1, 11, 12, 13, 2, 1, 21, 22, 23, 2]])
    labels = tokens.clone()
    labels[0, :3] = labels[0, 5:7] = -100
    found = {"input_ids": tokens, "labels": labels}
    if by == "positions":
        found["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    elif by == "mask":
        found["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    return found


@pytest.mark.parametrize("by", ["positions", "mask"])
def test_packed_texts_are_judged_one_by_one(by: str) -> None:
    found = lora.assert_labels_sound(packed(by), end=2, begin=1, prompts=[3, 2])
    assert (found.details["rows"], found.details["texts"]) == (1, 2)
    wrong = packed(by)
    wrong["labels"][0, 6] = 21
    with pytest.raises(CheckFailed, match=r"row 0, text 1, from place 6 .*1 tokens of the prompt"):
        lora.assert_labels_sound(wrong, prompts=[3, 2])


def test_the_flattening_collator_of_transformers() -> None:
    from transformers import DataCollatorWithFlattening

    texts = [{"input_ids": [1, 11, 12, 2]}, {"input_ids": [1, 21, 2]}, {"input_ids": [1, 2]}]
    found = dict(DataCollatorWithFlattening()(texts))
    assert lora.assert_labels_sound(found, end=2, begin=1).details["texts"] == len(texts)
    found["labels"][0, 4] = 1
    with pytest.raises(CheckFailed, match="its first token is taught"):
        lora.assert_labels_sound(found, end=2, begin=1)


@pytest.mark.parametrize(
    ("place", "token", "label", "says"),
    [
        (5, 1, 1, r"row 0, text 1, from place 5 .*its first token is taught .*the text before it"),
        (4, 2, -100, r"row 0, text 0, from place 4 .*the end token is ignored"),
        (4, 14, 14, r"row 0, text 0, .*the text ends without an end token"),
        (5, 20, -100, r"row 0, text 1: it begins with 0 times token 1"),
        (slice(5, 10), 9, -100, r"row 0, text 1: every label is ignored"),
    ],
)
def test_faults_within_a_packed_row(place: Any, token: int, label: int, says: str) -> None:
    found = packed("positions")
    found["input_ids"][0, place], found["labels"][0, place] = token, label
    with pytest.raises(CheckFailed, match=says):
        lora.assert_labels_sound(found, end=2, begin=1)


def test_positions_of_padding_begin_no_text() -> None:
    found = batch(side="left")
    mask = found["attention_mask"]
    found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    assert lora.assert_labels_sound(found).details["texts"] == len(mask)
    found["position_ids"] = torch.zeros_like(mask)
    assert lora.assert_labels_sound(found).details["texts"] == len(mask)
