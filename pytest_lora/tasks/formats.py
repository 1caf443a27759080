"""Tasks from files in the form their authors publish, without a converter.

A form is known by its fields; the first record decides, and every record has to have it.  Prompts
and preprocessing are those of the published evaluation harnesses (docs/tasks.md has the table), so
that numbers can stand beside theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_lora.errors import UsageError
from pytest_lora.names import meant
from pytest_lora.tasks.graders import GRADERS
from pytest_lora.tasks.records import Length, Scoring, Task, TaskItem
from pytest_lora.tasks.rows import Row, read_rows

__all__ = ["FORMATS", "Format", "find_format", "read_task"]


class Source:
    """A file under reading: what its records share."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """Labels in a file of their own beside this one (``valid-labels.lst``), or None."""
        file = self.path.with_name(f"{self.path.name.partition('.')[0]}-labels.lst")
        if not file.is_file() or file.stat().st_size > 1 << 24:
            return None
        return tuple(file.read_text(encoding="ascii", errors="replace").split())


@dataclass(frozen=True, slots=True)
class Format:
    """One form of file.

    Attributes:
        name: what settings and results call it.
        needs: fields a record must have; the form with the most of them present wins.
        read: makes an item of a record, which is the ``number``-th, from 1.
        rules: how such a task is put and judged unless said otherwise (attributes of a Task).
        like: a further condition on the first record.
    """

    name: str
    needs: frozenset[str]
    read: Callable[[Row, int, Source], TaskItem]
    rules: Mapping[str, Any] = field(default_factory=dict)
    like: Callable[[Mapping[str, Any]], bool] = lambda _: True

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether a record has this form."""
        return self.needs <= fields.keys() and self.like(fields)


def read_task(
    path: Path | str,
    *,
    name: str | None = None,
    format: str | None = None,  # noqa: A002
    **rules: Any,
) -> Task:
    """The task in a file.

    Args:
        path: JSON Lines or a JSON array of objects; either may be gzipped.
        name: what results call it; the file's name by default.
        format: one of :data:`FORMATS` by name, where the fields alone do not tell.
        rules: attributes of :class:`~pytest_lora.tasks.records.Task` in place of the form's own.

    Raises:
        UsageError: the file cannot be read, no form fits, or a record is wrong; file, line and
            field are named.
    """
    path = Path(path)
    source = Source(path)
    forms = [] if format is None else _named(format)
    items: list[TaskItem] = []
    for number, row in enumerate(read_rows(path), 1):
        forms = forms or [find_format(row)]
        form = next((form for form in forms if form.needs <= row.fields.keys()), forms[0])
        items.append(form.read(row, number, source))
    if not items:
        raise UsageError(f"{path}: there are no records in it")
    return Task(name or _stem(path), tuple(items), forms[0].name, **{**forms[0].rules, **rules})


def find_format(row: Row) -> Format:
    """The form of a record.

    Raises:
        UsageError: none fits; the nearest is named with the fields it lacks.
    """
    fitting = [form for form in FORMATS if form.fits(row.fields)]
    if fitting:
        return max(reversed(fitting), key=lambda form: len(form.needs))
    nearest = max(FORMATS, key=lambda form: (len(form.needs & row.fields.keys()), -len(form.needs)))
    lacking = sorted(nearest.needs - row.fields.keys())
    found = ", ".join(repr(name[:60]) for name in list(row.fields)[:12]) or "none"
    hint = meant(lacking[0], row.fields) if lacking else ""
    raise row.fault(
        f"no known form has the fields {found}; nearest is {nearest.name}, which lacks"
        f" {', '.join(lacking) or 'nothing, but its contents differ'}{hint} (forms:"
        f" {', '.join(dict.fromkeys(form.name for form in FORMATS))})"
    )


def _named(name: str) -> list[Format]:
    """The forms of that name: some are published in more than one shape."""
    forms = [form for form in FORMATS if form.name == name]
    if not forms:
        names = list(dict.fromkeys(form.name for form in FORMATS))
        raise UsageError(f"format {name!r}{meant(name, names)} is none of {', '.join(names)}")
    return forms


def _stem(path: Path) -> str:
    name = path.name
    for ending in (".gz", ".jsonl", ".json"):
        name = name.removesuffix(ending)
    return name


# ------------------------------------------------------------------------------------ fields


def _get(row: Row, name: str, within: Mapping[str, Any] | None = None, at: str = "") -> Any:
    fields = row.fields if within is None else within
    if name not in fields:
        raise row.fault(f"field {at + name!r} is missing{meant(name, fields)}")
    return fields[name]


