"""Whatever a configuration and tensor names hold, the file checks end in a verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

from adapter_maker import lora_config, lora_tensors, write_safetensors
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.adapter import lora_modules, read_adapter
from pytest_lora.checks.config import measure_config_matches_weights
from pytest_lora.checks.files import measure_adapter_files, measure_finite_weights
from pytest_lora.checks.serving import measure_serving_profile
from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.peft_tables import METHODS
from pytest_lora.records import Measurement

KEYS = sorted({key.partition("@")[0] for m in METHODS.values() for key in m.keys.split()})
PARTS = ["model", "layers", "0", "1", "q_proj", "lora_A", "lora_B", "weight", "bias", "default",
         "base_layer", "lora_embedding_A", "lora_magnitude_vector", "hada_w1_a", "base_model",
         "_orig_mod", "module", "embed_tokens", "token_adapter", "trainable_tokens_delta",
         "lm_head", "lora_diag", "ia3_l", "oft_R", "prompt_embeddings", ""]  # fmt: skip

words = st.sampled_from(["q_proj", "v_proj", "layers", ".*", "(", "all-linear", "none", "LORA", ""])
numbers = st.integers(-2, 9) | st.sampled_from([10**30, 0.5, -1.5, 1e300])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
configs = st.dictionaries(st.sampled_from(KEYS) | words, values, max_size=6)
names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=7).map(".".join)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("adapter")


def verdicts(folder: Path) -> list[Measurement]:
    adapter = read_adapter(folder)
    lora_modules(adapter)
    found: list[Measurement] = []
    for measure in (
        measure_adapter_files,
        measure_config_matches_weights,
        measure_finite_weights,
        lambda adapter: measure_serving_profile(adapter, targets=["vllm", "lorax"]),
    ):
        try:
            found.append(measure(adapter))
        except (CannotRun, NotApplicable):
            continue
    return found


def check(found: list[Measurement]) -> None:
    for measured in found:
        assert measured.value == len(measured.problems)
        plain = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
        assert Measurement.from_dict(plain).to_dict() == plain


@given(st.sampled_from([*METHODS, "LORA", "LORA", "LORAX"]), configs)
def test_any_configuration_gets_a_verdict(
    folder: Path, method: str, changes: dict[str, Any]
) -> None:
    write_safetensors(folder / "adapter_model.safetensors", lora_tensors())
    config = lora_config(peft_type=method, **{k: v for k, v in changes.items() if k != "peft_type"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    check(verdicts(folder))


@given(
    st.sampled_from([*METHODS, "LORA", "LORA"]),
    st.dictionaries(names, st.tuples(shapes, st.just(1.0)), max_size=5),
    configs,
)
def test_any_tensor_names_get_a_verdict(
    folder: Path,
    method: str,
    tensors: dict[str, tuple[tuple[int, ...], float]],
    changes: dict[str, Any],
) -> None:
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = lora_config(peft_type=method, **{k: v for k, v in changes.items() if k != "peft_type"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    check(verdicts(folder))


@given(values)
def test_any_json_is_a_configuration_of_sorts(folder: Path, config: Any) -> None:
    write_safetensors(folder / "adapter_model.safetensors", lora_tensors())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = verdicts(folder)
    check(found)
    assert found[0].value >= 1
