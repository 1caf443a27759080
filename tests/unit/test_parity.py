"""Served outputs and metrics: sound ones pass, each fault is named."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))
pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from torch.nn import functional

import pytest_lora as lora
from pytest_lora.errors import CheckFailed, NotApplicable, UsageError
from pytest_lora.subject import Subject
from timemachine.cases import llama, lora_config, on_disk, saved, trained

IDS = torch.arange(3, 27).view(2, 12)
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    config = lora_config("q_proj", task_type="CAUSAL_LM")
    found = on_disk(llama(), config, tmp_path_factory.mktemp("parity"))
    return Subject(found.adapter, found.base, {"input_ids": IDS})


def _outputs(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    output, base = subject.output(), subject.base_output()
    subject.release()
    return output, base


def test_the_adapters_own_output_is_at_one(subject: Subject) -> None:
    output, _ = _outputs(subject)
    assert lora.assert_serving_parity(lambda name: output, subject).value == pytest.approx(1)


def test_a_finer_answer_than_the_models_own_is_no_fault(subject: Subject) -> None:
    output, _ = _outputs(subject)
    found = lora.assert_serving_parity(lambda name: output.double(), subject)
    assert found.value == pytest.approx(1)


@pytest.mark.parametrize(
    ("served", "says"),
    [
        (lambda output, base: base, "default: the base model's output: nothing of"),
        (lambda output, base: base + 0.75 * (output - base), "0.75 times the adapter's effect; no"),
        (lambda output, base: output.bfloat16(), "at most 2"),
        (lambda output, base: output[:1], "shape"),
        (lambda output, base: output * float("nan"), "not finite"),
    ],
)
def test_a_fault_is_named(
    subject: Subject, served: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], says: str
) -> None:
    answer = served(*_outputs(subject))
    with pytest.raises(CheckFailed, match=says):
        lora.assert_serving_parity(lambda name: answer, subject)


def test_a_second_round_is_asked_for(subject: Subject) -> None:
    output, base = _outputs(subject)
    answers = iter([output, base])
    with pytest.raises(CheckFailed, match="default, asked after default"):
        lora.assert_serving_parity(lambda name: next(answers), subject)


@pytest.fixture(scope="module")
def served(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two adapters of one base, and their outputs and the base's by name."""
    config = lora_config("v_proj", task_type="CAUSAL_LM")
    folder = saved(trained(llama(), config), tmp_path_factory.mktemp("second"))
    second = Subject(lora.read_adapter(folder), subject.base, {"input_ids": IDS})
    outputs: dict[Any, torch.Tensor] = {None: _outputs(subject)[1]}
    outputs |= {name: _outputs(one)[0] for name, one in (("first", subject), ("second", second))}
    return {"first": subject, "second": second}, outputs


def _mix(outputs: dict[Any, torch.Tensor], names: list[Any]) -> torch.Tensor:
    return torch.stack([outputs[name][row] for row, name in enumerate(names)])


def test_the_base_model_and_mixed_batches_are_asked_for(served: Any) -> None:
    subjects, outputs = served
    batches: list[list[Any]] = []

    def mixed(names: list[Any]) -> torch.Tensor:
        batches.append(names)
        return _mix(outputs, names)

    found = lora.assert_serving_parity(outputs.__getitem__, subjects, base=True, mixed=mixed)
    assert found.value == pytest.approx(1)
    asked = [answer["asked"] for answer in found.details["answers"]]  # type: ignore
    assert asked[:6] == 2 * ["the base model", "first", "second"]
    assert [sorted(map(str, column)) for column in zip(*batches, strict=True)] == 2 * [
        ["None", "first", "second"]
    ]
    lora.assert_serving_parity(outputs.__getitem__, subjects, mixed=mixed)
    assert None not in batches[3] + batches[4]


def test_a_mixed_batch_may_come_row_by_row(served: Any) -> None:
    subjects, outputs = served
    serve = outputs.__getitem__
    lora.assert_serving_parity(
        serve, subjects, base=True, mixed=lambda names: list(_mix(outputs, names))
    )
    with pytest.raises(CheckFailed, match=r"a mixed batch of .*: row 1"):
        lora.assert_serving_parity(
            serve, subjects, base=True, mixed=lambda names: list(_mix(outputs, [names[0]] * 2))
        )
    with pytest.raises(UsageError, match="no batch of rows"):
        lora.assert_serving_parity(serve, subjects, mixed=lambda names: ["text"] * 2)  # type: ignore


