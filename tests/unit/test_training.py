"""What training moves, what gets a gradient, what the optimizer holds, whether the loss falls.

Each assertion passes on a sound loop and fails on mutants of it, for the reason it names.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from tiny import llama, wrap
from training_loops import (
    adamw,
    adapted,
    adapted_cnn,
    backward,
    config,
    loss_of,
    texts,
    train_step,
)

from pytest_lora import (
    CheckFailed,
    Outcome,
    UsageError,
    assert_gradient_coverage,
    assert_optimizer_holds,
    assert_overfits_one_batch,
    assert_trains_only_adapter,
)
from pytest_lora.checks.training import sign_test
from pytest_lora.loading import quiet
from pytest_lora.records import collecting

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
B0 = A0.replace("lora_A", "lora_B")


def failure(call: Any, *args: Any, **options: Any) -> CheckFailed:
    with pytest.raises(CheckFailed) as caught:
        call(*args, **options)
    return caught.value


def problems(error: CheckFailed) -> dict[str, str]:
    assert error.result.measurement is not None
    return {problem.where: str(problem) for problem in error.result.measurement.problems}


# --------------------------------------------------------------------------- trains only adapter


def test_a_text_is_one_pattern_and_not_its_letters() -> None:
    """``*`` is among the letters of most patterns, and names everything."""
    model = adapted()
    model.requires_grad_(False)  # so that nothing moves
    found = failure(assert_trains_only_adapter, lambda _: 0.0, model, idle="*.layers.1.*")
    there = problems(found)
    assert A0 in there
    assert "did not move" in str(found)
    assert_gradient_coverage(backward, adapted(), trainable="*.lora_?.*")


@pytest.mark.parametrize("idle", ["*", ["*lora_A*", "*lora_B*"]])
def test_what_leaves_nothing_to_judge_is_refused(idle: Any) -> None:
    for check in (assert_trains_only_adapter, assert_gradient_coverage):
        with pytest.raises(UsageError, match="nothing would be judged"):
            check(backward, adapted(), idle=idle)


def test_no_step_is_no_training() -> None:
    with pytest.raises(UsageError, match="steps=0"):
        assert_trains_only_adapter(backward, adapted(), steps=0)


def test_a_sound_loop_moves_the_adapter_and_nothing_else() -> None:
    model = adapted()
    with collecting() as results:
        found = assert_trains_only_adapter(train_step(adamw(model)), model)
    assert found.count == len(model.state_dict()) + len(list(model.buffers()))
    assert len(found.details["losses"]) == 3  # type: ignore[arg-type]
    assert [result.outcome for result in results] == [Outcome.PASSED]


@pytest.mark.parametrize("changes", [
    {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
    {"lora_bias": True}, {"trainable_token_indices": [5, 9]}, {"target_modules": ["embed_tokens"]},
], ids=str)  # fmt: skip
def test_the_configuration_says_what_trains(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    assert_trains_only_adapter(train_step(adamw(model)), model)
    assert_gradient_coverage(backward, adapted(**changes))


def test_a_base_layer_left_trainable_is_named() -> None:
    model = adapted()
    name = "base_model.model.model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).requires_grad_(True)
    found = problems(failure(assert_trains_only_adapter, train_step(adamw(model)), model))
    assert set(found) == {name}
    assert "freeze the base" in str(found)


def test_a_base_tensor_that_only_weight_decay_moves_is_found() -> None:
    model = adapted()
    norm = model.base_model.model.model.norm.weight
    optimizer = torch.optim.SGD([*(p for p in model.parameters() if p.requires_grad)], lr=0.1)

    def step(model: Any) -> torch.Tensor:
        loss = train_step(optimizer)(model)
        with torch.no_grad():
            norm.mul_(1 - 1e-6)
        return loss

    found = problems(failure(assert_trains_only_adapter, step, model))
    assert list(found) == ["base_model.model.model.norm.weight"]
    assert "weight decay" in str(found)


def test_batch_norm_statistics_that_move_are_found_and_can_be_allowed() -> None:
    model, step = adapted_cnn()
    model.train()
    found = problems(failure(assert_trains_only_adapter, step, model))
    assert {name.rpartition(".")[2] for name in found} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert "BatchNorm2d" in str(found)
    assert_trains_only_adapter(step, model, may_change=["*.norm.*"])
    model.eval()
    assert_trains_only_adapter(step, model)


def test_an_adapter_that_is_frozen_is_found() -> None:
    model = adapted()
    optimizer = adamw(model)
    model.get_parameter(B0).requires_grad_(False)
    found = problems(failure(assert_trains_only_adapter, train_step(optimizer), model))
    assert set(found) == {B0}


def test_an_adapter_frozen_altogether_trains_nothing() -> None:
    model = adapted()
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that there is a loss to minimise
    found = problems(failure(assert_trains_only_adapter, train_step(optimizer), model))
    assert {A0, B0} <= set(found)
    assert "frozen" in found[A0]


def test_an_optimizer_built_before_the_adapter_is_the_cause_named() -> None:
    base = llama()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3, weight_decay=0.0)
    model = wrap(base, config())
    error = failure(assert_trains_only_adapter, train_step(optimizer), model)
    assert "build the optimizer after the adapter is attached" in str(error)


def in_bfloat16(lr: float) -> tuple[Any, torch.optim.Optimizer]:
    model = adapted().bfloat16()
    return model, adamw(model, lr=lr)


def test_steps_that_half_precision_rounds_away_are_remarked() -> None:
    model, optimizer = in_bfloat16(1e-5)
    found = assert_trains_only_adapter(train_step(optimizer), model)
    [note] = found.notes
    assert note.startswith("bfloat16 rounds steps away: of the numbers that had a gradient ")
    assert "lora_A" in note
    assert "keep the adapter in float32" in note


def test_adapters_that_are_taken_apart_meanwhile_are_not_remarked() -> None:
    model, optimizer = in_bfloat16(1e-5)
    step = train_step(optimizer)

    def released(batch: int) -> object:
        loss = step(batch)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.new_empty(0)
        return loss

    found = assert_trains_only_adapter(released, model, steps=1)
    assert not found.notes


def test_steps_that_are_all_rounded_away_are_a_cause() -> None:
    model, optimizer = in_bfloat16(1e-7)
    said = problems(failure(assert_trains_only_adapter, train_step(optimizer), model))
    assert "bfloat16 rounds its steps away" in said[A0]
    exact = adapted()
    silent = failure(assert_trains_only_adapter, train_step(adamw(exact, lr=0.0)), exact)
    assert "rounds" not in str(silent)


def test_steps_that_arrive_are_not_remarked() -> None:
    for model, optimizer in (in_bfloat16(5e-3), ((exact := adapted()), adamw(exact, lr=1e-5))):
        assert not assert_trains_only_adapter(train_step(optimizer), model).notes


def test_numbers_without_a_gradient_may_stay() -> None:
    """Rows of an embedding that the texts do not hold."""
    model = wrap(llama(), config(target_modules=["embed_tokens"])).bfloat16()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=100.0)
    step = train_step(optimizer, texts(rows=1, length=3))
    assert not assert_trains_only_adapter(step, model).notes


def test_the_second_adapter_trained_instead_of_the_first() -> None:
    model = adapted()
    with quiet():
        model.add_adapter("second", config())
        model.set_adapter("second")
    step = train_step(adamw(model))
    with pytest.raises(UsageError, match="default, second"):
        assert_trains_only_adapter(step, model)
    found = problems(failure(assert_trains_only_adapter, step, model, adapter="default"))
    assert "set_adapter('default')" in found[A0.replace(".default.", ".second.")]
    assert A0 in found
    assert_trains_only_adapter(step, model, adapter="second")


def test_the_second_adapter_never_trains_with_the_first_ones_optimizer() -> None:
    model = adapted()
    optimizer = adamw(model)
    with quiet():
        model.add_adapter("second", config())
        model.set_adapter("second")
    found = problems(
        failure(assert_trains_only_adapter, train_step(optimizer), model, adapter="second")
    )
    assert "the optimizer does not hold it" in found[B0.replace("default", "second")]


def test_training_that_diverges_is_not_movement() -> None:
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    step = train_step(torch.optim.SGD(trained, lr=math.inf))
    assert "not finite after training" in str(failure(assert_trains_only_adapter, step, model))


def test_patterns_stand_in_for_a_configuration() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)

    def step(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with pytest.raises(UsageError, match="no PeftModel"):
        assert_trains_only_adapter(step, model)
    with pytest.raises(UsageError, match="expected a model whose parameters are named, not dict"):
        assert_trains_only_adapter(step, {})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'2\.\*' matches no parameter"):
        assert_trains_only_adapter(step, model, trainable=["2.*"])
    assert "trainable" in str(
        failure(assert_trains_only_adapter, step, model, trainable=["1.*"])
    )  # the first layer's flags
    model[0].requires_grad_(False)
    model[0].zero_grad()
    assert_trains_only_adapter(step, model, trainable=["1.*"])


@pytest.mark.parametrize(("arguments", "words"), [
    ((3, None), "a step is a callable"),
    ((backward, None), "needs the model"),
])  # fmt: skip
def test_requests_that_cannot_be_meant(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        assert_trains_only_adapter(*arguments)


def test_an_adapter_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no adapter 'other'; it has default"):
        assert_trains_only_adapter(backward, adapted(), adapter="other")


class Compiled(torch.nn.Module):
    """What torch.compile puts around a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, **batch: torch.Tensor) -> Any:
        return self._orig_mod(**batch)


