"""A second adapter beside the first, and what stays of it; what preparing for it does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))
pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from stack import since

from pytest_lora import assert_adapter_isolation, assert_requires_grad
from pytest_lora.checks.switching import disabled
from pytest_lora.errors import CheckFailed, NotApplicable
from pytest_lora.loading import quiet
from timemachine.cases import Mlp

X = {"x": torch.linspace(-2, 2, 24).sin().view(3, 8)}


def adapted(**options: Any) -> Any:
    """A model with an adapter, and a head that is saved whole, all off their initial values."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["body"], **options)
    with quiet():
        model = peft.get_peft_model(Mlp(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@since("has faults that these checks find", peft=(0, 21))
@pytest.mark.parametrize("saved", [None, ["head"]])
def test_a_sound_peft_passes(saved: list[str] | None) -> None:
    assert_adapter_isolation(adapted(modules_to_save=saved), X)
    assert_requires_grad(adapted(modules_to_save=saved), X)


@since("has faults that these checks find", peft=(0, 21))
def test_switching_inside_that_forgets_a_saved_module_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import PeftModel
    from peft.tuners import tuners_utils
    from peft.utils.other import _set_adapter

    def outside(self: Any, name: str, inference_mode: bool = False) -> None:
        self.active_adapter = name
        self.base_model.set_adapter(name, inference_mode=inference_mode)
        _set_adapter(self, name, inference_mode=inference_mode)

    monkeypatch.setattr(tuners_utils, "_set_adapter", lambda *_, **__: None)
    monkeypatch.setattr(PeftModel, "set_adapter", outside)
    assert_adapter_isolation(adapted(), X)
    with pytest.raises(CheckFailed, match=r"after base_model\.set_adapter\('default'\)"):
        assert_adapter_isolation(adapted(modules_to_save=["head"]), X)


@since("has faults that these checks find", peft=(0, 21))
def test_what_stays_of_a_deleted_adapter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils.other import ModulesToSaveWrapper

    monkeypatch.setattr(ModulesToSaveWrapper, "delete_adapter", lambda *_, **__: None)
    with pytest.raises(CheckFailed, match=r"modules_to_save\.default2\.\w+ and 1 more of its"):
        assert_adapter_isolation(adapted(modules_to_save=["head"]), X)


@since("has faults that these checks find", peft=(0, 21))
def test_a_method_whose_patterns_are_no_ranks_is_judged() -> None:
    """AdaLoRA's pattern says which singular values are kept, or is not there yet.

    Where it is there, layers are made anew while a second adapter is loaded (docs/upstream.md).
    """
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["body"])
    model = peft.get_peft_model(Mlp(), config, adapter_name="policy").eval()
    assert assert_requires_grad(model, X).value == 0
    model.peft_config["policy"].rank_pattern = {"body.lora_E": [True, False, True, True]}
    with pytest.raises(CheckFailed, match=r"onto a frozen one: frozen: .*lora_A\.second") as caught:
        assert_requires_grad(model, X)
    assert "hot-swap" not in str(caught.value.result.measurement.details["problems"])


@since("has faults that these checks find", peft=(0, 21))
def test_room_for_hot_swapping_that_thaws_the_adapter_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.utils import hotswap

    original = hotswap.prepare_model_for_compiled_hotswap

    def thawing(model: Any, **options: Any) -> None:
        original(model, **options)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    monkeypatch.setattr(hotswap, "prepare_model_for_compiled_hotswap", thawing)
    with pytest.raises(CheckFailed, match="after prepare_model_for_compiled_hotswap: trainable"):
        assert_requires_grad(adapted(), X)


def test_what_peft_breaks_on_when_switching_off_is_a_reason_to_skip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Any) -> Any:
        raise UnboundLocalError("cannot access local variable 'old'")

    monkeypatch.setattr(peft.PeftModel, "disable_adapter", broken)
    with pytest.raises(NotApplicable, match="variable 'old'"), disabled(adapted()):
        pass
