"""More faults that no release of PEFT has: of trainers, made anew.

As in :mod:`timemachine.toys`, each has a twin that does it right as its control.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import pytest_lora as lora
from pytest_lora.loading import quiet
from pytest_lora.records import Measurement
from timemachine.cases import case, llama, lora_config, trained
from timemachine.parts import TOKENS, adamw, base_of, fresh, logits, stepper, subject_of, wrapped

__all__: list[str] = []

# ------------------------------------------------------------------------------ what trains


@case(
    "meta-pytorch/torchtune#2250", "trains_only_adapter", "lora_magnitude_vector",
    control="magnitudes that train",
)  # fmt: skip
def magnitudes_that_do_not_train(place: Path, sound: bool = False) -> Measurement:
    """The magnitudes of DoRA do not train, so that it is LoRA and nobody sees a difference."""
    model = wrapped(lora_config("q_proj", use_dora=True))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(sound)
    return lora.assert_trains_only_adapter(stepper(adamw(model)), model)


@case("trl#4081", "trains_only_adapter", "lora_A", control="prepared before it is wrapped")
def prepared_once_more(place: Path, sound: bool = False) -> Measurement:
    """Preparing a model for training in few bits freezes all of it, the adapter it has as well."""
    from peft import prepare_model_for_kbit_training

    model = wrapped(lora_config("q_proj"))
    optimizer = adamw(model)
    if not sound:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    def step(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return lora.assert_trains_only_adapter(step, model)


@case("unslothai/unsloth#2343", "trains_only_adapter", "bias", control="biases as declared")
def biases_that_were_to_train(place: Path, sound: bool = False) -> Measurement:
    """The trainer thaws factors by name and freezes the biases that bias="lora_only" names."""
    model = wrapped(lora_config("q_proj", bias="lora_only"), net=llama(attention_bias=True))
    for name, parameter in model.named_parameters():
        if not sound and "lora_" not in name:
            parameter.requires_grad_(False)
    return lora.assert_trains_only_adapter(stepper(adamw(model)), model)


@case(
    "MakazhanAlpamys/Soup#794", "trains_only_adapter", "vera_lambda", control="the method asked for"
)
def another_method_than_asked_for(place: Path, sound: bool = False) -> Measurement:
    """VeRA is asked for, accepted, and plain LoRA is made."""
    from peft import VeraConfig

    config = VeraConfig(r=4, target_modules=["q_proj"]) if sound else lora_config("q_proj")
    model = wrapped(config)
    asked = ["*.vera_lambda_*"]
    return lora.assert_trains_only_adapter(stepper(adamw(model)), model, trainable=asked)


@case("modelscope/FunASR#3456", "trains_only_adapter", "lora_", control="the setting read")
def a_setting_that_nothing_consumes(place: Path, sound: bool = False) -> Measurement:
    """use_lora is in the configuration and nothing reads it: the whole model trains."""
    model = wrapped(lora_config("q_proj")) if sound else llama()
    asked = ["*.lora_*"]
    return lora.assert_trains_only_adapter(stepper(adamw(model)), model, trainable=asked)


@case(
    "LoganBooker/prodigy-plus-schedule-free#7", "trains_only_adapter", "lora_B",
    control="gradients kept until the step",
)  # fmt: skip
def gradients_gone_before_the_step(place: Path, sound: bool = False) -> Measurement:
    """A fused backward pass frees the gradients, and the optimizer then steps without any."""
    model = wrapped(lora_config("q_proj"))
    optimizer = adamw(model)

    def step(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        if not sound:
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return lora.assert_trains_only_adapter(step, model)


@case("keras-team/keras-hub#2629", "trains_only_adapter", "rounds steps away",
      control="an adapter in float32", remarked=True)  # fmt: skip
def steps_too_small_for_its_format(place: Path, sound: bool = False) -> Measurement:
    """The adapter has the base's bfloat16, in which most of its numbers are too large to be moved
    by a step.
    """
    model = wrapped(lora_config("q_proj"), net=llama().bfloat16())
    model = model if sound else model.bfloat16()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    return lora.assert_trains_only_adapter(stepper(optimizer), model)


class _MergedInEval(torch.nn.Module):
    """A layer that may add its adapter to the weight for evaluation, and never takes it out."""

    def __init__(self, base: Any, *, merges: bool) -> None:
        super().__init__()
        self.base, self.merges, self.merged = base, merges, False
        self.lora_A = torch.nn.Parameter(torch.randn(4, base.in_features) / 8)
        self.lora_B = torch.nn.Parameter(torch.randn(base.out_features, 4) / 8)

    def train(self, mode: bool = True) -> _MergedInEval:
        """To training, or to evaluation."""
        super().train(mode)
        if self.merges and self.merged != (not mode):
            if not mode:
                self.base.weight.data += self.lora_B.data @ self.lora_A.data
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base's, and the adapter's where it is not in there."""
        result: torch.Tensor = self.base(x)
        return result if self.merged else result + x @ self.lora_A.T @ self.lora_B.T


@case(
    "espnet/espnet#6425",
    "trains_only_adapter",
    "base.weight",
    control="no merging",
)
def merged_for_every_evaluation(place: Path, sound: bool = False) -> Measurement:
    """Evaluation merges the adapter, training does not take it out: the base grows each epoch."""
    model = llama().requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.q_proj = _MergedInEval(block.self_attn.q_proj, merges=not sound)
    inner = stepper(adamw(model))

    def step(model: Any) -> torch.Tensor:
        loss = inner(model)
        logits(model)  # which evaluates
        return loss

    return lora.assert_trains_only_adapter(step, model, trainable=["*.lora_*"])


# ------------------------------------------------------------------------------ gradients