def test_a_compiled_or_parallel_model_is_judged_by_what_is_inside() -> None:
    model = torch.nn.DataParallel(Compiled(adapted()))
    assert_trains_only_adapter(train_step(adamw(model)), model)


def test_tensors_that_come_and_go_are_named() -> None:
    model = adapted()
    optimizer = adamw(model)

    def step(model: Any) -> torch.Tensor:
        model.base_model.model.model.norm.register_buffer("extra", torch.ones(1))
        return train_step(optimizer)(model)

    found = problems(failure(assert_trains_only_adapter, step, model))
    assert "came or went" in found["base_model.model.model.norm.extra"]


def test_a_method_declares_what_it_trains_itself() -> None:
    """A prompt in front, and a model that a pattern is about although it has an adapter."""
    from peft import PromptTuningConfig

    model = wrap(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    found = assert_trains_only_adapter(train_step(adamw(model)), model)
    assert found.details["trained"] == 1
    only_b = adapted()
    for name, parameter in only_b.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    step = train_step(adamw(only_b))
    assert_trains_only_adapter(step, only_b, trainable=["*.lora_B.*"])
    failure(assert_trains_only_adapter, step, only_b)


# --------------------------------------------------------------------------- gradient coverage


def test_a_fresh_adapter_is_covered_by_theory_and_left_as_it_was() -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = assert_gradient_coverage(train_step(adamw(model)), model)
    assert "4 tensors have a zero gradient only because another factor is zero" in found.notes[0]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def checkpointed_too_late(model: Any) -> Any:
    """Reentrant checkpointing around a block whose input needs no gradient."""
    from torch.utils.checkpoint import checkpoint

    model.gradient_checkpointing = True
    layer = model.base_model.model.model.layers[0]
    inner = layer.forward

    def forward(hidden: torch.Tensor, *args: Any, **named: Any) -> Any:
        def run(hidden: torch.Tensor) -> Any:
            return inner(hidden, *args, **named)

        return checkpoint(run, hidden, use_reentrant=True)

    layer.forward = forward
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_that_starves_the_adapter() -> None:
    model = checkpointed_too_late(adapted())
    found = problems(failure(assert_gradient_coverage, backward, model))
    assert {name.split(".layers.")[1][0] for name in found} == {"0"}
    assert "enable_input_require_grads() before" in found[A0]
    step = train_step(adamw(model))
    assert A0 in problems(failure(assert_trains_only_adapter, step, model))


def test_a_module_that_its_caller_goes_around() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.forward = layer.base_layer.forward
    found = problems(failure(assert_gradient_coverage, backward, model))
    assert {name.split(".layers.")[1].split(".lora")[0] for name in found} == {"1.self_attn.q_proj"}
    assert "goes around" in str(found)
    assert_gradient_coverage(backward, model, idle=["*.layers.1.self_attn.q_proj.*"])


def test_a_gradient_that_is_zero_for_no_good_reason() -> None:
    model = adapted()
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 0.0
    found = problems(failure(assert_gradient_coverage, backward, model))
    assert set(found) == {A0, B0}
    assert "zero everywhere" in found[B0]


def test_a_gradient_that_is_not_finite() -> None:
    def step(model: Any) -> torch.Tensor:
        loss = (loss_of(model, texts()) * 0).log()
        loss.backward()
        return loss

    assert "not finite" in str(failure(assert_gradient_coverage, step, adapted()))


def test_a_gradient_on_a_frozen_tensor() -> None:
    model = adapted()

    def step(model: Any) -> torch.Tensor:
        norm = model.base_model.model.model.norm.weight.requires_grad_(True)
        loss = backward(model)
        norm.requires_grad_(False)
        return loss

    found = problems(failure(assert_gradient_coverage, step, model))
    assert list(found) == ["base_model.model.model.norm.weight"]


def test_gradients_are_seen_although_the_step_clears_them() -> None:
    def step(model: Any) -> torch.Tensor:
        loss = backward(model)
        model.zero_grad()
        return loss

    assert_gradient_coverage(step, adapted())


# --------------------------------------------------------------------------- optimizer


def test_an_optimizer_with_exactly_the_adapter() -> None:
    model = adapted()
    found = assert_optimizer_holds(adamw(model, lr=1e-3), model, lr=1e-3)
    assert found.details["learning_rates"] == [1e-3]


def test_an_optimizer_over_everything() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters())
    found = problems(failure(assert_optimizer_holds, optimizer, model))
    assert "in the optimizer, frozen" in found["base_model.model.lm_head.weight"]


