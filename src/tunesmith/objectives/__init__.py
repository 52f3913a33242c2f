"""Training objectives, and the chunked loss head that runs them."""

from __future__ import annotations

from tunesmith.objectives.head import ObjectiveInputs, ReferenceHidden, argmax_tokens, head_loss
from tunesmith.objectives.losses import Chunk, Objective, make_chunk, nll
from tunesmith.objectives.registry import OBJECTIVES, named_objective, with_terms

__all__ = [
    "OBJECTIVES",
    "Chunk",
    "Objective",
    "ObjectiveInputs",
    "ReferenceHidden",
    "argmax_tokens",
    "head_loss",
    "make_chunk",
    "named_objective",
    "nll",
    "with_terms",
]
