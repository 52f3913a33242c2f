"""Parity checks of model parallelism: a made-up micro-batch must give what one process computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.model.causal_lm import CausalLM
from tunesmith.types import Document, Origin, Segment

PROBED_TOKENS = 24
"""Tokens of the longer one of two made-up documents."""
NARROW = (torch.bfloat16, torch.float16)
ROUNDING = {"cpu": 2e-4, "other": 5e-3, "narrow": 8e-2}
"""What rounding may change of a hidden state, relative: float32 on a CPU and elsewhere, 16 bits."""


def rounding_of(compute: torch.dtype, device: torch.device) -> float:
    """What rounding may change, relative."""
    if compute in NARROW:
        return ROUNDING["narrow"]
    return ROUNDING["cpu" if device.type == "cpu" else "other"]


def difference(found: Tensor, wanted: Tensor, *, narrow: bool) -> float:
    """The largest relative difference of a token's hidden states [T, D]; the median where it is
    `narrow`, since in 16 bits rounding can flip an expert of a token.
    """
    wanted = wanted.to(found.device).float()
    each = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(each.median() if narrow else each.max())


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