def test_an_optimizer_built_too_early_lacks_the_adapter() -> None:
    base = llama()
    optimizer = torch.optim.AdamW(base.lm_head.parameters())
    model = wrap(base, config())
    found = problems(failure(assert_optimizer_holds, optimizer, model))
    assert "built before the adapter" in found[A0]


def test_an_optimizer_of_another_model_holds_strangers() -> None:
    found = failure(assert_optimizer_holds, adamw(adapted()), adapted())
    assert "not part of the model" in str(found)


def test_an_empty_optimizer() -> None:
    model = adapted()
    optimizer = adamw(model)
    optimizer.param_groups.clear()
    assert "holds nothing" in str(failure(assert_optimizer_holds, optimizer, model))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_tensor_held_twice() -> None:
    model = adapted()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*own, own[0]], lr=0.1)
    assert "2 times" in problems(failure(assert_optimizer_holds, optimizer, model))[A0]


def test_two_parameters_of_one_memory() -> None:
    model = adapted()
    own = [p for p in model.parameters() if p.requires_grad]
    own[4].data = own[0].data
    error = failure(assert_optimizer_holds, adamw(model), model)
    assert "shares its memory" in str(error)


def plus(model: Any, a: float, b: float) -> torch.optim.Optimizer:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return torch.optim.AdamW([
        {"params": [p for n, p in named if "lora_A" in n], "lr": a},
        {"params": [p for n, p in named if "lora_B" in n], "lr": b},
    ])  # fmt: skip


