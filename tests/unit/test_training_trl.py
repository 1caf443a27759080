"""The same assertions on TRL's SFTTrainer, where TRL is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from example import ROOT
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from pytest_lora import (
    CheckFailed,
    assert_gradient_coverage,
    assert_optimizer_holds,
    assert_overfits_one_batch,
    assert_trains_only_adapter,
)

# By test and not by module: a module that skips shows in every run that collects it.
pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed"),
    pytest.mark.filterwarnings("ignore"),  # what TRL and its dependencies deprecate
]
BASE = ROOT / "fixtures" / "base"
TEXTS = ["the cat sat on the mat", "a dog ran off", "the bird sang", "one two three"]


def sft(folder: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        learning_rate=5e-3,
        per_device_train_batch_size=2,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(BASE),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )


def test_a_sound_sft_trainer_passes(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    assert_optimizer_holds(trainer, lr=5e-3)
    assert_gradient_coverage(trainer)
    assert_trains_only_adapter(trainer)
    assert_overfits_one_batch(trainer)


def test_a_base_weight_left_trainable_is_named(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(CheckFailed, match=r"norm\.weight: "):
        assert_trains_only_adapter(trainer)
