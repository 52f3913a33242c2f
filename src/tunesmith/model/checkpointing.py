"""Which activations the backward pass finds and which it computes again.

The decoder's layers are transformers' checkpointing layers: each has a flag and the function that
wraps its forward. Both are set here and not by the model's own switch, which would also let the
embedding ask for a gradient that nobody needs. Modes: `none`; `layers`, every layer keeps its input
only; a number N, so every N-th layer; `selective`, every layer keeps its input and the results of
matrix products and of attention, and computes the cheap rest again (norms, rotations, gates).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tunesmith.errors import ModelError

Mode = str | int
"""`none`, `layers`, `selective`, or N for every N-th layer."""

_KEPT = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "_scaled_mm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def as_mode(value: bool | Mode) -> Mode:
    """A mode as the recipe may write it: true is `layers`, false `none`, 1 `layers` too."""
    if value is False:
        return "none"
    return "layers" if value is True or value == 1 else value


def set_checkpointing(model: Any, mode: bool | Mode) -> int:
    """Put a transformers model into a mode; returns the number of layers that recompute.

    Raises:
        ModelError: the architecture has no layers that can recompute.
    """
    mode = as_mode(mode)
    layers = checkpointed_layers(model)
    if mode == "none":
        for layer in layers:
            layer.gradient_checkpointing = False
        return 0
    if not layers or not model.supports_gradient_checkpointing:
        raise ModelError(
            "this architecture can't recompute its activations",
            where="device.gradient_checkpointing",
            hint="device.gradient_checkpointing=none",
        )
    every = mode if isinstance(mode, int) else 1
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0
        layer._gradient_checkpointing_func = _selective if mode == "selective" else _whole
    return -(-len(layers) // every)


def checkpointed_layers(model: Any) -> list[Any]:
    """The layers with a checkpointing flag, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def recomputing(model: nn.Module) -> int:
    """Layers that recompute now."""
    return sum(bool(layer.gradient_checkpointing) for layer in checkpointed_layers(model))


def _kept_operations() -> frozenset[Any]:
    found = (getattr(torch.ops.aten, name, None) for name in _KEPT)
    return frozenset(packet.default for packet in found if packet is not None)


def _policy(_: Any, operation: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
    if operation in _operations():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_operations = functools.lru_cache(maxsize=1)(_kept_operations)
_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)


def _whole(function: Any, *args: Any, **keywords: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **keywords)


def _selective(function: Any, *args: Any, **keywords: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, context_fn=_contexts, **keywords)
