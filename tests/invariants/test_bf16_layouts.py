"""The promise for bfloat16: how documents share forward passes moves the gradient by far less than
the precision itself does.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from recurrent_models import RECURRENT
from tiny import tiny_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.model.load import wrap_causal_lm
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

LAYOUTS = {
    "shared": {"micro_tokens": 10**6},
    "cut": {"micro_tokens": 200},
    "packed": {"micro_tokens": 10**6, "share_prefixes": False},
    "alone": {"micro_tokens": 1, "share_prefixes": False},
}
BASE = "alone"


def documents() -> list[Document]:
    """A dozen rows under one prefix, and as many without it."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(3, 400, 60)
    rows = []
    for number in range(24):
        body = rng.integers(3, 400, 20 + 2 * number)
        ids = np.concatenate([prefix, body]) if number % 2 else body
        index = np.arange(len(ids) - 15, len(ids), dtype=np.int32)
        ones = np.ones(len(index), np.float32)
        segment = Segment(ids.astype(np.int32), -1, 0, index, ones, np.zeros_like(index))
        rows.append(Document((segment,), Origin("made", number)))
    return rows


@functools.cache
def gradient(dtype: torch.dtype, layout: str, family: str) -> Tensor:
    """All gradients of the step in one vector, in float64."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    model = tiny_model(family, **{**sizes, **RECURRENT.get(family, {})})
    # the same bfloat16 weights in either precision: only the arithmetic differs
    model.bfloat16()
    causal_lm = wrap_causal_lm(model if dtype == torch.bfloat16 else model.float()).model
    for parameter in causal_lm.parameters():
        parameter.grad_dtype = torch.float32
    rows = documents()
    total = sum(row.target_tokens for row in rows)
    head = functools.partial(head_loss, objective=nll)
    for plan in plan_step(rows, **LAYOUTS[layout]):
        (causal_lm(collate(plan), head).loss_sum / total).backward()
    return torch.cat([p.grad.double().flatten() for p in causal_lm.parameters()])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(params=["llama", "qwen3", "qwen3_5_text", "falcon_h1", "lfm2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_packing_moves_the_gradient_by_a_quarter_of_the_noise_at_most(family: str) -> None:
    """A shared prefix is not held to this: it rounds the sum of its gradients once where unshared
    rows round each, so the distance is the rows' own noise; the next test bounds it.
    """
    noise, difference = measure("packed", family)
    assert difference <= min(noise) / 4


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != BASE])
def test_no_layout_is_noisier_than_one_document_at_a_time(layout: str, family: str) -> None:
    (ours, alone), difference = measure(layout, family)
    assert ours <= 1.1 * alone
    assert difference < min(ours, alone)


def measure(layout: str, family: str) -> tuple[tuple[float, float], float]:
    """Distances to float32 of the layout and of one document at a time, and between them."""
    exact = gradient(torch.float32, BASE, family)
    ours = gradient(torch.bfloat16, layout, family)
    alone = gradient(torch.bfloat16, BASE, family)
    assert distance(gradient(torch.float32, layout, family), exact) < 1e-5
    noise = distance(ours, exact), distance(alone, exact)
    assert 1e-3 < min(noise) < 0.2, "the noise of bfloat16 must be there to be compared with"
    return noise, distance(ours, alone)
