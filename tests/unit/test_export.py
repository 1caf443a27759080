"""Exported weights: sound merges pass, and each fault is told from the numbers alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))
pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
import transformers
from safetensors.torch import load_file

import pytest_lora as lora
from pytest_lora.errors import CheckFailed, NotApplicable, UsageError
from pytest_lora.loading import quiet
from pytest_lora.subject import Subject
from timemachine.cases import Mlp, llama, lora_config, on_disk, trained

Weights = dict[str, torch.Tensor]


def _subject(place: Path, *targets: str, base: Any = None, **options: Any) -> Subject:
    config = lora_config(*targets, **{"task_type": "CAUSAL_LM", **options})
    return on_disk(llama() if base is None else base, config, place)


def _merged(subject: Subject, *, dtype: torch.dtype | None = None, safe: bool = False) -> Any:
    """The merged model as PEFT makes it of a base of its own."""
    from peft import PeftModel

    place = subject.adapter.path.parent / "base"
    with quiet():
        base = type(subject.base.module).from_pretrained(place)  # type: ignore[attr-defined]
        base = base if dtype is None else base.to(dtype)
        model = PeftModel.from_pretrained(base, subject.adapter.path)
        return model.merge_and_unload(safe_merge=safe)


def _weights(model: Any) -> Weights:
    named = model.named_parameters(remove_duplicate=False)
    return {name: tensor.detach().clone() for name, tensor in named}


def _gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


# ------------------------------------------------------------------------------ sound exports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe", [False, True])
def test_what_peft_merges_passes(tmp_path: Path, dtype: torch.dtype, safe: bool) -> None:
    subject = _subject(tmp_path, "q_proj", "up_proj", base=llama().to(dtype))
    assert lora.assert_export_parity(_merged(subject, safe=safe), subject).value <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_export_in_a_coarser_format_passes(tmp_path: Path, dtype: torch.dtype) -> None:
    subject = _subject(tmp_path, "q_proj", "up_proj")
    assert lora.assert_export_parity(_merged(subject, dtype=dtype), subject).value <= 1
    assert lora.assert_export_parity(_merged(subject).to(dtype), subject).value <= 1


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["q_proj"], {"use_dora": True}),
        (["q_proj", "embed_tokens"], {}),
        (["q_proj"], {"use_rslora": True}),
        (["q_proj"], {"modules_to_save": ["lm_head"]}),
        (["q_proj"], {"trainable_token_indices": [4, 5, 20]}),
        (["q_proj", "v_proj"], {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}}),
    ],
)
def test_every_part_of_an_adapter(tmp_path: Path, targets: list[str], options: Any) -> None:
    subject = _subject(tmp_path, *targets, **options)
    assert lora.assert_export_parity(_merged(subject), subject).value <= 1
    assert not subject.base.verify()


def test_biases(tmp_path: Path) -> None:
    base = llama(attention_bias=True)
    subject = _subject(tmp_path, "q_proj", base=base, bias="lora_only", lora_bias=True)
    good = _merged(subject)
    assert lora.assert_export_parity(good, subject).value <= 1
    weights = _weights(good) | {
        name: tensor for name, tensor in _weights(llama(attention_bias=True)).items()
        if name.endswith("q_proj.bias")
    }  # fmt: skip
    said = _said(weights, subject)
    assert "q_proj.bias (2)" in said


def test_transposed_layers_and_tied_heads(tmp_path: Path) -> None:
    subject = _subject(tmp_path, "c_attn", "wte", base=_gpt2(), fan_in_fan_out=True)
    merged = _merged(subject)
    found = lora.measure_export_parity(merged, subject)
    # Merging into the tied embedding changes the head as well, which the adapter does not.
    assert found.where is not None
    assert found.where.startswith("lm_head.weight: ")
    assert len(found.details["problems"]) == 1  # type: ignore[arg-type]
    untied = _subject(tmp_path / "c", "c_attn", base=_gpt2(), fan_in_fan_out=True)
    weights = _weights(_merged(untied))
    del weights["lm_head.weight"]
    assert lora.assert_export_parity(weights, untied).value <= 1


def test_a_folder_is_loaded_as_its_user_would(tmp_path: Path) -> None:
    subject = _subject(tmp_path, "q_proj", "lm_head")
    with quiet():
        _merged(subject).save_pretrained(tmp_path / "merged")
    assert lora.assert_export_parity(tmp_path / "merged", subject).value <= 1
    said = _said(tmp_path / "base", subject)
    assert "lm_head.weight: the base's own weight" in said


def test_fused_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    base = transformers.Qwen3MoeForCausalLM(config).eval()
    if not hasattr(base.model.layers[0].mlp.experts, "down_proj"):
        pytest.skip("experts are no fused parameters in this transformers")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    subject = _subject(tmp_path, "q_proj", base=base, target_parameters=names)
    good = _weights(_merged(subject))
    assert lora.assert_export_parity(good, subject).value <= 1
    wrong = good | {"model.layers.1.mlp.experts.down_proj": torch.zeros(4, 32, 16)}
    assert "layers.1.mlp.experts.down_proj: off by" in _said(wrong, subject)


# ------------------------------------------------------------------------------ faults


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return _subject(tmp_path_factory.mktemp("export"), "q_proj", "gate_proj", "up_proj")


@pytest.fixture(scope="module")
def parts(subject: Subject) -> tuple[Weights, Weights]:
    """The base's weights and the deltas, in our own arithmetic."""
    weights = load_file(subject.adapter.path / "adapter_model.safetensors")
    base = _weights(subject.base.module)
    deltas = {
        key.removeprefix("base_model.model.").replace("lora_A.", ""):
        3.0 * weights[key.replace("lora_A", "lora_B")] @ weights[key]
        for key in weights if "lora_A" in key
    }  # fmt: skip
    return base, deltas


