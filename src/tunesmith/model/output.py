"""The head's weight as the loss needs it, whatever peft put around the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def head_weight(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] that turn hidden states into logits, with the head's adapter in.

    A low-rank adapter gives W + s B A. Any other is a linear map too, and is read off as what it
    makes of the unit vectors: as much work as D tokens. Gradients reach the adapter either way.
    """
    if not hasattr(head, "base_layer"):
        return head.weight, getattr(head, "bias", None)  # a wrapper of trained rows hides it
    base = head.get_base_layer()
    if head.disable_adapters or head.merged:
        return base.weight, base.bias
    active = [name for name in head.active_adapters if name in getattr(head, "lora_A", ())]
    if active and not any(name in head.lora_variant for name in active):
        weight = base.weight
        for name in active:
            down, up = head.lora_A[name].weight, head.lora_B[name].weight
            weight = weight + head.scaling[name] * (up @ down)
        return weight, base.bias
    unit = torch.eye(base.in_features, dtype=base.weight.dtype, device=base.weight.device)
    mapped = head(unit)
    if base.bias is not None:
        mapped = mapped - base.bias
    return mapped.T, base.bias
