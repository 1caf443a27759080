"""What faults of trainers, servers, exports and metrics are made from: a tiny Llama, an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pytest_lora.loading import quiet
from pytest_lora.subject import Subject
from timemachine.cases import llama, lora_config, on_disk

__all__ = [
    "TOKENS", "adamw", "base_at", "base_of", "configure", "fresh", "logits", "merged", "stepper",
    "subject_of", "wrapped",
]  # fmt: skip

TOKENS = torch.arange(3, 27).view(2, 12)


def subject_of(place: Path, *targets: str, net: Any = None, **options: Any) -> Subject:
    """A Llama and a trained adapter of it, on disk and read again, with tokens to probe them."""
    config = lora_config(*(targets or ("q_proj",)), task_type="CAUSAL_LM", **options)
    subject = on_disk(llama() if net is None else net, config, place)
    return Subject(subject.adapter, subject.base, {"input_ids": TOKENS})


def logits(model: Any) -> torch.Tensor:
    """What a model says of the tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def base_at(folder: Path) -> Any:
    """The model in a folder."""
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder)


def base_of(place: Path) -> Any:
    """The saved base model."""
    return base_at(place / "base")


def fresh(place: Path, adapter: Path | None = None) -> Any:
    """The saved base, with the adapter if one is given."""
    from peft import PeftModel

    with quiet():
        base = base_of(place)
        return base if adapter is None else PeftModel.from_pretrained(base, adapter)


def merged(place: Path) -> Path:
    """The adapter merged by PEFT and saved as a model of its own."""
    with quiet():
        fresh(place, place / "adapter").merge_and_unload().save_pretrained(place / "merged")
    return place / "merged"


def configure(folder: Path, **settings: Any) -> None:
    """Change settings of an adapter's configuration file."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def stepper(optimizer: torch.optim.Optimizer) -> Callable[[Any], torch.Tensor]:
    """One step on one batch, as everybody writes it."""

    def step(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def adamw(model: Any) -> torch.optim.Optimizer:
    """Over what the model says trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def wrapped(config: Any, name: str = "default", net: Any = None) -> Any:
    """A Llama with a fresh adapter."""
    from peft import get_peft_model

    with quiet():
        return get_peft_model(llama() if net is None else net, config, adapter_name=name)
