"""Faults that no release of PEFT has: of trainers, servers, exports and metrics, made anew.

Each is the report's fault on a tiny model, with a twin that does it right as its control.
"""

from __future__ import annotations

import contextlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import pytest_lora as lora
from pytest_lora.loading import quiet
from pytest_lora.records import Measurement
from pytest_lora.subject import Subject, load_base
from timemachine.cases import case, llama, lora_config, rewrite, saved, trained
from timemachine.parts import (
    TOKENS,
    adamw,
    base_at,
    base_of,
    configure,
    fresh,
    logits,
    merged,
    stepper,
    subject_of,
    wrapped,
)

__all__ = ["TOKENS"]

# ------------------------------------------------------------------------------ adapter folders


@case("peft#2038", "adapter_files", "use_newvariant", control="the key as PEFT writes it")
def a_setting_nobody_reads(place: Path, sound: bool = False) -> Measurement:
    """A setting that this release does not know is dropped while loading."""
    folder = saved(trained(llama(), lora_config("q_proj")), place)
    if not sound:
        configure(folder, use_newvariant=True)
    return lora.assert_adapter_files(folder)


@case("peft#1337", "adapter_files", "enable_lora", control="a configuration of today")
def a_setting_of_long_ago(place: Path, sound: bool = False) -> Measurement:
    """An adapter of an early PEFT says which parts of a fused projection it adapts."""
    folder = saved(trained(llama(), lora_config("q_proj")), place)
    if not sound:
        configure(folder, enable_lora=[True, False, True])
    return lora.assert_adapter_files(folder)


