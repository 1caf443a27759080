"""More faults that no release of PEFT has: of folders, exports and servers, made anew.

As in :mod:`timemachine.toys`, each has a twin that does it right as its control.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pytest_lora as lora
from pytest_lora.loading import quiet
from pytest_lora.records import Measurement
from pytest_lora.subject import Subject
from timemachine.cases import case, llama, lora_config, rewrite, saved, trained
from timemachine.parts import TOKENS, base_at, base_of, configure, fresh, logits, merged, subject_of

__all__: list[str] = []

Weights = dict[str, torch.Tensor]


def _factors(place: Path, name: str = "adapter") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """``A`` and ``B`` of an adapter's file, by the names of the base's weights."""
    from safetensors.torch import load_file

    file = load_file(place / name / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace("lora_A.weight", "weight"): (
            value, file[key.replace("lora_A", "lora_B")],
        )
        for key, value in file.items()
        if "lora_A" in key
    }  # fmt: skip


def _exported(place: Path, delta: Callable[[str, Any, Any], torch.Tensor | None]) -> Weights:
    """The base's weights plus what an exporter makes of each pair of factors."""
    weights = {name: tensor.clone() for name, tensor in base_of(place).state_dict().items()}
    for name, (a, b) in _factors(place).items():
        change = delta(name, a, b)
        if change is not None:
            weights[name] += change
    return weights


# ------------------------------------------------------------------------------ adapter folders


@case("vllm-project/vllm#32045", "adapter_files", "pickle", control="the same as safetensors")
def a_pickle_to_load(place: Path, sound: bool = False) -> Measurement:
    """The weights are a pickle, which a server loads and which may run anything."""
    folder = saved(trained(llama(), lora_config("q_proj")), place)
    if not sound:
        (folder / "adapter_model.safetensors").rename(folder / "unused")
        torch.save({"weight": torch.ones(1)}, folder / "adapter_model.bin")
        (folder / "unused").unlink()
    return lora.assert_adapter_files(folder)