@case("unslothai/unsloth#5230", "gradient_coverage", "zero everywhere", control="the plain loss")
def a_fused_loss_without_gradients(place: Path, sound: bool = False) -> Measurement:
    """With only the last answer's labels kept, a fused loss has the right value and no gradient."""
    model = wrapped(lora_config("q_proj", "v_proj"))
    labels = TOKENS.clone()
    labels[:, :-2] = -100

    def step(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model.train()(input_ids=TOKENS, labels=labels).loss
        loss = loss if sound else loss * 0 + loss.detach()
        loss.backward()
        return loss

    return lora.assert_gradient_coverage(step, model)


@case("NVIDIA-NeMo/Megatron-Bridge#5635", "gradient_coverage", "no gradient", control="attached")
def an_output_that_is_detached(place: Path, sound: bool = False) -> Measurement:
    """What an adapter gives is gathered in a way that autograd does not follow."""
    model = wrapped(lora_config("q_proj", "up_proj"))
    for name, module in model.named_modules():
        if name.endswith("up_proj.lora_B.default") and not sound:
            module.register_forward_hook(lambda module, given, out: out.detach())
    return lora.assert_gradient_coverage(stepper(adamw(model)), model)


ROWS = (TOKENS[:1], TOKENS[1:, :5])
"""Texts of unequal length, so that a mean of means is another one."""
TAUGHT = sum(rows.shape[1] - 1 for rows in ROWS)


@case("transformers#37766", "accumulation_equivalent", "lora_", control="a sum over all tokens")
def a_mean_of_means(place: Path, sound: bool = False) -> Measurement:
    """Each micro-batch's loss is a mean over its own tokens, whatever the other ones hold."""
    return _accumulated(lambda count: count / TAUGHT if sound else 1 / len(ROWS))


@case("unslothai/unsloth-zoo#1023", "accumulation_equivalent", "lora_", control="once")
def divided_once_more(place: Path, sound: bool = False) -> Measurement:
    """The loss is divided by the number of all tokens, and by that of micro-batches as well."""
    return _accumulated(lambda count: count / TAUGHT / (1 if sound else len(ROWS)))


def _accumulated(weight: Callable[[int], float]) -> Measurement:
    """One batch against its rows in turn, each loss weighted by its number of tokens."""
    model = trained(llama(), lora_config("q_proj", "up_proj"))

    def whole(model: Any) -> torch.Tensor:
        model.zero_grad()
        losses = [_loss(model, rows) * (rows.shape[1] - 1) for rows in ROWS]
        loss = torch.stack(losses).sum() / TAUGHT
        loss.backward()
        return loss

    def in_turn(model: Any) -> torch.Tensor:
        model.zero_grad()
        losses = []
        for rows in ROWS:
            loss = _loss(model, rows) * weight(rows.shape[1] - 1)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return lora.assert_accumulation_equivalent(whole, in_turn, model=model)


def _loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=rows, labels=rows).loss
    return loss


# ------------------------------------------------------------------------------ seeds


@case("MakazhanAlpamys/Soup#354", "seeded_initialisation", "seed is set after",
      control="the seed first")  # fmt: skip
def a_seed_for_the_trainer_alone(place: Path, sound: bool = False) -> Measurement:
    """The seed reaches the Trainer, which sets it when the adapter has been drawn already."""

    def build(seed: int) -> Any:
        net = llama()
        torch.seed()
        if sound:
            torch.manual_seed(seed)
        model = wrapped(lora_config("q_proj"), net=net)
        torch.manual_seed(seed)
        return model

    return lora.assert_seeded_initialisation(build)


@case(
    "GMISWE/tinker-cloud#38",
    "seeded_initialisation",
    "not from the seed",
    control="the one asked for",
)
def a_seed_that_nothing_reads(place: Path, sound: bool = False) -> Measurement:
    """Whatever seed a client declares, the adapter follows from the server's own."""
    subject_of(place)

    def build(seed: int) -> Any:
        torch.manual_seed(seed if sound else 1234)
        return wrapped(lora_config("q_proj"), net=base_of(place))

    return lora.assert_seeded_initialisation(build)


# ------------------------------------------------------------------------------ references


@case("modelscope/ms-swift#9934", "reference_policy", "fresh", control="loaded into the reference")
def a_reference_that_is_not_loaded(place: Path, sound: bool = False) -> Measurement:
    """The reference adapter's weights are loaded into no model: it is a fresh adapter."""
    subject_of(place)
    model = fresh(place, place / "adapter")
    with quiet():
        if sound:
            model.load_adapter(place / "adapter", "ref")
        else:
            model.add_adapter("ref", lora_config("q_proj"))
    _train_only(model, "default")

    def reference(model: Any) -> torch.Tensor:
        with _as(model, "ref"):
            return logits(model)

    return lora.assert_reference_policy(reference, logits, stepper(adamw(model)), model)


@contextlib.contextmanager
def _as(model: Any, name: str) -> Iterator[None]:
    """The model with another adapter at work."""
    model.base_model.set_adapter(name)
    try:
        yield
    finally:
        _train_only(model, "default")


def _train_only(model: Any, name: str) -> None:
    model.set_adapter(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(f".{name}." in key)


@case("trl#1871", "reference_policy", "base", control="with the adapter disabled")
def a_reference_with_the_adapter_on(place: Path, sound: bool = False) -> Measurement:
    """Answers of the reference are made with the adapter at work."""
    model = trained(llama(), lora_config("q_proj"))

    def reference(model: Any) -> torch.Tensor:
        with model.disable_adapter() if sound else contextlib.nullcontext():
            return logits(model)

    step: Callable[[Any], torch.Tensor] = stepper(adamw(model))
    return lora.assert_reference_policy(reference, logits, step, model, declared="base")