@case("peft#1337", "config_matches_weights", "A has rank 8 and B has rank 4", control="one pair")
def factors_of_long_ago(place: Path, sound: bool = False) -> Measurement:
    """The same: two pairs of factors in one, B as the kernel of a convolution."""
    folder = saved(trained(llama(), lora_config("q_proj")), place)

    def fuse(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return key, torch.cat([value, value]) if "lora_A" in key else value[:, :, None]

    if not sound:
        rewrite(folder, fuse)
    return lora.assert_config_matches_weights(folder)


@case("accelerate#4206", "adapter_effect", "output rows of lora_B", control="all rows")
def one_shard_of_two(place: Path, sound: bool = False) -> Measurement:
    """A sharded save keeps one rank's rows; the others are at their initial value, zero."""
    subject = subject_of(place)

    def cut(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        if "lora_B" in key and not sound:
            value[len(value) // 2 :] = 0
        return key, value

    rewrite(place / "adapter", cut)
    adapter = lora.read_adapter(place / "adapter")
    return lora.assert_adapter_effect(Subject(adapter, subject.base))


@case("peft#3085", "adapter_files", "auto_mapping", control="a library of the allow-list")
def a_module_to_import(place: Path, sound: bool = False) -> Measurement:
    """The configuration names a module that loading would import, and so run."""
    folder = saved(trained(llama(), lora_config("q_proj")), place)
    library = "transformers.models.llama.modeling_llama" if sound else "marker"
    configure(
        folder, auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": library}
    )
    return lora.assert_adapter_files(folder)


@case("NVIDIA-NeMo/Automodel#1755", "base_compatibility", "no such module", control="its own keys")
def experts_under_other_names(place: Path, sound: bool = False) -> Measurement:
    """The file has tensors of each expert, the base model one fused parameter: none is loaded."""
    subject_of(place, "up_proj")

    def rename(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return (key if sound else key.replace("mlp.", "mlp.experts.0.")), value

    rewrite(place / "adapter", rename)
    return lora.assert_base_compatibility(lora.read_adapter(place / "adapter"), place / "base")


# ------------------------------------------------------------------------------ training


@case(
    "transformers#26221", "gradient_coverage", "no gradient",
    affected="0.21.2/4.57.6", fixed="0.21.2",
)  # fmt: skip
def checkpointed_from_the_first_block(place: Path) -> Measurement:
    """Checkpointed blocks whose inputs need no gradient give none to the adapter in them."""
    model = wrapped(lora_config("q_proj", "v_proj", modules_to_save=["lm_head"]))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return lora.assert_gradient_coverage(stepper(adamw(model)), model)


@case(
    "unslothai/unsloth#9331", "trains_only_adapter", "embed_tokens", control="all that were asked"
)
def targets_dropped_on_the_way(place: Path, sound: bool = False) -> Measurement:
    """Embedding and head are taken off the list of targets before the adapter is made."""
    asked = ["q_proj", "embed_tokens", "lm_head"]
    model = wrapped(lora_config(*(asked if sound else asked[:1])))
    declared = [f"*.{target}.lora_*" for target in asked]
    return lora.assert_trains_only_adapter(stepper(adamw(model)), model, trainable=declared)


@case("trl#1340", "reference_policy", "not fresh", control="a frozen copy as reference")
def reference_without_the_adapter(place: Path, sound: bool = False) -> Measurement:
    """The reference is the disabled adapter, but the policy starts from a trained one."""
    model = trained(llama(), lora_config("q_proj"))
    start = logits(model).clone()

    def reference(model: Any) -> torch.Tensor:
        with contextlib.nullcontext() if sound else model.disable_adapter():
            return start if sound else logits(model)

    return lora.assert_reference_policy(reference, logits, stepper(adamw(model)), model)


@case("peft#1303", "optimizer_holds", "second", control="the optimizer of the second")
def optimizer_of_the_first_adapter(place: Path, sound: bool = False) -> Measurement:
    """The optimizer was made while the first adapter was active, so the second never trains."""
    model = wrapped(lora_config("q_proj"), "first")
    model.add_adapter("second", lora_config("q_proj"))
    early = adamw(model)
    model.set_adapter("second")
    optimizer = adamw(model) if sound else early
    return lora.assert_optimizer_holds(optimizer, model, adapter="second")


@case("huggingface/lerobot#3459", "resume_equivalent", "load", control="the adapter as loaded")
def wrapped_again_on_resume(place: Path, sound: bool = False) -> Measurement:
    """Resuming loads the adapter, then wraps the model with a new one."""
    from peft import PeftModel, get_peft_model

    def begun(model: Any) -> tuple[Any, Any]:
        return model, adamw(model)

    def save(run: Any, folder: Path) -> None:
        with quiet():
            run[0].save_pretrained(folder)
        torch.save(run[1].state_dict(), folder / "optimizer.pt")

    def resume(folder: Path) -> Any:
        with quiet():
            model: Any = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
            if not sound:
                model = get_peft_model(model.unload(), lora_config("q_proj"))
        model, optimizer = begun(model)
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return model, optimizer

    return lora.assert_resume_equivalent(
        lambda: begun(wrapped(lora_config("q_proj"))),
        lambda run: stepper(run[1])(run[0]), save, resume,
    )  # fmt: skip


@case("peft#2448", "trains_only_adapter", "not finite", control="a rate it can take")
def weights_that_differ_from_everything(place: Path, sound: bool = False) -> Measurement:
    """Training diverges, and a test that weights have changed passes: NaN is never equal."""
    model = wrapped(lora_config("q_proj"))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return lora.assert_trains_only_adapter(
        stepper(torch.optim.SGD(trainable, lr=0.1 if sound else 1e30)), model
    )


@case("peft#738", "memory_left", "bytes of tensors left", control="each one deleted")
def adapters_that_stay(place: Path, sound: bool = False) -> Measurement:
    """Adapters are loaded one after the other to be evaluated, and all of them stay."""
    from itertools import count

    subject_of(place)
    model, numbers = fresh(place, place / "adapter"), count()

    def evaluate() -> None:
        name = f"adapter{next(numbers)}"
        model.load_adapter(place / "adapter", name)
        model.set_adapter(name)
        logits(model)
        if sound:
            model.set_adapter("default")
            model.delete_adapter(name)

    return lora.assert_no_memory_left(evaluate)


@case(
    "AgileRL/AgileRL#623",
    "memory_unchanged",
    "adapter: 5,120 bytes",
    control="adapter weights as before",
)
def adapter_weights_in_float32(place: Path, sound: bool = False) -> Measurement:
    """An upgrade makes the adapter float32, so every layer keeps a copy of its input in float32."""
    from pytest_lora.memory.predict import predict_memory
    from pytest_lora.memory_assertions import assert_memory_unchanged

    def predicted(dtype: str) -> Any:
        config = lora_config("q_proj", "up_proj", task_type="CAUSAL_LM")
        return predict_memory(llama().config, config, batch=2, sequence=16, adapter_dtype=dtype)

    file = place / "memory.json"
    assert_memory_unchanged(predicted("bfloat16"), file, "step", update=True)
    return assert_memory_unchanged(predicted("bfloat16" if sound else "float32"), file, "step")


# ------------------------------------------------------------------------------ exports and servers


@case("trl#386", "serving_parity", "base model's output", control="the merged weights")
def merged_without_the_delta(place: Path, sound: bool = False) -> Measurement:
    """The merge script takes the adapter off without adding it, and saves the base model."""
    subject, folder = subject_of(place), merged(place)
    if not sound:
        shutil.copy(place / "base" / "model.safetensors", folder)
    served = logits(base_at(folder))
    return lora.assert_serving_parity(lambda name: served, subject)


@case("hiyouga/LLaMA-Factory#9051", "serving_parity", "layer 1", control="every shard written")
def a_shard_of_the_base(place: Path, sound: bool = False) -> Measurement:
    """The export keeps a shard that the base model has under the same name and size."""
    subject, folder = subject_of(place, "q_proj", "up_proj"), merged(place)
    kept = "none" if sound else "layers.1."

    def shard(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return key, base_of(place).state_dict()[key] if kept in key else value

    rewrite(folder, shard, "model.safetensors")
    served = logits(base_at(folder))
    return lora.assert_serving_parity(lambda name: served, subject)


@case("peft#1932", "serving_parity", "another revision of the base", control="the same base")
def on_another_revision_of_the_base(place: Path, sound: bool = False) -> Measurement:
    """The base is not quite the one it was trained on; what it answered then was kept."""
    subject = subject_of(place)
    kept = logits(fresh(place, place / "adapter"))
    if not sound:
        rewrite(place / "base", lambda key, value: (key, 1.001 * value), "model.safetensors")
    base = load_base(place / "base", adapter=subject.adapter, device="cpu")
    now = Subject(subject.adapter, base, {"input_ids": TOKENS})
    return lora.assert_serving_parity(lambda name: kept, now)


@case("vllm-project/vllm#6909", "serving_parity", "at 0.5 times", control="alpha / sqrt(r)")
def served_at_the_wrong_scale(place: Path, sound: bool = False) -> Measurement:
    """The server takes alpha / r as the scaling of an adapter trained with alpha / sqrt(r)."""
    subject = subject_of(place, use_rslora=True)
    model = fresh(place, place / "adapter")
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict) and not sound:
            layer.scaling["default"] = 12 / 4
    return lora.assert_serving_parity(lambda name: logits(model), subject)


@case("vllm-project/vllm#48974", "serving_parity", "adapter", control="through the wrapper")
def one_projection_gone_around(place: Path, sound: bool = False) -> Measurement:
    """The server calls the inner layer of one projection, past the adapter on it."""
    subject = subject_of(place, "q_proj", "v_proj")
    model = fresh(place, place / "adapter")
    for name, layer in model.named_modules():
        if name.endswith("v_proj") and not sound:
            layer.forward = layer.base_layer.forward
    return lora.assert_serving_parity(lambda name: logits(model), subject)


@case("vllm-project/vllm#30931", "serving_parity", "asked after", control="a cache by content")
def a_cache_by_name(place: Path, sound: bool = False) -> Measurement:
    """The prefix cache is keyed by a name that several adapters share."""
    subject = subject_of(place)
    with quiet():
        other = saved(
            trained(base_of(place), lora_config("v_proj", task_type="CAUSAL_LM")), place / "b"
        )
    second = Subject(lora.read_adapter(other), subject.base, {"input_ids": TOKENS})
    folders = {"first": place / "adapter", "second": other}
    cache: dict[str, torch.Tensor] = {}

    def serve(name: str) -> torch.Tensor:
        key = name if sound else "lora"
        if key not in cache:
            cache[key] = logits(fresh(place, folders[name]))
        return cache[key]

    return lora.assert_serving_parity(serve, {"first": subject, "second": second})


@case(
    "huggingface/sentence-transformers#3865", "serving_parity", "base model's output",
    control="keys without PEFT's prefix",
)  # fmt: skip
def attached_but_not_loaded(place: Path, sound: bool = False) -> Measurement:
    """The loader attaches the layers and drops the weights: their keys still have PEFT's prefix."""
    from safetensors.torch import load_file

    subject = subject_of(place)
    model = base_of(place)
    from peft import LoraConfig, inject_adapter_in_model

    with quiet():
        inject_adapter_in_model(LoraConfig.from_pretrained(place / "adapter"), model)
    weights = load_file(place / "adapter" / "adapter_model.safetensors")
    for key, value in weights.items():
        name = key.removeprefix("base_model.model.") if sound else key
        where = name.replace(".weight", ".default.weight")
        model.load_state_dict({where: value}, strict=False)
    return lora.assert_serving_parity(lambda name: logits(model), subject)


@case(
    "transformers#36473", "serving_parity", "base model's output",
    affected="0.14.0/4.49.0", fixed="0.14.0/4.50.3",
)  # fmt: skip
def a_pipeline_on_an_adapter(place: Path) -> Measurement:
    """pipeline() on an adapter's folder runs the base model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, pipeline

    subject = subject_of(place)
    configure(place / "adapter", base_model_name_or_path=str(place / "base"))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with quiet():
        tokenizer.save_pretrained(place / "adapter")
        made = pipeline("text-generation", model=str(place / "adapter"), tokenizer=tokenizer,
                        device="cpu")  # fmt: skip
    return lora.assert_serving_parity(lambda name: logits(made.model), subject)


# ------------------------------------------------------------------------------ metrics


def _loss(model: Any, batch: dict[str, torch.Tensor], *, shift: int = 1) -> torch.Tensor:
    """Nats per token, as one writes it down; without a shift each token predicts itself."""
    kept, ids = batch["attention_mask"].bool(), batch["input_ids"]
    logits = model(**batch).logits[:, : ids.shape[1] - shift].transpose(1, 2)
    told = functional.cross_entropy(logits, ids[:, shift:], reduction="none")
    return told[kept[:, shift:] & kept[:, : ids.shape[1] - shift]].mean()


@case("peft#3419", "metric_sound", "not shifted", control="labels one further")
def labels_that_are_not_shifted(place: Path, sound: bool = False) -> Measurement:
    """The forgetting metric compares each logit with the token it was given, not with the next."""
    model = trained(llama(), lora_config("q_proj"))
    shift = 1 if sound else 0
    return lora.assert_metric_sound(partial(_loss, shift=shift), model, TOKENS)


@case("peft#3419", "metric_sound", "that of the adapted model", control="the adapter disabled")
def a_baseline_with_the_adapter_on(place: Path, sound: bool = False) -> Measurement:
    """What the base model knew is measured with the adapter on, which is no identity."""
    model = trained(llama(), lora_config("q_proj"))

    def before(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with model.disable_adapter() if sound else contextlib.nullcontext():
            return _loss(model, batch)

    return lora.assert_metric_sound(before, model, TOKENS, declared="base")


@case("oumi-ai/oumi#389", "metric_sound", "that of the base model",
      control="the adapter on")  # fmt: skip
def evaluated_without_the_adapter(place: Path, sound: bool = False) -> Measurement:
    """The harness evaluates the model it was given, and the adapter is not at work there."""
    model = trained(llama(), lora_config("q_proj"))

    def metric(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with contextlib.nullcontext() if sound else model.disable_adapter():
            return _loss(model, batch)

    return lora.assert_metric_sound(metric, model, TOKENS)


@case("peft#2986", "metric_sound", "mask is of the other side", control="the mask as it is")
def scored_on_padding(place: Path, sound: bool = False) -> Measurement:
    """The forgetting metric masks as if padding were on the other side."""

    def metric(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        kept = batch["attention_mask"].bool()
        kept = kept if sound else kept.flip(1)
        kept, ids = kept[:, 1:] & kept[:, :-1], batch["input_ids"]
        logits = model(**batch).logits[:, :-1].transpose(1, 2)
        return functional.cross_entropy(logits, ids[:, 1:], reduction="none")[kept].mean()

    return lora.assert_metric_sound(metric, trained(llama(), lora_config("q_proj")), TOKENS)
