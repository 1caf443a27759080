"""Files in the forms their authors publish: read as they are, or refused with the place."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from example import ROOT

from pytest_lora import profile
from pytest_lora.errors import UsageError
from pytest_lora.profile import LM_EVAL_KEYS, TASK_KEYS
from pytest_lora.tasks import rows
from pytest_lora.tasks.configure import task_from_config
from pytest_lora.tasks.formats import FORMATS, read_task
from pytest_lora.tasks.graders import GRADERS, final_number
from pytest_lora.tasks.records import Length, Scoring, Task, TaskItem

SHARED = ROOT.parent / "shared" / "data" / "eval"
NEEDS_SHARED = pytest.mark.skipif(not SHARED.is_dir(), reason="the public test sets are not here")

STEM = {
    "stem": "Which is wet?",
    "choices": [{"text": "water", "label": "A"}, {"text": "sand", "label": "B"}],
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "prompt_answer": {"id": "p1", "prompt": "2 + 2 =", "answer": 4},
    "prompt_choices": {"prompt": "The sky is", "choices": [" blue", " made of tin"], "answer": 0},
    "question_answer": {"question": "Who?", "answer": "Ada"},
    "gsm8k": {"question": "2 and 2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    "hellaswag": {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": ["is [substeps] tired.", "rips shingles [title] Done", "x  y", "z"],
        "label": 3,
        "source_id": "activitynet~v",
        "split": "val",
    },
    "arc": {
        "id": "Mercury_1",
        "question": "Which is wet?",
        "choices": {"text": ["water", "sand"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "arc as its authors publish it": {"id": "Mercury_2", "question": STEM, "answerKey": "2"},
    "openbookqa": {
        "id": "7-980",
        "question_stem": "Which is wet?",
        "choices": {"text": ["water", "sand"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "openbookqa as its authors publish it": {
        "id": "7-981",
        "question": STEM,
        "fact1": "water is wet",
        "answerKey": "A",
    },
    "winogrande": {
        "qID": "3FCJ-1",
        "sentence": "Sarah beat Maria because _ was faster.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": "1",
    },
    "piqa": {"goal": "dry a sponge", "sol1": "squeeze it", "sol2": "soak it", "label": 0},
    "boolq": {"question": "is it wet", "title": "Water", "passage": "It is.", "answer": True},
    "boolq of SuperGLUE": {"question": "is it wet?", "passage": "It is.", "idx": 0, "label": 0},
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
    "instruction_choices": {
        "instruction": "Please choose: Which is wet?\n\nAnswer1: water Answer2: sand\n\n"
        "Answer format: answer1/answer2",
        "input": "",
        "output": "the correct answer is answer1",
        "answer": "answer1",
    },
    "instruction": {"instruction": "Add.", "input": "2 2", "output": "It is 4."},
}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def one(tmp_path: Path, kind: str, **changes: Any) -> TaskItem:
    record = {key: value for key, value in {**PUBLISHED[kind], **changes}.items()
              if value is not ...}  # fmt: skip
    [item] = read_task(write(tmp_path / "x.jsonl", record)).items
    return item


@pytest.mark.parametrize("kind", PUBLISHED)
def test_each_form_is_known_by_its_fields(tmp_path: Path, kind: str) -> None:
    task = read_task(write(tmp_path / "x.jsonl", PUBLISHED[kind], PUBLISHED[kind]))
    assert task.format == kind.partition(" ")[0]
    assert (task.name, len(task)) == ("x", 2)
    named = read_task(tmp_path / "x.jsonl", format=task.format)
    assert named.items == task.items


def test_the_samples_cover_every_form() -> None:
    assert {kind.partition(" ")[0] for kind in PUBLISHED} == {form.name for form in FORMATS}


def test_hellaswag_is_prepared_as_published(tmp_path: Path) -> None:
    item = one(tmp_path, "hellaswag")
    assert item.prompt == "Roof shingle removal: A man is sitting on a roof. He"
    assert item.choices == ("is tired.", "rips shingles. Done", "x y", "z")
    assert (item.id, item.correct) == ("24", 3)
    assert one(tmp_path, "hellaswag", label="1").correct == 1
    plain = one(tmp_path, "hellaswag", ctx_a=..., activity_label=...)
    assert plain.prompt == "A man is sitting on a roof. he"


def test_winogrande_is_scored_behind_the_blank(tmp_path: Path) -> None:
    item = one(tmp_path, "winogrande")
    assert item.contexts == ("Sarah beat Maria because Sarah", "Sarah beat Maria because Maria")
    assert item.choices == ("was faster.", "was faster.")
    assert item.correct == 0


def test_answer_keys_are_letters_or_numbers(tmp_path: Path) -> None:
    assert one(tmp_path, "arc", answerKey="B").correct == 1
    assert one(tmp_path, "arc", answerKey="2").correct == 1
    numbered = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}
    assert one(tmp_path, "arc", choices=numbered, answerKey="3").correct == 2
    assert one(tmp_path, "arc", choices=numbered, answerKey="C").correct == 2


def test_boolq_asks_once(tmp_path: Path) -> None:
    for kind, correct in (("boolq", 1), ("boolq of SuperGLUE", 0)):
        item = one(tmp_path, kind)
        assert item.prompt == "It is.\nQuestion: is it wet?\nAnswer:"
        assert (item.choices, item.correct) == (("no", "yes"), correct)


def test_choices_may_be_given_by_text(tmp_path: Path) -> None:
    assert one(tmp_path, "prompt_choices", answer=" made of tin").correct == 1
    assert one(tmp_path, "prompt_choices", answer="1").correct == 1


def test_labels_of_piqa_lie_beside_it(tmp_path: Path) -> None:
    bare = {key: value for key, value in PUBLISHED["piqa"].items() if key != "label"}
    file = write(tmp_path / "valid.jsonl", bare, bare)
    with pytest.raises(UsageError, match=r"valid.jsonl:1: field 'label' is missing"):
        read_task(file)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    assert [item.correct for item in read_task(file).items] == [1, 0]
    (tmp_path / "valid-labels.lst").write_text("1\n")
    with pytest.raises(UsageError, match=r"valid.jsonl:2: the file of labels beside it has only 1"):
        read_task(file)


def test_instructions_hold_their_options(tmp_path: Path) -> None:
    item = one(tmp_path, "instruction_choices")
    assert item.extra == {
        "labels": ["answer1", "answer2"],
        "question": "Which is wet?",
        "options": ["water", "sand"],
    }
    assert item.choices == ("the correct answer is answer1", "the correct answer is answer2")
    assert one(tmp_path, "instruction").prompt == "Add.\n2 2"


# ------------------------------------------------------------------------- what is refused

WRONG = [
    ("prompt_answer", {"answer": None}, "field 'answer' is None, expected text or a number"),
    ("prompt_answer", {"prompt": 3}, "field 'prompt' is 3, expected text"),
    ("prompt_choices", {"answer": 2}, "field 'answer' is 2, expected 0 to 1"),
    ("prompt_choices", {"answer": True}, "field 'answer' is True, expected a whole number"),
    ("prompt_choices", {"answer": "x"}, "which is not one of the choices"),
    ("prompt_choices", {"choices": [" blue"]}, "1 choices, expected at least two"),
    ("prompt_choices", {"choices": [" blue", " "]}, "one of the choices is empty"),
    ("prompt_choices", {"choices": "blue"}, "expected a list of texts"),
    ("hellaswag", {"label": ""}, "test split whose answers are not public"),
    ("arc", {"answerKey": "E"}, "expected one of A, B"),
    ("arc", {"answerKey": "0"}, "expected one of A, B"),
    ("arc", {"choices": {"text": ["x"], "label": ["A", "B"]}}, "1 choices but 2 labels"),
    ("arc", {"choices": {"text": ["x", "y"], "label": ["A", "A"]}}, "two choices have one label"),
    ("arc", {"choices": {"txt": ["x"], "label": ["A"]}}, "'choices.text' is missing"),
    ("arc", {"choices": 3}, "expected choices with labels"),
    ("winogrande", {"sentence": "no blank"}, "has no blank"),
    ("winogrande", {"sentence": "the end is _"}, "nothing follows the blank"),
    ("winogrande", {"answer": "3"}, "field 'answer' is 3, expected 1 to 2"),
    ("piqa", {"label": -1}, "test split whose answers are not public"),
    ("boolq", {"answer": "yes"}, "field 'answer' is 'yes', expected a whole number"),
    ("humaneval", {"entry_point": "a b"}, "which is no name"),
    ("instruction_choices", {"answer": "answer3"}, "expected one of answer1, answer2"),
    ("instruction_choices", {"output": "sand"}, "does not hold the answer"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), WRONG)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "x.jsonl", PUBLISHED[kind], {**PUBLISHED[kind], **changes})
    with pytest.raises(UsageError) as caught:
        read_task(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)


def test_unknown_forms_name_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"promt": "a", "answer": "b"})
    with pytest.raises(
        UsageError, match=r"x.jsonl:1: no known form has the fields 'promt', 'answer"
    ):
        read_task(file)
    with pytest.raises(UsageError, match=r"lacks prompt \(did you mean 'promt'\?\)"):
        read_task(file)
    with pytest.raises(UsageError, match=r"format 'hellswag' \(did you mean 'hellaswag'\?\)"):
        read_task(file, format="hellswag")


# ------------------------------------------------------------------------------------ files


def test_arrays_gzip_and_byte_order_marks(tmp_path: Path) -> None:
    records = [{"prompt": f'{i} "[{{\\', "answer": i} for i in range(3)]
    texts = {
        "lines.jsonl": "\n\n".join(map(json.dumps, records)),
        "array.json": json.dumps(records, indent=4),
        "marked.json": "\ufeff" + json.dumps(records),
        "marked.jsonl": "\ufeff" + "\n".join(map(json.dumps, records)),
        "spaced.json": " \n" + json.dumps(records),
    }
    digests = set()
    for name, text in texts.items():
        plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
        plain.write_text(text, encoding="utf-8")
        packed.write_bytes(gzip.compress(text.encode()))
        digests |= {read_task(plain).digest, read_task(packed).digest}
    assert len(digests) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_arrays_are_cut_right_at_any_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(rows, "_CHUNK", size)
    file = tmp_path / "x.json"
    file.write_text(
        '[\n{"prompt": "\\"]}\\\\", "answer": "1"},\n {"prompt": "[", "answer": "2"}\n]'
    )
    items = read_task(file).items
    assert [(item.prompt, item.answer) for item in items] == [('"]}\\', "1"), ("[", "2")]
    assert [row.line for row in rows.read_rows(file)] == [2, 3]


BAD_FILES = [
    ("", "the file is empty"),
    ("  \n", "the file is empty"),
    ("[]", "there are no records"),
    ("[1, 2]", "'1, 2' where an object was expected"),
    ('[{"prompt": "a", "answer": "b"}', "the array ends in the middle"),
    ('[{"prompt": "a", "answer": "b"}] x', "'x' where an object was expected"),
    ('{"prompt": "a",\n', "x:1: not JSON"),
    ('{"prompt": "a", "prompt": "b", "answer": "c"}', "the key 'prompt' occurs twice"),
    ('{"prompt": "a", "answer": NaN}', "NaN, which is not JSON"),
    ("3\n", "x:1: a JSON number where an object was expected"),
    ("\x1f\x8bnot gzip", "cannot be read"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="x") as caught:
        read_task(tmp_path / "x")
    assert message in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        read_task(tmp_path / "x")
    with pytest.raises(UsageError, match="is no regular file"):
        read_task(tmp_path)


def test_nothing_grows_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_RECORD", 1000)
    long = {"prompt": "x" * 1000, "answer": "1"}
    with pytest.raises(UsageError, match=r"x.jsonl:1: a record of more than 1000 bytes"):
        read_task(write(tmp_path / "x.jsonl", long))
    (tmp_path / "x.json").write_text(json.dumps([long]))
    with pytest.raises(UsageError, match=r"x.json:1: a record of more than 1000 bytes"):
        read_task(tmp_path / "x.json")
    monkeypatch.setattr(rows, "MAX_BYTES", 10_000)
    short = {"prompt": "x" * 100, "answer": "1"}
    packed = gzip.compress((json.dumps(short) + "\n").encode() * 1000)
    (tmp_path / "bomb.gz").write_bytes(packed)
    with pytest.raises(UsageError, match="more than 10000 bytes of records"):
        read_task(tmp_path / "bomb.gz")


# ----------------------------------------------------------------------------------- tasks


def test_the_digest_knows_items_and_rules() -> None:
    task = Task("x", (TaskItem("1", "a", "b"), TaskItem("2", "c", "d")))
    assert task.digest == task.with_rules(name="y").digest
    others = [
        task.with_rules(stop=("\n",)),
        task.with_rules(items=task.items[::-1]),
        task.with_rules(shots=1),
        task.with_rules(template="{prompt}:"),
    ]
    assert len({task.digest, *(other.digest for other in others)}) == 5


def test_a_grader_of_ones_own_counts_by_its_source() -> None:
    def strict() -> Any:
        def mine(answer: str, item: TaskItem) -> bool:
            return answer == item.answer

        return mine

    def lenient() -> Any:
        def mine(answer: str, item: TaskItem) -> bool:
            return str(item.answer) in answer

        return mine

    task = Task("x", (TaskItem("1", "a", "b"), TaskItem("2", "c", "d")))
    one, same, other = (task.with_rules(grader=made()) for made in (strict, strict, lenient))
    assert one.digest == same.digest
    assert one.rules()["grader_source"] != other.rules()["grader_source"]
    typed_in: dict[str, Any] = {}
    exec("def mine(answer, item): return True", typed_in)
    assert "grader_source" not in task.with_rules(grader=typed_in["mine"]).rules()


def test_graders_of_one_source_count_by_the_values_they_were_made_with() -> None:
    def within(most: int) -> Any:
        def mine(answer: str, item: TaskItem) -> bool:
            return len(answer) <= most

        return mine

    def close(answer: str, item: TaskItem, most: int) -> bool:
        return len(answer) <= most

    task = Task("x", (TaskItem("1", "a", "b"),))
    for made in (within, lambda most: partial(close, most=most)):
        one, same, other = (task.with_rules(grader=made(most)) for most in (1, 1, 2))
        assert one.digest == same.digest != other.digest
    assert "close" in task.with_rules(grader=partial(close, most=1)).rules()["grader"]


def test_tasks_that_cannot_be_meant() -> None:
    item = TaskItem("1", "a", "b")
    with pytest.raises(UsageError, match="there are no items"):
        Task("x", ())
    with pytest.raises(UsageError, match="no place for"):
        Task("x", (item,), template="Q:")
    with pytest.raises(UsageError, match="item 1: scoring by choices needs at least two"):
        Task("x", (item,), scoring=Scoring.CHOICES)
    with pytest.raises(UsageError, match="not enough items to draw 1 shots"):
        Task("x", (item,), shots=1)
    with pytest.raises(ValueError, match="choice 2 of 2"):
        TaskItem("1", "a", choices=("x", "y"), correct=2)
    with pytest.raises(ValueError, match="1 contexts for 2"):
        TaskItem("1", "a", choices=("x", "y"), correct=1, contexts=("x",))


def test_three_lines_are_a_task(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", PUBLISHED["gsm8k"], PUBLISHED["gsm8k"])
    config = {"path": "t.jsonl", "min_accuracy": 0.5, "shots": 1, "stop": "\n\n"}
    task = task_from_config("maths", config, tmp_path)
    assert (task.name, task.min_accuracy, task.shots, task.stop) == ("maths", 0.5, 1, ("\n\n",))
    assert task.grader is not None
    regex = {"path": "t.jsonl", "grader": "regex", "pattern": r"(\d+)"}
    assert task_from_config("maths", regex, tmp_path).rules()["grader"] == r"regex (\d+)"


def test_every_key_of_a_task_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", PUBLISHED["instruction_choices"])
    config = {
        "path": "t.jsonl",
        "min_accuracy": 0,
        "format": "instruction_choices",
        "scoring": "choices",
        "length": "bytes",
        "template": "### {prompt}",
        "separator": "\n",
        "shots": 1,
        "shots_path": "t.jsonl",
        "chat": True,
        "system": "Be brief.",
        "stop": ["\n"],
        "max_new_tokens": 3,
        "max_unstopped": "0%",
        "about": "domain",
        "batch_size": 4,
    }
    task = task_from_config("x", config, tmp_path)
    assert (task.scoring, task.length, task.chat) == (Scoring.CHOICES, Length.BYTES, True)
    assert task.pool == task.items
    assert {*config, "grader", "pattern", "lm_eval", *LM_EVAL_KEYS} == set(TASK_KEYS)
    graded = task_from_config("x", {"path": "t.jsonl", "grader": "exact"}, tmp_path)
    assert graded.scoring is Scoring.GENERATE


def test_the_profile_offers_what_there_is() -> None:
    assert tuple(Scoring) == (*profile.SCORINGS, Scoring.HARNESS)
    assert tuple(Length) == profile.LENGTHS
    assert (*GRADERS, "regex") == profile.GRADERS


def test_a_floor_relative_to_the_base_is_not_the_tasks_own(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", PUBLISHED["gsm8k"])
    config = {"path": "t.jsonl", "min_accuracy": "base - 2%"}
    assert task_from_config("x", config, tmp_path).min_accuracy is None


def test_humaneval_is_graded_only_with_permission(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", PUBLISHED["humaneval"])
    with pytest.raises(UsageError, match="--lora-allow-code-execution"):
        task_from_config("x", {"path": "t.jsonl"}, tmp_path)
    task = task_from_config("x", {"path": "t.jsonl"}, tmp_path, allow_code_execution=True)
    assert task.grader is not None


MISTAKES = [
    ({"pth": "t"}, r"there is no key 'pth' \(did you mean 'path'\?\)"),
    ({}, "path is missing"),
    ({"path": 3}, "path = 3, expected a non-empty text"),
    ({"path": "t", "min_accuracy": 50}, "min_accuracy = 50, expected a share"),
    ({"path": "t", "min_accuracy": True}, "min_accuracy = True, expected a share"),
    ({"path": "t", "grader": "gsm8"}, r"expected one of exact, .*did you mean 'gsm8k'"),
    ({"path": "t", "grader": "regex"}, 'grader = "regex" and pattern go together'),
    ({"path": "t", "grader": "regex", "pattern": "(a+)+"}, "repetition of repetitions"),
    ({"path": "t", "pattern": "x"}, "go together"),
    (
        {"path": "t", "length": "chars"},
        r"expected one of none.*did you mean 'characters'",
    ),
    ({"path": "t", "shots": -1}, "shots = -1, expected a whole number"),
    ({"path": "t", "shots": 1.5}, "shots = 1.5, expected a whole number"),
    ({"path": "t", "chat": "yes"}, "chat = 'yes', expected true or false"),
    ({"path": "t", "stop": [1]}, "expected a text or a list of texts"),
    ({"path": "t"}, "there is no such file"),
]


@pytest.mark.parametrize(("config", "message"), MISTAKES)
def test_mistakes_in_a_profile_name_their_key(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        task_from_config("mine", config, tmp_path)


# ------------------------------------------------------------------------- public test sets

COUNTS = {
    "gsm8k_test.jsonl": ("gsm8k", 1319),
    "HumanEval.jsonl.gz": ("humaneval", 164),
    "arc_challenge_test.json": ("instruction_choices", 1172),
    "winogrande_test.json": ("instruction_choices", 1267),
    "boolq_test.json": ("instruction_choices", 3270),
    "piqa_test.json": ("instruction_choices", 1838),
    "openbookqa_test.json": ("instruction_choices", 500),
}


@NEEDS_SHARED
@pytest.mark.parametrize("file", COUNTS)
def test_public_test_sets_are_read_whole(file: str) -> None:
    task = read_task(SHARED / file)
    assert (task.format, len(task)) == COUNTS[file]
    assert len({item.id for item in task.items}) == len(task)
    for item in task.items:
        if task.format == "gsm8k":
            assert final_number(item.answer) is not None
        elif task.format == "instruction_choices":
            options = item.extra["options"]
            assert all(options)
            assert len(options) == len(item.choices) >= 2
            assert item.extra["question"]
            assert item.choices[item.correct or 0] == item.solution
    if task.format == "instruction_choices":
        assert read_task(SHARED / file, scoring=Scoring.CHOICES).scoring is Scoring.CHOICES


@NEEDS_SHARED
def test_the_gold_answers_of_gsm8k_are_right_and_the_next_ones_wrong() -> None:
    task = read_task(SHARED / "gsm8k_test.jsonl")
    grader: Any = task.grader
    answers = [item.answer for item in task.items]
    assert all(grader(item.answer, item) for item in task.items)
    shifted = sum(grader(answers[i - 1], item) for i, item in enumerate(task.items))
    assert shifted < len(task) / 20
