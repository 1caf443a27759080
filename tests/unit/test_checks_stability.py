"""dtype_stability: sound adapters keep their drift, and one that overflows float16 is found."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny
import torch
from example import EXAMPLE, FIXTURES, NEEDS_EXAMPLE

from pytest_lora import loading
from pytest_lora.adapter import read_adapter
from pytest_lora.assertions import assert_dtype_stability
from pytest_lora.checks import stability
from pytest_lora.checks.stability import measure_dtype_stability
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.records import Measurement
from pytest_lora.subject import BaseModel, Subject, load_base

Make = Callable[..., Subject]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(change: Any = None, dtype: str = "float32", **options: Any) -> Subject:
        base = tiny.save_base(tiny.llama(), tmp_path / "base")
        options = {"task_type": "CAUSAL_LM", **options}
        adapter = tiny.save_adapter(tiny.llama(), tmp_path / "adapter", **options)
        if change is not None:
            adapter = tiny.rewrite_weights(adapter, change)
        return Subject(adapter, load_base(base, adapter=adapter, device="cpu", dtype=dtype))

    return make


def formats(measured: Measurement) -> Any:
    return measured.details["formats"]


def overflowing(tensors: dict[str, Any]) -> None:
    """What float32 carries easily: the delta's outputs are in the millions."""
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor *= 1e7


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["up_proj", "down_proj"], "use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_a_sound_adapter_passes(make: Make, options: dict[str, Any]) -> None:
    subject = make(**options)
    measured = assert_dtype_stability(subject)
    assert 0 <= measured.value < 1
    assert measured.count == 46
    for name in ("bfloat16", "float16"):
        row = formats(measured)[name]
        assert row["change"] < row["rounding_bound"]
        assert row["agreement_base"] > 0.8
        assert row["drift"] == pytest.approx(formats(measured)["float32"]["drift"], abs=0.1)
    assert subject.base.verify() == ()


def test_an_adapter_that_overflows_float16_fails(make: Make) -> None:
    subject = make(overflowing, target_modules=["up_proj", "down_proj"])
    with pytest.raises(CheckFailed) as failed:
        assert_dtype_stability(subject)
    measured = failed.value.result.measurement
    assert measured is not None
    assert measured.value == math.inf
    assert "float16: with the adapter the likelihood of" in str(measured.where)
    assert formats(measured)["float16"]["change"] == "inf"
    assert formats(measured)["bfloat16"]["change"] != "inf"
    assert "float16" in str(failed.value)


def test_it_fails_in_nats_just_the_same(make: Make) -> None:
    subject = make(overflowing, target_modules=["up_proj", "down_proj"])
    with pytest.raises(CheckFailed):
        assert_dtype_stability(subject, max_change=100.0)


def cancelling(tensors: dict[str, Any]) -> None:
    """Two halves of the rank (of 4) that cancel up to digits only float32 has."""
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor[2:] = tensor[:2]
        if "lora_B" in name:
            tensor[:, 2:] = tensor[:, :2] - 1e3
            tensor[:, :2] = 1e3


def test_an_effect_in_digits_a_format_has_not_is_seen(make: Make) -> None:
    """Cast to 8 or 11 bits the small part is gone, and with it what the adapter does."""
    sound = measure_dtype_stability(make(), in_nats=True)
    subject = make(cancelling)  # takes the place of the sound one on disk
    measured = measure_dtype_stability(subject, in_nats=True)
    assert measured.unit == "nats per token"
    assert measured.value > 3 * sound.value
    with pytest.raises(CheckFailed):
        assert_dtype_stability(subject, max_change=sound.value)


def test_a_change_below_what_the_user_allows_passes(make: Make) -> None:
    measured = assert_dtype_stability(make(), max_change=1.0)
    assert measured.unit == "nats per token"
    changes = [formats(measured)[name]["change"] for name in ("bfloat16", "float16")]
    assert measured.value == max(changes)


