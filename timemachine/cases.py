"""Faults people met, as tiny models that meet them again, each handed to the check meant for it.

A case is a function that builds what the report describes, with the PEFT at hand, and ends in one
of our assertions.  Its docstring is the fault in one line.  Nothing here knows what the outcome
should be: that depends on the release, and :class:`Case` says on which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pytest_lora as lora
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import quiet
from pytest_lora.records import Measurement
from pytest_lora.subject import Subject, load_base
from timemachine.stacks import NEWEST, Stack

__all__ = [
    "CASES", "Case", "case", "llama", "lora_config", "on_disk", "rewrite", "saved", "trained",
]  # fmt: skip

INPUT = {"x": torch.linspace(-2, 2, 24).sin().view(3, 8)}


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        name: what it is called here.
        thread: where it was reported.
        check: id of the check that has to catch it.
        shows: what the evidence has to say, lest it be caught for another reason.
        affected: a release of PEFT that has the fault.
        fixed: one that has not; None where none is known, or where the fault is the file's.
        control: what is done instead to get rid of a fault that no release is free of.
        remarked: whether the check only remarks on it, for it does not decide the verdict.
        run: carries it out in an empty folder; with True as second argument, the control.
        fault: one line on what went wrong.
    """

    name: str
    thread: str
    check: str
    shows: str
    affected: Stack
    fixed: Stack | None
    control: str
    remarked: bool
    run: Callable[..., Measurement]

    @property
    def fault(self) -> str:
        """The function's docstring on one line."""
        return " ".join((self.run.__doc__ or "").split()).rstrip(".")

    @property
    def takes_processes(self) -> bool:
        """Whether the check starts fresh processes, which takes some ten seconds."""
        return self.check in ("save_reload", "merged_reload", "seeded_initialisation")


CASES: list[Case] = []

_Run = Callable[..., Measurement]


def case(
    thread: str,
    check: str,
    shows: str,
    *,
    affected: str = NEWEST,
    fixed: str | None = None,
    control: str = "",
    remarked: bool = False,
) -> Callable[[_Run], _Run]:
    """Add the decorated function to :data:`CASES`."""

    def add(run: _Run) -> _Run:
        name = run.__name__.replace("_", " ")
        sound = None if fixed is None else Stack.parse(fixed)
        CASES.append(
            Case(name, thread, check, shows, Stack.parse(affected), sound, control, remarked, run)
        )
        return run

    return add


# ------------------------------------------------------------------------------ models


class Mlp(nn.Module):
    """Two layers and no more, so that a case shows only its own fault."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 8) to (n, 4)."""
        result: torch.Tensor = self.head(self.body(x).relu())
        return result


def llama(**changes: Any) -> Any:
    """A Llama of two layers and 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.2, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def lora_config(*targets: str, **options: Any) -> Any:
    """LoRA of rank 4 with alpha 12: a scaling of 3, which shows where it is left out."""
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": list(targets), **options})


def trained(model: nn.Module, config: Any, name: str = "default") -> Any:
    """``model`` with an adapter whose tensors are all off their initial values."""
    from peft import get_peft_model

    with quiet():
        adapted = get_peft_model(model, config, adapter_name=name)
    _train(adapted)
    return adapted.eval()


def _train(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.2 * noise).to(parameter.dtype))


def saved(model: Any, folder: Path, name: str = "default") -> Path:
    """The adapter called ``name``, saved by PEFT; the folder it is in."""
    with quiet():
        model.save_pretrained(folder, selected_adapters=[name], safe_serialization=True)
    return folder if name == "default" else folder / name


def on_disk(base: Any, config: Any, place: Path) -> Subject:
    """A base model and a trained adapter of it, both saved and read again."""
    with quiet():
        base.save_pretrained(place / "base")
    adapter = lora.read_adapter(saved(trained(base, config), place / "adapter"))
    return Subject(adapter, load_base(place / "base", adapter=adapter, device="cpu"))


# ------------------------------------------------------------------------------ merge and unmerge


@case("peft#2018", "merge_equivalence", "lm_head", control="an untied head")
def merge_into_a_tied_head(place: Path, sound: bool = False) -> Measurement:
    """Merging an adapter of the head of a tied model rewrites the input embedding too."""
    model = trained(llama(tie_word_embeddings=not sound), lora_config("lm_head"))
    return lora.assert_merge_equivalence(model, {"input_ids": torch.arange(16).view(2, 8)})


@case("peft#2489", "merge_equivalence", "bias", affected="0.15.2", fixed="0.16.0")
def merge_of_a_lora_bias(place: Path) -> Measurement:
    """Merging adds the adapter's bias without the scaling."""
    model = trained(Mlp(), lora_config("body", lora_bias=True))
    return lora.assert_merge_equivalence(model, INPUT)


