"""Documents side by side by torch's varlen kernel: what it is asked for, against softmax over a
mask. There is no such kernel on a CPU, where one stands in that does what torch documents.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_oracle import make_layout, softmax_over_mask, visible
from tunesmith.model.attention import varlen
from tunesmith.model.attention.parity import AttentionFeatures, Fused, branched_layout, flat_layout
from tunesmith.model.attention.varlen import VARLEN, is_flat, varlen_attention, varlen_kernels
from tunesmith.model.attention.window import AttentionWindow

CPU = torch.device("cpu")
FLAT = ((7, ()), (1, ()), (12, ()), (3, ()))


def documented(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _: Tensor, longest: int, __: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """Rows [T, heads, width]; (left, right) tokens around each are seen, -1 for all."""
    assert starts.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    outputs, lengths = [], starts.diff().tolist()
    assert longest == max(lengths)
    for begin, length in zip(starts.tolist(), lengths, strict=False):
        own = slice(begin, begin + length)
        at = torch.arange(length)
        ahead = at[None] - at[:, None]
        mask = (ahead <= right) & ((-ahead <= left) if left >= 0 else True)
        q, k, v = (rows[own].transpose(0, 1)[None] for rows in (query, key, value))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("size", [None, 2, 4, 50])
@pytest.mark.parametrize("heads", [4, 2])
def test_outputs_and_gradients(size: int | None, heads: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    compare(size, heads, CPU, torch.float32, 2e-6)


def compare(
    size: int | None, heads: int, device: torch.device, dtype: torch.dtype, bound: float,
    attend: Any = varlen_attention,
) -> None:  # fmt: skip
    layout, generator = make_layout(FLAT), torch.Generator().manual_seed(1)
    wide = [
        torch.randn(1, h, len(layout.position), 16, generator=generator).to(dtype).double()
        for h in (4, heads, heads)
    ]
    inputs = [tensor.to(device, dtype).requires_grad_() for tensor in wide]
    wide = [tensor.requires_grad_() for tensor in wide]
    local = None if size is None else AttentionWindow(size, chunked=False)
    found = attend(*inputs, layout, scale=0.3, window=local)
    expected = softmax_over_mask(*wide, visible(layout, size=size), scale=0.3)
    expected = expected if expected.shape == found.shape else expected.transpose(1, 2)
    toward = torch.randn(expected.shape, generator=generator).double()
    found.backward(toward.to(device, dtype))
    expected.backward(toward)
    pairs = [(found, expected), *((i.grad, w.grad) for i, w in zip(inputs, wide, strict=True))]
    for one, other in pairs:
        assert one is not None
        assert other is not None
        assert (
            float((one.detach().cpu().double() - other.detach()).norm() / other.detach().norm())
            < bound
        )


def test_what_the_kernels_know_of(monkeypatch: Any) -> None:
    query = torch.zeros(1, 4, 310, 64, dtype=torch.bfloat16)
    flat = flat_layout()
    packaged = Fused("flash_attn", varlen_attention, branches=False, instead="")
    for package, kernels in ((None, (VARLEN,)), (packaged, (packaged, VARLEN))):
        monkeypatch.setattr(varlen, "_flash_attn", lambda _, found=package: found)
        assert varlen_kernels(query, flat, AttentionFeatures()) == kernels
        assert varlen_kernels(query, flat, AttentionFeatures(window=True)) == kernels
        assert varlen_kernels(query, flat, AttentionFeatures(softcap=True)) == kernels[:-1]
        for other in (query.float(), query[..., :60], query.repeat(1, 1, 1, 5)):
            assert varlen_kernels(other, flat, AttentionFeatures()) == ()
        for more in (AttentionFeatures(blocks=True), AttentionFeatures(sinks=True)):
            assert varlen_kernels(query, flat, more) == ()
        assert varlen_kernels(query, branched_layout(), AttentionFeatures()) == ()
    assert is_flat(flat)
    assert not is_flat(branched_layout())


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_the_package_is_called_as_it_documents(name: str, monkeypatch: Any) -> None:
    def documented_there(
        *tensors: Any, softmax_scale: float, causal: bool, window_size: tuple[int, int],
        softcap: float, deterministic: bool,
    ) -> Tensor:  # fmt: skip
        assert causal
        assert softcap == 0.0
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        query, key = tensors[:2]
        return documented(
            *tensors, scale=softmax_scale, window_size=window_size,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    package = ModuleType(name)
    package.__spec__ = ModuleSpec(name, None)
    package.flash_attn_varlen_func = documented_there  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    varlen._flash_attn.cache_clear()
    try:
        assert varlen._flash_attn(torch.device("cpu")) is None or name == "flash_attn"
        found = varlen._flash_attn(torch.device("cuda", 0))
    finally:
        varlen._flash_attn.cache_clear()
    assert found is not None
    assert found.name == name
    for size in (None, 4):
        compare(size, 2, CPU, torch.float32, 2e-6, attend=found.attend)


def test_starts_are_made_once_a_micro_batch() -> None:
    one, other = make_layout(FLAT), make_layout(FLAT)
    first = varlen._starts(one, CPU)
    assert first.tolist() == [0, 7, 8, 20, 23]
    assert varlen._starts(one, CPU) is first
    assert varlen._starts(other, CPU) is not first
    assert varlen._starts(one, CPU) is first


@pytest.mark.gpu
@pytest.mark.parametrize("size", [None, 2, 4, 50])
@pytest.mark.parametrize("heads", [4, 2])
def test_on_a_gpu(size: int | None, heads: int) -> None:
    compare(size, heads, torch.device("cuda"), torch.bfloat16, 3e-2)