def test_an_adapter_that_stays_on_for_the_base_model(served: Any) -> None:
    subjects, outputs = served
    last: list[Any] = []

    def serve(name: Any) -> torch.Tensor:
        last.append(name or (last[-1] if last else None))
        return outputs[last[-1]]

    lora.assert_serving_parity(serve, subjects)  # nobody asks
    last.clear()
    with pytest.raises(
        CheckFailed, match=r"the base model, asked after second: the output of second"
    ):
        lora.assert_serving_parity(serve, subjects, base=True)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda names: [names[0]] * 2, "a mixed batch of .*: row 1"),
        (lambda names: names[::-1], ": the output of"),
        (lambda names: [name or "first" for name in names], "the base model: the output of first"),
        (lambda names: [None, names[1]], "row 0, .*the base model's output"),
        (lambda names: names[:1], "shape"),
    ],
    ids=["one for all", "reversed", "none is the first", "none is none", "a row less"],
)
def test_rows_of_a_batch_that_get_another_ones_adapter(
    served: Any, broken: Callable[[list[Any]], list[Any]], says: str
) -> None:
    subjects, outputs = served

    def mixed(names: list[Any]) -> torch.Tensor:
        return _mix(outputs, broken(names))

    lora.assert_serving_parity(outputs.__getitem__, subjects, base=True)
    with pytest.raises(CheckFailed, match=says):
        lora.assert_serving_parity(outputs.__getitem__, subjects, base=True, mixed=mixed)


def test_a_small_error_in_the_base_models_answer_is_measured(served: Any) -> None:
    subjects, outputs = served
    rounded = {**outputs, None: outputs[None].bfloat16().float()}
    with pytest.raises(CheckFailed, match=r"the base model: .* rounding error"):
        lora.assert_serving_parity(rounded.__getitem__, subjects, base=True)


def test_what_is_no_mixed_batch(served: Any) -> None:
    subjects, outputs = served
    first, second = subjects["first"], subjects["second"]
    serve = outputs.__getitem__

    def mixed(names: list[Any]) -> torch.Tensor:
        return _mix(outputs, names)

    with pytest.raises(UsageError, match="of one adapter is none"):
        lora.measure_serving_parity(serve, {"first": first}, mixed=mixed)
    assert lora.measure_serving_parity(serve, {"first": first}, base=True, mixed=mixed).value <= 2
    others = Subject(second.adapter, second.base, {"input_ids": IDS + 1})
    with pytest.raises(UsageError, match="the same probe inputs"):
        lora.measure_serving_parity(serve, {"first": first, "second": others}, mixed=mixed)
    alone = Subject(first.adapter, first.base, {"input_ids": IDS[:1]})
    with pytest.raises(UsageError, match="two rows, not of 1"):
        lora.measure_serving_parity(serve, {"first": alone}, base=True, mixed=mixed)


def test_what_cannot_be_told(subject: Subject) -> None:
    with pytest.raises(UsageError, match="at least one adapter"):
        lora.measure_serving_parity(lambda name: IDS, {})
    with pytest.raises(NotApplicable, match="nothing to tell"):
        lora.measure_serving_parity(lambda name: IDS, {"a": subject, "b": subject})


# ------------------------------------------------------------------------------ metrics


def _loss(model: Any, batch: Batch, kept: torch.Tensor | None = None) -> torch.Tensor:
    mask = batch["attention_mask"].bool()
    kept = mask[:, 1:] & mask[:, :-1] if kept is None else kept
    logits = model(**batch).logits[:, :-1].float().transpose(1, 2)
    losses: torch.Tensor = functional.cross_entropy(
        logits, batch["input_ids"][:, 1:], reduction="none"
    )
    return losses[kept].mean()


def _unshifted(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(**batch).logits.float().flatten(0, 1)
    return functional.cross_entropy(logits, batch["input_ids"].flatten())


def _padding_counted(model: Any, batch: Batch) -> torch.Tensor:
    return _loss(model, batch, torch.ones_like(batch["input_ids"][:, 1:]).bool())


def _of_means(model: Any, batch: Batch) -> torch.Tensor:
    count = len(batch["input_ids"])
    rows = [{name: t[row : row + 1] for name, t in batch.items()} for row in range(count)]
    return torch.stack([_loss(model, row) for row in rows]).mean()


def _adapter_off(model: Any, batch: Batch) -> torch.Tensor:
    with model.disable_adapter():
        return _loss(model, batch)


def _without_mask(model: Any, batch: Batch) -> torch.Tensor:
    return _loss(model, {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])},
                 _kept(batch))  # fmt: skip


