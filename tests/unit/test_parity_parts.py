"""What a wrong answer is instead: the scaling, the part left out, the other adapter that stayed."""

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
from safetensors.torch import load_file

import pytest_lora as lora
from pytest_lora.checks import parts
from pytest_lora.errors import CheckFailed, NotApplicable
from pytest_lora.loading import quiet
from pytest_lora.probe import output_of
from pytest_lora.subject import Subject
from timemachine.cases import llama, lora_config, on_disk, rewrite, saved, trained

IDS = torch.arange(3, 27).view(2, 12)
SCALING = 3.0
Weights = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor], torch.Tensor]


def _subject(place: Path, *targets: str, base: Any = None, **options: Any) -> Subject:
    config = lora_config(*targets, task_type="CAUSAL_LM", **options)
    found = on_disk(llama() if base is None else base, config, place)
    return Subject(found.adapter, found.base, {"input_ids": IDS})


def _as_is(_: str, delta: torch.Tensor) -> torch.Tensor:
    return delta


def _deltas(folder: Path) -> Weights:
    """``s B A`` by module, in our own arithmetic."""
    weights = load_file(folder / "adapter_model.safetensors")
    ends = ".lora_A.weight"
    pairs = {key.removesuffix(ends): (key, key.replace("lora_A", "lora_B"))
             for key in weights if key.endswith(ends)}  # fmt: skip
    return {
        name.removeprefix("base_model.model."): SCALING * (weights[b] @ weights[a])
        for name, (a, b) in pairs.items()
    }


