"""Training loops on tiny models, sound ones; the tests break one thing at a time in them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from tiny import cnn, image, llama, wrap

from pytest_lora.loading import quiet

TARGETS = ["q_proj", "v_proj"]


def config(**changes: Any) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    if not set(changes) <= {field.name for field in dataclasses.fields(LoraConfig)}:
        pytest.skip(f"PEFT {peft.__version__} has no LoraConfig with {sorted(changes)}")
    return LoraConfig(**{**options, **changes})


def adapted(**changes: Any) -> Any:
    """A fresh adapter on a tiny Llama."""
    torch.manual_seed(0)
    return wrap(llama(), config(**changes))


def texts(rows: int = 4, length: int = 12, seed: int = 5) -> dict[str, torch.Tensor]:
    """Token ids and labels; rows of unequal length, their ends masked in the labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, length - 2 * row : length] = -100
    return {"input_ids": ids, "labels": labels}


def adamw(model: Any, lr: float = 5e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def train_step(
    optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor] | None = None, sign: float = 1
) -> Callable[[Any], torch.Tensor]:
    """One step on one batch, as everybody writes it."""
    data = texts() if batch is None else batch

    def step(model: Any) -> torch.Tensor:
        model.train()
        loss = loss_of(model, data)
        (sign * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def backward(model: Any) -> torch.Tensor:
    """Forward and backward, no optimizer."""
    loss = loss_of(model, texts())
    loss.backward()
    return loss


def adapted_cnn() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """LoRA on the convolution of a network with a batch norm, and a step for it."""
    model = wrap(cnn(), LoraConfig(r=2, lora_alpha=4, target_modules=["conv"]))
    optimizer, batch = adamw(model), image()

    def step(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step


def built_from_seed(seed: int) -> Any:
    """A model whose every number follows from the seed."""
    base = llama()
    torch.manual_seed(seed)
    return wrap(base, config())


def seeded_too_late(seed: int) -> Any:
    """The seed comes after the adapter was drawn."""
    base = llama()
    torch.seed()
    model = wrap(base, config())
    torch.manual_seed(seed)
    random.seed(seed)
    return model


def built_from_hash(seed: int) -> Any:
    """Each initial value follows from a string's hash, which is another one in each process."""
    base = llama()
    torch.manual_seed(seed + hash("adapter") % 1000)
    return wrap(base, config())


def trainer(model: Any, folder: Any, **changes: Any) -> Any:
    """A transformers Trainer on a few rows of :func:`texts`."""
    import transformers

    data = texts(rows=6)
    rows = [{key: value[row] for key, value in data.items()} for row in range(6)]
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
        **changes,
    }
    with quiet():
        arguments = transformers.TrainingArguments(**options)
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)
