"""The attention function against a softmax over one mask, and whole trees against one path at a
time, over the families that can take a layout.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_oracle import make_layout, softmax_over_mask, visible
from tiny import tiny_model
from tunesmith.errors import ModelError
from tunesmith.model.attention.dispatch import MaskRule, layout_attention
from tunesmith.model.load import wrap_causal_lm
from tunesmith.types import Batch, Layout, TargetOwners

SIZE = 8
"""Of sliding windows and of blocks."""


def module(*, chunked: bool = False, training: bool = False) -> Any:
    kinds = ["chunked_attention" if chunked else "full_attention"]
    return SimpleNamespace(config=SimpleNamespace(layer_types=kinds), training=training)


def leaves(
    heads: int, groups: int, *, width: int = 16, value_width: int = 16, dtype=torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = len(make_layout().position)
    shapes = [(heads, width), (groups, width), (groups, value_width)]
    return [
        torch.randn(1, h, total, d, generator=generator).to(dtype).requires_grad_()
        for h, d in shapes
    ]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"heads": 6, "groups": 2},
    "one key head": {"groups": 1},
    "own scale": {"scaling": 0.7},
    "sliding": {"size": SIZE},
    "chunked": {"size": SIZE, "chunked": True},
    "window of two": {"size": 2},
    "softcap": {"softcap": 1.5},
    "softcap, sliding": {"softcap": 1.5, "size": SIZE, "groups": 2},
    "sinks": {"sinks": True},
    "sinks, sliding": {"sinks": True, "size": SIZE, "groups": 2},
    "narrow values": {"value_width": 8},
    "narrow values, sinks": {"value_width": 8, "sinks": True, "groups": 2},
    "narrow values, chunked": {"value_width": 8, "size": SIZE, "chunked": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient(case: str, dtype: torch.dtype) -> None:
    options = dict(CASES[case])
    scaling, size = options.pop("scaling", None), options.pop("size", None)
    softcap, chunked = options.pop("softcap", None), options.pop("chunked", False)
    sunk = options.pop("sinks", False)
    tensors = leaves(options.pop("heads", 4), options.pop("groups", 4), dtype=dtype, **options)
    inputs = [*tensors]
    sinks = torch.linspace(-1, 2, tensors[0].shape[1], dtype=dtype).requires_grad_()
    inputs += [sinks] if sunk else []
    layout = make_layout()
    found, weights = layout_attention(
        module(chunked=chunked), *tensors, MaskRule(size), layout=layout, scaling=scaling,
        softcap=softcap, s_aux=sinks if sunk else None,
        sliding_window=None if chunked else size,
    )  # fmt: skip
    assert weights is None
    scale = tensors[0].shape[-1] ** -0.5 if scaling is None else scaling
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = softmax_over_mask(
        *wide[:3], visible(layout, size=size, chunked=chunked), scale=scale,
        softcap=softcap, sinks=wide[3] if sunk else None,
    )  # fmt: skip
    assert found.shape == expected.shape
    assert found.dtype == dtype
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    found.backward(toward.to(dtype))
    expected.backward(toward)
    assert relative(found, expected) < 2e-6
    for ours, theirs in zip(inputs, wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert relative(ours.grad, theirs.grad) < 2e-6


def relative(found: Tensor, expected: Tensor) -> float:
    found = found.detach().double()
    return float((found - expected.detach()).norm() / expected.detach().norm())


def test_the_oracle_sees_a_leak() -> None:
    """Packing as one causal run must differ, or the comparison above would prove nothing."""
    tensors = leaves(4, 4)
    total = len(make_layout().position)
    found, _ = layout_attention(module(), *tensors, MaskRule(None), layout=make_layout())
    leaking = torch.ones(total, total, dtype=torch.bool).tril()
    expected = softmax_over_mask(*[t.double() for t in tensors], leaking, scale=0.25)
    assert relative(found, expected) > 1e-2


def test_a_window_wider_than_the_longest_path_is_none() -> None:
    tensors = leaves(4, 2)
    layout = make_layout()
    plain, _ = layout_attention(module(), *tensors, MaskRule(None), layout=layout)
    wide, _ = layout_attention(module(), *tensors, MaskRule(999), layout=layout)
    assert torch.equal(plain, wide)


def test_bfloat16_stays_near_float32() -> None:
    tensors = leaves(4, 2)
    layout = make_layout()
    exact, _ = layout_attention(module(), *tensors, MaskRule(SIZE), layout=layout)
    short = [t.detach().bfloat16() for t in tensors]
    rounded, _ = layout_attention(module(), *short, MaskRule(SIZE), layout=layout)
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded, exact.double()) < 1e-2


def test_refusals() -> None:
    tensors = leaves(4, 4)
    with pytest.raises(ModelError, match="hand keyword arguments down"):
        layout_attention(module(), *tensors, None)
    layout = make_layout()
    with pytest.raises(ModelError, match="dropout"):
        layout_attention(module(training=True), *tensors, None, layout=layout, dropout=0.1)
    layout_attention(module(), *tensors, None, layout=layout, dropout=0.1)
    with pytest.raises(ModelError, match="window of 4, its mask for 8"):
        layout_attention(module(), *tensors, MaskRule(8), layout=layout, sliding_window=4)
    with pytest.raises(ModelError, match="window of 4, its mask for None"):
        layout_attention(module(), *tensors, None, layout=layout, sliding_window=4)


WINDOW = {"sliding_window": SIZE}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": WINDOW, "qwen2": {}, "smollm3": {}, "gemma": {}, "phi": {},
    "phi3": {"sliding_window": None}, "cohere": {}, "olmo2": {}, "glm4": {}, "starcoder2": {},
    "exaone4": WINDOW, "ernie4_5": {}, "seed_oss": {}, "arcee": {}, "hunyuan_v1_dense": {},
    "apertus": {}, "helium": {}, "gpt_neox": {}, "opt": {}, "olmoe": EXPERTS,
    "qwen3_moe": {"moe_intermediate_size": 32, **EXPERTS},
    "granitemoe": {"num_local_experts": 4},
    "llama4_text": {
        "intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": SIZE,
        "interleave_moe_layer_step": 2,
    },
}  # fmt: skip
"""Those whose start-up test no other test runs."""


def batch(ids: Tensor, layout: Layout) -> Batch:
    none = torch.empty(0, dtype=torch.int64)
    nobody = np.empty(0, np.int32)
    shares = TargetOwners(nobody, nobody, np.empty(0, np.float32))
    position = torch.from_numpy(layout.position).long()
    return Batch(ids, position, layout, none, none, none.float(), shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_is_its_paths(family: str) -> None:
    layout = make_layout()
    model = tiny_model(family, **FAMILIES[family])
    ids = torch.randint(3, 400, (len(layout.position),), generator=torch.Generator().manual_seed(2))
    decoder = model.get_decoder()
    decoder = model.model if decoder is model else decoder
    paths = [
        torch.cat([torch.arange(a, b) for a, b in (*chain.prefix, (chain.start, chain.end))])
        for chain in layout.chains
    ]
    with torch.no_grad():
        alone = [
            decoder(input_ids=ids[path][None], use_cache=False).last_hidden_state[0]
            for path in paths
        ]
        together = wrap_causal_lm(model).model.hidden(batch(ids, layout))
    assert max(len(path) for path in paths) > 2 * SIZE
    for path, expected in zip(paths, alone, strict=True):
        assert float((together[path] - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_asks_its_device_for_no_value(family: str) -> None:
    layout = make_layout()
    causal_lm = wrap_causal_lm(tiny_model(family, **FAMILIES[family]).bfloat16()).model
    causal_lm.to("meta").train()  # where any value that is asked for is an error
    there = batch(torch.empty(len(layout.position), dtype=torch.int64, device="meta"), layout)
    there = replace(there, position_ids=there.position_ids.to("meta"))
    causal_lm.hidden(there).sum().backward()