def _text(row: Row, name: str, within: Mapping[str, Any] | None = None, at: str = "") -> str:
    value = _get(row, name, within, at)
    if not isinstance(value, str):
        raise row.fault(f"field {at + name!r} is {_short(value)}, expected text")
    return value


def _texts(row: Row, name: str, within: Mapping[str, Any] | None = None, at: str = "") -> list[str]:
    value = _get(row, name, within, at)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise row.fault(f"field {at + name!r} is {_short(value)}, expected a list of texts")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _index(row: Row, name: str, count: int, *, first: int = 0) -> int:
    """A field that says which of ``count`` choices is right, as a number or its digits."""
    value = _get(row, name)
    if value in ("", -1, "-1", None):
        raise row.fault(
            f"field {name!r} is {_short(value)}: this looks like a test split whose answers are"
            " not public; take the validation split"
        )
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise row.fault(f"field {name!r} is {_short(value)}, expected a whole number")
    if not first <= value < first + count:
        raise row.fault(f"field {name!r} is {value}, expected {first} to {first + count - 1}")
    return value - first


def _id(row: Row, number: int, *names: str) -> str:
    for name in names:
        value = row.fields.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)[:200]
    return str(number)


def _choice_item(
    row: Row, id_: str, prompt: str, choices: Iterable[str], correct: int, **more: Any
) -> TaskItem:
    texts = tuple(choices)
    if len(texts) < 2:
        raise row.fault(f"{len(texts)} choices, expected at least two")
    if not all(text.strip() for text in texts):
        raise row.fault("one of the choices is empty")
    return TaskItem(id_, prompt, "", texts, correct, solution=texts[correct], **more)


# ------------------------------------------------------------------------------- one's own


def _prompt_answer(row: Row, number: int, source: Source) -> TaskItem:
    return _asked(row, number, "prompt")


def _question_answer(row: Row, number: int, source: Source) -> TaskItem:
    return _asked(row, number, "question")