def test_learning_rates_by_pattern_and_by_ratio() -> None:
    model = adapted()
    optimizer = plus(model, 1e-4, 1.6e-3)
    declared = {"*.lora_A.*": 1e-4, "*.lora_B.*": 1.6e-3}
    assert_optimizer_holds(optimizer, model, lr=declared, loraplus_lr_ratio=16)
    swapped = plus(model, 1.6e-3, 1e-4)
    assert "wrong group" in str(failure(assert_optimizer_holds, swapped, model, lr=declared))
    error = failure(assert_optimizer_holds, swapped, model, loraplus_lr_ratio=16)
    assert "0.0625 times the learning rate of its lora_A" in str(error)
    with pytest.raises(UsageError, match="matches no trainable tensor"):
        assert_optimizer_holds(optimizer, model, lr={"*.lora_C.*": 1.0})


def test_a_ratio_is_not_asked_of_a_pair_whose_rates_are_declared() -> None:
    """LoRA+ gives the factors of an embedding one rate of their own."""
    model = adapted()
    equal = plus(model, 1e-4, 1e-4)
    assert_optimizer_holds(equal, model, lr={"*": 1e-4}, loraplus_lr_ratio=16)
    for lr in (None, 1e-4, {"*.lora_A.*": 1e-4}):
        error = failure(assert_optimizer_holds, equal, model, lr=lr, loraplus_lr_ratio=16)
        assert "1 times the learning rate of its lora_A" in str(error)
    wrong = failure(assert_optimizer_holds, equal, model, lr={"*": 1e-3}, loraplus_lr_ratio=16)
    assert "wrong group" in str(wrong)


