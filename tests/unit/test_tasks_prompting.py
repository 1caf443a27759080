"""Prompts: examples, templates, chats, one BOS, and where a choice begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from example import FIXTURES, NEEDS_EXAMPLE
from tiny_chat import ADAPTERS, example_subject

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import load_tokenizer
from pytest_lora.subject import BaseModel, Subject
from pytest_lora.tasks.prompting import Prompter, TaskTokenizer, task_tokenizer
from pytest_lora.tasks.records import Scoring, Task, TaskItem

pytestmark = NEEDS_EXAMPLE

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ITEMS = tuple(TaskItem(str(i), f"{i} + {i} =", str(2 * i), solution=str(2 * i)) for i in range(6))


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return example_subject("attention-lora").base


@pytest.fixture
def tokens(base: BaseModel) -> TaskTokenizer:
    return TaskTokenizer(load_tokenizer(FIXTURES / "base"), "given")


def chatting() -> TaskTokenizer:
    tokenizer = load_tokenizer(FIXTURES / "base")
    assert tokenizer is not None
    tokenizer.chat_template = TEMPLATE
    return TaskTokenizer(tokenizer, "given", "given")


def test_examples_are_drawn_once_and_never_the_item_itself(tokens: TaskTokenizer) -> None:
    prompter = Prompter(Task("x", ITEMS, shots=3), tokens)
    for index, item in enumerate(ITEMS):
        shown = prompter.examples(index)
        assert len(shown) == len(set(map(id, shown))) == 3
        assert item not in shown
    again = Prompter(Task("x", ITEMS, shots=3), tokens)
    assert all(prompter.examples(i) == again.examples(i) for i in range(6))
    assert len({prompter.examples(i) for i in range(6)}) == 4  # the three shown see a fourth


def test_examples_from_a_pool_leave_out_the_same_question(tokens: TaskTokenizer) -> None:
    pool = (ITEMS[0], TaskItem("other", "9 + 9 =", "18", solution="18"))
    prompter = Prompter(Task("x", ITEMS, shots=1, pool=pool), tokens)
    assert prompter.examples(0) == (pool[1],)
    short = Prompter(Task("x", ITEMS, shots=1, pool=(ITEMS[0],)), tokens)
    with pytest.raises(UsageError, match="task x, item 0: only 0 other items to show, 1 asked for"):
        short.prompt(0)


def test_the_text_of_a_prompt(tokens: TaskTokenizer) -> None:
    task = Task("x", ITEMS[:2], template="Q: {prompt} {curly}\nA:", shots=1)
    assert Prompter(task, tokens).prompt(0) == (
        "Q: 1 + 1 = {curly}\nA: 2\n\nQ: 0 + 0 = {curly}\nA:"
    )
    lined = task.with_rules(template="{prompt}\n")
    assert Prompter(lined, tokens).prompt(0) == "1 + 1 =\n2\n\n0 + 0 =\n"


def test_there_is_one_bos_and_no_eos(tokens: TaskTokenizer) -> None:
    bos, eos = tokens.tokenizer.bos_token_id, tokens.tokenizer.eos_token_id
    plain = tokens.encode("Emma was")
    assert plain[0] == bos
    assert bos not in plain[1:]
    assert tokens.encode("<s>Emma was") == plain
    assert tokens.encode("Emma was", special=False) == plain[1:]
    closing = _Closing(tokens.tokenizer)
    assert TaskTokenizer(closing, "given").encode("Emma was") == plain
    assert TaskTokenizer(closing, "given").encode("Emma was</s>")[-1] == eos


class _Closing:
    """A tokenizer that ends what it is given with EOS."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*self.inner(text, **options)["input_ids"], self.inner.eos_token_id]}


def test_choices_begin_where_the_context_ends(tokens: TaskTokenizer) -> None:
    items = (
        TaskItem("1", "Emma was a", choices=("girl", " boy"), correct=0),
        TaskItem("2", "Emma was\n", choices=("quiet", "a girl"), correct=0),
        TaskItem("3", "", choices=("Emma", "Nora"), correct=0),
        TaskItem("4", "x", choices=("more.", "more."), correct=0, contexts=("Emma", "Nora")),
    )
    prompter = Prompter(Task("x", items, scoring=Scoring.CHOICES), tokens)
    texts = [
        [(tokens.decode(c), tokens.decode(k)) for c, k in prompter.choices(i)] for i in range(4)
    ]
    assert texts[0] == [("Emma was a", " girl"), ("Emma was a", " boy")]
    assert texts[1] == [("Emma was", "\nquiet"), ("Emma was", "\na girl")]
    assert [continuation for _, continuation in texts[2]] == [" Emma", " Nora"]
    assert texts[3] == [("Emma", " more."), ("Nora", " more.")]
    for index, item in enumerate(items):
        for (context, continuation), choice in zip(
            prompter.choices(index), item.choices, strict=True
        ):
            assert context
            assert continuation
            assert tokens.decode([*context, *continuation]).endswith(choice.strip())