def _asked(row: Row, number: int, name: str) -> TaskItem:
    answer = _get(row, "answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise row.fault(f"field 'answer' is {_short(answer)}, expected text or a number")
    prompt = _text(row, name)
    return TaskItem(_id(row, number, "id"), prompt, answer, solution=answer)


def _prompt_choices(row: Row, number: int, source: Source) -> TaskItem:
    choices = _texts(row, "choices")
    answer = _get(row, "answer")
    if isinstance(answer, str) and not answer.isdecimal():
        if choices.count(answer) != 1:
            raise row.fault(f"field 'answer' is {_short(answer)}, which is not one of the choices")
        correct = choices.index(answer)
    else:
        correct = _index(row, "answer", len(choices))
    return _choice_item(row, _id(row, number, "id"), _text(row, "prompt"), choices, correct)


# ------------------------------------------------------------------------------- published


def _hellaswag(row: Row, number: int, source: Source) -> TaskItem:
    """``activity: context``, the context's second half capitalised, WikiHow's brackets out."""
    if "ctx_a" in row.fields and "ctx_b" in row.fields:
        context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    else:
        context = _text(row, "ctx")
    activity = _text(row, "activity_label") if "activity_label" in row.fields else ""
    prompt = _without_wikihow(f"{activity}: {context}" if activity else context)
    endings = [_without_wikihow(ending) for ending in _texts(row, "endings")]
    correct = _index(row, "label", len(endings))
    return _choice_item(row, _id(row, number, "ind"), prompt, endings, correct)


_BRACKETS = re.compile(r"\[[^\[\]]*\]")


def _without_wikihow(text: str) -> str:
    """``[title]`` ends a sentence; other marks in brackets go, with the spaces they double."""
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _arc(row: Row, number: int, source: Source) -> TaskItem:
    return _keyed(row, number, _text(row, "question"), _labelled(row, _get(row, "choices")))


def _openbookqa(row: Row, number: int, source: Source) -> TaskItem:
    return _keyed(row, number, _text(row, "question_stem"), _labelled(row, _get(row, "choices")))


def _stem_form(row: Row, number: int, source: Source) -> TaskItem:
    """The authors' own files of ARC and OpenBookQA: stem and choices inside ``question``."""
    question = _get(row, "question")
    if not isinstance(question, dict):
        raise row.fault(f"field 'question' is {_short(question)}, expected an object")
    choices = _labelled(row, _get(row, "choices", question, "question."))
    return _keyed(row, number, _text(row, "stem", question, "question."), choices)


def _labelled(row: Row, choices: Any) -> dict[str, str]:
    """Choices by their label, from ``{text: [], label: []}`` or ``[{text, label}]``."""
    if isinstance(choices, dict):
        texts = _texts(row, "text", choices, "choices.")
        labels = _texts(row, "label", choices, "choices.")
        if len(texts) != len(labels):
            raise row.fault(f"{len(texts)} choices but {len(labels)} labels")
    elif isinstance(choices, list) and all(isinstance(item, dict) for item in choices):
        texts = [_text(row, "text", item, "choices.") for item in choices]
        labels = [_text(row, "label", item, "choices.") for item in choices]
    else:
        raise row.fault(f"field 'choices' is {_short(choices)}, expected choices with labels")
    if len(set(labels)) != len(labels):
        raise row.fault(f"two choices have one label: {', '.join(labels)[:80]}")
    return dict(zip(labels, texts, strict=True))


def _keyed(row: Row, number: int, prompt: str, choices: Mapping[str, str]) -> TaskItem:
    """The key may count (``1``) where the labels are letters, and the other way round."""
    key = _text(row, "answerKey").strip()
    labels = list(choices)
    if key in labels:
        correct = labels.index(key)
    else:
        place = _place_of(key)
        if place is None or place >= len(labels):
            raise row.fault(
                f"field 'answerKey' is {_short(key)}, expected one of {', '.join(labels)[:80]}"
            )
        correct = place
    return _choice_item(
        row, _id(row, number, "id"), prompt, choices.values(), correct, extra={"labels": labels}
    )


def _place_of(key: str) -> int | None:
    if len(key) != 1 or not key.isascii():
        return None
    if key.isdigit():
        return int(key) - 1 if key != "0" else None
    return ord(key.upper()) - ord("A") if key.isalpha() else None


def _winogrande(row: Row, number: int, source: Source) -> TaskItem:
    """Partial scoring (Trinh and Le, 2018): each option fills the blank, and what follows the blank
    is scored, so that the options' own likelihood does not count.
    """
    before, blank, after = _text(row, "sentence").partition("_")
    if not blank:
        raise row.fault("field 'sentence' has no blank (_) to fill")
    if not after.strip():
        raise row.fault("nothing follows the blank in 'sentence', so there is nothing to score")
    options = [_text(row, "option1"), _text(row, "option2")]
    correct = _index(row, "answer", 2, first=1)
    return _choice_item(
        row,
        _id(row, number, "qID"),
        before,
        (after.strip(),) * 2,
        correct,
        contexts=tuple(before + option for option in options),
        extra={"options": options},
    )


def _piqa(row: Row, number: int, source: Source) -> TaskItem:
    solutions = [_text(row, "sol1"), _text(row, "sol2")]
    if "label" not in row.fields and source.labels is not None:
        if number > len(source.labels):
            raise row.fault(f"the file of labels beside it has only {len(source.labels)}")
        row = Row(row.file, row.line, {**row.fields, "label": source.labels[number - 1]})
    return _choice_item(
        row, _id(row, number, "id"), _text(row, "goal"), solutions, _index(row, "label", 2)
    )


def _boolq(row: Row, number: int, source: Source) -> TaskItem:
    name = "answer" if "answer" in row.fields else "label"
    value = _get(row, name)
    yes = value if isinstance(value, bool) else bool(_index(row, name, 2))
    question = _text(row, "question").removesuffix("?")
    prompt = f"{_text(row, 'passage')}\nQuestion: {question}?\nAnswer:"
    return _choice_item(row, _id(row, number, "idx"), prompt, ("no", "yes"), int(yes))


def _humaneval(row: Row, number: int, source: Source) -> TaskItem:
    texts = {name: _text(row, name) for name in ("entry_point", "canonical_solution", "test")}
    if not texts["entry_point"].isidentifier():
        raise row.fault(f"field 'entry_point' is {_short(texts['entry_point'])}, which is no name")
    return TaskItem(
        _id(row, number, "task_id"),
        _text(row, "prompt"),
        solution=texts["canonical_solution"],
        extra=texts,
    )


# ------------------------------------------------------------------------------ instructions

_CLOSED = "Answer format:"


def _instruction(row: Row, number: int, source: Source) -> TaskItem:
    """An open instruction: the output is the reference, ``answer`` where there is one."""
    output = _text(row, "output")
    answer = _text(row, "answer") if "answer" in row.fields else output
    return TaskItem(_id(row, number, "id"), _instruction_text(row), answer, solution=output)


def _instruction_choices(row: Row, number: int, source: Source) -> TaskItem:
    """The options stand in the instruction, which ends in ``Answer format: answer1/answer2``.

    As a task by choices, the output with each label in turn is what is scored.
    """
    body, closed, form = _text(row, "instruction").rpartition(_CLOSED)
    if not closed:
        raise row.fault(f"field 'instruction' does not say {_CLOSED!r}")
    labels = [label.strip() for label in form.strip().split("/")]
    answer, output = _text(row, "answer").strip(), _text(row, "output")
    if answer not in labels:
        raise row.fault(f"field 'answer' is {_short(answer)}, expected one of {', '.join(labels)}")
    if answer not in output:
        raise row.fault(f"field 'output' does not hold the answer {_short(answer)}")
    question, options = _embedded_options(row, body, labels)
    head, _, tail = output.rpartition(answer)
    extra = {"labels": labels, "question": question, "options": options}
    return TaskItem(
        _id(row, number, "id"),
        _instruction_text(row),
        answer,
        tuple(head + label + tail for label in labels),
        labels.index(answer),
        solution=output,
        extra=extra,
    )


def _instruction_text(row: Row) -> str:
    given = row.fields.get("input", "")
    if not isinstance(given, str):
        raise row.fault(f"field 'input' is {_short(given)}, expected text")
    instruction = _text(row, "instruction")
    return f"{instruction}\n{given}" if given.strip() else instruction


def _embedded_options(row: Row, body: str, labels: list[str]) -> tuple[str, list[str]]:
    """Question and options, read from the end: ``... Answer1: this Answer2: that``."""
    options: list[str] = []
    end = len(body)
    if labels[0][-1:].isdigit():
        for label in reversed(labels):
            mark = f"{label.capitalize()}:"
            place = body.rfind(mark, 0, end)
            if place < 0:
                raise row.fault(f"field 'instruction' does not hold the option {mark!r}")
            options.insert(0, body[place + len(mark) : end].strip())
            end = place
    return body[:end].partition(": ")[2].strip(), options or labels


# ------------------------------------------------------------------------------------ table

_BY_CHOICE = {"scoring": Scoring.CHOICES}
_NORMALISED = {**_BY_CHOICE, "length": Length.CHARACTERS}
_QUESTION = {"template": "Question: {prompt}\nAnswer:"}


def _form(name: str, needs: str, read: Any, *, like: Any = lambda _: True, **rules: Any) -> Format:
    return Format(name, frozenset(needs.split()), read, rules, like)


FORMATS: tuple[Format, ...] = (
    _form("prompt_answer", "prompt answer", _prompt_answer, grader=GRADERS["exact"]),
    _form("prompt_choices", "prompt choices answer", _prompt_choices, **_BY_CHOICE),
    _form("question_answer", "question answer", _question_answer, grader=GRADERS["exact"]),
    _form(
        "gsm8k",
        "question answer",
        _question_answer,
        like=lambda fields: "####" in str(fields["answer"]),
        grader=GRADERS["gsm8k"],
        stop=("Question:",),
        **_QUESTION,
    ),
    _form("hellaswag", "ctx endings label", _hellaswag, **_NORMALISED),
    _form(
        "arc",
        "question choices answerKey",
        _arc,
        **_NORMALISED,
        **_QUESTION,
    ),
    _form("openbookqa", "question_stem choices answerKey", _openbookqa, **_NORMALISED),
    _form("openbookqa", "question answerKey fact1", _stem_form, **_NORMALISED),
    _form(
        "arc",
        "question answerKey",
        _stem_form,
        like=lambda fields: isinstance(fields["question"], dict),
        **_NORMALISED,
        **_QUESTION,
    ),
    _form("openbookqa", "question answerKey", _stem_form, like=lambda _: False, **_NORMALISED),
    _form("winogrande", "sentence option1 option2 answer", _winogrande, **_BY_CHOICE),
    _form("piqa", "goal sol1 sol2", _piqa, **_NORMALISED, **_QUESTION),
    _form("boolq", "question passage", _boolq, **_BY_CHOICE),
    _form(
        "humaneval",
        "task_id prompt entry_point canonical_solution test",
        _humaneval,
        stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("),
        separator="",
        max_new_tokens=512,
    ),
    _form(
        "instruction_choices",
        "instruction output answer",
        _instruction_choices,
        like=lambda fields: _CLOSED in str(fields["instruction"]),
        grader=GRADERS["label"],
        separator="\n",
        max_new_tokens=32,
    ),
    _form(
        "instruction",
        "instruction output",
        _instruction,
        grader=GRADERS["exact"],
        separator="\n",
    ),
)
"""Every form that is read.  Where several fit a record, the one that asks for the most fields is
meant; of equals, the later one."""
