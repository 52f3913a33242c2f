"""The output embedding (LM head) as weight and bias, also inside peft's wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def head_inputs(head: Any, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [T, E], weight [V, E] and bias [V] whose products are the logits, the head's
    adapter among them.

    A low-rank adapter adds its rank to the width: [h, s h A'] [W, B]', so that small additions are
    not rounded away in 16-bit weights. Any other is a linear map too, and its weight is read off as
    what it makes of the unit vectors: as much work as D tokens. Gradients reach the adapter.
    """
    if not hasattr(head, "base_layer"):
        # a wrapper of trained rows hides the bias
        return hidden_TD, head.weight, getattr(head, "bias", None)
    base = head.get_base_layer()
    if head.disable_adapters or head.merged:
        return hidden_TD, base.weight, base.bias
    active = [name for name in head.active_adapters if name in getattr(head, "lora_A", ())]
    if not active or any(name in head.lora_variant for name in active):
        return hidden_TD, _read_off(head, base), base.bias
    hidden, weight = [hidden_TD], [base.weight]
    for name in active:
        down, up = head.lora_A[name].weight, head.lora_B[name].weight
        added = hidden_TD.to(down.dtype) @ down.T * head.scaling[name]
        hidden.append(added.to(hidden_TD.dtype))
        weight.append(up.to(base.weight.dtype))
    return torch.cat(hidden, dim=1), torch.cat(weight, dim=1), base.bias


def _read_off(head: Any, base: Any) -> Tensor:
    unit = torch.eye(base.in_features, dtype=base.weight.dtype, device=base.weight.device)
    mapped = head(unit)
    if base.bias is not None:
        mapped = mapped - base.bias
    return mapped.T
