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


def layer_values(config: Any, name: str) -> list[Any]:
    """A value of each layer of a text configuration: one for all, a list, or what transformers
    keeps apart as `per_layer_config`. None where a layer has none.
    """
    count = int(config.num_hidden_layers)
    if getattr(config, "is_heterogeneous", False):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    value: Any = getattr(config, name, None)
    return list(value) if per_layer(value, count) else [value] * count


def attention_width(config: Any) -> int:
    """Query heads times head size, added up over the layers."""
    heads = [int(n or 1) for n in layer_values(config, "num_attention_heads")]
    sizes = layer_values(config, "head_dim")
    hidden = int(config.hidden_size)
    return sum(n * int(size or hidden // n) for n, size in zip(heads, sizes, strict=True))
