"""Gradient checkpointing, accumulation and data order: the same gradients, up to rounding."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from tiny import bert, gpt2, llama, t5, wrap
from training_loops import adamw, adapted, backward, config, loss_of, texts, train_step

from pytest_lora import (
    Bound,
    CannotRun,
    CheckFailed,
    UsageError,
    assert_accumulation_equivalent,
    assert_checkpointing_equivalent,
    measure_accumulation_equivalent,
)
from pytest_lora.loading import quiet
from pytest_lora.numerics.noise import accumulation_error, gradient_noise, sum_unit

DTYPES = [torch.float32, torch.bfloat16]


def failure(call: Any, *args: Any, **options: Any) -> CheckFailed:
    with pytest.raises(CheckFailed) as caught:
        call(*args, **options)
    return caught.value


def enabled(model: Any, **options: Any) -> Any:
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


# --------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_nothing(dropout: float) -> None:
    model = adapted(lora_dropout=dropout)
    modes = [module.training for module in model.modules()]
    found = assert_checkpointing_equivalent(
        train_step(adamw(model)), model, checkpointing={"use_reentrant": False}
    )
    assert found.value == 0.0
    assert found.count == 8
    assert [module.training for module in model.modules()] == modes
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_checkpointing_that_is_on_is_tried_as_it_is() -> None:
    model = enabled(adapted(), use_reentrant=False)
    assert assert_checkpointing_equivalent(backward, model).value == 0.0
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_before_hooks_starves_the_adapter() -> None:
    """Reentrant checkpointing, and a trainable head that keeps the loss differentiable."""
    model = enabled(adapted(modules_to_save=["lm_head"]), use_reentrant=True)
    with quiet(), contextlib.suppress(AttributeError):  # older releases did not enable them
        model.disable_input_require_grads()
    error = failure(assert_checkpointing_equivalent, backward, model)
    assert error.result.measurement is not None
    assert error.result.measurement.value == math.inf
    assert "enable_input_require_grads() before checkpointing" in str(error)
    assert len(error.result.measurement.problems) == 8


def test_a_recomputation_that_is_another_computation() -> None:
    """A layer that computes otherwise while the backward pass runs it again."""
    model = enabled(adapted(), use_reentrant=False)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    inner = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        again = torch._C._current_graph_task_id() != -1
        return inner(x) * (1.01 if again else 1.0)

    layer.forward = forward
    error = failure(assert_checkpointing_equivalent, backward, model)
    assert error.result.measurement is not None
    assert 10 < error.result.measurement.value < math.inf


def test_checkpointing_that_recomputes_nothing_is_no_pass() -> None:
    model = adapted()
    model.gradient_checkpointing = True  # a flag that nobody reads
    with pytest.raises(CannotRun, match="nothing was tried"):
        assert_checkpointing_equivalent(backward, model)


def test_a_model_without_checkpointing() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="has no gradient_checkpointing_enable"):
        assert_checkpointing_equivalent(lambda model: 0.0, model, trainable=["weight"])


def test_no_gradient_in_the_first_place_is_no_verdict() -> None:
    with pytest.raises(CannotRun, match="assert_gradient_coverage"):
        assert_checkpointing_equivalent(lambda model: 0.0, adapted())


# --------------------------------------------------------------------------- accumulation


def micro(rows: list[list[int]], normalise: str = "tokens") -> Any:
    """A step over the rows of one batch, some at a time."""
    batch = texts()

    def step(model: Any) -> float:
        total = int((batch["labels"][:, 1:] != -100).sum())
        for chosen in rows:
            part = {key: value[chosen] for key, value in batch.items()}
            loss = loss_of(model, part)
            tokens = int((part["labels"][:, 1:] != -100).sum())
            share = tokens / total if normalise == "tokens" else 1 / len(rows)
            (loss * share).backward()
        return 0.0

    return step


FAMILIES = {
    "llama": (llama, ["q_proj", "down_proj", "embed_tokens", "lm_head"], 1),
    "gpt2": (gpt2, ["c_attn", "c_proj"], 1),
    "bert": (bert, ["query", "value"], 0),
    "t5": (t5, ["q", "wo"], 0),
}
"""Model, what is adapted, and by how much its loss shifts the labels."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_explains_sound_splits_in_every_family(family: str, dtype: torch.dtype) -> None:
    make, targets, shift = FAMILIES[family]
    model = wrap(make().to(dtype), config(target_modules=targets), autocast_adapter_dtype=False)
    batch = texts(rows=6)
    counted = (batch["labels"][:, shift:] != -100).sum(1)

    def split(*groups: list[int]) -> Any:
        def step(model: Any) -> None:
            for rows in groups:
                part = {key: value[rows] for key, value in batch.items()}
                share = float(counted[rows].sum()) / float(counted.sum())
                (loss_of(model, part) * share).backward()

        return step

    found = assert_accumulation_equivalent(
        split([0, 1, 2, 3, 4, 5]), split([5, 4, 3, 2, 1, 0]), split([5], [0, 3], [1, 2, 4]),
        model=model,
    )  # fmt: skip
    assert found.value < 0.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cuda_device(dtype: torch.dtype) -> None:
    """Where kernels may add in an order of their own."""
    model = tiny(dtype).cuda()

    def on_device(step: Any) -> Any:
        def run(model: Any) -> Any:
            with torch.device("cuda"):
                return step(lambda **batch: model(**{k: v.cuda() for k, v in batch.items()}))

        return run

    assert_accumulation_equivalent(on_device(backward), on_device(micro([[0, 2], [3, 1]])),
                                   model=model)  # fmt: skip
    assert_checkpointing_equivalent(on_device(backward), model)