def test_a_scheduler_that_has_begun_does_not_hide_the_declared_rate() -> None:
    model = adapted()
    optimizer = adamw(model, lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert_optimizer_holds(optimizer, model, lr=1e-3)


def test_the_declared_weight_decay_is_in_the_groups() -> None:
    model = adapted(bias="lora_only", modules_to_save=["lm_head"])
    trained = [p for p in model.parameters() if p.requires_grad]
    sound = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    assert_optimizer_holds(sound, model, weight_decay=0.1)
    lost = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    assert_optimizer_holds(lost, model)  # nothing is declared
    found = problems(failure(assert_optimizer_holds, lost, model, lr=1e-3, weight_decay=0.1))
    assert len(found) == len(trained)
    assert "a weight decay of 0 (expected 0.1)" in found[B0]
    with pytest.raises(UsageError, match=r"weight_decay: '\*\.lora_C\.\*' matches no trainable"):
        assert_optimizer_holds(sound, model, weight_decay={"*.lora_C.*": 0.1})


def test_weight_decay_by_pattern_and_of_groups_that_have_none() -> None:
    model = adapted()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if ("lora_A" in n) is first], "weight_decay": decay}
        for first, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    declared = {"*.lora_A.*": 0.1, "*": 0.0}
    found = assert_optimizer_holds(optimizer, model, weight_decay=declared)
    assert found.details["weight_decays"] == [0.0, 0.1]
    assert set(problems(failure(assert_optimizer_holds, optimizer, model, weight_decay=0.1))) == {
        name for name, _ in named if "lora_B" in name
    }
    plain = SimpleNamespace(param_groups=[{"params": [p for _, p in named], "lr": 1e-3}])
    assert_optimizer_holds(plain, model, weight_decay=0.0)
    assert "expected 0.1" in str(failure(assert_optimizer_holds, plain, model, weight_decay=0.1))


def test_what_is_no_optimizer() -> None:
    with pytest.raises(UsageError, match="no param_groups"):
        assert_optimizer_holds(object(), adapted())
    with pytest.raises(UsageError, match="needs the model"):
        assert_optimizer_holds(object())


# --------------------------------------------------------------------------- overfitting


def test_one_batch_is_learnt() -> None:
    model = adapted()
    found = assert_overfits_one_batch(train_step(adamw(model)), model)
    assert found.value == 2.0**-10
    assert found.details["falls"] == 10


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_frozen_adapter_learns_nothing(dropout: float) -> None:
    torch.manual_seed(3)
    model = adapted(lora_dropout=dropout)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    optimizer = adamw(model, lr=0.0)
    error = failure(assert_overfits_one_batch, train_step(optimizer), model)
    assert error.result.measurement is not None
    assert error.result.measurement.value > 0.05


def test_a_step_uphill_fails() -> None:
    model = adapted()
    step = train_step(adamw(model), sign=-1)
    error = failure(assert_overfits_one_batch, step, model)
    assert error.result.measurement is not None
    assert error.result.measurement.value > 0.9


def test_a_loss_that_is_not_finite_fails() -> None:
    error = failure(assert_overfits_one_batch, lambda model: float("inf"), adapted())
    assert error.result.measurement is not None
    assert error.result.measurement.value == math.inf


@pytest.mark.parametrize(("options", "words"), [
    ({"steps": 8}, "cannot show anything"),
    ({"steps": 21, "chance": 0.01}, "even number"),
    ({"chance": 0.0}, "cannot show"),
])  # fmt: skip
def test_too_few_steps_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        assert_overfits_one_batch(lambda model: 1.0, adapted(), **options)


def test_a_step_has_to_return_its_loss() -> None:
    with pytest.raises(UsageError, match="returns no loss"):
        assert_overfits_one_batch(lambda model: None, adapted())


def test_the_sign_test_counts_coins() -> None:
    assert sign_test(0, 4) == 1.0
    assert sign_test(4, 4) == 1 / 16
    assert sign_test(3, 4) == 5 / 16


def test_a_step_that_does_nothing_passes_as_rarely_as_stated() -> None:
    """Exchangeable losses: the share of passes stays within the stated probability."""
    generator = torch.Generator().manual_seed(1)
    passes, runs = 0, 400
    for _ in range(runs):
        losses = iter(torch.rand(8, generator=generator).tolist())
        try:
            assert_overfits_one_batch(
                lambda model, losses=losses: next(losses), torch.nn.Identity(), steps=8, chance=0.07
            )
        except CheckFailed:
            continue
        passes += 1
    # Four of four falls: 1/16.  Binomial, four standard deviations above.
    assert passes <= runs / 16 + 4 * math.sqrt(runs / 16 * 15 / 16)