def _kept(batch: Batch) -> torch.Tensor:
    mask = batch["attention_mask"].bool()
    return mask[:, 1:] & mask[:, :-1]


def _first_masked(model: Any, batch: Batch) -> torch.Tensor:
    mask = batch["attention_mask"].clone()
    mask[torch.arange(len(mask)), mask.argmax(1)] = 0
    return _loss(model, {**batch, "attention_mask": mask}, _kept(batch))


def _by_all_tokens(model: Any, batch: Batch) -> torch.Tensor:
    count = batch["attention_mask"].sum()
    return _loss(model, batch) * _kept(batch).sum() / count


def _one_too_many(model: Any, batch: Batch) -> torch.Tensor:
    return _loss(model, batch, batch["attention_mask"].bool()[:, :-1])


def _by_blocks(size: int, side: int) -> Callable[[Any, Batch], torch.Tensor]:
    """The mean of the means of blocks of positions, or of micro-batches of texts."""

    def metric(model: Any, batch: Batch) -> torch.Tensor:
        places = torch.arange(batch["input_ids"].shape[side] - side).split(size)
        of = [torch.zeros_like(_kept(batch)).index_fill(side, block, True) for block in places]
        return torch.stack(
            [
                _loss(model, batch, _kept(batch) & block)
                for block in of
                if (_kept(batch) & block).any()
            ]
        ).mean()

    return metric


def _perplexities(model: Any, batch: Batch) -> torch.Tensor:
    rows = [_loss(model, {name: t[row : row + 1] for name, t in batch.items()}).exp()
            for row in range(len(batch["input_ids"]))]  # fmt: skip
    return torch.stack(rows).mean()


def _in_training_mode(model: Any, batch: Batch) -> torch.Tensor:
    return _loss(model.train(), batch)


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(llama(), lora_config("q_proj", lora_dropout=0.1))


def test_a_sound_metric_passes_and_the_model_is_as_before(model: Any) -> None:
    before = {name: (p.dtype, p.clone()) for name, p in model.named_parameters()}
    assert lora.assert_metric_sound(_loss, model, IDS).value <= 1
    assert lora.assert_metric_sound(_adapter_off, model, IDS, declared="base").value <= 1
    for name, parameter in model.named_parameters():
        dtype, value = before[name]
        assert parameter.dtype == dtype
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (_unshifted, "labels are not shifted"),
        (_padding_counted, "padding is counted"),
        (_of_means, "mean of the texts' means"),
        (_adapter_off, "that of the base model"),
        (_without_mask, "the model is not given the mask"),
        (_first_masked, "the first token of each text is masked"),
        (_by_all_tokens, "the sum is divided by 12, not by the 11 tokens that are predicted"),
        (_one_too_many, "what follows a text, its padding, is predicted from it"),
        (_by_blocks(4, 1), "the mean of the means of 4 positions each"),
        (_by_blocks(2, 0), "the mean of the means of 2 texts each"),
        (lambda model, batch: _loss(model, batch).exp(), "it is the perplexity, not its"),
        (_perplexities, "it is the (mean of the texts' perplexities|perplexity)"),
        (
            lambda model, batch: _perplexities(model, batch).log(),
            "the logarithm of the mean of the texts' perplexities",
        ),
        (lambda model, batch: _loss(model, batch) / math.log(2), "it is in bits"),
        (lambda model, batch: 1.01 * _loss(model, batch), r"nats per token allowed"),
        (_in_training_mode, "when asked again: dropout or sampling is on"),
        (lambda model, batch: float("nan"), "nan nats"),
    ],
)
def test_a_wrong_metric_is_named(model: Any, metric: Any, says: str) -> None:
    ids = torch.cat([IDS, IDS[:1] + 30])  # three texts: two at a time leave one
    with pytest.raises(CheckFailed) as failure:
        lora.assert_metric_sound(metric, model, ids)
    assert re.search(says, " ".join(str(failure.value).split()))


def test_a_baseline_taken_with_the_adapter_on(model: Any) -> None:
    with pytest.raises(CheckFailed, match="that of the adapted model"):
        lora.assert_metric_sound(_loss, model, IDS, declared="base")


def test_what_a_metric_needs(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two rows of six"):
        lora.measure_metric(_loss, model, IDS[:1])
    with pytest.raises(UsageError, match="declared"):
        lora.measure_metric(_loss, model, IDS, declared="start")
