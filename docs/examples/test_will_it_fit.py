"""Will this fit on a 24 GB card?  Llama-3-8B with LoRA, four ways, three batch sizes, no GPU.

    python -m pytest -s docs/examples/test_will_it_fit.py

Nothing is downloaded and no weights are made; each prediction takes about a second.  The tests fail
where the table in docs/memory.md is no longer what is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

from pytest_lora.memory.predict import predict_memory

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCHES = (1, 2, 4)

FITS = {
    "plain": (False, False, False),
    "checkpointed": (True, True, False),
    "DoRA": (False, False, False),
    "QLoRA, checkpointed": (True, True, True),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"checkpointing": True},
    "DoRA": {},
    "QLoRA, checkpointed": {"checkpointing": True, "quantisation": "nf4"},
}


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, list[str]]]:
    """Gathers the cells and prints them as a Markdown table in the end."""
    rows: dict[str, list[str]] = {}
    yield rows
    print("\n\n| 1024 tokens a row | 1 row | 2 rows | 4 rows |\n| --- | --- | --- | --- |")
    for way, cells in rows.items():
        print(f"| {way} | {' | '.join(cells)} |")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("way", WAYS)
def test_it_fits_as_documented(way: str, batch: int, table: dict[str, list[str]]) -> None:
    """On the tightest card of the class; "too close to call" is not a fit."""
    if "QLoRA" in way:
        pytest.importorskip("bitsandbytes")
    found = predict_memory(
        LLAMA_3_8B,
        LoraConfig(r=16, target_modules=EVERY, use_dora=way == "DoRA", task_type="CAUSAL_LM"),
        batch=batch,
        sequence=1024,
        profile="24gb",
        extrapolate=True,
        **WAYS[way],
    )
    table.setdefault(way, []).append(f"{found.predicted / 2**30:.1f} GiB, {found.fit()}")
    assert (found.fit() == "fits") == FITS[way][BATCHES.index(batch)]