@case("peft#1370", "merge_equivalence", "not quantised again", affected="0.7.1", fixed="0.8.2")
def merge_into_four_bits(place: Path) -> Measurement:
    """Merging into a 4-bit weight keeps the constants of the blocks that it replaces."""
    model = trained(_four_bits(), lora_config("0"))
    return lora.assert_merge_equivalence(model, {"input": torch.ones(2, 128).cumsum(-1)})


def _four_bits() -> Any:
    """One linear layer, quantised by bitsandbytes, which does so on a CPU as well."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise NotApplicable("bitsandbytes is not installed") from None
    torch.manual_seed(0)
    held = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    held.load_state_dict(nn.Linear(128, 64, bias=False).state_dict())
    net: Any = nn.Sequential(held).to("cpu").requires_grad_(False).eval()
    net.is_loaded_in_4bit = True  # as transformers says it, for PEFT to take its 4-bit layers
    return net


@case("peft#3216", "unmerge_restoration", "bias", affected="0.19.1", fixed="0.20.0")
def unmerge_of_a_convolution_under_ia3(place: Path) -> Measurement:
    """Unmerging IA3 multiplies the bias of a convolution once more instead of dividing it."""
    from peft import IA3Config

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = trained(net, IA3Config(target_modules=["0"], feedforward_modules=[]))
    return lora.assert_unmerge_restoration(model, {"input": torch.ones(1, 3, 5, 5).cumsum(-1)})


@case(
    "trl#6688",
    "unmerge_restoration",
    "grows with every cycle",
    affected="0.16.0",
    fixed="0.15.2",
    remarked=True,
)
def merge_cycles_in_bfloat16(place: Path) -> Measurement:
    """In bfloat16 the error grows with every merge and unmerge (since PEFT 0.16; the sound release
    is an older one).
    """
    model = trained(Mlp().bfloat16(), lora_config("body"))
    inputs = {"x": INPUT["x"].bfloat16()}
    return lora.assert_unmerge_restoration(model, inputs, cycles=10)


@case("peft#3504", "frozen_weights", "delete while merged", affected="0.20.0", fixed="0.21.0")
def delete_of_a_merged_adapter(place: Path) -> Measurement:
    """Deleting a merged adapter leaves its delta in the base model for good."""
    return lora.assert_frozen_weights(trained(Mlp(), lora_config("body")), INPUT)


@case("NVIDIA-NeMo/RL#3696", "merge_equivalence", "takes", control="in float32", remarked=True)
def a_small_step_merged_in_bfloat16(place: Path, sound: bool = False) -> Measurement:
    """Merged into bfloat16 weights for every rollout, a small update is mostly rounded away."""
    model = trained(llama() if sound else llama().bfloat16(), lora_config("q_proj"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-3)
    return lora.assert_merge_equivalence(model, {"input_ids": torch.arange(16).view(2, 8)})


# ------------------------------------------------------------------------------ switching


@case(
    "peft#736", "disable_equals_base", "inside disable_adapter()", affected="0.4.0", fixed="0.6.0"
)
def disabled_with_a_saved_module(place: Path) -> Measurement:
    """With the adapter disabled the trained copy of a saved module stays in use."""
    return lora.assert_disable_equals_base(_with_saved_head(place))


@case("peft#736", "requires_grad", "original_module", affected="0.5.0", fixed="0.21.0")
def original_of_a_saved_module(place: Path) -> Measurement:
    """The original of a saved module, which disabling goes back to, is trainable."""
    return lora.assert_requires_grad(_with_saved_head(place))


def _with_saved_head(place: Path) -> Subject:
    config = lora_config("q_proj", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return on_disk(llama(), config, place)


@case("peft#2422", "adapter_isolation", "without saved modules", affected="0.14.0", fixed="0.21.0")
def switched_away_and_back(place: Path) -> Measurement:
    """After a visit to an adapter without saved modules, the trained head is no longer used."""
    model = trained(Mlp(), lora_config("body", modules_to_save=["head"]))
    return lora.assert_adapter_isolation(model, INPUT)


@case("peft#3581", "adapter_isolation", "into a merged adapter", affected="0.20.0", fixed="0.21.0")
def hot_swap_into_a_merged_adapter(place: Path) -> Measurement:
    """Hot-swapping into a merged adapter changes nothing, and nobody is told."""
    return lora.assert_adapter_isolation(trained(Mlp(), lora_config("body")), INPUT)


@case("peft#3580", "requires_grad", "onto a frozen one", affected="0.20.0", fixed="0.21.0")
def second_adapter_trainable(place: Path) -> Measurement:
    """Loading a second adapter to train thaws the frozen first one and freezes the second."""
    return lora.assert_requires_grad(trained(Mlp(), lora_config("body")), INPUT)


@case("trl#6700", "requires_grad", "add_adapter", affected="0.20.0", fixed="0.21.0")
def reference_adapter_added(place: Path) -> Measurement:
    """Adding a reference copy of the adapter leaves nothing to train: the optimizer is empty."""
    return lora.assert_requires_grad(trained(Mlp(), lora_config("body")), INPUT)


# ------------------------------------------------------------------------------ saved and loaded


@case("peft#2334", "save_reload", "layernorm_before", affected="0.14.0", fixed="0.15.0")
def saved_modules_with_similar_names(place: Path) -> Measurement:
    """A saved module whose name begins with another's is loaded under the wrong name, or not,
    depending on PYTHONHASHSEED.
    """
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, patch_size=4,
                       num_attention_heads=2, image_size=8, num_labels=4)  # fmt: skip
    norms = ["layernorm", "layernorm_before"]
    subject = on_disk(ViTForImageClassification(config).eval(),
                      lora_config("query", modules_to_save=norms), place)  # fmt: skip
    return lora.assert_save_reload(subject, hash_seeds=range(4))


@case(
    "transformers#45127",
    "merged_reload",
    "merged, saved and loaded again",
    affected="0.14.0",
    fixed="0.20.0",
)
def merged_with_a_head_of_its_own(place: Path) -> Measurement:
    """A head trained apart from the embedding is overwritten when the merged model is loaded,
    because its configuration still says that the two are tied.
    """
    saved_whole = ["lm_head", "embed_tokens"]
    config = lora_config("q_proj", modules_to_save=saved_whole, task_type="CAUSAL_LM")
    return lora.assert_merged_reload(on_disk(llama(tie_word_embeddings=True), config, place))


@case("peft#3282", "config_matches_weights", "foobar", affected="0.19.1", fixed="0.20.0")
def saved_with_a_namesake(place: Path) -> Measurement:
    """Saving the adapter "foo" also writes the tensors of "foobar"."""
    model = trained(Mlp(), lora_config("body"), "foo")
    model.add_adapter("foobar", lora_config("head"))
    return lora.assert_config_matches_weights(saved(model, place, "foo"))


def _wrong_layers(place: Path) -> Subject:
    """T5 counts blocks, and the parts of each block, so that its paths hold two numbers."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                      decoder_start_token_id=0)  # fmt: skip
    chosen = lora_config("q", layers_to_transform=[1], task_type="SEQ_2_SEQ_LM")
    return on_disk(T5ForConditionalGeneration(config).eval(), chosen, place)


