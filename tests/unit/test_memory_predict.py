"""Predictions for a GPU: what they say, how they move, what they refuse."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
torch = pytest.importorskip("torch")

import memory_cases as cases  # noqa: E402
from stack import follows_autocast, since  # noqa: E402

from pytest_lora.errors import CannotRun, UsageError  # noqa: E402
from pytest_lora.memory.accounting import account_adapter  # noqa: E402
from pytest_lora.memory.depth import period  # noqa: E402
from pytest_lora.memory.predict import make_workload, predict_memory  # noqa: E402
from pytest_lora.memory.profiles import CLASSES, PROFILES, find_profile  # noqa: E402
from pytest_lora.memory.records import Fit, MemoryPrediction, NotPredictable  # noqa: E402

MIB = 1 << 20
STEP: dict[str, Any] = {"batch": 2, "sequence": 64}


def predict(config: Any = None, adapter: Any = None, **options: Any) -> MemoryPrediction:
    adapter = cases.lora() if adapter is None else adapter
    return predict_memory(config or cases.llama(), adapter, **{**STEP, **options})


def test_a_prediction_adds_up_and_survives_json() -> None:
    found = predict()
    assert sum(found.peak.by_category.values()) == found.peak.live
    assert found.allocated is not None
    assert found.reserved is not None
    assert found.peak.live <= found.allocated <= found.reserved
    assert found.predicted == found.allocated + found.workspaces
    again = MemoryPrediction.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found


def test_it_repeats_to_the_byte() -> None:
    first, second = predict(), predict()
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)


def test_it_leaves_torch_as_it_was() -> None:
    import torch.nn.functional as F

    names = ("scaled_dot_product_attention", "dropout", "rms_norm")
    before = [getattr(F, name) for name in names]
    autocast = torch.autocast
    predict(adapter=cases.lora(lora_dropout=0.1))
    assert [getattr(F, name) for name in names] == before
    assert torch.autocast is autocast


def live(**options: Any) -> int:
    return predict(**options).peak.live


def test_what_takes_more_is_predicted_to_take_more() -> None:
    plain = live(padding="none")
    assert live(padding="none", batch=3) > plain
    assert live(padding="none", attention="eager") > plain
    assert live(padding="none", adapter=cases.lora(r=32)) > plain
    assert live(padding="none", adapter=cases.lora(use_dora=True)) > plain
    assert live(padding="none", dtype="float32") > plain
    assert live(padding="none", adapter_dtype="bfloat16") < plain
    assert live(padding="none", checkpointing=True) < plain


@since("repeats the key heads itself", transformers=(5, 0))
def test_kernels_follow_from_the_inputs() -> None:
    assert predict(padding="none").kernels == {"flash": 3}
    assert predict(padding="padded").kernels == {"efficient": 3}
    assert predict(padding="none", dtype="float32").kernels == {"math": 3}, "fewer key heads"
    assert "native dropout" in predict(adapter=cases.lora(lora_dropout=0.1)).kernels


def test_a_ceiling_has_three_outcomes() -> None:
    found = predict()
    assert found.fit(found.at_most) is Fit.FITS
    assert found.fit(found.at_most - 1) is Fit.TOO_CLOSE
    assert found.fit(found.predicted) is Fit.TOO_CLOSE
    assert found.fit(found.predicted - 1) is Fit.DOES_NOT_FIT
    assert found.fit() is Fit.FITS, "the card's own memory"


def test_the_card_decides_workspaces_and_room() -> None:
    small, large = predict(profile="24gb"), predict(profile="h200-141gb")
    assert small.workspaces < large.workspaces
    assert small.usable < large.usable
    assert small.peak.live == large.peak.live


@pytest.mark.parametrize(("wrong", "near"), [("h100-80", "h100-80gb"), ("rtx4090", "rtx4090-24gb")])
def test_an_unknown_card_is_told_its_neighbour(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{near}'"):
        find_profile(wrong)


def test_a_class_is_its_tightest_card() -> None:
    for name, card in (("24gb", "l4-24gb"), ("80GB", "h100-80gb")):
        assert find_profile(name) is PROFILES[card]
    for kind in ("24gb", "80gb"):
        of_kind = [card for name, card in PROFILES.items() if name.endswith(kind)]
        assert find_profile(kind).usable == min(card.usable for card in of_kind)


def test_the_table_of_cards_in_the_docs_is_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text("utf-8")
    for card in PROFILES.values():
        classes = ", ".join(f"`{name}`" for name, found in CLASSES.items() if found == card.name)
        assert f"| `{card.name}` | {classes} | {card.usable / 2**30:.2f} |" in page


# ------------------------------------------------------------------------------------ refusals


def test_a_step_that_reads_a_value_is_refused_by_name() -> None:
    def step(model: Any, optimizer: Any, batches: Any) -> None:
        loss = model(**batches[0]).loss
        if loss.item() > 0:
            loss.backward()

    with pytest.raises(NotPredictable, match="reads the value of a float32 tensor"):
        predict(step=step)


def test_a_step_under_autocast_of_another_device_is_refused_by_name() -> None:
    def step(model: Any, optimizer: Any, batches: Any) -> None:
        with torch.autocast("xpu", dtype=torch.bfloat16):
            model(**batches[0]).loss.backward()

    with pytest.raises(NotPredictable, match=r"runs under torch\.autocast\('xpu'\)"):
        predict(step=step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer 'lion' is none of"),
        ({"padding": "left"}, "padding 'left' is none of"),
        ({"checkpointing": "on"}, "checkpointing 'on' is none of"),
        ({"quantisation": "int3"}, "quantisation 'int3' is none of"),
        ({"autocast": "int8"}, "autocast 'int8' is neither bfloat16 nor float16"),
        ({"autocast": "auto"}, "autocast 'auto' is neither bfloat16 nor float16"),
        ({"dtype": "auto"}, "dtype"),
        ({"dtype": "bf8"}, "bf8"),
        ({"batch": 0}, "batch 0 is not a positive whole number"),
        ({"accumulation": -1}, "accumulation -1"),
        ({"batch": True}, "batch True is not a positive whole number"),
        ({"margin": 1.5}, "margin 1.5"),
        ({"margin": "5%"}, "margin '5%' is not a share"),
        ({"checkpointing": None}, "checkpointing None"),
        ({"profile": None}, "not None"),
        ({"clip": 0}, "clip 0 is not a positive number"),
        ({"clip": "1"}, "clip '1' is not a positive number"),
        ({"task": "CAUSAL"}, "task 'CAUSAL' is none of"),
        ({"optimizer": None}, "optimizer None is neither a name nor a function"),
        ({"inputs": 3}, "a mapping from names to tensors"),
        ({"inputs": {"input_ids": [[1]]}}, "a mapping from names to tensors"),
        ({"inputs": {"input_ids": torch.ones(1, 4, dtype=torch.long)}}, "does it have labels"),
        ({"new_tokens": 4}, "new_tokens belongs to job='inference', not to 'train_step'"),
        ({"job": "merge", "new_tokens": 4}, "new_tokens belongs to job='inference'"),
        ({"job": "inference", "checkpointing": True}, "checkpointing belongs to job='train_step'"),
        ({"job": "load", "optimizer": "sgd"}, "optimizer belongs to job='train_step'"),
        ({"job": "inference", "clip": 1.0}, "clip belongs to job='train_step'"),
    ],
)
def test_arguments_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predict(**options)


def test_a_load_needs_an_adapter() -> None:
    with pytest.raises(UsageError, match="name the adapter"):
        predict_memory(cases.llama(), None, job="load")


def _few_positions() -> Any:
    from transformers import GPT2Config

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    return GPT2Config(**sizes, n_positions=16, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize(
    ("config", "options", "rows"),
    [
        (_few_positions, {"sequence": 20}, "row 19 of a table that has 16"),
        (cases.llama, {"inputs": {"input_ids": torch.tensor([[-1]])}}, "row -1 of a table"),
    ],
)
def test_rows_a_table_has_not_are_asked_for_in_vain(
    config: Any, options: dict[str, Any], rows: str
) -> None:
    """A device stops there; without one the prediction would be that of a step nobody can run."""
    adapter = cases.lora(target_modules="all-linear")
    with pytest.raises(UsageError, match=rows):
        predict(config(), adapter, **options)


def test_a_step_that_does_nothing_has_no_memory_to_predict() -> None:
    with pytest.raises(UsageError, match="ran no operator"):
        predict(step=lambda model, optimizer, batches: None)


def test_what_does_not_run_without_a_device_is_refused_by_name() -> None:
    with pytest.raises(NotPredictable, match="cannot be traced without a device"):
        predict(attention="flex_attention")
    with pytest.raises(ZeroDivisionError):  # the user's own code keeps its own traceback
        predict(step=lambda model, optimizer, batches: 1 // 0)


def test_configurations_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not 5"):
        predict(config=5)
    with pytest.raises(UsageError, match="an adapter is"):
        predict(adapter=5)
    with pytest.raises(UsageError, match=r"adapter_config\.json: missing"):
        predict(adapter=tmp_path / "none")
    with pytest.raises(CannotRun, match=r"config\.json"):
        predict(config=tmp_path)


def test_a_model_that_cannot_be_built_is_refused_by_name() -> None:
    with pytest.raises(NotPredictable, match="cannot be built"):
        predict(adapter=cases.lora(target_modules=["no_such_module"]))


def test_nothing_to_train_is_refused() -> None:
    empty = cases.lora(layers_to_transform=[2], inference_mode=True)
    with pytest.raises(NotPredictable, match="trainable"):
        predict(adapter=empty)


def test_models_and_adapters_come_from_folders_too(tmp_path: Path) -> None:
    cases.llama().save_pretrained(tmp_path / "base")
    config = cases.lora(target_modules=["q_proj"])
    config.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    by_path = predict(tmp_path / "base", str(tmp_path / "adapter"))
    assert by_path.peak.live == predict(adapter=config).peak.live


# --------------------------------------------------------------------------------------- steps


def test_the_users_own_step_is_traced() -> None:
    def keeps_outputs(model: Any, optimizer: Any, batches: Any) -> None:
        outputs = model(**batches[0])
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    logits = 2 * 64 * 2000 * 2
    own = predict(step=keeps_outputs)
    assert own.peak.live - live() >= logits, "the outputs hold the logits during backward"
    assert own.request["step"] == "custom"


def test_the_users_own_optimizer_is_taken() -> None:
    own = predict(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    assert own.peak.live == live(optimizer="sgd")


def test_the_users_own_batch_is_taken() -> None:
    ids = torch.arange(128).view(2, 64)
    own = predict(inputs={"input_ids": ids, "labels": ids})
    assert own.peak.live == live(padding="none")


# ------------------------------------------------------------------------------ bitsandbytes


def test_eight_bit_states_are_those_of_the_paper() -> None:
    """Two bytes an element, two float32 for each 256, tables shared; small ones in float32."""
    pytest.importorskip("bitsandbytes")
    adapter = cases.lora(r=64)
    held = account_adapter(cases.llama(), adapter, optimizer="adamw_8bit").adapter
    sizes = [64 * width for layer in SIDES.values() for width in layer] * 3  # layers
    large, small = [n for n in sizes if n >= 4096], [n for n in sizes if n < 4096]
    tables = 2 * 256 * 4
    expected = sum(2 * n + 2 * 4 * -(-n // 256) for n in large) + sum(8 * n for n in small)
    assert held.optimizer == expected + tables
    assert held.parameters == sum(sizes)


SIDES = {
    "q": (128, 128), "k": (128, 32), "v": (128, 32), "o": (128, 128),
    "gate": (128, 344), "up": (128, 344), "down": (344, 128),
}  # fmt: skip


def a_step(model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[Any]) -> None:
    """The step that is predicted where none is given, as a user would write it."""
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_paged_states_are_told_apart_from_what_is_counted() -> None:
    """In managed memory is what is large, and the two together are what the plain one takes."""
    pytest.importorskip("bitsandbytes")
    step = {"adapter": cases.lora(r=512), "padding": "none"}
    plain = predict(optimizer="adamw_8bit", **step)
    paged = predict(optimizer="paged_adamw_8bit", **step)
    large = [512 * width for layer in SIDES.values() for width in layer if 512 * width >= 100_000]
    assert paged.managed == 2 * sum(large) * 3
    assert paged.peak.live + paged.managed == plain.peak.live
    assert plain.managed == 0
    assert any("paged optimizer states" in line for line in paged.lines())
    again = MemoryPrediction.from_dict(json.loads(json.dumps(paged.to_dict())))
    assert again.managed == paged.managed
    mine = predict(optimizer="paged_adamw_8bit", step=a_step, **step)
    assert (mine.peak.live, mine.managed) == (paged.peak.live, paged.managed)
    deep = cases.llama(num_hidden_layers=13)
    traced = predict(deep, optimizer="paged_adamw_8bit", extrapolate=True, **step)
    assert traced.method == "traced whole"


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for options in ({"optimizer": "adamw_8bit"}, {"quantisation": "nf4"}):
        with pytest.raises(CannotRun, match=r"pytest-lora\[quantised\]") as missing:
            predict(**options)
        assert missing.value.missing


# --------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "none"},
        {"checkpointing": True, "clip": 1.0},
        {"optimizer": "adamw_loop", "accumulation": 2, "dtype": "float32"},
        pytest.param({"autocast": "bfloat16", "padding": "none"}, marks=follows_autocast()),
    ],
    ids=str,
)
def test_three_shallow_models_give_the_deep_one_to_the_byte(options: dict[str, Any]) -> None:
    config = cases.llama(num_hidden_layers=13)
    whole = predict(config, **options)
    shallow = predict(config, extrapolate=True, **options)
    assert "extrapolated" in shallow.method
    assert (shallow.allocated, shallow.reserved) == (None, None)
    assert shallow.kernels == whole.kernels
    for name in ("live", "by_category", "op", "phase", "phases"):
        assert getattr(shallow.peak, name) == getattr(whole.peak, name), name


@pytest.mark.parametrize(
    "adapter",
    [
        cases.lora(layers_to_transform=[0, 7]),
        cases.lora(rank_pattern={r"layers\.3\.self_attn\.q_proj": 32}),
    ],
    ids=["some layers", "one layer's rank"],
)
def test_layers_that_differ_are_traced_whole(adapter: Any) -> None:
    found = predict(cases.llama(num_hidden_layers=13), adapter, extrapolate=True)
    assert found.method == "traced whole"


def test_shallow_models_are_traced_whole() -> None:
    assert predict(extrapolate=True).method == "traced whole"


@since("has no Gemma 3", transformers=(4, 50))
def test_the_period_is_that_of_the_layer_types() -> None:
    import transformers

    gemma = transformers.Gemma3TextConfig(**{**cases.GROUPED, "num_hidden_layers": 20}, head_dim=16)
    options = {"dtype": "bfloat16", "batch": 1, "sequence": 8}
    assert period(make_workload(gemma, cases.everywhere(), **options)) == 6
    assert period(make_workload(cases.llama(num_hidden_layers=9), cases.lora(), **options)) == 1
