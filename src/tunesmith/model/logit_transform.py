"""Logit scale and logit soft-capping (as in Gemma 2), read from the config and checked by the
self-test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
