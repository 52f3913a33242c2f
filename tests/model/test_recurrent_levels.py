"""The tree behind recurrent layers: runs, levels, predecessors and states, against each path alone.

Oracle: loops over root-to-leaf paths, which know nothing of runs or levels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tunesmith.data.microbatch.planner import plan_step
from tunesmith.errors import ModelError
from tunesmith.model.recurrent.active_layout import (
    active_layout,
    recompute_contexts,
    use_layout,
)
from tunesmith.model.recurrent.convolution import path_convolution
from tunesmith.model.recurrent.handover import run_over_tree
from tunesmith.model.recurrent.levels import SHORT, run_tree, split_runs
from tunesmith.model.recurrent.linear_scan import decayed_attention, diagonal_scan
from tunesmith.types import Document, Layout, Origin, Segment

CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts of documents with few different ids, so that many prefixes are shared."""
    rows = draw(st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=9), min_size=1))
    documents = []
    for number, row in enumerate(rows):
        ids = np.array(row, np.int32)
        index = np.arange(1, len(ids), dtype=np.int32)
        ones = np.ones(len(index), np.float32)
        segment = Segment(ids, -1, 0, index, ones, np.zeros_like(index))
        documents.append(Document((segment,), Origin("made", number)))
    (plan,) = plan_step(documents, micro_tokens=10**6, share_prefixes=draw(st.booleans()))
    return plan.layout


def paths(layout: Layout) -> list[list[int]]:
    """The tokens that each token sees, itself last, by the definition of a layout."""
    until = layout.visible_until
    return [[k for k in range(q + 1) if q < until[k]] for q in range(len(until))]


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_runs_cover_all_tokens_and_parents_come_first(layout: Layout) -> None:
    runs = split_runs(layout)
    covered = [token for run in runs for token in range(run.start, run.end)]
    assert covered == list(range(len(layout.position)))
    assert all(run.parent < number for number, run in enumerate(runs))
    done: set[int] = {-1}
    for batch in run_tree(layout, CPU).batches:
        assert all(runs[number].parent in done for number in batch.runs)
        assert all(number not in done for number in batch.runs)
        done |= set(batch.runs)
    assert len(done) == len(runs) + 1


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_predecessors_are_those_of_the_path(layout: Layout) -> None:
    expected = [path[-2] if len(path) > 1 else -1 for path in paths(layout)]
    assert run_tree(layout, CPU).predecessor.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_states_and_their_gradients_are_handed_over(layout: Layout) -> None:
    total = len(layout.position)
    torch.manual_seed(total)
    decay = torch.rand(total, 2, dtype=torch.float64, requires_grad=True)
    inflow = torch.randn(total, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(total, 2, dtype=torch.float64)

    def recurrence(inputs, initial):
        output, final = diagonal_scan(*inputs, None if initial is None else initial[0])
        return output, (final,)

    tree = run_tree(layout, CPU)
    found = run_over_tree(tree, recurrence, [decay, inflow], padding=(1.0, 0.0))
    rows: list[Tensor] = []
    for path in paths(layout):
        state = torch.zeros(2, dtype=torch.float64)
        for token in path:
            state = decay[token] * state + inflow[token]
        rows.append(state)
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), [decay, inflow]),
        torch.autograd.grad((expected * weight).sum(), [decay, inflow]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(layouts(), st.integers(2, 4))
def test_convolutions_look_along_the_path(layout: Layout, width: int) -> None:
    total = len(layout.position)
    torch.manual_seed(total)
    inputs = torch.randn(1, 3, total, requires_grad=True)
    weight = torch.randn(3, width, requires_grad=True)
    bias = torch.randn(3)

    def packed(x: Tensor) -> Tensor:
        return F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=3)[..., :total]

    found = path_convolution(packed, layout, inputs, weight, bias)
    columns = [packed_alone(inputs[0, :, path], weight, bias) for path in paths(layout)]
    expected = torch.stack(columns, -1)[None]
    torch.testing.assert_close(found, expected)
    toward = torch.randn(1, 3, total)
    for ours, theirs in zip(
        torch.autograd.grad((found * toward).sum(), [inputs, weight]),
        torch.autograd.grad((expected * toward).sum(), [inputs, weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def packed_alone(path: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution at the last token of one path, [C]."""
    last = path[:, -weight.shape[1] :]
    return (last * weight[:, weight.shape[1] - last.shape[1] :]).sum(-1) + bias


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_decayed_attention_is_its_recurrence(chunk: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 10, 3, 4, dtype=torch.float64) for _ in range(3))
    log_decay = -torch.rand(2, 10, 3, dtype=torch.float64)
    state = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found, final = decayed_attention(query, key, value, log_decay, state, chunk=chunk)
    for t in range(10):
        outer = key[:, t, :, :, None] * value[:, t, :, None]
        state = log_decay[:, t].exp()[..., None, None] * state + outer
        torch.testing.assert_close(found[:, t], torch.einsum("shd,shde->she", query[:, t], state))
    torch.testing.assert_close(final, state)


def test_padding_stays_below_a_factor_of_two() -> None:
    lengths = [3, 5000, 60, 64, 65, 130, 900, 2, 4000, 128]
    documents = []
    for number, length in enumerate(lengths):
        ids = np.random.default_rng(number).integers(3, 400, length + 1).astype(np.int32)
        one = np.array([length], np.int32)
        segment = Segment(ids, -1, 0, one, np.ones(1, np.float32), np.zeros(1, np.int32))
        documents.append(Document((segment,), Origin("made", number)))
    (plan,) = plan_step(documents, micro_tokens=10**6, share_prefixes=False)
    batches = run_tree(plan.layout, CPU).batches
    assert sum(len(batch.real) for batch in batches) == sum(lengths)
    for batch in batches:
        assert batch.steps <= SHORT or len(batch.tokens) <= 2 * len(batch.real)


def test_the_layout_is_there_inside_and_when_a_layer_is_recomputed() -> None:
    layout = Layout((), np.zeros(0, np.int32), np.zeros(0, np.int32))
    assert active_layout() is None
    with use_layout(layout):
        assert active_layout() is layout
        with use_layout(None):
            assert active_layout() is None
        forward, recompute = recompute_contexts()
        with forward:
            assert active_layout() is layout
    assert active_layout() is None
    with recompute:
        assert active_layout() is layout
    assert active_layout() is None


def test_a_backward_pass_that_does_not_know_the_layout_is_refused() -> None:
    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            active_layout()
            return grad

    x = torch.ones(1, requires_grad=True)
    with pytest.raises(ModelError, match="without its micro-batch's layout"):
        Recomputed.apply(x).backward()
    with use_layout(None):
        Recomputed.apply(x).backward()
