"""P2 and P3: loss and every gradient of a step do not depend on how its documents share forward
passes.

Oracle: plain transformers, eager attention, one path at a time, labels made by hand.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tiny import FAMILIES, tiny_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.lm_head import read_logit_transform
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

attention.register()
TOLERANCE = 1e-5
LAYOUTS = {
    "one": dict(micro_tokens=10**6),
    "cut": dict(micro_tokens=80),
    "path by path": dict(micro_tokens=1),
    "unshared": dict(micro_tokens=10**6, share_prefixes=False),
    "unshared, cut": dict(micro_tokens=100, share_prefixes=False),
}


def segment(ids, parent, start, index, weight=None) -> Segment:
    index = np.array(index, np.int32)
    weight = np.ones(len(index)) if weight is None else np.asarray(weight)
    return Segment(
        np.asarray(ids, np.int32),
        parent,
        start,
        index,
        weight.astype(np.float32),
        np.zeros(len(index), np.int32),
    )


def documents() -> list[Document]:
    """Rows with a common prefix, a row that branches twice, a repeated row; longer than the tiny
    models' window.
    """
    rng = np.random.default_rng(0)
    prefix = rng.integers(3, 400, 30)
    rows = []
    for i in range(6):
        body = rng.integers(3, 400, 10 + 5 * i)
        ids = np.concatenate([prefix, body]) if i % 2 else body
        index = range(len(ids) - 6, len(ids))
        rows.append((segment(ids, -1, 0, index, rng.uniform(0.5, 2, 6)),))
    trunk = np.concatenate([prefix, rng.integers(3, 400, 4)])
    rows.append(
        (
            segment(trunk, -1, 0, [32, 33]),
            segment(rng.integers(3, 400, 5), 0, len(trunk), [0, 2, 4]),
            segment(rng.integers(3, 400, 9), 0, len(trunk), [0, 5, 8]),
            segment(rng.integers(3, 400, 3), 2, len(trunk) + 9, [0, 1, 2]),
        )
    )
    rows.append(rows[1])
    return [Document(segments, Origin("made", i)) for i, segments in enumerate(rows)]


def paths(document: Document):
    """(ids from the root, places of the segment's targets in them, weights) of each segment with
    targets.
    """
    segments = document.segments
    for number, last in enumerate(segments):
        chain = [number]
        while segments[chain[-1]].parent >= 0:
            chain.append(segments[chain[-1]].parent)
        ids = np.concatenate([segments[i].ids for i in reversed(chain)])
        if len(last.index):
            yield torch.tensor(ids).long(), last.start + last.index, torch.tensor(last.weight)


@functools.cache
def one_at_a_time(family: str):
    """(loss, gradients) by the oracle."""
    model = tiny_model(family)
    rows = documents()
    total = sum(float(s.weight.sum()) for d in rows for s in d.segments)
    loss = 0.0
    for document in rows:
        for ids, places, weight in paths(document):
            logits = model(input_ids=ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits[places - 1], ids[places], reduction="none"
            )
            part = (losses * weight).sum() / total
            part.backward()
            loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters()}, total


def run(family: str, rows: list[Document], total: float, **layout):
    reference = tiny_model(family)
    model = tiny_model(family, attention="tunesmith")
    model.load_state_dict(reference.state_dict())
    causal_lm = CausalLM(model, logits=read_logit_transform(model.config), native_attention="eager")
    if layout.get("unpacked"):
        causal_lm.run_unpacked()
    # a chunk smaller than the targets of a micro-batch, and one that does not divide them
    head = functools.partial(head_loss, objective=nll, chunk_bytes=4 * 448 * 7)
    loss = 0.0
    for plan in plan_step(rows, **layout):
        output = causal_lm(collate(plan), head)
        (output.loss_sum / total).backward()
        loss += output.loss_sum.item() / total
    return loss, {name: p.grad for name, p in model.named_parameters()}


def assert_equal(family: str, loss: float, grads: dict) -> None:
    expected_loss, expected, _ = one_at_a_time(family)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    for name, grad in expected.items():
        if grad is None or grad.norm() == 0:
            continue
        assert grads[name] is not None, name
        assert (grads[name] - grad).norm() <= TOLERANCE * grad.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_with_one_document_at_a_time(family: str, layout: str) -> None:
    total = one_at_a_time(family)[2]
    loss, grads = run(family, documents(), total, **LAYOUTS[layout])
    assert_equal(family, loss, grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_documents_does_not_matter(family: str) -> None:
    total = one_at_a_time(family)[2]
    loss, grads = run(family, documents()[::-1], total, micro_tokens=120)
    assert_equal(family, loss, grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacked_paths_through_the_models_own_attention_agree(family: str) -> None:
    total = one_at_a_time(family)[2]
    loss, grads = run(family, documents(), total, micro_tokens=1, unpacked=True)
    assert_equal(family, loss, grads)


def test_the_comparison_notices_a_leak() -> None:
    """A document that sees its neighbour must fail the comparison, or the tests above would prove
    nothing.
    """
    rows = documents()
    first, second = rows[0].segments[0], rows[2].segments[0]
    glued = Document(
        (
            segment(
                np.concatenate([first.ids, second.ids]),
                -1,
                0,
                len(first.ids) + second.index,
                second.weight,
            ),
        ),
        Origin("leak", 0),
    )
    total = one_at_a_time("llama")[2]
    loss, _ = run("llama", [*rows[:2], glued, *rows[3:]], total, micro_tokens=10**6)
    assert loss != pytest.approx(one_at_a_time("llama")[0], rel=TOLERANCE)
