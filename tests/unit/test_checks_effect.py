"""adapter_effect: sound adapters act; a no-op, in whole or in part, is found and named."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import tiny
import torch
from torch import nn

from pytest_lora.assertions import assert_adapter_effect
from pytest_lora.checks import deltas
from pytest_lora.checks.effect import measure_adapter_effect, relative_change
from pytest_lora.errors import CheckFailed
from pytest_lora.subject import BaseModel, Subject, load_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_lora.records import Measurement

Tensors = dict[str, torch.Tensor]
FAILING_THEN = ("LoHaConfig", "OFTConfig", "PrefixTuningConfig")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tiny.llama(), tmp_path_factory.mktemp("base"))


def on(
    folder: Path, home: Path, change: Any = None, *, dtype: str = "auto", **config: Any
) -> Subject:
    adapter = tiny.save_adapter(tiny.llama(), home / "a", task_type="CAUSAL_LM", **config)
    if change is not None:
        adapter = tiny.rewrite_weights(adapter, change)
    return Subject(adapter, load_base(folder, adapter=adapter, device="cpu", dtype=dtype))


def only(part: str, act: Callable[[torch.Tensor], object]) -> Callable[[Tensors], None]:
    """A change of every tensor whose name contains ``part``."""

    def change(tensors: Tensors) -> None:
        touched = [act(tensor) for name, tensor in tensors.items() if part in name]
        assert touched

    return change


def where(measured: Measurement) -> list[str]:
    return [problem.where for problem in measured.problems]


# ---------------------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ({}, 4),
        ({"target_modules": "all-linear", "use_dora": True}, 14),
        ({"target_modules": ["embed_tokens", "lm_head"]}, 2),
        ({"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, 2),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, 6),
        ({"trainable_token_indices": [5, 60]}, 5),
        ({"cls": "TrainableTokensConfig", "token_indices": [5]}, 1),
        ({"cls": "IA3Config", "target_modules": ["k_proj"], "feedforward_modules": []}, 2),
        ({"cls": "LoHaConfig", "target_modules": ["v_proj"]}, 2),
        ({"cls": "OFTConfig", "target_modules": ["v_proj"]}, 2),
        ({"cls": "AdaLoraConfig", "target_modules": ["v_proj"], "total_step": 9}, 2),
        ({"cls": "PromptTuningConfig", "num_virtual_tokens": 4}, 1),
        ({"cls": "PrefixTuningConfig", "num_virtual_tokens": 4}, 1),
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_sound_adapters_act(
    folder: Path, tmp_path: Path, config: dict[str, Any], modules: int, dtype: str
) -> None:
    if tiny.PEFT < (0, 15) and config.get("cls") in FAILING_THEN:
        pytest.skip("that PEFT cannot run it with these transformers, or in bfloat16")
    subject = on(folder, tmp_path, dtype=dtype, **config)
    measured = measure_adapter_effect(subject)
    assert measured.problems == ()
    assert measured.value > 0.01
    assert measured.value == measured.details["output_change"]
    assert measured.count == modules
    kinds = measured.details["kinds"]
    assert all(kind["output_change_alone"] > 0 for kind in kinds.values())  # type: ignore
    assert subject.base.verify() == ()
    assert_adapter_effect(subject)


def test_the_measurement_leaves_the_model_as_it_was(folder: Path, tmp_path: Path) -> None:
    subject = on(folder, tmp_path, modules_to_save=["lm_head"])
    before = subject.output()
    flags = [module.training for module in subject.model.modules()]
    grads = [parameter.requires_grad for parameter in subject.model.parameters()]
    measure_adapter_effect(subject)
    assert torch.equal(subject.output(), before)
    assert [module.training for module in subject.model.modules()] == flags
    assert [parameter.requires_grad for parameter in subject.model.parameters()] == grads
    assert not any(module._forward_pre_hooks for module in subject.model.modules())


def test_the_kinds_are_reported(folder: Path, tmp_path: Path) -> None:
    measured = measure_adapter_effect(on(folder, tmp_path))
    kinds: Any = measured.details["kinds"]
    assert set(kinds) == {"model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"}
    assert all(kind["modules"] == 2 and kind["zero"] == 0 for kind in kinds.values())
    assert all(0.05 < kind["delta_per_weight"] < 1 for kind in kinds.values())
    assert measured.where is not None
    assert measured.where.startswith("least alone: model.layers.*.self_attn.q_proj")


def test_convolutions_and_gpt2(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tiny.cnn(), tmp_path / "c", target_modules=["conv", "head"])
    subject = Subject(adapter, BaseModel.from_module(tiny.cnn()), inputs=tiny.image())
    assert measure_adapter_effect(subject).problems == ()
    folder = tiny.save_base(tiny.gpt2(), tmp_path / "base")
    adapter = tiny.save_adapter(
        tiny.gpt2(), tmp_path / "g", task_type="CAUSAL_LM", target_modules=["c_attn"],
        fan_in_fan_out=True,
    )  # fmt: skip
    subject = Subject(adapter, load_base(folder, adapter=adapter, device="cpu"))
    assert measure_adapter_effect(subject).problems == ()


# ---------------------------------------------------------------------------- the norms


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model", ["llama", "gpt2", "cnn"])
def test_the_norm_of_the_delta_is_that_of_the_dense_product(dora: bool, model: str) -> None:
    if dora and model == "gpt2" and tiny.PEFT < (0, 15):
        pytest.skip("that PEFT merges the DoRA of an embedding wrongly")
    bare = getattr(tiny, model)()
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "wte"], "cnn": ["conv", "head"]}[model]
    wrapped = tiny.wrap(
        bare, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=dora,
                              fan_in_fan_out=model == "gpt2")
    ).double()  # fmt: skip
    tiny.fill(wrapped)
    found = [(n, m, deltas.measure_delta(n, m)) for n, m in deltas.adapted_modules(wrapped)]
    assert found
    for _, module, delta in found:
        before = module.get_base_layer().weight.detach().clone()
        module.merge()
        after = module.get_base_layer().weight.detach()
        assert delta is not None
        assert delta.norm == pytest.approx(float((after - before).norm()), rel=1e-9)
        assert delta.weight == pytest.approx(float(before.norm()), rel=1e-9)
        assert not delta.zero


def test_a_product_of_factors_that_miss_each_other_is_zero() -> None:
    B = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    A = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    assert deltas.low_rank_norm(B, A, 3.0) == 0
    assert deltas.low_rank_norm(B, A.flip(0), -2.0) == pytest.approx(2 * math.sqrt(5 * 14))


def test_kinds() -> None:
    assert deltas.kind_of("model.layers.11.mlp.up_proj") == "model.layers.*.mlp.up_proj"
    assert deltas.kind_of("h.0.experts.12") == "h.*.experts.*"
    assert deltas.kind_of("0") == "*"
    assert deltas.kind_of("conv2.fc1") == "conv2.fc1"


def test_relative_change() -> None:
    plain = torch.tensor([3.0, 4.0])
    assert relative_change(plain * 1.5, plain) == pytest.approx(0.5)
    assert relative_change(plain, plain * 0) == pytest.approx(math.sqrt(12.5))


# ---------------------------------------------------------------------------- in the weights


def test_a_no_op_fails_and_says_so(folder: Path, tmp_path: Path) -> None:
    subject = on(folder, tmp_path, only("lora_B", torch.Tensor.zero_))
    measured = measure_adapter_effect(subject)
    assert measured.value == 0.0
    assert where(measured) == ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"]
    assert "all 2 change nothing" in measured.problems[0].found
    assert "no weight changes: this adapter is the base model" in measured.notes
    with pytest.raises(CheckFailed, match=r"q_proj: all 2 change nothing"):
        assert_adapter_effect(subject)


def test_one_kind_alone_at_zero(folder: Path, tmp_path: Path) -> None:
    zero_q = only("q_proj.lora_B", torch.Tensor.zero_)
    measured = measure_adapter_effect(on(folder, tmp_path, zero_q))
    assert where(measured) == ["model.layers.*.self_attn.q_proj"]
    assert measured.value == 0.0
    assert measured.details["output_change"] > 0.01  # type: ignore[operator]


def test_one_layer_at_zero(folder: Path, tmp_path: Path) -> None:
    change = only("layers.1.self_attn.v_proj.lora_A", torch.Tensor.zero_)
    measured = measure_adapter_effect(on(folder, tmp_path, change))
    [problem] = measured.problems
    assert "1 of 2 change nothing: model.layers.1.self_attn.v_proj" in problem.found


def test_keys_that_load_nowhere(folder: Path, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        return {"_orig_mod." + name: tensor for name, tensor in tensors.items()}

    measured = measure_adapter_effect(on(folder, tmp_path, rename))
    assert measured.value == 0.0
    assert where(measured)[0] == "model.layers.*.self_attn.q_proj"
    if tiny.PEFT >= (0, 14):  # older ones say nothing
        assert any("missing adapter keys" in note for note in measured.notes)


@pytest.mark.parametrize("part", [slice(0, 16), slice(8, 24), slice(16, 32)])
def test_rows_lost_with_a_shard(folder: Path, tmp_path: Path, part: slice) -> None:
    change = only("layers.0.self_attn.q_proj.lora_B", lambda tensor: tensor[part].zero_())
    measured = measure_adapter_effect(on(folder, tmp_path, change))
    [problem] = measured.problems
    assert problem.where == "model.layers.0.self_attn.q_proj"
    assert "16 of 32 output rows" in problem.found
    assert measured.value == 0.0


def test_rows_lost_in_an_embedding_and_in_gpt2(folder: Path, tmp_path: Path) -> None:
    change = only("lora_embedding_B", lambda tensor: tensor[16:].zero_())
    measured = measure_adapter_effect(on(folder, tmp_path, change, target_modules=["embed_tokens"]))
    assert "16 of 32 output rows" in measured.problems[0].found
    base = tiny.save_base(tiny.gpt2(), tmp_path / "base")
    adapter = tiny.save_adapter(
        tiny.gpt2(), tmp_path / "g", task_type="CAUSAL_LM", target_modules=["c_attn"],
        fan_in_fan_out=True,
    )  # fmt: skip
    adapter = tiny.rewrite_weights(adapter, only("lora_B", lambda tensor: tensor[:48].zero_()))
    measured = measure_adapter_effect(
        Subject(adapter, load_base(base, adapter=adapter, device="cpu"))
    )
    assert len(measured.problems) == 2
    assert "48 of 96 output rows" in measured.problems[0].found


def test_single_dead_rows_are_sound(folder: Path, tmp_path: Path) -> None:
    change = only("lora_B", lambda tensor: tensor[::3].zero_())
    assert measure_adapter_effect(on(folder, tmp_path, change)).problems == ()


def test_dora_without_its_product(folder: Path, tmp_path: Path) -> None:
    change = only("lora_B", torch.Tensor.zero_)
    measured = measure_adapter_effect(on(folder, tmp_path, change, use_dora=True))
    assert len(measured.problems) == 4
    assert "only the magnitude vector acts" in measured.problems[0].found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_dora_is_a_no_op(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny.save_base(tiny.llama().to(dtype), tmp_path / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"], use_dora=True
    )
    wrapped = tiny.wrap(tiny.llama().to(dtype), config)
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    adapter = tiny.read_adapter(tmp_path / "a")
    measured = measure_adapter_effect(
        Subject(adapter, load_base(base, adapter=adapter, device="cpu"))
    )
    assert where(measured) == ["model.embed_tokens", "model.layers.*.self_attn.q_proj"]
    assert all("nothing" in problem.found for problem in measured.problems)


def test_a_saved_module_that_is_the_bases_own(folder: Path, tmp_path: Path) -> None:
    weight = tiny.llama().lm_head.weight.detach()

    def change(tensors: Tensors) -> None:
        tensors["base_model.model.lm_head.weight"] = weight.clone()

    measured = measure_adapter_effect(on(folder, tmp_path, change, modules_to_save=["lm_head"]))
    assert where(measured) == ["lm_head"]
    assert measured.problems[0].found == "changes nothing"


def test_token_rows_that_are_the_bases_own(folder: Path, tmp_path: Path) -> None:
    rows = tiny.llama().model.embed_tokens.weight.detach()[[5, 60]]

    def partly(tensors: Tensors) -> None:
        [name] = [name for name in tensors if "token_adapter" in name]
        tensors[name][0] = rows[0]

    def wholly(tensors: Tensors) -> None:
        [name] = [name for name in tensors if "token_adapter" in name]
        tensors[name] = rows.clone()

    config = {"trainable_token_indices": [5, 60]}
    measured = measure_adapter_effect(on(folder, tmp_path / "1", partly, **config))
    assert measured.problems == ()
    assert any("tokens [5] are the base model's own" in note for note in measured.notes)
    measured = measure_adapter_effect(on(folder, tmp_path / "2", wholly, **config))
    assert where(measured) == ["model.embed_tokens"]


def test_other_methods_at_their_initial_values(folder: Path, tmp_path: Path) -> None:
    change = only("ia3_l", lambda tensor: tensor.fill_(1.0))
    config = {"cls": "IA3Config", "target_modules": ["k_proj"], "feedforward_modules": []}
    measured = measure_adapter_effect(on(folder, tmp_path, change, **config))
    assert where(measured) == ["model.layers.*.self_attn.k_proj"]


def test_a_trained_bias_of_b_counts(folder: Path, tmp_path: Path) -> None:
    change = only("lora_B.weight", torch.Tensor.zero_)
    measured = measure_adapter_effect(on(folder, tmp_path, change, lora_bias=True,
                                         target_modules=["lm_head"], r=2))  # fmt: skip
    kinds: Any = measured.details["kinds"]
    assert kinds["lm_head"]["zero"] == 0


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x) + self.experts[1](x)  # type: ignore[no-any-return]


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)  # type: ignore[no-any-return]


def test_an_expert_nobody_asked_is_a_note(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(Routed(), tmp_path, target_modules=["0", "1", "2"])
    idle = only("experts.2.lora_B", torch.Tensor.zero_)
    adapter = tiny.rewrite_weights(adapter, idle)
    subject = Subject(adapter, BaseModel.from_module(Routed()), inputs={"x": torch.ones(2, 6)})
    measured = measure_adapter_effect(subject)
    assert measured.problems == ()
    assert any("1 experts were never trained" in note for note in measured.notes)


# ---------------------------------------------------------------------------- at the output


class Attention(nn.Module):
    """Two projections; ``how`` says how the second one is used."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.up = nn.Linear(6, 6)
        self.kv_b = nn.Linear(6, 6)
        if how == "stale":
            object.__setattr__(self, "stale", self.kv_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        if self.how == "weight":
            return hidden @ self.kv_b.weight.T
        if self.how == "stale":
            return self.stale(hidden)  # type: ignore[no-any-return, operator]
        if self.how == "ignored":
            return hidden + 0 * self.kv_b(hidden)
        return hidden


@pytest.mark.parametrize("how", ["weight", "stale"])
def test_a_wrapper_that_is_gone_around_is_found(tmp_path: Path, how: str) -> None:
    adapter = tiny.save_adapter(Attention(how), tmp_path, target_modules=["up", "kv_b"])
    base = BaseModel.from_module(Attention(how))
    measured = measure_adapter_effect(Subject(adapter, base, inputs={"x": torch.ones(2, 6)}))
    assert set(where(measured)) == {"kv_b"}
    assert measured.value == 0.0
    assert "base layer" in measured.problems[0].fix
    assert base.verify() == ()


@pytest.mark.parametrize("how", ["ignored", "unused"])
def test_a_module_the_inputs_do_not_reach_is_a_note(tmp_path: Path, how: str) -> None:
    adapter = tiny.save_adapter(Attention(how), tmp_path, target_modules=["up", "kv_b"])
    base = BaseModel.from_module(Attention(how))
    measured = measure_adapter_effect(Subject(adapter, base, inputs={"x": torch.ones(2, 6)}))
    assert measured.problems == ()
    assert any("kv_b: the inputs do not reach" in note for note in measured.notes)


def test_embedding_rows_the_inputs_do_not_show(folder: Path, tmp_path: Path) -> None:
    subject = on(folder, tmp_path, trainable_token_indices=[60])
    ids = torch.full((1, 4), 7)
    subject = Subject(subject.adapter, subject.base, inputs={"input_ids": ids})
    measured = measure_adapter_effect(subject)
    assert measured.problems == ()
    assert any("show no token whose row" in note for note in measured.notes)


def test_an_effect_lost_in_bfloat16_is_reported(folder: Path, tmp_path: Path) -> None:
    change = only("lora_B", lambda tensor: tensor.mul_(1e-5))
    subject = on(folder, tmp_path, change, dtype="bf16")
    measured = measure_adapter_effect(subject)
    assert measured.problems == ()
    assert measured.value == 0.0
    assert any("lost in the rounding of bfloat16" in note for note in measured.notes)
    assert any("nothing of it arrives at the bfloat16 output" in note for note in measured.notes)
    assert measure_adapter_effect(on(folder, tmp_path / "2", change)).value > 0


def test_other_methods_lost_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    change = only("ia3_l", lambda tensor: tensor.fill_(1 + 1e-4))
    config = {"cls": "IA3Config", "target_modules": ["k_proj"], "feedforward_modules": []}
    measured = measure_adapter_effect(on(folder, tmp_path, change, dtype="bf16", **config))
    assert measured.problems == ()
    assert any("lost in the rounding of bfloat16" in note for note in measured.notes)


def test_an_output_that_is_not_finite_fails(folder: Path, tmp_path: Path) -> None:
    change = only("lora_B", lambda tensor: tensor.mul_(math.inf))
    subject = on(folder, tmp_path, change)
    with pytest.raises(CheckFailed):
        assert_adapter_effect(subject)


def test_a_method_that_cannot_be_merged_is_judged_by_the_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.ia3.layer import Linear

    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(Linear, "merge", refuse)
    config = {"cls": "IA3Config", "target_modules": ["k_proj"], "feedforward_modules": []}
    measured = measure_adapter_effect(on(folder, tmp_path, **config))
    assert measured.problems == ()
    assert any("size of 2 deltas cannot be told" in note for note in measured.notes)
