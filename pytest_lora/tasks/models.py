"""What a language model says about itself that prompts have to respect."""

from __future__ import annotations

from typing import Any

__all__ = ["known_tokens", "text_config", "window"]


def text_config(module: Any) -> Any:
    """The configuration of the part of a model that reads text; None where there is none."""
    config = getattr(module, "config", None)
    nested = getattr(config, "get_text_config", None)
    return config if nested is None else nested()


def window(module: Any) -> int:
    """Tokens the model can see at once; practically unlimited where it names no limit."""
    limit = getattr(text_config(module), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 1 << 30


def known_tokens(module: Any) -> int:
    """Rows of the input embedding."""
    rows: int = module.get_input_embeddings().weight.shape[0]
    return rows
