"""padding_invariance: sound adapters do not care, and what leaks or shifts is found and named."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.layer import Linear as LoraLinear

from pytest_lora.assertions import assert_padding_invariance
from pytest_lora.checks import padding
from pytest_lora.checks.padding import BATCHED, LEFT, RIGHT, measure_padding_invariance
from pytest_lora.errors import CheckFailed, NotApplicable
from pytest_lora.numerics import noise as rounding
from pytest_lora.subject import BaseModel, Subject, load_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_lora.records import Measurement


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    kinds = ("llama", "gpt2", "bert", "t5")
    return {kind: tiny.save_base(getattr(tiny, kind)(), home / kind) for kind in kinds}


def on(
    folders: dict[str, Path], home: Path, kind: str = "llama", *, dtype: str = "auto", **config: Any
) -> Subject:
    options = {"task_type": "CAUSAL_LM", **config}
    adapter = tiny.save_adapter(getattr(tiny, kind)(), home / "a", **options)
    return Subject(adapter, load_base(folders[kind], adapter=adapter, device="cpu", dtype=dtype))


@pytest.fixture
def subject(folders: dict[str, Path], tmp_path: Path) -> Subject:
    return on(folders, tmp_path)


def ratios(measured: Measurement) -> dict[str, float]:
    layouts: Any = measured.details["layouts"]
    return {name: float(found["adapter"]) for name, found in layouts.items()}


def spoil(monkeypatch: pytest.MonkeyPatch, act: Callable[[Any, Any, Any], Any]) -> None:
    """Have every adapted layer pass its result through ``act(layer, x, result)``."""
    forward = LoraLinear.forward

    def faulty(self: Any, x: Any, *args: Any, **options: Any) -> Any:
        return act(self, x, forward(self, x, *args, **options))

    monkeypatch.setattr(LoraLinear, "forward", faulty)


def deltas(layer: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer.lora_B["default"](layer.lora_A["default"](x))
    return result


# ---------------------------------------------------------------------------- sound

FLAVOURS = [
    ("llama", {}),
    ("llama", {"use_rslora": True, "target_modules": "all-linear"}),
    ("llama", {"use_dora": True, "modules_to_save": ["lm_head"]}),
    ("llama", {"trainable_token_indices": [5, 6]}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    ("bert", {"target_modules": ["query", "value"], "task_type": None}),
    ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
]


@pytest.mark.parametrize(("kind", "config"), FLAVOURS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_sound_adapters_do_not_care(
    folders: dict[str, Path], tmp_path: Path, kind: str, config: dict[str, Any], dtype: str
) -> None:
    subject = on(folders, tmp_path, kind, dtype=dtype, **config)
    measured = assert_padding_invariance(subject)
    assert set(ratios(measured)) == {RIGHT, LEFT, BATCHED}
    assert measured.value == max(ratios(measured).values()) < 0.9
    assert measured.notes == ()
    assert measured.count > 1000
    assert subject.base.verify() == ()
    assert not any(module._forward_hooks for module in subject.model.modules())


@pytest.mark.parametrize("kind", ["TokenClassification", "SequenceClassification"])
def test_classifiers(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    config = tiny.llama(pad_token_id=0).config
    model = getattr(transformers, f"LlamaFor{kind}")(config).eval()
    task = "TOKEN_CLS" if kind.startswith("Token") else "SEQ_CLS"
    base = tiny.save_base(model, tmp_path / "b")
    adapter = tiny.save_adapter(model, tmp_path / "a", task_type=task)
    subject = Subject(adapter, load_base(base, adapter=adapter, device="cpu"))
    measured = assert_padding_invariance(subject)
    assert set(ratios(measured)) == {RIGHT, LEFT, BATCHED}
    # A sequence classifier looks for the last token that is no padding token, whatever the mask.
    reads = f"{RIGHT}: the base model itself reads other tokens; contents not judged"
    assert (reads in measured.notes) == (task == "SEQ_CLS")


def test_question_answering(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Here PEFT drops explicit positions, and start and end logits are concatenated."""
    model = transformers.BertForQuestionAnswering(tiny.bert().config).eval()
    base = tiny.save_base(model, tmp_path / "b")
    adapter = tiny.save_adapter(
        model, tmp_path / "a", task_type="QUESTION_ANS", target_modules=["query", "value"]
    )
    subject = Subject(adapter, load_base(base, adapter=adapter, device="cpu"))
    measured = assert_padding_invariance(subject)
    assert set(ratios(measured)) == {RIGHT, LEFT, BATCHED}
    assert measured.notes == ()


