"""The bridge to lm-eval: its own numbers, in slices, on a model that is already loaded."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from example import EXAMPLE, FIXTURES, NEEDS_EXAMPLE

from pytest_lora.adapter import read_adapter
from pytest_lora.baseline import FACTS, Reference, flat
from pytest_lora.checks.learning import measure_task_accuracy
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.nll_cache import NllCache, Scores
from pytest_lora.records import Measurement
from pytest_lora.subject import Subject, load_base
from pytest_lora.tasks import lm_eval_bridge as bridge
from pytest_lora.tasks.lm_eval_bridge import LmEvalRun, LmEvalTask, load_lm_eval_tasks

if TYPE_CHECKING:
    from pytest_lora.subject import BaseModel

pytestmark = NEEDS_EXAMPLE
WORDS = ("one", "two", "red", "blue", "cat", "dog", "sun")
ITEMS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = [
        {
            "question": f"{WORDS[number % 7]} and {WORDS[(number + 3) % 7]} {number}",
            "choices": [WORDS[(number + 1) % 7], WORDS[(number + 2) % 7], WORDS[number % 7]],
            "answer": number % 3,
        }
        for number in range(ITEMS)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "items.jsonl").write_text(text, encoding="utf-8")
    return folder


def configuration(data: Path, **changes: Any) -> dict[str, Any]:
    return {
        "task": "own_choices",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data / "items.jsonl")},
            "cache_dir": str(data / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 2,
        "metadata": {"version": 3.5},
        **changes,
    }


def writing(data: Path, **changes: Any) -> dict[str, Any]:
    """A task whose answers are written, and judged by what the tiny model does say."""
    options: dict[str, Any] = configuration(
        data,
        task="own_writing",
        output_type="generate_until",
        doc_to_target="{{question}}",
        num_fewshot=0,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        filter_list=[
            {
                "name": "letters",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-z])", "fallback": ""},
                    {"function": "take_first"},
                ],
            }
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    )
    del options["doc_to_choice"]
    return options


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    adapter = read_adapter(EXAMPLE)
    base: BaseModel = load_base(FIXTURES / "base", adapter=adapter, device="cpu")
    subject = Subject(adapter, base)
    yield subject
    subject.release()
    assert base.verify() == ()


def only(spec: bridge.Spec) -> LmEvalTask:
    [task] = load_lm_eval_tasks(spec)
    return task


@pytest.fixture(scope="module")
def choices(subject: Subject, data: Path) -> LmEvalRun:
    return LmEvalRun(subject, only(configuration(data)), batch_size=4)


def harness(subject: Subject, data: Path, model: Any, spec: dict[str, Any]) -> list[float]:
    """What the harness itself gives each item."""
    from lm_eval.evaluator import evaluate

    with bridge._silence():
        lm = bridge._wrapped(model, subject.base.tokenizer, 4, None)
        task = only(spec).task
        task.set_fewshot_seed(seed=bridge.SEED)
        found = evaluate(lm, {"tasks": {task.task_name: task}}, bootstrap_iters=0)
    samples = sorted(found["samples"][task.task_name], key=lambda sample: sample["doc_id"])
    metric = "acc" if "acc" in samples[0] else "exact_match"
    return [float(sample[metric]) for sample in samples]


def test_items_score_as_in_a_run_of_the_harness(
    subject: Subject, data: Path, choices: LmEvalRun
) -> None:
    found = choices.run()
    spec = configuration(data)
    assert list(found.adapter) == harness(subject, data, subject.model, spec)
    with subject.base.bare() as module:
        assert list(found.base) == harness(subject, data, module, spec)
    assert found.indices == tuple(range(ITEMS))
    assert set(found.adapter) | set(found.base) == {0.0, 1.0}


def test_slices_in_any_order_give_the_same_scores(choices: LmEvalRun) -> None:
    whole = choices.run()
    order = [7, 2, 11, 0, 5, 1, 3, 4, 6, 8, 9, 10]
    first, second = choices.run(order[:5]), choices.run(order[5:])
    assert first.indices == tuple(order[:5])
    for side in ("adapter", "base"):
        pieces = [*getattr(first, side), *getattr(second, side)]
        assert pieces == [getattr(whole, side)[index] for index in order]


def test_adapter_and_base_are_asked_the_same_and_answer_differently(
    subject: Subject, choices: LmEvalRun
) -> None:
    """The negative control of the toggle: likelihoods differ, prompts do not."""
    prompts, likelihoods = [], []
    answer = choices._lm.loglikelihood

    def listen(requests: Any, **options: Any) -> Any:
        found = answer(requests, **options)
        prompts.append([request.args for request in requests])
        likelihoods.append([value for value, _ in found])
        return found

    choices._lm.loglikelihood = listen
    try:
        choices.run([4, 3])
    finally:
        choices._lm.loglikelihood = answer
    assert prompts[0] == prompts[1]
    assert likelihoods[0] != likelihoods[1]


def test_the_base_need_not_be_asked(choices: LmEvalRun) -> None:
    found = choices.run([0], base=False)
    assert (len(found.adapter), found.base) == (1, ())


def test_the_definition_says_what_was_asked(choices: LmEvalRun) -> None:
    wanted = {
        "task": "own_choices",
        "task_version": "3.5",
        "metric": "acc",
        "filter": "none",
        "num_fewshot": 2,
        "items": ITEMS,
        "output_type": "multiple_choice",
        "dtype": "float32",
    }
    assert wanted.items() <= choices.definition.items()
    assert str(choices.definition["harness"]).startswith("lm-eval 0.")
    assert len(choices) == ITEMS
    json.dumps(choices.definition)


def test_another_metric_and_other_examples_can_be_asked_for(subject: Subject, data: Path) -> None:
    run = LmEvalRun(subject, only(configuration(data)), metric="acc_norm", num_fewshot=0)
    assert run.definition["metric"] == "acc_norm"
    assert run.definition["num_fewshot"] == 0
    assert len(run.run([1]).adapter) == 1


def test_written_answers_are_filtered_and_judged(subject: Subject, data: Path) -> None:
    run = LmEvalRun(subject, only(writing(data)), batch_size=4)
    assert run.definition["filter"] == "letters"
    found = run.run()
    assert list(found.adapter) == harness(subject, data, subject.model, writing(data))
    wrong = run.run([3, 1])
    assert list(wrong.adapter) == [found.adapter[3], found.adapter[1]]


def test_a_written_answer_can_be_right(subject: Subject, data: Path) -> None:
    """Both models write something: a task that takes any letter is passed."""
    anything = {"function": "map", "mapping_dict": {}, "default_value": "a"}
    filters = [{"name": "any", "filter": [anything, {"function": "take_first"}]}]
    spec = writing(data) | {"doc_to_target": "a", "filter_list": filters}
    run = LmEvalRun(subject, only(spec))
    assert run.run([0, 1]).adapter == (1.0, 1.0)


def test_a_task_file_is_read(subject: Subject, data: Path) -> None:
    path = data / "own.yaml"
    path.write_text(json.dumps(configuration(data, task="from_file")), encoding="utf-8")
    task = only(path)
    assert (task.name, task.version, task.items) == ("from_file", "3.5", ITEMS)


# ------------------------------------------------------------------- what a number depends on


def _pattern(spec: dict[str, Any], pattern: str) -> dict[str, Any]:
    [letters] = spec["filter_list"]
    regex = letters["filter"][0] | {"regex_pattern": pattern}
    return spec | {"filter_list": [letters | {"filter": [regex, *letters["filter"][1:]]}]}


def test_another_filter_is_another_task_to_the_cache_and_to_a_baseline(
    subject: Subject, data: Path, tmp_path: Path
) -> None:
    """Whether no letter was found is the answer: the pattern alone decides whether it is right."""
    spec = writing(data) | {"doc_to_target": "{{''}}"}
    kept = Scores(NllCache(tmp_path), "own")

    def measure(pattern: str, store: Scores | None = kept) -> Measurement:
        task = bridge.lm_eval_task("own", _pattern(spec, pattern), limit=3)
        return measure_task_accuracy(subject, task, store=store)

    first, other = measure("([a-z])"), measure("(ZZZ)")
    assert first.value < other.value == 1.0
    assert (first.details["computed"], other.details["computed"]) == (3, 3)
    assert measure("(ZZZ)").details["computed"] == 0
    reference = Reference(first.value, first.unit, first.count, flat(facts_of(first)))
    reference.require(facts_of(measure("([a-z])", None)))
    with pytest.raises(CannotRun, match=r"rules\.lm_eval\.configuration was '\w+' and is '\w+'"):
        reference.require(facts_of(other))


def facts_of(measured: Measurement) -> Any:
    return measured.details[FACTS]


def test_the_digest_follows_what_decides_and_not_where_data_lies(
    data: Path, tmp_path: Path
) -> None:
    spec = configuration(data)
    shutil.copy(data / "items.jsonl", tmp_path)
    plain = only(spec).configuration
    assert only(configuration(tmp_path, task="renamed")).configuration == plain
    others = [
        {"metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]},
        {"doc_to_text": "{{question}}?"},
        {"doc_to_target": lambda row: row["answer"]},
        {"doc_to_target": lambda row: row["answer"] - 1},
        {"doc_to_target": functools.partial(_answer, 0)},
        {"doc_to_target": functools.partial(_answer, 1)},
        {"target_delimiter": ""},
        {"num_fewshot": 1},
    ]
    found = [plain, *(only(spec | other).configuration for other in others)]
    assert len(set(found)) == len(found)
    writings = [
        writing(data),
        writing(data) | {"generation_kwargs": {"until": ["."], "do_sample": False}},
    ]
    assert len({only(one).configuration for one in writings}) == 2


def _answer(more: int, row: dict[str, Any]) -> int:
    return int(row["answer"]) + more - more


def test_a_function_of_a_task_file_counts_with_what_it_calls(data: Path) -> None:
    path, helpers = data / "graded.yaml", data / "helpers.py"
    lines = [f"{key}: {json.dumps(value)}" for key, value in configuration(data).items()]
    path.write_text("\n".join(lines).replace('"answer"', "!function helpers.target"))
    found = []
    for number in range(2):
        helpers.write_text(
            f"def of(row):\n    return row['answer'] + {number} - {number}\n"
            "def target(row):\n    return of(row)\n"
        )
        os.utime(helpers, (number, number))
        found.append(only(path).configuration)
    assert found[0] != found[1]


# --------------------------------------------------------------------------------------- misuse


def test_a_name_that_is_no_task_gets_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    class Manager:
        """Reading the harness's ten thousand definitions takes it half a minute."""

        all_tasks = ("hellaswag", "piqa")

        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    with pytest.raises(UsageError, match=r"no task 'hellaswagg'.*did you mean 'hellaswag'"):
        load_lm_eval_tasks("hellaswagg")


