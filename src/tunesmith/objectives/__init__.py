"""Losses, each a small function of a chunk's logits, and the one head that runs them."""

from __future__ import annotations

from tunesmith.objectives.head import Objective, head_loss
from tunesmith.objectives.nll import nll

OBJECTIVES: dict[str, Objective] = {"nll": nll}

__all__ = ["OBJECTIVES", "Objective", "head_loss", "nll"]
