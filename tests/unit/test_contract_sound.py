"""Classes that are sound, whatever their habits, break no law."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import sound_layers

from pytest_lora.contract.cells import Result, assert_contract

HABITS = (
    sound_layers.Several,
    sound_layers.MergesInEval,
    sound_layers.KeepsWhatIsInUse,
    sound_layers.FreezesWhatIsMerged,
    sound_layers.DropsWhatIsMerged,
    sound_layers.RefusesMergedBases,
)


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
def test_a_sound_class_is_not_accused(habit: type) -> None:
    verdicts = assert_contract(habit, examples=8)
    assert not [verdict for verdict in verdicts if verdict.result is Result.FAIL]
    held = {verdict.law for verdict in verdicts if verdict.result is Result.PASS}
    assert held >= {"forward", "padding_and_batch", "frozen_weights", "requires_grad"} - (
        {"requires_grad"} if habit is sound_layers.RefusesMergedBases else set()
    )
