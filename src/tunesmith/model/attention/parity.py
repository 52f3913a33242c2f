"""Parity trial of a fused attention kernel: compared with plain attention on the device before it
is used.

Drivers, compilers and chips differ, and a wrong gradient tells nobody. So each kernel computes a
small layout's output and gradients once, in the precision that the run uses.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.model.attention.window import AttentionWindow
from tunesmith.model.ops.numerics import ONE_OPERATION, Comparison, equivalence_trial
from tunesmith.types import Chain, Layout

HEADS, WIDTH = 4, 64
NEAR = 48
"""Tokens of a window or block, fewer than the trial's documents have."""
CAP = 1.5
"""Of scores whose deviation is 1."""

Attend = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Fused:
    """An attention by fused kernels, and whether its trial has branches."""

    name: str
    attend: Attend
    branches: bool
    instead: str  # what is done where it is not used


@dataclass(frozen=True, slots=True)
class AttentionFeatures:
    """What an attention has to honour besides the layout; each combination is tried by itself."""

    window: bool = False
    blocks: bool = False
    softcap: bool = False
    sinks: bool = False


def agrees(
    fused: Fused,
    plain: Attend,
    features: AttentionFeatures,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether outputs and gradients on this device are those of `plain`, and where kernels have to
    be deterministic the same bits twice; where they are not, it is said once.
    """
    same_bits = torch.are_deterministic_algorithms_enabled()
    return _agrees(fused, plain, features, device, dtype, same_bits)


@functools.cache
def _agrees(
    fused: Fused, plain: Attend, asked: AttentionFeatures, device: torch.device, dtype: torch.dtype,
    same_bits: bool,
) -> bool:  # fmt: skip
    if dtype not in ONE_OPERATION:
        return False
    layout = branched_layout() if fused.branches else flat_layout()

    def compare() -> list[Comparison]:
        found = _tried(fused.attend, layout, asked, device, dtype)
        if same_bits:
            repeated = _tried(fused.attend, layout, asked, device, dtype)
            if not all(map(torch.equal, found, repeated)):
                raise RuntimeError("it gives other bits each time")
        expected = _tried(plain, layout, asked, device, dtype)
        pairs = zip(found, expected, strict=True)
        return [Comparison(one, other, ONE_OPERATION[dtype]) for one, other in pairs]

    problem = equivalence_trial(compare).problem
    if problem is not None:
        warnings.warn(
            f"{fused.name} is not used on {device}: {problem}; {fused.instead}", stacklevel=3
        )
    return problem is None


def _tried(
    attend: Attend,
    layout: Layout,
    asked: AttentionFeatures,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Output and gradients over a layout, in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, len(layout.position), WIDTH) for heads in (HEADS, 2, 2)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs += [torch.linspace(-1, 1, HEADS)] if asked.sinks else []
    inputs = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
    local = AttentionWindow(NEAR, chunked=asked.blocks) if asked.window or asked.blocks else None
    with torch.enable_grad():
        output = attend(
            *inputs[:3], layout, scale=WIDTH**-0.5, window=local,
            softcap=CAP if asked.softcap else None, sinks=inputs[3] if asked.sinks else None,
        )  # fmt: skip
        output.backward(torch.randn(output.shape, generator=generator).to(device, dtype))
    seen = [output, *(tensor.grad for tensor in inputs)]
    return [tensor.detach().float() for tensor in seen if tensor is not None]


def branched_layout() -> Layout:
    """A prefix, two branches, and a document of its own."""
    chains = (Chain(0, 200, ()), Chain(200, 260, ((0, 150),)), Chain(260, 310, ()))
    until = np.concatenate(
        [np.full(150, 260), np.full(50, 200), np.full(60, 260), np.full(50, 310)]
    )
    position = np.concatenate([np.arange(200), np.arange(150, 210), np.arange(50)])
    return Layout(chains, until.astype(np.int32), position.astype(np.int32))


def flat_layout() -> Layout:
    """Three documents."""
    chains = (Chain(0, 200, ()), Chain(200, 201, ()), Chain(201, 310, ()))
    until = np.concatenate([np.full(200, 200), np.full(1, 201), np.full(109, 310)])
    position = np.concatenate([np.arange(200), np.arange(1), np.arange(109)])
    return Layout(chains, until.astype(np.int32), position.astype(np.int32))