@case(
    "peft#3318", "config_matches_weights", "layers_to_transform", affected="0.19.1", fixed="0.20.0"
)
def layers_counted_by_the_last_number(place: Path) -> Measurement:
    """layers_to_transform picks by the last number in a module's path: expert 1 of every layer in
    the report, the cross-attention of every block here.
    """
    return lora.assert_config_matches_weights(_wrong_layers(place).adapter)


@case("peft#3318", "base_compatibility", "leaves out", affected="0.19.1", fixed="0.20.0")
def layers_that_were_meant(place: Path) -> Measurement:
    """The same: modules of the chosen layer that have no tensors."""
    return lora.assert_base_compatibility(_wrong_layers(place).adapter, place / "base")


@case("peft#3582", "config_matches_weights", "q_porj", control="no typo")
def pattern_with_a_typo(place: Path, sound: bool = False) -> Measurement:
    """A mistyped key of alpha_pattern is accepted and has no effect (a warning since 0.21)."""
    key = "q_proj" if sound else "q_porj"
    config = lora_config("q_proj", "v_proj", alpha_pattern={key: 100})
    return lora.assert_config_matches_weights(saved(trained(llama(), config), place))


@case("peft#3693", "config_matches_weights", "dt_proj", control="none but those of the model")
def a_target_that_is_not_there(place: Path, sound: bool = False) -> Measurement:
    """Of several targets one matches no module, which is accepted as long as another one does."""
    config = lora_config("q_proj", *([] if sound else ["dt_proj"]))
    return lora.assert_config_matches_weights(saved(trained(llama(), config), place))