@case("trl#4416", "adapter_files", "no tensors", control="what was gathered")
def a_file_of_forty_bytes(place: Path, sound: bool = False) -> Measurement:
    """Saved without gathering the shards, the file of the adapter holds no tensors."""
    from safetensors.torch import save_file

    folder = saved(trained(llama(), lora_config("q_proj")), place)
    if not sound:
        save_file({}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return lora.assert_adapter_files(folder)


@case("peft#2450", "config_matches_weights", "lm_head", control="the whole head")
def a_saved_module_of_no_size(place: Path, sound: bool = False) -> Measurement:
    """The saved copy of a module was not gathered: its tensor has no elements."""
    folder = saved(trained(llama(), lora_config("q_proj", modules_to_save=["lm_head"])), place)

    def cut(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return key, value if sound or "lm_head" not in key else torch.empty(0)

    rewrite(folder, cut)
    return lora.assert_config_matches_weights(folder)


@case("verl-project/verl#1821", "adapter_files", "lora_alpha: 0", control="the alpha in training")
def an_alpha_nobody_knew(place: Path, sound: bool = False) -> Measurement:
    """The converter does not find alpha and writes 0, with which the adapter does nothing."""
    folder = saved(trained(llama(), lora_config("q_proj")), place)
    if not sound:
        configure(folder, lora_alpha=0)
    return lora.assert_adapter_files(folder)


@case("NVIDIA-NeMo/Automodel#3834", "config_matches_weights", "rank", control="the rank it has")
def a_rank_for_each_expert(place: Path, sound: bool = False) -> Measurement:
    """Experts are trained with a share of the rank that the configuration declares for all."""
    own = {} if sound else {"rank_pattern": {"up_proj": 2}}
    folder = saved(trained(llama(), lora_config("q_proj", "up_proj", **own)), place)
    if not sound:
        configure(folder, rank_pattern={})
    return lora.assert_config_matches_weights(folder)


def _fits(place: Path, base: Path) -> Measurement:
    """The saved adapter against a base."""
    return lora.assert_base_compatibility(lora.read_adapter(place / "adapter"), base)


@case("diffusers#9622", "base_compatibility", "layers.1", control="keys of both layers")
def keys_that_are_missing(place: Path, sound: bool = False) -> Measurement:
    """The file lacks the keys of a layer, which keeps its initial values, of no effect."""
    from safetensors.torch import load_file, save_file

    subject_of(place)
    file = place / "adapter" / "adapter_model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if sound or "layers.1" not in key}
    save_file(kept, file, metadata={"format": "pt"})
    return _fits(place, place / "base")


@case("vllm-project/vllm#34186", "base_compatibility", "no such module", control="its own base")
def trained_on_the_text_model_alone(place: Path, sound: bool = False) -> Measurement:
    """An adapter of the language model meets a base that has it under another name."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    subject_of(place)
    if not sound:
        sight = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                 num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
        config = LlavaConfig(vision_config=sight, text_config=llama().config)
        with quiet():
            LlavaForConditionalGeneration(config).save_pretrained(place / "seeing")
    base = place / ("base" if sound else "seeing")
    return _fits(place, base)


@case("NVIDIA-NeMo/Automodel#3866", "base_compatibility", "no such module", control="as loaded")
def keys_of_an_older_library(place: Path, sound: bool = False) -> Measurement:
    """Keys and targets are of the names that the base had in an older library."""
    subject_of(place)

    def rename(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return key if sound else key.replace("model.layers", "backbone.layers"), value

    rewrite(place / "adapter", rename)
    return _fits(place, place / "base")


@case(
    "huggingface/sentence-transformers#3052",
    "base_compatibility",
    "tokenizer beside",
    control="the base's",
)
def tokens_that_nobody_saved(place: Path, sound: bool = False) -> Measurement:
    """The tokenizer has tokens that were added for training, whose rows are in no file."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    subject_of(place)
    count = 64 if sound else 70
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(place / "adapter")
    return _fits(place, place / "base")


@case("ohdearquant/lattice#136", "base_compatibility", "takes 32 inputs", control="its own base")
def a_base_of_another_size(place: Path, sound: bool = False) -> Measurement:
    """The adapter is loaded onto a base of other dimensions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    subject_of(place)
    other = LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4)  # fmt: skip
    with quiet():
        LlamaForCausalLM(other).save_pretrained(place / "larger")
    base = place / ("base" if sound else "larger")
    return _fits(place, base)


@case("NVIDIA-NeMo/Automodel#1814", "base_compatibility", "ignores them", control="by module")
def experts_in_one_tensor(place: Path, sound: bool = False) -> Measurement:
    """All experts' factors are in one tensor under a name that no other library has a place for."""
    subject_of(place, "up_proj")

    def grouped(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        for factor in ("A", "B"):
            key = key.replace(f"up_proj.lora_{factor}.weight", f"experts.lora_up_{factor}")
        return key, value[None].repeat(3, 1, 1)

    if not sound:
        rewrite(place / "adapter", grouped)
    return _fits(place, place / "base")


@case("modelscope/mcore-bridge#173", "adapter_effect", "layers.1", control="the sum over ranks")
def a_factor_that_one_rank_did_not_train(place: Path, sound: bool = False) -> Measurement:
    """What is saved is the copy of one rank, whose gradients were never added up: one is zero."""
    subject = subject_of(place, "o_proj")

    def untrained(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return key, value * float(sound or "layers.1.self_attn.o_proj.lora_B" not in key)

    rewrite(place / "adapter", untrained)
    adapter = lora.read_adapter(place / "adapter")
    return lora.assert_adapter_effect(Subject(adapter, subject.base, subject.inputs))


@case("NVIDIA-NeMo/RL#3696", "merge_equivalence", "of the adapter", control="in float32",
      remarked=True)  # fmt: skip
def merged_onto_a_coarse_grid(place: Path, sound: bool = False) -> Measurement:
    """The trainer merges into bfloat16 weights to send them, and most of the update is lost."""
    net = llama() if sound else llama().bfloat16()
    return lora.assert_merge_equivalence(subject_of(place, net=net, lora_alpha=0.004))


# ------------------------------------------------------------------------------ exports


@case("PrimeIntellect-ai/prime-rl#1707", "export_parity", "base's own weight", control="merged")
def factors_left_out_of_the_weights(place: Path, sound: bool = False) -> Measurement:
    """What should be merged weights is the state without the adapter's factors."""
    subject = subject_of(place)
    weights = _exported(place, lambda name, a, b: 3 * b @ a if sound else None)
    return lora.assert_export_parity(weights, subject)


@case("vllm-project/vllm#31994", "export_parity", "rank", control="zeros at the end of each")
def zeros_between_the_ranks(place: Path, sound: bool = False) -> Measurement:
    """Filled up to the largest rank, A has zeros after each shard and B at the end."""
    subject = subject_of(place)

    def filled(a: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(2, a.shape[1])
        first, second = a.chunk(2)
        parts = (first, second, nothing, nothing) if sound else (first, nothing, second, nothing)
        return torch.cat(parts)

    def delta(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 3 * torch.cat((b, torch.zeros(len(b), 4)), 1) @ filled(a)

    return lora.assert_export_parity(_exported(place, delta), subject)


@case("ooples/AiDotNet#752", "export_parity", "transpose", control="B A as it is")
def merged_with_its_indices_swapped(place: Path, sound: bool = False) -> Measurement:
    """The merge adds the delta with rows and columns swapped, which fits where both are as many."""
    subject = subject_of(place)
    weights = _exported(place, lambda name, a, b: 3 * (b @ a if sound else (b @ a).T))
    return lora.assert_export_parity(weights, subject)


@case("NVIDIA-NeMo/Automodel#3284", "export_parity", "transpose", control="A as A, B as B")
def factors_in_each_others_place(place: Path, sound: bool = False) -> Measurement:
    """The trainer saves each factor as the other one, which loads where the module is square."""
    subject_of(place)
    model = fresh(place, place / "adapter").merge_and_unload()

    def swap(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        if sound:
            return key, value
        other = {"lora_A": "lora_B", "lora_B": "lora_A"}
        [kind] = [name for name in other if name in key]
        return key.replace(kind, other[kind]), value.T.contiguous()

    rewrite(place / "adapter", swap)
    written = lora.read_adapter(place / "adapter")
    subject = Subject(written, lora_base(place, written), {"input_ids": TOKENS})
    return lora.assert_export_parity(model, subject)


def lora_base(place: Path, adapter: Any) -> Any:
    """The base model, as the suite loads it."""
    from pytest_lora.subject import load_base

    return load_base(place / "base", adapter=adapter, device="cpu")


@case(
    "diffusers#13998",
    "export_parity",
    "ranks in another order",
    control="the output's order in B alone",
)
def an_order_of_rows_given_to_both_factors(place: Path, sound: bool = False) -> Measurement:
    """The converter swaps the halves of both factors: of the outputs in B, of the rank in A."""
    subject = subject_of(place)

    def halves(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(tensor.chunk(2)[::-1])

    def delta(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 3 * halves(halves(b) @ (a if sound else halves(a)))  # the reader swaps back

    return lora.assert_export_parity(_exported(place, delta), subject)


_QKV = [f"self_attn.{part}_proj.weight" for part in "qkv"]


def _interleaved(rows: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Q, K and V of each head, one head after the other."""
    by_head = [part.view(heads, -1, part.shape[-1]) for part in rows]
    return torch.cat(by_head, 1).flatten(0, 1)


def _split(fused: torch.Tensor, heads: int) -> list[torch.Tensor]:
    parts = fused.view(heads, 3, -1, fused.shape[-1]).unbind(1)
    return [part.reshape(-1, fused.shape[-1]) for part in parts]


@case("Lightning-AI/litgpt#891", "export_parity", "deltas", control="deltas interleaved as well")
def deltas_one_after_the_other(place: Path, sound: bool = False) -> Measurement:
    """In the fused weight the heads of Q, K and V take turns, the deltas added to it do not."""
    subject = subject_of(place, "q_proj", "k_proj", "v_proj")
    weights, factors = base_of(place).state_dict(), _factors(place)
    for layer in range(2):
        names = [f"model.layers.{layer}.{part}" for part in _QKV]
        deltas = [3 * factors[name][1] @ factors[name][0] for name in names]
        fused = _interleaved([weights[name] for name in names], 4)
        fused = fused + (_interleaved(deltas, 4) if sound else torch.cat(deltas))
        weights |= dict(zip(names, _split(fused, 4), strict=True))
    return lora.assert_export_parity(weights, subject)


@case("ggml-org/llama.cpp#3364", "export_parity", "rows", control="by the heads there are")
def permuted_by_the_wrong_heads(place: Path, sound: bool = False) -> Measurement:
    """With fewer heads for keys than for queries, the converter orders their rows by neither."""
    subject = subject_of(place, "k_proj", net=llama(num_key_value_heads=2))

    def ordered(tensor: torch.Tensor, heads: int) -> torch.Tensor:
        return tensor.view(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)

    def restored(tensor: torch.Tensor, heads: int) -> torch.Tensor:
        return tensor.view(heads, -1, 2, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)

    weights = _exported(place, lambda name, a, b: 3 * b @ a)
    for name in [name for name in weights if "k_proj" in name]:
        weights[name] = restored(ordered(weights[name], 2 if sound else 1), 2)  # 4 // 2 and no more
    return lora.assert_export_parity(weights, subject)


@case("unslothai/unsloth-zoo#779", "export_parity", "base's own weight", control="by the factors")
def a_layout_guessed_from_sizes(place: Path, sound: bool = False) -> Measurement:
    """Wider than high is taken for transposed; a delta that then does not fit is left out."""
    subject = subject_of(place, "up_proj", "down_proj")
    shapes = {name: tensor.shape for name, tensor in base_of(place).state_dict().items()}

    def delta(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
        whole = 3 * b @ a
        transposed = not sound and shapes[name][1] > shapes[name][0]
        whole = whole.T if transposed else whole
        return whole if whole.shape == shapes[name] else None

    return lora.assert_export_parity(_exported(place, delta), subject)


@case("ml-explore/mlx-lm#1564", "export_parity", "quantised", control="fused and left as numbers")
def fused_and_quantised_again(place: Path, sound: bool = False) -> Measurement:
    """Fused weights are rounded to four bits again, which takes most of the delta."""
    subject = subject_of(place, lora_alpha=1)
    weights = _exported(place, lambda name, a, b: b @ a / 4)
    if not sound:
        for name in _factors(place):
            weights[name] = _four_bits(weights[name])
    return lora.assert_export_parity(weights, subject)


def _four_bits(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to sixteen values for each row."""
    step = weight.abs().amax(1, keepdim=True) / 7
    return (weight / step).round() * step


# ------------------------------------------------------------------------------ servers


@case("ray-project/ray#62609", "serving_parity", "base model's output", control="passed on")
def asked_without_the_adapter(place: Path, sound: bool = False) -> Measurement:
    """The pipeline takes the name of the adapter and does not pass it on to the engine."""
    subject = subject_of(place)
    engine = {None: base_of(place), "default": fresh(place, place / "adapter")}

    def serve(name: str) -> torch.Tensor:
        return logits(engine[name if sound else None])

    return lora.assert_serving_parity(serve, {"default": subject})


@case("vllm-project/vllm#55193", "serving_parity", "without mlp.down_proj", control="told of both")
def a_module_it_was_not_told_of(place: Path, sound: bool = False) -> Measurement:
    """The server was started for some modules only, and leaves the adapter's others out."""
    subject = subject_of(place, "q_proj", "down_proj")
    model = fresh(place, place / "adapter")
    for name, layer in model.named_modules():
        if name.endswith("down_proj") and not sound:
            layer.scaling["default"] = 0.0
    return lora.assert_serving_parity(lambda name: logits(model), subject)


@case("diffusers#14409", "serving_parity", "0.25 times", control="the scale of each")
def the_first_rank_as_everybodys_alpha(place: Path, sound: bool = False) -> Measurement:
    """Where a file has several ranks and no alpha, all get the rank of its first key as theirs."""
    own = {"up_proj": 16}
    subject = subject_of(place, "q_proj", "up_proj", lora_alpha=4, rank_pattern=own,
                         alpha_pattern=own)  # fmt: skip
    model = fresh(place, place / "adapter")
    for name, layer in model.named_modules():
        if name.endswith("up_proj") and not sound:
            layer.scaling["default"] = 4 / 16
    return lora.assert_serving_parity(lambda name: logits(model), subject)


@case("ohdearquant/lattice#261", "serving_parity", "0.333 times", control="alpha from the header")
def alpha_taken_to_be_the_rank(place: Path, sound: bool = False) -> Measurement:
    """The loader does not read the alpha that was saved and takes it to be the rank."""
    subject = subject_of(place)
    model = fresh(place, place / "adapter")
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict) and not sound:
            layer.scaling["default"] = 1.0
    return lora.assert_serving_parity(lambda name: logits(model), subject)


@case("espnet/espnet#5722", "serving_parity", "at 2 times", control="saved as it was in training")
def saved_with_the_delta_in_it(place: Path, sound: bool = False) -> Measurement:
    """All parameters are saved in eval mode, merged, and the adapter is added to them once more."""
    subject = subject_of(place)
    model = fresh(place, place / "adapter")
    whole = {} if sound else base_at_merged(place)
    model.base_model.model.load_state_dict(
        {name.replace("q_proj.", "q_proj.base_layer."): value for name, value in whole.items()},
        strict=False,
    )
    return lora.assert_serving_parity(lambda name: logits(model), subject)


def base_at_merged(place: Path) -> Weights:
    """The weights of the merged model."""
    found: Weights = base_at(merged(place)).state_dict()
    return found


def _two(place: Path) -> tuple[dict[str, Subject], dict[str, Path]]:
    """Two adapters of one base, and their folders."""
    first = subject_of(place)
    with quiet():
        config = lora_config("v_proj", task_type="CAUSAL_LM")
        other = saved(trained(base_of(place), config), place / "b")
    second = Subject(lora.read_adapter(other), first.base, {"input_ids": TOKENS})
    return {"first": first, "second": second}, {"first": place / "adapter", "second": other}


@case("NovaSky-AI/SkyRL#2250", "serving_parity", "at 3 times", control="scaled in a copy")
def scaled_where_it_is_kept(place: Path, sound: bool = False) -> Measurement:
    """Loading multiplies the scaling into the staged factors; loaded again after it had to make
    room for another adapter, it is scaled twice.
    """
    subjects, folders = _two(place)
    staged = {name: _factors(folder.parent, folder.name) for name, folder in folders.items()}

    def load(name: str) -> Any:
        model = base_of(place)
        for key, (a, b) in staged[name].items():
            scaled = 3 * b if sound else b.mul_(3)
            model.get_parameter(key).data += scaled @ a
        return model

    return lora.assert_serving_parity(lambda name: logits(load(name)), subjects)


@case(
    "ggml-org/llama.cpp#28674",
    "serving_parity",
    "no adapter is named",
    control="scale 0 for those not named",
)
def at_work_unless_named(place: Path, sound: bool = False) -> Measurement:
    """A request that names no adapter gets those that are loaded, at a scale of one."""
    subjects, _ = _two(place)
    model = fresh(place, place / "adapter")

    def serve(name: str | None) -> torch.Tensor:
        if name is None and sound:
            return logits(base_of(place))
        return logits(model)

    return lora.assert_serving_parity(serve, {"first": subjects["first"]}, base=True)


@case("lucataco/cog-flux-dev-multi-lora#7", "serving_parity", "asked after",
      control="scales compared as well")  # fmt: skip
def a_scale_that_is_not_compared(place: Path, sound: bool = False) -> Measurement:
    """The scale is set when the list of adapters changes, and not when only the scale does."""
    import shutil

    full = subject_of(place)
    half_folder = Path(shutil.copytree(place / "adapter", place / "half"))
    configure(half_folder, lora_alpha=6)
    half = Subject(lora.read_adapter(half_folder), full.base, {"input_ids": TOKENS})
    folders = {"full": place / "adapter", "half": half_folder}
    loaded: dict[str, Any] = {}

    def serve(name: str) -> torch.Tensor:
        if sound or not loaded:
            loaded["model"] = fresh(place, folders[name])
        return logits(loaded["model"])

    return lora.assert_serving_parity(serve, {"full": full, "half": half})


@case("espnet/espnet#6425", "serving_parity", "no other scaling", control="loaded first")
def decomposed_before_it_was_loaded(place: Path, sound: bool = False) -> Measurement:
    """The adapter's start is taken from a network whose pretrained weights are loaded afterwards,
    over what is left of it.
    """
    from peft import get_peft_model

    pretrained = llama()
    with quiet():
        pretrained.save_pretrained(place / "base")
        torch.manual_seed(9)
        net = base_of(place) if sound else type(pretrained)(pretrained.config)
        config = lora_config("q_proj", init_lora_weights="pissa", task_type="CAUSAL_LM")
        model = get_peft_model(net, config)
    if not sound:
        known = pretrained.state_dict()
        named = {key.replace("q_proj.", "q_proj.base_layer."): t for key, t in known.items()}
        model.base_model.model.load_state_dict(named, strict=False)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * ("lora_" in name) * torch.randn(parameter.shape)
    adapter = lora.read_adapter(saved(model, place / "adapter"))
    subject = Subject(adapter, lora_base(place, adapter), {"input_ids": TOKENS})
    return lora.assert_serving_parity(lambda name: logits(model), subject)


# ------------------------------------------------------------------------------ metrics


@case("alvdansen/signet-trainer#34", "metric_sound", "dropout", control="in eval mode")
def validated_in_training_mode(place: Path, sound: bool = False) -> Measurement:
    """Validation runs in the midst of training, with the dropout of the adapter on."""
    from torch.nn import functional

    def metric(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        kept = batch["attention_mask"].bool()
        kept, ids = kept[:, 1:] & kept[:, :-1], batch["input_ids"]
        model.train(not sound)
        scores = model(**batch).logits[:, :-1].transpose(1, 2)
        return functional.cross_entropy(scores, ids[:, 1:], reduction="none")[kept].mean()

    model = trained(llama(), lora_config("q_proj", lora_dropout=0.5))
    return lora.assert_metric_sound(metric, model, TOKENS)
