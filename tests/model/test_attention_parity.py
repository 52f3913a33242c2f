"""A fused attention is used only where its output and gradients are plain attention's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_oracle import visible
from tunesmith.model.attention import parity as module
from tunesmith.model.attention.dispatch import _plain
from tunesmith.model.attention.parity import (
    AttentionFeatures,
    Fused,
    agrees,
    branched_layout,
    flat_layout,
)

CPU = torch.device("cpu")
ALL = [
    AttentionFeatures(w, b, c, s)
    for w, b, c, s in product((False, True), repeat=4)
    if not (w and b)
]
TREATED = {"window": "window", "softcap": "softcap", "sinks": "sinks"}


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    module._agrees.cache_clear()
    yield
    module._agrees.cache_clear()


NOTHING = AttentionFeatures()


def tried(
    attend: Any, asked: AttentionFeatures = NOTHING, dtype: torch.dtype = torch.float32
) -> bool:
    fused = Fused("the kernel", attend, branches=True, instead="another is")
    return agrees(fused, _plain, asked, device=CPU, dtype=dtype)


@pytest.mark.parametrize("asked", ALL)
def test_the_same_attention_agrees(asked: AttentionFeatures) -> None:
    def same(*tensors: Tensor, **options: Any) -> Tensor:
        return _plain(*tensors, **options)

    assert tried(same, asked)
    assert tried(same, asked, torch.bfloat16)


@pytest.mark.parametrize("ignored", TREATED)
def test_a_kernel_that_ignores_what_is_asked_is_found(ignored: str) -> None:
    def without(*tensors: Tensor, **options: Any) -> Tensor:
        return _plain(*tensors, **{**options, ignored: None})

    def fully(*tensors: Tensor, **options: Any) -> Tensor:
        output = without(*tensors, **options)
        # a sink that is ignored has no gradient at all
        return output if options["sinks"] is None else output + 0 * options["sinks"].sum()

    assert tried(fully)
    with pytest.warns(UserWarning, match="the kernel is not used on cpu: it differs by"):
        assert not tried(fully, AttentionFeatures(**{TREATED[ignored]: True}))


def test_a_window_that_is_off_by_one_is_found() -> None:
    def wider(*tensors: Tensor, window: Any, **options: Any) -> Tensor:
        near = window and module.AttentionWindow(window.size + 1, chunked=window.chunked)
        return _plain(*tensors, window=near, **options)

    assert tried(wider)
    with pytest.warns(UserWarning, match="it differs by"):
        assert not tried(wider, AttentionFeatures(window=True))


def test_a_wrong_gradient_is_found() -> None:
    def detached(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        return _plain(query, 0.9 * key + 0.1 * key.detach(), *rest, **options)

    with pytest.warns(UserWarning, match="it differs by"):
        assert not tried(detached)


def test_branches_that_see_each_other_are_found() -> None:
    def mixed(query: Tensor, key: Tensor, value: Tensor, layout: Any, **options: Any) -> Tensor:
        whole = module.Chain(0, len(layout.position), ())
        changed = module.Layout((whole,), layout.visible_until, layout.position)
        return _plain(query, key, value, changed, **options)

    with pytest.warns(UserWarning, match="it differs by"):
        assert not tried(mixed)


def test_a_kernel_that_fails_is_left_out_and_told_of_once(recwarn: Any) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no image for this chip\nmore")

    fused = Fused("the kernel", broken, branches=True, instead="another is")
    for _ in range(3):
        assert not agrees(fused, _plain, AttentionFeatures(), device=CPU, dtype=torch.float32)
    assert [str(one.message) for one in recwarn] == [
        "the kernel is not used on cpu: no image for this chip; another is"
    ]


def test_a_precision_without_a_bound_is_not_tried() -> None:
    assert not tried(_plain, dtype=torch.float64)


def test_other_bits_each_time_are_refused_where_they_must_be_the_same() -> None:
    noise = torch.Generator().manual_seed(0)

    def restless(*tensors: Tensor, **options: Any) -> Tensor:
        output = _plain(*tensors, **options)
        return output * (1 + 1e-6 * torch.rand(output.shape, generator=noise))

    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        assert tried(restless)
        torch.use_deterministic_algorithms(True)
        with pytest.warns(UserWarning, match="other bits each time"):
            assert not tried(restless)
    finally:
        torch.use_deterministic_algorithms(before)


def test_the_layouts_of_trials_are_what_they_say() -> None:
    for layout in (branched_layout(), flat_layout()):
        by_chains = torch.zeros(len(layout.position), len(layout.position), dtype=torch.bool)
        for chain in layout.chains:
            own = torch.arange(chain.start, chain.end)
            by_chains[own[:, None], own[None]] = own[None] <= own[:, None]
            for start, end in chain.prefix:
                by_chains[chain.start : chain.end, start:end] = True
        assert torch.equal(visible(layout), by_chains)
    assert any(chain.prefix for chain in branched_layout().chains)
    assert not any(chain.prefix for chain in flat_layout().chains)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ALL)
def test_flex_attention_is_used_on_a_gpu(asked: AttentionFeatures, dtype: torch.dtype) -> None:
    from tunesmith.model.attention.flex import FLEX

    assert agrees(FLEX, _plain, asked, device=torch.device("cuda", 0), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("asked", [AttentionFeatures(), AttentionFeatures(window=True)])
def test_varlen_attention_is_used_on_a_gpu(asked: AttentionFeatures) -> None:
    from tunesmith.model.attention.varlen import VARLEN

    device = torch.device("cuda", 0)
    assert agrees(VARLEN, _plain, asked, device=device, dtype=torch.bfloat16)