@case("peft#2566", "base_compatibility", "it is another class", control="an adapter of all of it")
def the_text_half_of_a_model(place: Path, sound: bool = False) -> Measurement:
    """Trained on the text model alone, and loaded onto one of text and images: one warning."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = llama()
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                              num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text.config, image_token_index=63)
    both = LlavaForConditionalGeneration(config).eval()
    with quiet():
        both.save_pretrained(place / "base")
    folder = saved(trained(both if sound else text, lora_config("q_proj")), place / "adapter")
    return lora.assert_base_compatibility(lora.read_adapter(folder), place / "base")


@case("peft#515", "adapter_effect", "change nothing", control="trained")
def an_adapter_that_changes_nothing(place: Path, sound: bool = False) -> Measurement:
    """Answers with the adapter and without are the same: what was saved are its initial values."""
    subject = on_disk(llama(), lora_config("q_proj", task_type="CAUSAL_LM"), place)
    if not sound:
        rewrite(place / "adapter", lambda key, t: (key, t * 0 if "lora_B" in key else t))
    return lora.assert_adapter_effect(Subject(lora.read_adapter(place / "adapter"), subject.base))


# ------------------------------------------------------------------------------ broken files


@case(
    "MakazhanAlpamys/Soup#335",
    "config_matches_weights",
    "_orig_mod",
    control="keys as PEFT writes them",
)
def keys_of_a_compiled_model(place: Path, sound: bool = False) -> Measurement:
    """A trainer that saves a compiled model prefixes every key; PEFT then loads none of them."""
    folder = saved(trained(llama(), lora_config("q_proj")), place)
    rewrite(folder, lambda key, value: (key if sound else f"_orig_mod.{key}", value))
    return lora.assert_config_matches_weights(folder)


@case("peft#1505", "finite_weights", "nan", control="finite numbers")
def not_a_number(place: Path, sound: bool = False) -> Measurement:
    """An adapter with NaN in it ruins the base model it is merged into (up to PEFT 0.8 even where
    safe_merge refuses it).
    """
    folder = saved(trained(llama(), lora_config("q_proj")), place)
    rewrite(folder, lambda key, value: (key, value if sound else value.fill_(float("nan"))))
    return lora.assert_finite_weights(folder)


def rewrite(
    folder: Path,
    change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]],
    name: str = "adapter_model.safetensors",
) -> None:
    """Change keys and tensors of a file of weights."""
    from safetensors.torch import load_file, save_file

    file = folder / name
    tensors = dict(change(key, value) for key, value in load_file(file).items())
    save_file(tensors, file, metadata={"format": "pt"})
