"""Train a LoRA adapter on word problems.

    python train.py --out adapters/problems

The same seed, libraries and processor give the same adapter; no accelerator is needed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "../../fixtures/base"
IGNORED = -100


def main() -> None:
    """Read the texts, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=BASE, help="folder or hub id of the base model")
    parser.add_argument("--data", type=Path, default=Path("data/train.jsonl"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    torch.manual_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(given.base)
    base = AutoModelForCausalLM.from_pretrained(given.base)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.learning_rate, given.steps)

    lines = given.data.read_text(encoding="utf-8").splitlines()
    rows = [encode(tokenizer, json.loads(line)["text"]) for line in lines]
    drawn = random.Random(given.seed)
    model.train()
    for step in range(1, given.steps + 1):
        loss = model(**batch_of(drawn.sample(rows, given.batch), tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == given.steps:
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(given.out)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens between BOS and EOS."""
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id]


def batch_of(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to one length, padding kept out of the loss."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


if __name__ == "__main__":
    main()