def test_a_bound_and_a_change_are_not_both_given(make: Make) -> None:
    with pytest.raises(UsageError, match="not both"):
        assert_dtype_stability(make(), max_change=1.0, bound=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_is_one_copy_of_the_model_at_a_time(
    make: Make, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make(dtype=dtype)
    load, seen = loading.load_weights, [weakref.ref(subject.base.module)]

    def watched(*arguments: Any) -> Any:
        assert seen[-1]() is None, "the old weights are still there"
        loaded = load(*arguments)
        seen.append(weakref.ref(loaded.module))
        return loaded

    monkeypatch.setattr(loading, "load_weights", watched)
    before = subject.base.state()
    measured = measure_dtype_stability(subject)
    assert measured.value < 1
    assert len(seen) == 4  # two other formats, and back
    assert subject.base.dtype == getattr(torch, dtype)
    assert subject.base.state() == before
    assert subject.base.verify() == ()


def test_the_base_is_given_back_after_a_failure(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make()
    before, run = subject.base.state(), stability._run

    def stop(subject: Subject, windows: Any) -> Any:
        if subject.base.dtype == torch.float16:
            raise KeyboardInterrupt
        return run(subject, windows)

    monkeypatch.setattr(stability, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        measure_dtype_stability(subject)
    assert subject.base.dtype == torch.float32
    assert subject.base.state() == before


def test_the_same_question_gets_the_same_answer(make: Make) -> None:
    subject = make()
    assert measure_dtype_stability(subject) == measure_dtype_stability(subject)


def test_the_drift_is_what_a_plain_loop_says(make: Make) -> None:
    subject = make()
    measured = measure_dtype_stability(subject)
    ids = subject.inputs["input_ids"]
    means = []
    for model in (subject.model, None):
        if model is None:
            subject.release()
        with torch.inference_mode():
            logits = (model or subject.base.module)(input_ids=ids).logits.double()
        flat = logits[:, :-1].flatten(0, 1)
        means.append(torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten()).item())
    assert formats(measured)["float32"]["drift"] == pytest.approx(means[0] - means[1], abs=1e-6)


@NEEDS_EXAMPLE
def test_texts_are_scored_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "WINDOW", 8)
    adapter = read_adapter(EXAMPLE)
    subject = Subject(adapter, load_base(FIXTURES / "base", adapter=adapter, device="cpu"))
    measured = measure_dtype_stability(subject, ["the cat sat on the mat and slept"], max_tokens=11)
    assert measured.count == 7 + 2
    assert measured.value < 1


def test_noise_leaves_weights_and_hooks_as_they_were(make: Make) -> None:
    subject = make()
    model = subject.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    quiet = subject.output()
    with stability._noise(model, stability._names(subject), torch.bfloat16, 0):
        noisy = subject.output()
    assert 0 < (noisy - quiet).abs().max() < 1
    assert torch.equal(subject.output(), quiet)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() == addresses[name]


def test_noise_is_the_same_on_shared_modules_and_differs_between_draws(make: Make) -> None:
    """An adapter without effect would else get a drift from noise alone."""

    def zeroed(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    subject = make(zeroed)
    names = stability._names(subject)
    outputs = []
    for draw in (0, 0, 1):
        with stability._noise(subject.model, names, torch.float16, draw):
            outputs.append(subject.output())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    with subject.base.bare() as module, stability._noise(module, {}, torch.float16, 0):
        plain = subject.output(module)
    shared = (outputs[0] - plain).abs().mean()
    assert shared < (outputs[0] - outputs[2]).abs().mean()


def test_the_quantile_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert stats.t.ppf(1 - 0.0005 / 2, stability.DRAWS) == pytest.approx(
        stability.QUANTILE, abs=1e-3
    )


# --------------------------------------------------------------------------------- no verdict


def test_a_base_that_overflows_by_itself_says_nothing_about_the_adapter(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, side = make(), stability._side

    def lossy(model: Any, windows: Any) -> Any:
        found = side(model, windows)
        if next(model.parameters()).dtype == torch.float16:
            found.losses[0] = math.nan
        return found

    monkeypatch.setattr(stability, "_side", lossy)
    measured = measure_dtype_stability(subject)
    assert measured.value < 1
    assert "float16" not in formats(measured)
    assert "float16: the base model's own likelihood is not finite" in measured.notes[0]


def test_a_format_the_device_does_not_compute_in_is_noted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, refused = stability._run, {torch.float16}

    def picky(subject: Subject, windows: Any) -> Any:
        if subject.base.dtype in refused:
            raise CannotRun("addmm is not implemented for it")
        return run(subject, windows)

    monkeypatch.setattr(stability, "_run", picky)
    measured = measure_dtype_stability(make())
    assert measured.notes == ("float16: addmm is not implemented for it",)
    refused.add(torch.bfloat16)
    with pytest.raises(CannotRun, match=r"bfloat16: .*; float16: ") as error:
        measure_dtype_stability(make())
    assert error.value.missing


def test_an_adapted_model_that_is_not_finite_in_float32_has_no_drift(make: Make) -> None:
    def endless(tensors: dict[str, Any]) -> None:
        for tensor in tensors.values():
            tensor *= 1e30

    with pytest.raises(NotApplicable, match="not finite in float32"):
        measure_dtype_stability(make(endless))


def test_a_base_that_was_passed_in_cannot_be_read_again(make: Make) -> None:
    subject = make()
    given = BaseModel.from_module(tiny.llama())
    with pytest.raises(CannotRun, match="passed in, not loaded") as error:
        measure_dtype_stability(Subject(subject.adapter, given))
    assert error.value.missing


def test_other_models_than_causal_ones_are_not_asked(tmp_path: Path) -> None:
    base = tiny.save_base(tiny.bert(), tmp_path / "base")
    adapter = tiny.save_adapter(
        tiny.bert(), tmp_path / "adapter", target_modules=["query"], task_type="FEATURE_EXTRACTION"
    )
    with pytest.raises(NotApplicable, match="causal language model"):
        measure_dtype_stability(Subject(adapter, load_base(base, adapter=adapter, device="cpu")))


def test_texts_need_a_tokenizer_and_two_tokens(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make()
    with pytest.raises(CannotRun, match="no tokenizer"):
        measure_dtype_stability(subject, ["a text"])
    monkeypatch.setattr(
        BaseModel, "tokenizer", property(lambda _: lambda text: {"input_ids": [1] * len(text)})
    )
    with pytest.raises(UsageError, match="no text of two tokens"):
        measure_dtype_stability(subject, ["a", ""])
