"""The same assertions on a transformers Trainer, recognised by what it can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import torch
from training_loops import adapted, trainer

from pytest_lora import (
    CannotRun,
    CheckFailed,
    UsageError,
    assert_accumulation_equivalent,
    assert_best_checkpoint_restored,
    assert_checkpointing_equivalent,
    assert_gradient_coverage,
    assert_optimizer_holds,
    assert_overfits_one_batch,
    assert_resume_equivalent,
    assert_trains_only_adapter,
)
from pytest_lora.checks.steps import Stepper


def test_a_sound_trainer_passes(tmp_path: Path) -> None:
    ours = trainer(adapted(), tmp_path, warmup_steps=1)
    before = vars(ours.args).copy()
    assert_optimizer_holds(ours, lr=5e-3)
    assert_gradient_coverage(ours)
    assert_trains_only_adapter(ours)
    assert_overfits_one_batch(ours)
    assert vars(ours.args) == before
    assert "training_step" not in vars(ours)
    assert ours.state.global_step == 0
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_base_weight_left_trainable_is_named(tmp_path: Path) -> None:
    model = adapted()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    ours = trainer(model, tmp_path)
    for judge in (assert_trains_only_adapter, assert_gradient_coverage, assert_optimizer_holds):
        with pytest.raises(CheckFailed, match=r"norm\.weight: "):
            judge(ours)


def test_checkpointing_with_and_without(tmp_path: Path) -> None:
    ours = trainer(adapted(lora_dropout=0.2), tmp_path)
    found = assert_checkpointing_equivalent(ours, checkpointing={"use_reentrant": False})
    assert found.value == 0.0


@pytest.mark.parametrize("pieces", [1, 2])
def test_micro_batches_give_the_gradients_of_one_batch(tmp_path: Path, pieces: int) -> None:
    ours = trainer(adapted(), tmp_path, gradient_accumulation_steps=pieces)
    found = assert_accumulation_equivalent(ours)
    assert found.value < 0.6


def test_a_trainer_that_forgets_how_many_tokens_there_are(tmp_path: Path) -> None:
    """Rows have unequal numbers of tokens, so a mean of means is another loss."""
    ours = trainer(adapted(), tmp_path, gradient_accumulation_steps=2)
    inner = ours.compute_loss
    ours.compute_loss = lambda model, inputs, **_: inner(model, inputs) / 2
    with pytest.raises(CheckFailed, match="another number of micro-batches or tokens"):
        assert_accumulation_equivalent(ours)


def test_one_example_a_step_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing can be split"):
        assert_accumulation_equivalent(trainer(adapted(), tmp_path, per_device_train_batch_size=1))


def test_resuming_from_a_checkpoint_of_the_trainer() -> None:
    def build(folder: Path) -> Any:
        return trainer(adapted(lora_dropout=0.2), folder)

    found = assert_resume_equivalent(build)
    assert found.details["losses"] == found.details["resumed_losses"]


def test_a_checkpoint_without_the_optimizer_is_found() -> None:
    def build(folder: Path) -> Any:
        ours = trainer(adapted(), folder)
        ours._load_optimizer_and_scheduler = lambda checkpoint: None
        return ours

    with pytest.raises(CheckFailed, match="the state of the optimizer or of the scheduler"):
        assert_resume_equivalent(build)


def test_a_trainer_that_saves_no_checkpoint() -> None:
    def build(folder: Path) -> Any:
        ours = trainer(adapted(), folder)
        ours._save_checkpoint = lambda *_, **__: None
        return ours

    with pytest.raises(CannotRun, match="saved no checkpoint-2"):
        assert_resume_equivalent(build)


def test_a_trainer_that_raises_is_no_verdict(tmp_path: Path) -> None:
    ours = trainer(adapted(), tmp_path)
    ours.train_dataset = [{"nonsense": torch.zeros(1)}]
    with pytest.raises(CannotRun, match=r"Trainer\.train\(\): "):
        assert_trains_only_adapter(ours)


def test_a_dataset_without_length_has_no_first_batch(tmp_path: Path) -> None:
    ours = trainer(adapted(), tmp_path)
    ours.train_dataset = iter([])
    with pytest.raises(CannotRun, match="without length"):
        Stepper(ours, None).run(1, one_batch=True)


# --------------------------------------------------------------------------- best checkpoints


def test_the_best_checkpoint_is_there_in_the_end() -> None:
    found = assert_best_checkpoint_restored(lambda folder: trainer(adapted(), folder))
    assert (found.value, found.count) == (0, 8)


def _unloaded(folder: Path) -> Any:
    ours = trainer(adapted(), folder)
    ours._load_best_model = lambda: None
    return ours


def _loaded_elsewhere(folder: Path) -> Any:
    """Loads another checkpoint than the best."""
    ours = trainer(adapted(), folder)
    inner = ours._load_best_model

    def load() -> None:
        ours.state.best_model_checkpoint = str(folder / "checkpoint-2")
        inner()

    ours._load_best_model = load
    return ours


@pytest.mark.parametrize(
    ("build", "says"),
    [(_unloaded, "the last weights are still there"), (_loaded_elsewhere, "neither the best")],
)
def test_another_checkpoint_in_the_end_is_found(build: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match=says) as caught:
        assert_best_checkpoint_restored(build)
    assert caught.value.result.measurement is not None
    assert len(caught.value.result.measurement.problems) == 8


def test_what_leaves_no_choice_of_checkpoints() -> None:
    with pytest.raises(UsageError, match="have to be two"):
        assert_best_checkpoint_restored(_unloaded, steps=1)
    with pytest.raises(UsageError, match="has to return a Trainer"):
        assert_best_checkpoint_restored(lambda folder: object())
    with pytest.raises(CannotRun, match="the steps change nothing"):
        assert_best_checkpoint_restored(
            lambda folder: trainer(adapted(), folder, learning_rate=0.0)
        )
