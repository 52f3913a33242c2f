"""Parity checks of model parallelism: a made-up micro-batch must give what one process computes."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.model.causal_lm import CausalLM
from tunesmith.types import Document, Origin, Segment

PROBED_TOKENS = 24
"""Tokens of the longer one of two made-up documents."""


def probe_plan(model: CausalLM) -> MicrobatchPlan:
    """Two made-up documents as a micro-batch."""
    vocabulary = int(model.head.weight.shape[0])
    documents = [_document(length, vocabulary) for length in (PROBED_TOKENS, PROBED_TOKENS // 3)]
    (plan,) = plan_step(documents, micro_tokens=2 * PROBED_TOKENS)
    return plan


def states_only(hidden: Tensor, *_: Any, **__: Any) -> Any:
    """A head that gives back the hidden states."""
    return hidden


def _document(tokens: int, vocabulary: int) -> Document:
    ids = np.linspace(vocabulary // 8, vocabulary // 2, tokens).astype(np.int32)
    index = np.arange(1, tokens, dtype=np.int32)
    segment = Segment(ids, -1, 0, index, np.ones(len(index), np.float32), np.zeros_like(index))
    return Document((segment,), Origin("probe", tokens))
