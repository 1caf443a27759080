"""From an item to token ids: few-shot examples, templates, chats, and one BOS.

Templates and tokenizers may come from an adapter, so they are untrusted: a template is only ever
filled by replacing ``{prompt}``, chat templates are rendered by transformers in its sandbox, and
remote code is never trusted.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import load_tokenizer, one_line, quiet
from pytest_lora.stats.order import seeded_order

if TYPE_CHECKING:
    from pytest_lora.subject import Subject
    from pytest_lora.tasks.records import Task, TaskItem

__all__ = ["Prompter", "TaskTokenizer", "task_tokenizer"]

_TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_MAX_TEMPLATE = 1 << 20
SEED = 20231


@dataclass(frozen=True, slots=True)
class TaskTokenizer:
    """A tokenizer, and where it and its chat template came from.

    Attributes:
        tokenizer: as transformers loads it.
        source: ``"the adapter's"``, ``"the base model's"`` or ``"given"``.
        template_source: the same of the chat template; None where there is none.
    """

    tokenizer: Any
    source: str
    template_source: str | None = None

    @property
    def pad(self) -> int:
        """A token id for padded positions, whose contents never matter."""
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if isinstance(value, int) and value >= 0:
                return value
        return 0

    @property
    def start(self) -> int | None:
        """The token an empty context is scored after: BOS, or EOS where there is no BOS."""
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if isinstance(value, int):
                return value
        return None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        With ``special`` the tokenizer adds what it adds in front, but never a second BOS; an EOS it
        adds behind is taken off, for the text is to go on.
        """
        with quiet():
            ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if not special:
            return ids
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and len(ids) > 1 and ids[-1] == eos:
            closed = bool(self.tokenizer.eos_token) and text.endswith(self.tokenizer.eos_token)
            ids = ids if closed else ids[:-1]
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids, exactly: no clean-up of spaces; special tokens kept if asked."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages in the chat template, open for the answer.

        Raises:
            UsageError: there is no chat template.
            CannotRun: the template fails on these messages.
        """
        if self.template_source is None:
            raise UsageError(
                "chat = true, but neither the adapter's folder nor the base model has a chat"
                " template; give one as chat_template.jinja, or leave chat out"
            )
        try:
            with quiet():
                text = self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # a template may raise anything
            raise CannotRun(
                f"the chat template ({self.template_source}) fails: {one_line(error)}"
            ) from None
        return str(text)


def task_tokenizer(subject: Subject, tokenizer: Any = None) -> TaskTokenizer:
    """The tokenizer to ask with: the one given, else the adapter folder's, else the base model's.

    A folder that holds only ``chat_template.jinja`` lends its template to the base's tokenizer.

    Raises:
        CannotRun: there is none, or the one in the adapter's folder does not load.
    """
    if tokenizer is not None:
        return _with_template(tokenizer, "given")
    folder = subject.adapter.path
    if any((folder / name).is_file() for name in _TOKENIZER_FILES[:2]):
        loaded = load_tokenizer(folder)
        if loaded is None:
            raise CannotRun(
                f"{folder}: the tokenizer in the adapter's folder does not load; delete its files"
                " there to use the base model's, or pass tokenizer="
            )
        return _with_template(loaded, "the adapter's")
    base = subject.base.tokenizer
    if base is None:
        raise CannotRun(
            "there is no tokenizer: neither the adapter's folder nor the base model has one that"
            " loads; pass tokenizer="
        )
    template = _template_in(folder)
    if template is None:
        return _with_template(base, "the base model's")
    dressed = copy.deepcopy(base)
    dressed.chat_template = template
    return TaskTokenizer(dressed, "the base model's", "the adapter's")


def _with_template(tokenizer: Any, source: str) -> TaskTokenizer:
    has = getattr(tokenizer, "chat_template", None)
    return TaskTokenizer(tokenizer, source, source if has else None)


def _template_in(folder: Path) -> str | None:
    path = folder / _TEMPLATE_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_TEMPLATE:
        raise CannotRun(f"{path}: more than {_MAX_TEMPLATE} bytes long")
    return path.read_text(encoding="utf-8", errors="replace")


class Prompter:
    """Puts the items of a task to a tokenizer.

    Attributes:
        task: the task.
        tokens: the tokenizer.
    """

    def __init__(self, task: Task, tokens: TaskTokenizer) -> None:
        self.task, self.tokens = task, tokens
        self._pool = task.items if task.pool is None else task.pool
        self._drawn = seeded_order(len(self._pool), SEED) if task.shots else []

    def examples(self, index: int) -> tuple[TaskItem, ...]:
        """The worked examples shown with item ``index``: always the same ones, never itself.

        The first ``shots`` of a seeded order, without an item whose prompt is this one's.
        """
        own = self.task.items[index]
        if not self.task.shots:
            return ()
        others = (self._pool[i] for i in self._drawn if not _same(self._pool[i], own))
        fit = tuple(itertools.islice(others, self.task.shots))
        if len(fit) < self.task.shots:
            raise UsageError(
                f"task {self.task.name}, item {own.id}: only {len(fit)} other items to show,"
                f" {self.task.shots} asked for"
            )
        return fit

    def prompt(self, index: int) -> str:
        """What the model is shown for item ``index``."""
        return self._with_examples(index, self.task.items[index].prompt)

    def prompt_ids(self, index: int) -> list[int]:
        """Token ids of :meth:`prompt`; of one token at least."""
        return self._ids(self.prompt(index)) or self._start()

    def choices(self, index: int) -> list[tuple[list[int], list[int]]]:
        """For each choice, the token ids of its context and of its continuation.

        The two are tokenized as one text and cut where the context's own tokens end, white space at
        the end of the context going to the continuation: the way of the published harnesses.
        """
        item = self.task.items[index]
        prompts = item.contexts or (item.prompt,) * len(item.choices)
        texts: dict[str, str] = {}
        pairs = []
        for prompt, choice in zip(prompts, item.choices, strict=True):
            if prompt not in texts:
                texts[prompt] = self._with_examples(index, prompt)
            pairs.append(self._pair(texts[prompt], self._joined(texts[prompt], choice)))
        return pairs

    def _pair(self, context: str, whole: str) -> tuple[list[int], list[int]]:
        before, ids = self._ids(context.rstrip()), self._ids(whole)
        if not before:
            return self._start(), ids
        if len(before) >= len(ids):  # a token of the context swallowed the choice
            before = before[: len(ids) - 1]
        return before or self._start(), ids[len(before) :]

    def _start(self) -> list[int]:
        if self.tokens.start is None:
            raise CannotRun("the prompt is empty and the tokenizer has no token to begin with")
        return [self.tokens.start]

    def _ids(self, text: str) -> list[int]:
        return self.tokens.encode(text, special=not self.task.chat)

    def _joined(self, text: str, answer: str) -> str:
        """The answer behind the text, with the separator unless one of them brings white space."""
        spaced = text[-1:].isspace() or answer[:1].isspace() or self.task.chat
        return text + ("" if spaced else self.task.separator) + answer

    def _filled(self, prompt: str) -> str:
        return self.task.template.replace("{prompt}", prompt)

    def _with_examples(self, index: int, prompt: str) -> str:
        shown = self.examples(index)
        if self.task.chat:
            return self._chat(shown, prompt)
        worked = [self._joined(self._filled(_asked(item)), item.solution) for item in shown]
        return "\n\n".join([*worked, self._filled(prompt)])

    def _chat(self, shown: Sequence[TaskItem], prompt: str) -> str:
        messages = [{"role": "system", "content": self.task.system}] if self.task.system else []
        for item in shown:
            messages.append({"role": "user", "content": self._filled(_asked(item))})
            messages.append({"role": "assistant", "content": item.solution})
        messages.append({"role": "user", "content": self._filled(prompt)})
        return self.tokens.chat(messages)


def _asked(item: TaskItem) -> str:
    """What stands before the solution of an example."""
    if item.contexts and item.correct is not None:
        return item.contexts[item.correct]
    return item.prompt


def _same(one: TaskItem, other: TaskItem) -> bool:
    return one is other or one.prompt == other.prompt
