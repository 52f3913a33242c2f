"""Parameters and gradients for the optimizers' tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def make_parameters(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Values that bfloat16 holds exactly, in `dtype`; gradients are float32."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)
        made[name] = nn.Parameter(values)
        made[name].grad_dtype = torch.float32
    return made


def set_gradients(named: Mapping[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