def test_data_that_cannot_be_had_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    spec = configuration(tmp_path, dataset_path="nobody/nothing", dataset_kwargs={})
    with pytest.raises(CannotRun, match=r"own_choices of lm-eval cannot be loaded.*local file"):
        load_lm_eval_tasks(spec)
    with pytest.raises(CannotRun, match="cannot be loaded"):
        load_lm_eval_tasks(configuration(tmp_path))


def test_tasks_that_run_programs_are_refused(data: Path) -> None:
    with pytest.raises(UsageError, match="humaneval, which runs them in a sandbox"):
        load_lm_eval_tasks(configuration(data, unsafe_code=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "f1"}, "no metric 'f1', expected one of acc"),
        ({"filter_name": "strict"}, "no filter 'strict', expected one of none"),
    ],
)
def test_what_a_task_has_not_is_named(
    subject: Subject, data: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        LmEvalRun(subject, only(configuration(data)), **options)


@pytest.mark.parametrize("indices", [[0, 0], [ITEMS], [-1], []])
def test_items_that_are_not_there(choices: LmEvalRun, indices: list[int]) -> None:
    with pytest.raises(UsageError, match=r"twice|expected items from 0 to 11"):
        choices.run(indices)


def test_a_metric_that_is_no_number_of_an_item(
    choices: LmEvalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices._task, "process_results", lambda *_: {"acc": (1.0, 0.0)})
    with pytest.raises(UsageError, match=r"item 0 is \(1.0, 0.0\), expected a number"):
        choices.run([0])


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotRun, match=r"pytest-lora\[lm-eval\]") as error:
        load_lm_eval_tasks("hellaswag")
    assert error.value.missing


def test_without_a_tokenizer_there_is_nothing_to_ask_with(
    subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(subject.base), "tokenizer", None)
    with pytest.raises(CannotRun, match="no tokenizer"):
        LmEvalRun(subject, only(configuration(data)))
