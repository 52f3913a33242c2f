"""Matrix product throughput of this device (FLOP/s): the floor of every step's time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.bf16_upcast import needs_upcast

SECONDS = 0.5
"""How long each shape is multiplied."""

Shape = tuple[int, int, int]
"""Rows, columns of the sum, columns of the result: [a, b] @ [b, c]."""


@dataclass(frozen=True, slots=True)
class MatmulRate:
    """The best rate that was seen, and the shape and precision it was seen with."""

    flops_per_second: float
    dtype: str
    shape: Shape


def product_dtype(model: CausalLM) -> torch.dtype:
    """The precision in which the model's products run: its own, or float32 on a CPU without units
    for bfloat16.
    """
    weight = model.head.weight
    return torch.float32 if needs_upcast(weight) else weight.dtype


def product_shapes(model: CausalLM, tokens: int) -> list[Shape]:
    """The largest map of the decoder over a micro-batch of `tokens`, and a large square."""
    head = id(model.head)
    maps = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m) != head]
    widths = [(int(m.in_features), int(m.out_features)) for m in maps]
    side = 1024 if model.head.weight.device.type == "cpu" else 8192
    largest = max(widths, key=lambda pair: pair[0] * pair[1], default=(side, side))
    return [(tokens, largest[0], largest[1]), (side, side, side)]


def matmul_rate(
    shapes: Sequence[Shape], *, dtype: torch.dtype, device: torch.device, seconds: float = SECONDS
) -> MatmulRate:
    """The best rate of a product over the shapes, 2abc operations each, after one to warm up."""
    found = [
        MatmulRate(_rate(shape, dtype, device, seconds), str(dtype).removeprefix("torch."), shape)
        for shape in shapes
    ]
    return max(found, key=lambda rate: rate.flops_per_second)


def _rate(shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    rows, inner, columns = shape
    left = torch.full((rows, inner), 0.5, dtype=dtype, device=device)
    right = torch.full((columns, inner), 0.25, dtype=dtype, device=device)
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    best = _once(left, right, out)
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        best = min(best, _once(left, right, out))
    return 2.0 * rows * inner * columns / best


def _once(left: Tensor, right: Tensor, out: Tensor) -> float:
    """Seconds of a product; on an accelerator of several in a row, so that launching is hidden."""
    repeats = 1 if left.device.type == "cpu" else 16
    started = time.perf_counter()
    for _ in range(repeats):
        torch.matmul(left, right.T, out=out)
    if left.device.type != "cpu":
        torch.accelerator.synchronize(left.device)
    return (time.perf_counter() - started) / repeats