def test_a_choice_without_context_keeps_all_its_tokens() -> None:
    """Also where the tokenizer puts nothing in front."""
    bare = _Bare(load_tokenizer(FIXTURES / "base"))
    item = TaskItem("1", "", choices=("Emma was", "Nora"), correct=0)
    prompter = Prompter(Task("x", (item,), scoring=Scoring.CHOICES), TaskTokenizer(bare, "given"))
    context, continuation = prompter.choices(0)[0]
    assert context == [bare.bos_token_id]
    assert continuation == bare(" Emma was")["input_ids"]


class _Bare(_Closing):
    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.inner(text, add_special_tokens=False)["input_ids"]}


def test_a_choice_that_a_token_swallows_keeps_its_last_token(tokens: TaskTokenizer) -> None:
    prompter = Prompter(Task("x", ITEMS), tokens)
    context, continuation = prompter._pair("Emma was a girl", "Emma")
    assert context
    assert continuation


def test_chats_go_through_the_template() -> None:
    task = Task("x", ITEMS[:2], chat=True, system="Be brief.", shots=1, template="{prompt}?")
    prompter = Prompter(task, chatting())
    assert prompter.prompt(0) == (
        "<s><system>Be brief.\n<user>1 + 1 =?\n<assistant>2\n<user>0 + 0 =?\n<assistant>"
    )
    ids = prompter.prompt_ids(0)
    assert ids[0] == prompter.tokens.tokenizer.bos_token_id
    assert ids.count(ids[0]) == 1


@pytest.mark.parametrize(
    ("template", "gist"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10000000) %}x{% endfor %}", "OverflowError"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_one_clear_error(template: str, gist: str) -> None:
    tokens = chatting()
    tokens.tokenizer.chat_template = template
    with pytest.raises(CannotRun, match=rf"the chat template \(given\) fails: .*{gist}"):
        Prompter(Task("x", ITEMS, chat=True), tokens).prompt(0)


def test_a_chat_needs_a_template(tokens: TaskTokenizer) -> None:
    with pytest.raises(UsageError, match="neither the adapter's folder nor the base model has"):
        Prompter(Task("x", ITEMS, chat=True), tokens).prompt(0)


# --------------------------------------------------------------------------- which tokenizer


def adapter_with(base: BaseModel, folder: Path, **files: str) -> Subject:
    shutil.copytree(ADAPTERS / "attention-lora", folder)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return example_subject(folder, base)


def test_the_base_models_tokenizer_is_the_usual_one(base: BaseModel, tmp_path: Path) -> None:
    found = task_tokenizer(adapter_with(base, tmp_path / "a"))
    assert (found.source, found.template_source) == ("the base model's", None)
    assert found.tokenizer is base.tokenizer


def test_the_adapters_own_tokenizer_comes_first(base: BaseModel, tmp_path: Path) -> None:
    subject = adapter_with(base, tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / "base" / name, subject.adapter.path)
    (subject.adapter.path / "chat_template.jinja").write_text(TEMPLATE)
    found = task_tokenizer(subject)
    assert found.source == "the adapter's"
    given = task_tokenizer(subject, tokenizer=base.tokenizer)
    assert given.source == "given"


def test_a_template_alone_is_lent_to_the_bases_tokenizer(base: BaseModel, tmp_path: Path) -> None:
    found = task_tokenizer(adapter_with(base, tmp_path / "a", chat_template__jinja=TEMPLATE))
    assert (found.source, found.template_source) == ("the base model's", "the adapter's")
    assert Prompter(Task("x", ITEMS, chat=True), found).prompt(1).endswith("<assistant>")
    assert base.tokenizer is not None
    assert base.tokenizer.chat_template is None


def test_a_tokenizer_that_does_not_load_is_said_and_not_passed_over(
    base: BaseModel, tmp_path: Path
) -> None:
    subject = adapter_with(base, tmp_path / "a", tokenizer__json="{}")
    with pytest.raises(CannotRun, match="the tokenizer in the adapter's folder does not load"):
        task_tokenizer(subject)


def test_without_any_tokenizer_nothing_can_be_asked(tmp_path: Path, base: BaseModel) -> None:
    subject = example_subject("attention-lora", BaseModel.from_module(base.module))
    with pytest.raises(CannotRun, match=r"there is no tokenizer.*pass tokenizer="):
        task_tokenizer(subject)
