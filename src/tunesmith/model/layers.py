"""Per-layer values of a model's config."""

from __future__ import annotations

from typing import Any


def per_layer(value: Any, total: int) -> bool:
    """Whether a value of a config with `total` layers has an entry for each."""
    return isinstance(value, list | tuple) and len(value) == total


def cut_layers(config: Any, count: int) -> None:
    """Let a config speak of its first `count` layers only."""
    text = config.get_text_config()
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if per_layer(value, total):
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