def _said(export: Any, subject: Subject) -> str:
    with pytest.raises(CheckFailed) as failure:
        lora.assert_export_parity(export, subject)
    return " ".join(str(failure.value).split())


def _exported(parts: tuple[Weights, Weights], change: Callable[..., torch.Tensor]) -> Weights:
    base, deltas = parts
    return base | {name: base[name] + change(name, delta) for name, delta in deltas.items()}


_PLACED = "the delta with its {}s in other places"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (torch.zeros_like, "the base's own weight"),
        (lambda delta: delta / 3, "0.333333 times the delta"),
        (lambda delta: delta * 1.0001, "1.0001 times the delta"),
        (lambda delta: delta.T, "the transposed delta"),
        (lambda delta: delta.roll(16, 0), f"{_PLACED.format('row')}: row 0 holds row 16, 32 of"),
        (lambda delta: delta.flip(1), f"{_PLACED.format('column')}: column 0 holds column 31"),
        (lambda delta: delta[:16].repeat(2, 1), f"{_PLACED.format('row')}: row 16 holds row 0"),
        (lambda delta: torch.cat([delta[:16], -delta[16:]]), "only rows 0 to 15 of 32 are right"),
        (lambda delta: delta.flip(0).cumsum(0), "a change of rank 4 or less as the adapter's is"),
        (lambda delta: delta.square(), "of the delta, and the difference from the base is no"),
    ],
)
def test_what_is_there_instead_of_the_delta(
    subject: Subject,
    parts: tuple[Weights, Weights],
    change: Callable[[torch.Tensor], torch.Tensor],
    says: str,
) -> None:
    good = _exported(parts, lambda name, delta: delta)
    assert lora.assert_export_parity(good, subject).value <= 1
    wrong = _exported(parts, lambda name, delta: change(delta) if "q_proj" in name else delta)
    said = _said(wrong, subject)
    assert "self_attn.q_proj.weight" in said
    assert says in said


