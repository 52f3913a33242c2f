"""FlexAttention over layouts: its blocks and its rule against the tree's definition, its outputs
and gradients against softmax over a mask; on a CPU uncompiled, on a GPU (marked) as runs use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module

from attention_oracle import make_layout, softmax_over_mask, visible
from tunesmith.model.attention.flex import BLOCK, block_mask, flex_tree_attention
from tunesmith.model.attention.window import AttentionWindow
from tunesmith.types import Chain, Layout

CPU = torch.device("cpu")
SIZE = 5
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"groups": 2},
    "own scale": {"scale": 0.7},
    "sliding": {"window": AttentionWindow(SIZE, chunked=False)},
    "chunked": {"window": AttentionWindow(SIZE, chunked=True)},
    "softcap": {"softcap": 1.5, "groups": 2},
    "sinks": {"sinks": True},
    "all": {
        "softcap": 1.5,
        "sinks": True,
        "window": AttentionWindow(SIZE, chunked=False),
        "groups": 1,
    },
}


def forest(seed: int) -> Layout:
    """Random trees of a few hundred tokens, depth first: a stack of the open segments."""
    rng = np.random.default_rng(seed)
    until, position = np.zeros(0, int), np.zeros(0, int)

    def grow(depth: int) -> None:
        nonlocal until, position
        start, length = len(position), int(rng.integers(1, 200))
        base = path[-1] if path else 0
        position = np.concatenate([position, np.arange(base, base + length)])
        until = np.concatenate([until, np.zeros(length, int)])
        path.append(base + length)
        for _ in range(int(rng.integers(0, 3)) if depth < 3 else 0):
            grow(depth + 1)
        path.pop()
        until[start : start + length] = len(position)

    path: list[int] = []
    for _ in range(3):
        grow(0)
    return Layout((Chain(0, len(position), ()),), until.astype(np.int32), position.astype(np.int32))


def seen(layout: Layout, window: AttentionWindow | None) -> Tensor:
    """[T, T] booleans from the definition alone."""
    number = np.arange(len(layout.position))
    found = (number[None] <= number[:, None]) & (number[:, None] < layout.visible_until[None])
    allowed = torch.from_numpy(found)
    position = torch.from_numpy(layout.position)
    return allowed if window is None else allowed & window.allowed(position, position)


@pytest.mark.parametrize(
    "window", [None, AttentionWindow(40, chunked=False), AttentionWindow(40, chunked=True)]
)
@pytest.mark.parametrize("seed", range(6))
def test_blocks_hold_every_visible_pair_and_whole_ones_no_other(
    seed: int, window: AttentionWindow | None
) -> None:
    layout = forest(seed)
    expected, total = seen(layout, window), len(layout.position)
    mask = block_mask(layout, window, CPU)
    blocks = -(-total // BLOCK)
    listed = _dense(mask.kv_num_blocks, mask.kv_indices, blocks)
    whole = _dense(mask.full_kv_num_blocks, mask.full_kv_indices, blocks)
    assert not (listed & whole).any()
    for query in range(blocks):
        for key in range(blocks):
            part = expected[query * BLOCK :, key * BLOCK :][:BLOCK, :BLOCK]
            if whole[query, key]:
                assert part.all()
            elif not listed[query, key]:
                assert not part.any()
    number = torch.arange(total)
    rule = mask.mask_mod(torch.tensor(0), torch.tensor(0), number[:, None], number[None])
    assert torch.equal(rule, expected)


def _dense(number: Tensor | None, indices: Tensor | None, blocks: int) -> np.ndarray:
    assert number is not None
    assert indices is not None
    found = np.zeros((blocks, blocks), bool)
    for query in range(blocks):
        found[query, indices[0, 0, query, : int(number[0, 0, query])]] = True
    return found


def test_far_blocks_of_a_window_and_other_branches_are_left_out() -> None:
    total = 16 * BLOCK
    one = Layout(
        (Chain(0, total, ()),), np.full(total, total, np.int32), np.arange(total, dtype=np.int32)
    )
    assert int(block_mask(one, None, CPU).full_kv_num_blocks.sum()) == 16 * 15 // 2
    window = block_mask(one, AttentionWindow(BLOCK, chunked=False), CPU)
    assert int(window.kv_num_blocks.sum()) == 16 + 15
    apart = Layout(
        (Chain(0, total, ()),),
        np.repeat(np.arange(1, 17, dtype=np.int32) * BLOCK, BLOCK),
        np.tile(np.arange(BLOCK, dtype=np.int32), 16),
    )
    assert int(block_mask(apart, None, CPU).kv_num_blocks.sum()) == 16


def test_layers_of_a_micro_batch_share_their_masks() -> None:
    layout, window = forest(0), AttentionWindow(SIZE, chunked=False)
    first, local = block_mask(layout, None, CPU), block_mask(layout, window, CPU)
    assert block_mask(layout, None, CPU) is first
    assert block_mask(layout, window, CPU) is local is not first
    assert block_mask(forest(0), None, CPU) is not first


def compare(case: str, device: torch.device, dtype: torch.dtype, bound: float) -> None:
    options = dict(CASES[case])
    groups, sunk = options.pop("groups", 4), options.pop("sinks", False)
    window, scale = options.pop("window", None), options.pop("scale", 0.25)
    layout = make_layout()
    generator = torch.Generator().manual_seed(0)
    wide = [
        torch.randn(1, heads, len(layout.position), 16, generator=generator).to(dtype).double()
        for heads in (4, groups, groups)
    ]
    wide += [torch.linspace(-1, 2, 4).double()] if sunk else []
    inputs = [t.to(device, dtype).requires_grad_() for t in wide]
    wide = [t.requires_grad_() for t in wide]
    found = flex_tree_attention(
        *inputs[:3], layout, scale=scale, window=window,
        sinks=inputs[3] if sunk else None, **options,
    )  # fmt: skip
    mask = visible(layout, size=window and window.size, chunked=bool(window and window.chunked))
    expected = softmax_over_mask(
        *wide[:3], mask, scale=scale, sinks=wide[3] if sunk else None, **options
    )
    if expected.shape != found.shape:
        expected = expected.transpose(1, 2)
    toward = torch.randn(expected.shape, generator=generator).double()
    found.backward(toward.to(device, dtype))
    expected.backward(toward)
    assert relative(found, expected) < bound
    for ours, theirs in zip(inputs, wide, strict=True):
        assert relative(ours.grad, theirs.grad) < bound


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    one, two = found.detach().cpu().double(), expected.detach()
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled there is a backward pass on a CPU, which torch refuses to users."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    compare(case, CPU, torch.float32, 3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("case", CASES)
def test_compiled_on_a_gpu(case: str, dtype: torch.dtype, bound: float) -> None:
    compare(case, torch.device("cuda"), dtype, bound)
