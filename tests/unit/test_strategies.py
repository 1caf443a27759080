"""What the strategies draw is what they promise, and what it is meant for accepts it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import peft
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

import pytest_lora as lora
from pytest_lora import strategies
from pytest_lora.errors import CheckFailed, UsageError
from pytest_lora.folders import FAULTS, AdapterFolder, Fault
from pytest_lora.loading import quiet
from pytest_lora.strategies import (
    TinyModel,
    adapter_folders,
    alphas,
    dtypes,
    faulty_adapter_folders,
    initialisations,
    lora_configs,
    lora_factors,
    scalings,
    shapes,
    target_modules,
    tensors,
    tiny_models,
)
from pytest_lora.tiny_models import FAMILIES, adaptable_modules, build_model, model_inputs

slow = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
BUILT = {family: build_model(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_runs_and_is_the_same_for_the_same_seed(family: str) -> None:
    before = torch.get_rng_state()
    model, again, other = (build_model(family, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    first, second, third = (
        torch.cat([p.flatten() for p in item.parameters()]) for item in (model, again, other)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    with torch.no_grad():
        output = model(**model_inputs(model))
    values = output if isinstance(output, torch.Tensor) else output.logits
    assert values.isfinite().all()
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 40_000


def test_families_have_what_they_are_there_for() -> None:
    kinds = {family: set(adaptable_modules(model).values()) for family, model in BUILT.items()}
    assert "conv1d" in kinds["gpt2"]
    assert kinds["cnn"] == {"convolution", "linear"}
    assert "embedding" not in kinds["gemma"]  # tied to the head
    assert "embedding" in kinds["llama"]
    grouped = BUILT["cnn"].get_submodule("grouped")
    assert isinstance(grouped, torch.nn.Conv2d)
    assert grouped.groups > 1


def test_an_unknown_family_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no tiny model 'lama'; there are llama"):
        build_model("lama")


@given(st.integers(1, 9), st.data())
def test_alpha_differs_from_the_rank_unless_asked(r: int, data: st.DataObject) -> None:
    assert data.draw(alphas(r)) != r
    assert data.draw(alphas(r, equal=True)) >= 1


@given(scalings(), shapes(), shapes(square=True), dtypes(half=False))
def test_numbers(scaling: float, shape: tuple[int, int], any_shape: tuple[int, int],
                 dtype: torch.dtype) -> None:  # fmt: skip
    assert scaling not in (0.0, 1.0)
    assert shape[0] != shape[1]
    assert min(any_shape) >= 1
    assert dtype in (torch.float32, torch.float64)


@given(tensors((2, 3), dtype=torch.bfloat16))
def test_tensors_have_the_shape_and_dtype(tensor: torch.Tensor) -> None:
    assert (tensor.shape, tensor.dtype) == ((2, 3), torch.bfloat16)
    assert tensor.isfinite().all()


@given(lora_factors())
def test_factors_fit_and_their_product_has_the_rank(factors: strategies.Factors) -> None:
    delta = factors.delta()
    assert delta.shape == (factors.B.shape[0], factors.A.shape[1])
    assert int(torch.linalg.matrix_rank(delta)) <= factors.r
    assert factors.alpha != factors.r
    assert bool(factors.B.any())
    assert bool(factors.A.any())


def test_strategies_shrink_to_the_simplest() -> None:
    factors = find(lora_factors(), lambda item: item.r >= 2)
    assert (factors.r, factors.alpha) == (2, 1)
    assert sorted(factors.delta().shape) == [1, 2]
    assert find(tiny_models(), lambda _: True) == TinyModel("llama", 0, torch.float32)
    folder = find(adapter_folders(), lambda _: True)
    assert len(folder.tensors) == 2


@slow
@given(tiny_models(families=list(FAMILIES)), st.data())
def test_peft_accepts_every_configuration_and_the_model_runs(
    recipe: TinyModel, data: st.DataObject
) -> None:
    model = recipe.build()
    config = data.draw(lora_configs(model, rewriting=True))
    with quiet():
        adapted = peft.get_peft_model(model, config).eval()
        adapted(**model_inputs(model))
    wanted = set(config.target_modules)
    found = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and not name.endswith(("lora_A", "lora_B"))
    }
    assert found == wanted


def test_fixed_keys_are_not_drawn() -> None:
    config = find(lora_configs(BUILT["llama"], r=3, bias="none"), lambda _: True)
    assert (config.r, config.bias) == (3, "none")


@pytest.mark.parametrize(
    ("family", "wanted"),
    [("llama", "all-linear"), ("llama", ["q_proj"]), ("gpt2", ".*c_attn"), ("cnn", ["grouped"])],
)
def test_targets_may_be_named_as_peft_lets_them(family: str, wanted: Any) -> None:
    config = find(lora_configs(BUILT[family], target_modules=wanted), lambda _: True)
    with quiet():
        adapted = peft.get_peft_model(build_model(family), config)
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    assert config.fan_in_fan_out == (family == "gpt2")


def test_targets_that_are_not_there_are_named() -> None:
    with pytest.raises(UsageError, match="names none of the modules"):
        find(lora_configs(BUILT["llama"], target_modules=["q_porj"]), lambda _: True)


def test_targets_can_be_of_one_kind() -> None:
    names = find(target_modules(BUILT["gpt2"], kinds=["conv1d"]), lambda found: len(found) == 2)
    assert all(adaptable_modules(BUILT["gpt2"])[name] == "conv1d" for name in names)


@given(initialisations())
def test_initialisations_leave_the_base_alone_unless_asked(value: bool | str) -> None:
    assert value in (True, False, "gaussian")


@slow
@given(adapter_folders(dtype=dtypes()))
def test_a_drawn_folder_is_sound(folder: AdapterFolder) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = folder.write(Path(name))
        lora.assert_adapter_files(path)
        lora.assert_config_matches_weights(path)
        lora.assert_finite_weights(path)


@pytest.mark.parametrize("name", FAULTS)
def test_a_folder_with_one_fault_fails_the_check_meant_for_it(name: str) -> None:
    @settings(slow, max_examples=8)
    @given(faulty_adapter_folders(faults={name: FAULTS[name]}))
    def broken(pair: tuple[AdapterFolder, Fault]) -> None:
        folder, fault = pair
        with tempfile.TemporaryDirectory() as temporary:
            path = folder.write(Path(temporary))
            with pytest.raises(CheckFailed):
                getattr(lora, f"assert_{fault.check}")(path)

    broken()