def test_the_delta_of_another_weight(subject: Subject, parts: tuple[Weights, Weights]) -> None:
    deltas = parts[1]
    wrong = _exported(parts, lambda name, delta: deltas[name.replace("up_proj", "gate_proj")])
    told = "layers.0.mlp.up_proj.weight: the delta of model.layers.0.mlp.gate_proj.weight"
    assert told in _said(wrong, subject)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda b, a: b[:, :2] @ a[:2], "2 of the factors' 4 ranks: without 2, 3"),
        (lambda b, a: b * torch.tensor([1, 1, 5, 1]) @ a, "rank 2 at 5 times"),
        (lambda b, a: b @ a.roll(1, 0), "the factors' ranks in another order in A than in B"),
        (lambda b, a: b @ a.cumsum(0), "a change of rank 4 or less as the adapter's is"),
    ],
)
def test_factors_used_otherwise(
    subject: Subject,
    parts: tuple[Weights, Weights],
    use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    says: str,
) -> None:
    weights = load_file(subject.adapter.path / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    good = _exported(parts, lambda name, delta: delta)
    wrong = {f"{name}.weight": parts[0][f"{name}.weight"] + 3.0 * use(b, a)}
    assert f"{name}.weight: {says}" in _said(good | wrong, subject).replace(
        "the delta with its ranks at scalings of their own: ", ""
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_causes_are_told_in_coarse_formats_and_not_of_noise(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base = llama(num_key_value_heads=2).to(dtype)
    subject = _subject(tmp_path, "q_proj", "v_proj", base=base)
    good = _weights(_merged(subject))
    assert lora.assert_export_parity(good, subject).value <= 1
    file = load_file(subject.adapter.path / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    a, b = (file[f"base_model.model.{module}.lora_{side}.weight"].float() for side in "AB")
    name, weight = f"{module}.weight", subject.base.module.state_dict()[f"{module}.weight"]

    def said(delta: torch.Tensor) -> str:
        return _said(good | {name: (weight.float() + 3.0 * delta).to(dtype)}, subject)

    assert f"{name}: 2 of the factors' 4 ranks: without 2, 3" in said(b[:, :2] @ a[:2])
    assert f"{name}: the factors' ranks in another order" in said(b @ a.roll(1, 0))
    assert f"{name}: 0.5 times the delta" in said(b @ a / 2)
    size = torch.finfo(dtype).eps * weight.float().abs().max()
    for noise in (2, 4, 8):  # rounding more than once, or in a coarser format: nobody knows
        torch.manual_seed(noise)
        off = noise * size * torch.randn(weight.shape)
        assert f"{name}: off by" in said(b @ a + off), noise


def test_rows_of_the_deltas_beside_it(tmp_path: Path) -> None:
    """As where a fused weight of q, k and v is filled at rows of another layout."""
    subject = _subject(tmp_path, "q_proj", "v_proj", base=llama(num_key_value_heads=2))
    good = _weights(_merged(subject))
    assert lora.assert_export_parity(good, subject).value <= 1
    base = _weights(subject.base.module)
    q, k, v = (f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv")
    delta = good[q] - base[q]
    empty = torch.zeros(8, 32)

    said = _said(good | {k: base[k] + torch.cat([empty, delta[:8]])}, subject)
    assert f"{k}: rows of other deltas: row 8 holds row 0 of q_proj's, 8 of 16 rows" in said
    own = good[v] - base[v]
    said = _said(good | {v: base[v] + torch.cat([delta[24:], own[8:]])}, subject)
    assert f"{v}: rows of other deltas: row 0 holds row 24 of q_proj's, 8 of 16 rows" in said
    # Rows that are no one's are not said to be any one's.
    said = _said(good | {k: base[k] + torch.cat([empty, 2 * delta[:8]])}, subject)
    assert f"{k}: 256 of 512 values are off" in said
    said = _said(good | {v: base[v] + torch.cat([empty, own[8:]])}, subject)
    assert f"{v}: only rows 8 to 15 of 16 are right" in said


def test_rows_of_the_whole_weight(subject: Subject, parts: tuple[Weights, Weights]) -> None:
    good = _exported(parts, lambda name, delta: delta)
    name = "model.layers.0.self_attn.q_proj.weight"
    said = _said(good | {name: good[name].flip(0)}, subject)
    assert f"{name}: the merged weight with its rows in other places: row 0 holds row 31" in said


def test_weights_that_the_adapter_has_nothing_to_do_with(
    subject: Subject, parts: tuple[Weights, Weights]
) -> None:
    good = _exported(parts, lambda name, delta: delta)
    head, rows = good["lm_head.weight"], good["model.embed_tokens.weight"]
    other = head.clone()
    other[3, 4] += 1e-6
    assert "lm_head.weight: 1 of 2048 values are off" in _said(
        good | {"lm_head.weight": other}, subject
    )
    assert "shape [60, 32] (expected [64, 32])" in _said(
        good | {"model.embed_tokens.weight": rows[:60]}, subject
    )
    assert "values are not finite" in _said(good | {"lm_head.weight": head / 0}, subject)
    del good["lm_head.weight"]
    assert "lm_head.weight: not in the export" in _said(good, subject)


def test_prefixed_names_are_shown(subject: Subject, parts: tuple[Weights, Weights]) -> None:
    good = _exported(parts, lambda name, delta: delta)
    said = _said({f"model.{name}": tensor for name, tensor in good.items()}, subject)
    assert "not in the export" in said
    assert "21 weights the base model does not have: model.lm_head.weight" in said


def test_magnitudes_and_saved_modules_left_out(tmp_path: Path) -> None:
    subject = _subject(tmp_path, "q_proj", use_dora=True, modules_to_save=["lm_head"])
    weights = _weights(_merged(subject))
    own = _weights(subject.base.module)
    said = _said(weights | {"lm_head.weight": own["lm_head.weight"]}, subject)
    assert "lm_head.weight: the base's own weight (expected the trained weight)" in said
    held = load_file(subject.adapter.path / "adapter_model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        b, a = (held[f"base_model.model.{name}.lora_{which}.weight"] for which in "BA")
        weights[f"{name}.weight"] = own[f"{name}.weight"] + 3.0 * b @ a
    assert "q_proj.weight (2): the delta without DoRA's magnitudes" in _said(weights, subject)


# ------------------------------------------------------------------------------ no verdict


def test_what_has_no_formula(tmp_path: Path, subject: Subject) -> None:
    from peft import IA3Config

    with pytest.raises(UsageError, match="holds no weights"):
        lora.assert_export_parity({}, subject)
    model = trained(Mlp(), IA3Config(target_modules=["body"], feedforward_modules=[]))
    lent = Subject.from_model(model, {"x": torch.ones(2, 8)})
    with pytest.raises(NotApplicable, match="IA3"):
        lora.assert_export_parity({"head.weight": torch.ones(4, 8)}, lent)
    lent.release()
    plain = Subject.from_model(trained(Mlp(), lora_config("body")), {"x": torch.ones(2, 8)})
    with pytest.raises(UsageError, match="how to load a folder"):
        lora.assert_export_parity(tmp_path, plain)
    plain.release()
