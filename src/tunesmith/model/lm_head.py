"""The output embedding (LM head) with its bias, also inside peft's wrappers, and what follows it:
logit scale and logit soft-capping (as in Gemma 2), read from the config.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Of gemma2, recurrent_gemma and xlstm."""


def read_logit_transform(config: Any) -> LogitTransform:
    """The transform that the config names: a soft cap (`final_logit_softcapping` of gemma2 and
    others), `logit_scale` (cohere), `logits_scaling` (granite).
    """
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    caps = (getattr(config, name, None) for name in _CAPS)
    softcap = next((cap for cap in caps if cap is not None), None)
    return LogitTransform(softcap=None if softcap is None else float(softcap), scale=scale)


def logit_caps(config: Any) -> list[float]:
    """Every number that the config calls a cap: families spell the softcap of logits in many ways,
    and attention may have one too.
    """
    found = [value for name, value in vars(config).items() if "cap" in name]
    return sorted({float(v) for v in found if isinstance(v, int | float) and v and v > 0})


def fitted_transforms(
    raw: Tensor, logits: Tensor, caps: Sequence[float]
) -> Iterator[LogitTransform]:
    """Transforms by value, for families whose config names theirs in another way: without a softcap
    and with each of `caps`, the scale fitted by least squares between the head's products and the
    model's own logits.
    """
    raw, logits = raw.double(), logits.double()
    for cap in (None, *caps):
        clear, linear = raw, logits
        if cap is not None:
            # Where tanh is flat its inverse is all rounding.
            clear = raw.where(logits.abs() < 0.8 * cap, 0.0)
            linear = torch.atanh((logits / cap).clamp(-0.8, 0.8)) * cap
        scale = float((linear * clear).sum() / clear.square().sum().clamp(min=1e-30))
        short = float(f"{scale:.4g}")
        near = abs(short - scale) < 1e-5 * abs(scale)
        yield LogitTransform(cap, short if near else scale)