def test_virtual_tokens_stand_before_the_padding(folders: dict[str, Path], tmp_path: Path) -> None:
    subject = on(folders, tmp_path, cls="PromptTuningConfig", num_virtual_tokens=4)
    assert set(ratios(assert_padding_invariance(subject))) == {RIGHT, BATCHED}


def test_positions_that_follow_from_padding_tokens(tmp_path: Path) -> None:
    """RoBERTa takes explicit positions, but counts from 2: given none it finds its own."""
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.2, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(config).eval()
    base = tiny.save_base(model, tmp_path / "b")
    adapter = tiny.save_adapter(model, tmp_path / "a", target_modules=["query"])
    subject = Subject(adapter, load_base(base, adapter=adapter, device="cpu"))
    measured = assert_padding_invariance(subject)
    assert set(ratios(measured)) == {RIGHT, LEFT, BATCHED}


def test_a_router_is_judged_by_the_median_position(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    base = tiny.save_base(model, tmp_path / "b")
    adapter = tiny.save_adapter(model, tmp_path / "a", task_type="CAUSAL_LM")
    subject = Subject(adapter, load_base(base, adapter=adapter, device="cpu"))
    assert assert_padding_invariance(subject).problems == ()


def test_what_it_costs(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven or eight forward passes of a sound adapter, and none of the base model."""
    calls = []
    run = padding.output_of

    def counted(model: Any, batch: Any) -> Any:
        calls.append(model)
        return run(model, batch)

    monkeypatch.setattr(padding, "output_of", counted)
    measure_padding_invariance(subject)
    assert len(calls) <= 8
    assert set(map(id, calls)) == {id(subject.model)}


def test_a_live_model_with_inputs_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    """A single row, and no mask."""
    subject = on(folders, tmp_path)
    ids = torch.arange(10, 34)[None]
    measured = assert_padding_invariance(subject.model, {"input_ids": ids})
    assert measured.value < 1
    assert set(ratios(measured)) == {RIGHT, LEFT, BATCHED}


# ---------------------------------------------------------------------------- not applicable


def test_images_have_no_padding(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tiny.cnn(), tmp_path, target_modules=["conv"])
    subject = Subject(adapter, BaseModel.from_module(tiny.cnn()), inputs=tiny.image())
    with pytest.raises(NotApplicable, match="takes no attention mask"):
        measure_padding_invariance(subject)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": torch.ones(2, 3, dtype=torch.long)},
        {"input_ids": torch.ones(2, 9, dtype=torch.long),
         "attention_mask": torch.ones(2, 9, dtype=torch.long).tril()},
    ],
)  # fmt: skip
def test_inputs_that_leave_no_choice(
    folders: dict[str, Path], tmp_path: Path, inputs: dict[str, torch.Tensor]
) -> None:
    made = on(folders, tmp_path)
    with pytest.raises(NotApplicable, match="padded, or too short"):
        measure_padding_invariance(Subject(made.adapter, made.base, inputs))


def test_overflow_without_any_padding(subject: Subject) -> None:
    adapter = tiny.rewrite_weights(subject.adapter, lambda t: {k: v * 1e30 for k, v in t.items()})
    with pytest.raises(NotApplicable, match=r"not finite in torch\.float32 even without padding"):
        measure_padding_invariance(Subject(adapter, subject.base))


def test_a_base_that_ignores_the_mask_says_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"target_modules": ["query"], "task_type": None}
    subject = on(folders, tmp_path, "bert", **options)
    ignore_the_mask(monkeypatch, transformers.BertModel)
    measured = measure_padding_invariance(subject)
    assert set(ratios(measured)) == {BATCHED}
    assert f"{LEFT}: the base model itself is not invariant; left out" in measured.notes
    assert f"{RIGHT}: the base model itself is not invariant; left out" in measured.notes


def test_a_base_that_mixes_its_rows_says_nothing_at_all(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = on(folders, tmp_path)
    forward = transformers.LlamaModel.forward

    def mixing(self: Any, *args: Any, **options: Any) -> Any:
        result = forward(self, *args, **options)
        result.last_hidden_state = result.last_hidden_state - result.last_hidden_state.mean((0, 1))
        return result

    monkeypatch.setattr(transformers.LlamaModel, "forward", mixing)
    with pytest.raises(NotApplicable, match="own answers depend on padding and batch size"):
        measure_padding_invariance(subject)


def ignore_the_mask(monkeypatch: pytest.MonkeyPatch, cls: Any, *, adapted: bool = False) -> None:
    forward = cls.forward

    def faulty(self: Any, *args: Any, **options: Any) -> Any:
        wrapped = any(hasattr(module, "lora_A") for module in self.modules())
        if not adapted or wrapped:
            options.pop("attention_mask", None)
        return forward(self, *args, **options)

    faulty.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(cls, "forward", faulty)


# ---------------------------------------------------------------------------- faults


def test_an_adapted_model_that_ignores_the_mask(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = on(folders, tmp_path)
    ignore_the_mask(monkeypatch, transformers.LlamaModel, adapted=True)
    measured = measure_padding_invariance(subject)
    assert measured.value == math.inf
    # On the right a causal model sees no padding, so it may ignore it.
    assert [p.where for p in measured.problems] == [f"row 2, {LEFT}", f"row 3, {LEFT}"]
    assert "with other tokens at padded positions: " in measured.problems[0].found
    assert ratios(measured)[RIGHT] < 1 < 1e3 < ratios(measured)[LEFT]
    assert measured.details["layouts"][LEFT]["base"] < 1  # type: ignore
    assert subject.base.verify() == ()
    with pytest.raises(CheckFailed, match="row 2, padded on the left: with other tokens"):
        assert_padding_invariance(subject, bound=1e9)


def test_a_padded_position_that_leaks_into_real_ones(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delta that is centred along the sequence, padding included."""

    def centred(layer: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result - deltas(layer, x).mean(1, keepdim=True)

    spoil(monkeypatch, centred)
    measured = measure_padding_invariance(subject)
    places = [problem.where for problem in measured.problems]
    assert places == [f"row {row}, {side}" for row, side in enumerate((RIGHT, RIGHT, LEFT, LEFT))]
    assert ratios(measured)[BATCHED] < 1


@pytest.mark.parametrize("row", [0, 2])
def test_a_row_that_leaks_into_another(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    """Each row's delta also gets a little of the one before (or behind) it."""

    def mixed(layer: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        delta = deltas(layer, x)
        other = torch.zeros_like(delta)
        if row:
            other[1:] = delta[:-1]
        else:
            other[:-1] = delta[1:]
        return result + 1e-3 * other

    spoil(monkeypatch, mixed)
    measured = measure_padding_invariance(subject)
    assert measured.value == math.inf
    leaks = {problem.where: problem.found for problem in measured.problems}
    assert "with other tokens at the other row" in leaks[f"row {row}, {BATCHED}"]
    assert f"row {2 - row}, {BATCHED}" not in leaks


def test_a_scale_that_depends_on_the_number_of_rows(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing leaks, so only the comparison with the row alone can tell."""

    def divided(layer: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result + 1e-3 * deltas(layer, x) * len(x)

    spoil(monkeypatch, divided)
    measured = measure_padding_invariance(subject)
    assert measured.problems == ()
    assert all(ratio > 1 for ratio in ratios(measured).values())
    assert 1 < measured.value < math.inf
    assert measured.where is not None
    assert "against itself alone: RMS" in measured.where
    with pytest.raises(CheckFailed, match=r"a row of [0-9]+ tokens"):
        assert_padding_invariance(subject)


def test_left_padding_that_shifts_positions(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapted model drops the positions it is given, as PeftModelForQuestionAnswering does."""
    subject = on(folders, tmp_path, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    forward = transformers.GPT2Model.forward

    def faulty(self: Any, *args: Any, **options: Any) -> Any:
        if any(hasattr(module, "lora_A") for module in self.modules()):
            options.pop("position_ids", None)
        return forward(self, *args, **options)

    monkeypatch.setattr(transformers.GPT2Model, "forward", faulty)
    measured = measure_padding_invariance(subject)
    assert measured.problems == ()
    assert ratios(measured)[RIGHT] < 1
    assert measured.value == ratios(measured)[LEFT] > 1e3
    assert measured.where is not None
    assert LEFT in measured.where
    assert "most at token" in measured.where


def test_not_a_number_is_not_invariant(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = on(folders, tmp_path)

    def broken(layer: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result / (len(x) == 1)

    spoil(monkeypatch, broken)
    measured = measure_padding_invariance(subject)
    assert not measured.value <= 1
    with pytest.raises(CheckFailed):
        assert_padding_invariance(subject)


def test_a_small_absolute_error_is_seen_in_half_precision_too(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = on(folders, tmp_path, dtype="bfloat16")

    def longer(layer: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return result * (1 + x.shape[1] / 100)

    spoil(monkeypatch, longer)
    measured = measure_padding_invariance(subject)
    assert measured.problems == ()
    assert ratios(measured)[BATCHED] < 1 < ratios(measured)[RIGHT]


# ---------------------------------------------------------------------------- the arithmetic


@given(st.integers(0, 999), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_noise_is_of_the_size_it_says(seed: int, dtype: torch.dtype) -> None:
    """Against what reordering one sum of k terms really does: never less, and a small multiple."""
    generator = torch.Generator().manual_seed(seed)
    k = 256
    x = torch.randn(64, k, generator=generator)
    w = torch.randn(k, 16, generator=generator)
    wide = x.double() @ w.double()
    order = torch.randperm(k, generator=generator)
    forth, back = (
        torch.zeros(64, 16),
        torch.zeros(64, 16),
    )
    for index in range(k):
        forth += x[:, index, None] * w[index]
        back += x[:, order[index], None] * w[order[index]]
    moved = float((forth.to(dtype).double() - back.to(dtype).double()).square().mean().sqrt())
    noisy = rounding.perturbed(wide.to(dtype), k, generator)
    noise = float((noisy.double() - wide.to(dtype).double()).square().mean().sqrt())
    assert moved <= noise


def test_what_is_left_alone_by_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    for value in (None, 3, torch.arange(4), torch.tensor(1.0)):
        assert rounding.perturbed(value, 4, generator) is value


def test_modules_that_return_tuples_get_noise_too() -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x * self.weight, None

    pair = Pair()
    with torch.no_grad(), rounding.rounding_noise(pair, 1):
        noisy, nothing = pair(torch.ones(3))
    assert nothing is None
    assert 0 < float((noisy - 1).abs().max()) < 1e-5
    assert not pair._forward_hooks
    assert torch.equal(pair(torch.ones(3))[0], torch.ones(3))


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"pad_token_id": 7}, 7), ({"eos_token_id": [4, 5]}, 4), ({"eos_token_id": 2}, 2),
     ({"pad_token_id": -1, "eos_token_id": None}, 0), ({"eos_token_id": 99_999}, 0)],
)  # fmt: skip
def test_the_padding_token(
    folders: dict[str, Path], tmp_path: Path, config: dict[str, Any], expected: int
) -> None:
    subject = on(folders, tmp_path)
    for name, value in {"pad_token_id": None, "eos_token_id": None, **config}.items():
        setattr(subject.base.module.config, name, value)
    assert padding._pad_token(subject) == expected


def test_a_model_short_of_positions(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.gpt2(n_positions=16)
    base = tiny.save_base(model, tmp_path / "b")
    adapter = tiny.save_adapter(
        model, tmp_path / "a", task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True
    )
    subject = Subject(adapter, load_base(base, adapter=adapter, device="cpu"))
    assert subject.inputs["input_ids"].shape[1] == 16
    assert padding._most_tokens(subject) == 11
    assert_padding_invariance(subject)
