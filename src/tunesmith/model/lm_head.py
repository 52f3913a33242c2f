"""The output embedding (LM head) with its bias, also inside peft's wrappers, and what follows it:
logit scale and logit soft-capping (as in Gemma 2), read from the config.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """logits -> softcap * tanh(scale * logits / softcap), or scale * logits without a softcap."""

    softcap: float | None = None
    scale: float = 1.0

    @property
    def identity(self) -> bool:
        return self.softcap is None and self.scale == 1.0

    def apply(self, logits: Tensor) -> Tensor:
        """The model's logits from the raw products of the head; any shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def read_logit_transform(config: Any) -> LogitTransform:
    """The transform that the config names: `final_logit_softcapping`, `logit_scale` (cohere),
    `logits_scaling` (granite).
    """
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(softcap=None if softcap is None else float(softcap), scale=scale)