def tiny(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return wrap(llama().to(dtype), config(lora_dropout=0.2), autocast_adapter_dtype=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_micro_batches_and_order_change_rounding_only(dtype: torch.dtype) -> None:
    found = assert_accumulation_equivalent(
        backward, micro([[0], [1], [2], [3]]), micro([[3, 1], [2, 0]]), model=tiny(dtype)
    )
    assert 0 < found.value < 0.6
    assert found.count == 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_of_means_weighs_tokens_unequally(dtype: torch.dtype) -> None:
    error = failure(
        assert_accumulation_equivalent,
        backward,
        micro([[0], [1], [2], [3]], normalise="micro-batches"),
        model=tiny(dtype),
    )
    assert "divide the summed loss by the number of tokens" in str(error)
    assert error.result.measurement is not None
    assert error.result.measurement.value > (1.5 if dtype == torch.bfloat16 else 1000)


@pytest.mark.parametrize("share", [0.5, 4.0])
def test_one_factor_for_all_gradients_is_named(share: float) -> None:
    def scaled(model: Any) -> None:
        (loss_of(model, texts()) * share).backward()

    error = failure(assert_accumulation_equivalent, backward, scaled, model=adapted())
    assert f"all of them are {share:g} times what they should be" in str(error)
    other = failure(
        assert_accumulation_equivalent, backward, micro([[0], [1], [2]]), model=adapted()
    )
    assert "all of them are" not in str(other)


def test_packed_texts_that_see_each_other() -> None:
    """Positions tell packed texts apart, unless a mask is passed beside them."""
    ids = texts()["input_ids"][:2]
    labels = ids.clone()
    labels[:, 0] = -100
    positions = torch.arange(ids.shape[1]).repeat(2)[None]

    def apart(model: Any) -> None:
        model(input_ids=ids, labels=labels).loss.backward()

    def packed(**options: Any) -> Any:
        def step(model: Any) -> None:
            batch = {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1)}
            model(**batch, position_ids=positions, use_cache=False, **options).loss.backward()

        return step

    model = adapted()
    if measure_accumulation_equivalent(apart, packed(), model=model).value > 1:
        pytest.skip("this transformers does not tell packed texts by their positions")
    mask = torch.ones_like(positions)
    error = failure(assert_accumulation_equivalent, apart, packed(attention_mask=mask), model=model)
    assert "texts packed in a row may not see each other" in str(error)


def test_a_forgotten_micro_batch() -> None:
    error = failure(
        assert_accumulation_equivalent, backward, micro([[0], [1], [2]]), model=adapted()
    )
    assert error.result.measurement is not None
    assert error.result.measurement.value > 1000


def test_the_bound_can_be_moved_and_the_reference_has_to_repeat_itself() -> None:
    rows = [[0], [1], [2], [3]]
    for bound in (1e-9, Bound.at_most(1e-9, "ours")):
        failure(assert_accumulation_equivalent, backward, micro(rows), model=adapted(), bound=bound)

    def random_step(model: Any) -> torch.Tensor:
        loss = loss_of(model, texts()) * torch.rand(())
        loss.backward()
        return loss

    with pytest.raises(CannotRun, match="depends on the random seed"):
        assert_accumulation_equivalent(random_step, backward, model=adapted())
    with pytest.raises(UsageError, match="a second step"):
        assert_accumulation_equivalent(backward, model=adapted())


# --------------------------------------------------------------------------- the noise


def test_noise_goes_both_ways_and_leaves_no_hook() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with gradient_noise(layer, 1) as seen:
        noisy = layer(x)
        noisy.sum().backward()
    assert layer.weight.grad is not None
    exact = torch.ones(4, 8).T @ x
    assert seen.most == 4
    assert 0 < float((noisy - layer(x)).detach().abs().max()) < 1e-4
    assert 0 < float((layer.weight.grad - exact).abs().max()) < 1e-4
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_the_rounding_of_adding_up() -> None:
    """One addition of the whole rounds its one part and itself; more of them round more."""
    u = torch.finfo(torch.bfloat16).eps / 2
    one = accumulation_error([1.0], torch.bfloat16, 1)
    assert one == pytest.approx(u * math.hypot(1, 1 + sum_unit(torch.bfloat16) / u))
    assert accumulation_error([1.0, 1.0], torch.bfloat16, 1) > one
    assert accumulation_error([], torch.float32, 1) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_in_another_order_stay_within_what_the_noise_allows(dtype: torch.dtype) -> None:
    """One layer's weight gradient, summed over rows in blocks and in other orders."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 16, generator=generator).to(dtype)
    layer = torch.nn.Linear(16, 8).to(dtype)

    def gradient(order: torch.Tensor, size: int) -> tuple[torch.Tensor, list[float]]:
        layer.zero_grad()
        norms = []
        for rows in order.split(size):
            layer(x[rows]).square().sum().backward()
            assert layer.weight.grad is not None
            norms.append(float(layer.weight.grad.double().norm()))
        assert layer.weight.grad is not None
        return layer.weight.grad.double().clone(), norms

    whole, norms = gradient(torch.arange(64), 64)
    with gradient_noise(layer, 3) as seen:
        noisy, _ = gradient(torch.arange(64), 64)
    own = accumulation_error(norms, dtype, seen.most)
    for size in (1, 5, 16):
        split, parts = gradient(torch.randperm(64, generator=generator), size)
        bound = math.hypot(float((noisy - whole).norm()), own, accumulation_error(parts, dtype, 1))
        assert float((split - whole).norm()) <= bound