def _server(subject: Subject, change: Change = _as_is, more: Weights | None = None) -> Any:
    """A copy of the base model with the deltas added, as a server does that knows no PEFT."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(subject.adapter.path.parent / "base").eval()
    own = model.state_dict()
    with torch.no_grad():
        for name, delta in _deltas(subject.adapter.path).items():
            own[f"{name}.weight"] += change(name, delta)
        for name, tensor in (more or {}).items():
            own[name].copy_(tensor)
    return model


def _serve(model: Any) -> Callable[[Any], torch.Tensor]:
    def serve(_: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=IDS).logits
        return logits

    return serve


def _said(serve: Callable[[Any], torch.Tensor], subjects: Any, **options: Any) -> str:
    with pytest.raises(CheckFailed) as failure:
        lora.assert_serving_parity(serve, subjects, **options)
    return " ".join(str(failure.value).split())


# ------------------------------------------------------------------------------ scalings


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return _subject(tmp_path_factory.mktemp("kinds"), "q_proj", "v_proj")


def _v_at(share: float) -> Change:
    return lambda name, delta: delta * (share if "v_proj" in name else 1)


def _layer_at(layer: int, share: float) -> Change:
    return lambda name, delta: delta * (share if f"layers.{layer}." in name else 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name, delta: delta / SCALING, "the whole adapter at 0.333 times its scaling"),
        (lambda name, delta: delta * 20 / SCALING, "the whole adapter at 6.67 times its scaling"),
        (lambda name, delta: delta * 2, "the whole adapter at 2 times its scaling"),
        (lambda name, delta: -delta, "the whole adapter at -1 times its scaling"),
        (lambda name, delta: delta * 0, "the base model's output: nothing of the adapter is used"),
        (_v_at(0), "the adapter without self_attn.v_proj allowed"),
        (_v_at(0.5), "the adapter with self_attn.v_proj at 0.5 times its scaling"),
        (_layer_at(1, 0), "the adapter without layer 1 allowed"),
        (_layer_at(0, 0.25), "the adapter with layer 0 at 0.25 times its scaling"),
        (lambda name, delta: delta.roll(8, 0), "no other scaling and no part left out gives it"),
        (lambda name, delta: delta.T, "no other scaling and no part left out gives it"),
    ],
)
def test_a_scaling_or_a_part_left_out(two_kinds: Subject, change: Change, says: str) -> None:
    output = two_kinds.output()
    assert says in _said(_serve(_server(two_kinds, change)), two_kinds)
    assert not two_kinds.base.verify()
    assert torch.equal(two_kinds.output(), output)


def test_only_what_is_at_another_scaling_is_listed(tmp_path: Path) -> None:
    subject = _subject(tmp_path, "q_proj", "v_proj", "o_proj")

    def change(name: str, delta: torch.Tensor) -> torch.Tensor:
        return delta if "o_proj" in name else delta / 4

    said = _said(_serve(_server(subject, change)), subject)
    assert (
        "the adapter with self_attn.q_proj at 0.25 times its scaling, with self_attn.v_proj" in said
    )
    assert "o_proj" not in said


def test_a_search_that_takes_too_long(two_kinds: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MOST_SECONDS", -1.0)
    said = _said(_serve(_server(two_kinds, _v_at(0.5))), two_kinds)
    assert "looked for too long" in said
    assert not two_kinds.base.verify()


def test_the_servers_own_arithmetic_passes(two_kinds: Subject) -> None:
    assert lora.assert_serving_parity(_serve(_server(two_kinds)), two_kinds).value <= 2


# ------------------------------------------------------------------------------ other parts


def test_a_saved_module_left_out(tmp_path: Path) -> None:
    subject = _subject(tmp_path, "q_proj", modules_to_save=["lm_head"])
    said = _said(_serve(_server(subject)), subject)
    assert "the adapter without the saved lm_head" in said
    held = load_file(subject.adapter.path / "adapter_model.safetensors")
    whole = {"lm_head.weight": held["base_model.model.lm_head.weight"]}
    assert lora.assert_serving_parity(_serve(_server(subject, more=whole)), subject)


def test_trained_token_rows_left_out(tmp_path: Path) -> None:
    subject = _subject(tmp_path, "q_proj", trainable_token_indices=[4, 5, 20])
    said = _said(_serve(_server(subject)), subject)
    assert "the adapter without the trained rows of model.embed_tokens" in said


def test_biases_left_out(tmp_path: Path) -> None:
    subject = _subject(tmp_path, "q_proj", base=llama(attention_bias=True), bias="lora_only")
    said = _said(_serve(_server(subject)), subject)
    assert "the adapter without the trained self_attn.q_proj.bias" in said
    assert not subject.base.verify()


def test_magnitudes_left_out(tmp_path: Path) -> None:
    subject = _subject(tmp_path, "q_proj", use_dora=True)
    said = _said(_serve(_server(subject)), subject)
    assert "the adapter without DoRA's magnitudes of self_attn.q_proj" in said


# ------------------------------------------------------------------------------ experts


def _moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    place = tmp_path_factory.mktemp("experts")
    fused = getattr(_moe().model.layers[0].mlp.experts, "down_proj", None)
    if not isinstance(fused, torch.nn.Parameter):
        pytest.skip("experts are no fused parameters in this transformers")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return _subject(place, "q_proj", base=_moe(), target_parameters=names)


def test_fused_experts_are_run_in_float64_and_their_code_put_back(experts: Subject) -> None:
    model = experts.model
    chosen = model.config._experts_implementation_internal
    output = experts.output()
    assert lora.assert_serving_parity(lambda name: output, experts).value == pytest.approx(1)
    assert experts.model.config._experts_implementation_internal == chosen
    found = lora.assert_merge_equivalence(experts)
    assert not any("float64" in str(note) for note in found.details["notes"])  # type: ignore


def test_experts_left_out(experts: Subject) -> None:
    with experts.attached() as model:
        for layer in model.modules():
            if getattr(layer, "parameter_name", "") == "down_proj":
                layer.scaling["default"] = 0.0
        output = output_of(model, experts.inputs)
    said = _said(lambda name: output, experts)
    assert "the adapter without mlp.experts.down_proj" in said


# ------------------------------------------------------------------------------ other adapters


@pytest.fixture(scope="module")
def pair(two_kinds: Subject) -> dict[str, Subject]:
    """An adapter of two kinds of modules, and one of the first of them with other weights."""
    place = two_kinds.adapter.path.parent
    config = lora_config("q_proj", task_type="CAUSAL_LM")
    folder = saved(trained(llama(), config), place / "second")
    rewrite(folder, lambda key, value: (key, value.flip(0).clone() if "lora_B" in key else value))
    second = Subject(lora.read_adapter(folder), two_kinds.base, two_kinds.inputs)
    return {"one": two_kinds, "two": second}


def test_what_another_adapter_left_behind(pair: dict[str, Subject]) -> None:
    rest = {name: delta for name, delta in _deltas(pair["one"].adapter.path).items()
            if "v_proj" in name}  # fmt: skip
    served = {name: _server(subject) for name, subject in pair.items()}
    lora.assert_serving_parity(lambda name: _serve(served[name])(name), pair)
    with torch.no_grad():
        for name, delta in rest.items():
            served["two"].get_submodule(name).weight += delta
    said = _said(lambda name: _serve(served[name])(name), pair)
    assert "two, asked after one: the adapter with self_attn.v_proj of one beside it" in said
    assert not pair["one"].base.verify()


def test_adapters_that_pile_up(pair: dict[str, Subject]) -> None:
    model = _server(pair["one"], lambda name, delta: delta * 0)

    def serve(name: str) -> torch.Tensor:
        with torch.no_grad():
            for module, delta in _deltas(pair[name].adapter.path).items():
                model.get_submodule(module).weight += delta
        return _serve(model)(name)

    assert "beside it" in _said(serve, pair)


def test_places_that_come_of_another_adapters_cache(pair: dict[str, Subject]) -> None:
    outputs = {name: subject.output() for name, subject in pair.items()}
    mixed = torch.cat([outputs["one"][:, :8], outputs["two"][:, 8:]], 1)
    answers = {"one": outputs["one"], "two": mixed}
    said = _said(answers.__getitem__, pair)
    assert "right at place 8 to 11; at place 0 to 7 the output of one" in said


# ------------------------------------------------------------------------------ the same, twice


def test_answers_that_differ_from_each_other(two_kinds: Subject) -> None:
    output = two_kinds.output()
    generator = torch.Generator().manual_seed(0)

    def serve(_: Any) -> torch.Tensor:
        noise: torch.Tensor = 0.01 * torch.randn(output.shape, generator=generator)
        return output + noise

    assert "dropout or sampling is on" in _said(serve, two_kinds)
    fixed = serve(None)
    assert "the same was asked twice" not in _said(lambda name: fixed, two_kinds)


def test_a_coarser_format_is_not_taken_for_a_fault_of_another_kind(two_kinds: Subject) -> None:
    output = two_kinds.output()
    assert "as a coarser format" in _said(lambda name: output.bfloat16(), two_kinds)
    wide = output.double()
    own = lora.measure_serving_parity(lambda name: wide, {"default": two_kinds}).value
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)) * 3e-6
    assert own <= 2
    assert "times its scaling" not in _said(lambda name: output + noise, two_kinds)


@pytest.mark.parametrize(
    ("size", "share", "says"),
    [
        (1.0, 0.5, "the whole adapter at 0.5 times its scaling"),
        (0.1, 0.5, "times what passes, too little to say what this is instead"),
        (0.1, 0.0, "the base model's output: nothing of the adapter is used"),
        (0.02, 0.0, "times what passes, too little to say what this is instead"),
    ],
)
def test_nothing_is_claimed_of_an_effect_near_rounding(
    tmp_path: Path, size: float, share: float, says: str
) -> None:
    subject = _subject(tmp_path, "q_proj", "v_proj", base=llama().bfloat16())
    rewrite(subject.adapter.path, lambda key, value: (key, value * size if "_B" in key else value))
    small = Subject(lora.read_adapter(subject.adapter.path), subject.base, subject.inputs)
    served = _serve(_server(small, lambda name, delta: delta * share).bfloat16())
    assert says in _said(served, small)


# ------------------------------------------------------------------------------ what can be told


def test_a_bound_that_lets_the_base_model_pass(two_kinds: Subject) -> None:
    base, output = two_kinds.base_output(), two_kinds.output()
    away = lora.measure_serving_parity(lambda name: base, {"default": two_kinds}).value
    with pytest.raises(NotApplicable, match=r"the output of the base model is .* nothing to"):
        lora.assert_serving_parity(lambda name: output, two_kinds, bound=away * 1.01)
    assert lora.assert_serving_parity(lambda name: output, two_kinds, bound=away * 0.99)
