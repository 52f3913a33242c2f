"""Activation checkpointing (arXiv 1604.06174), per layer or selective (torch's selective activation
checkpointing).

The decoder's layers are transformers' checkpointing layers: each has a flag and the function that
wraps its forward. Both are set here and not by the model's own switch, which would also let the
embedding ask for a gradient that nobody needs. Modes: `none`; `layers`, every layer keeps its input
only; a number N, so every N-th layer; `selective`, every layer keeps its input and the results of
matrix products and of attention, and computes the cheap rest again (norms, rotations, gates).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tunesmith.errors import ModelError
from tunesmith.model.recurrent.active_layout import recompute_contexts

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
_OF_EXPERTS = ("bmm", "_grouped_mm")
"""Products of all experts at once, as transformers computes them."""


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
        selective = functools.partial(_selective, _has_biased_experts(layer))
        layer._gradient_checkpointing_func = selective if mode == "selective" else _whole
    return -(-len(layers) // every)


def checkpointed_layers(model: Any) -> list[Any]:
    """The layers with a checkpointing flag, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def recomputing(model: nn.Module) -> int:
    """Layers that recompute now."""
    return sum(bool(layer.gradient_checkpointing) for layer in checkpointed_layers(model))


@functools.cache
def _kept_operations(biased_experts: bool) -> frozenset[Any]:
    names = set(_KEPT) - set(_OF_EXPERTS if biased_experts else ())
    found = (getattr(torch.ops.aten, name, None) for name in names)
    return frozenset(packet.default for packet in found if packet is not None)


def _policy(biased_experts: bool, _: Any, operation: Any, *args: Any, **keywords: Any) -> Any:
    if operation in _kept_operations(biased_experts):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _has_biased_experts(layer: nn.Module) -> bool:
    """Whether a bias is added to the experts' products, which transformers does in place: what was
    kept of them would be written over.
    """
    return any(name.endswith("_proj_bias") for name, _ in layer.named_parameters())


def _whole(function: Any, *args: Any, **keywords: Any) -> Any:
    # recurrent layers need the layout again when they are recomputed
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=recompute_contexts, **keywords
    )


def _selective(biased_experts: bool, function: Any, *args: Any, **keywords: Any) -> Any:
    contexts = functools.partial(_selective_contexts, biased_experts)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **keywords)


def _selective_contexts(
    biased_experts: bool,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What is kept and used again, and the layout for recurrent layers around both."""
    policy = functools.partial(_policy, biased_experts)
    keep, use = create_selective_checkpoint_contexts(policy)
    forward, recompute = recompute_contexts()
    return _both(forward, keep), _both(recompute, use)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
