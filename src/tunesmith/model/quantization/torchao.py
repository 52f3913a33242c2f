"""torchao's int8, int4 and float8 weights, multiplied after dequantisation.

torchao has no format of 4 bits that is trained through on every device: its kernels take CUDA or
XPU, and have no backward pass. Its quantiser gives the numbers on any device, one to a byte; here
two are packed into one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup
from torchao.utils import TorchAOBaseTensor

from tunesmith.errors import ModelError, first_line
from tunesmith.model.quantization.matmul import multiply

GROUP = 32
"""Weights that share one scale in 4 bits."""


class DequantizedTorchao(nn.Linear):
    """A linear map of torchao times its dequantised weight."""

    def forward(self, input: Tensor) -> Tensor:
        return multiply(self, input)

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the map stands for."""
        weight: Any = self.weight
        return weight.dequantize().to(dtype)


class PackedInt4(TorchAOBaseTensor):
    """Numbers of 4 bits, -8 to 7, with a scale for each group of a row.

    `packed` [out, in / 2] holds two in a byte, each 8 too large; `scale` [out, in / group] has the
    plain weight's dtype.
    """

    tensor_data_names = ["packed", "scale"]  # noqa: RUF012 - read by the base class
    tensor_attribute_names = ["dtype"]  # noqa: RUF012

    def __new__(cls, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> PackedInt4:
        shape = (packed.shape[0], 2 * packed.shape[1])
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, shape, dtype=dtype, device=packed.device, requires_grad=False
        )

    def __init__(self, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.scale = packed, scale

    @classmethod
    def pack(cls, numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> PackedInt4:
        """From int8 [out, in], an even number of columns."""
        pairs = (numbers + 8).to(torch.uint8).view(numbers.shape[0], -1, 2)
        return cls(pairs[..., 0] | (pairs[..., 1] << 4), scale, dtype)

    def dequantize(self) -> Tensor:
        """The plain weight [out, in]."""
        pairs = torch.stack((self.packed & 15, self.packed >> 4), dim=-1)
        numbers = pairs.view(*self.scale.shape, -1).to(self.dtype) - 8
        return (numbers * self.scale.unsqueeze(-1)).view(self.shape)


def settings(kind: str) -> Any:
    """torchao's configuration of the format.

    `torchao_int8`: one scale for a row; `torchao_fp8`: e4m3, one scale for a row; `torchao_int4`:
    symmetric, one scale for 32 weights of a row.
    """
    if kind == "torchao_int8":
        return Int8WeightOnlyConfig()
    if kind == "torchao_fp8":
        return Float8WeightOnlyConfig()
    four: Any = getattr(torch, "int4")  # noqa: B009, torch's stubs leave it out
    return IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(GROUP))


def check_device(kind: str, device: torch.device) -> None:
    """Quantise a small map on the device, and make it plain again.

    Raises:
        ModelError: torchao can't, there.
    """
    try:
        probe = nn.Linear(GROUP, 2, bias=False, device=device).requires_grad_(False)
        quantize_(probe, settings(kind))
        found = probe.weight.dequantize().float().sum().item()
        if found != found:
            raise ValueError("the weights come back as nan")
    except Exception as error:  # libraries of kernels raise whatever they like
        reason = first_line(error)
        raise ModelError(
            f"{kind} doesn't work on {device}: {reason}",
            where="model.quantization",
            hint="model.quantization=torchao_int8, or nf4 by bitsandbytes",
        ) from error


def check_widths(kind: str, widths: dict[str, int]) -> None:
    """`widths`: of each map's input, by its name.

    Raises:
        ModelError: rows of a map can't be divided into groups.
    """
    wrong = [name for name, width in widths.items() if width % GROUP]
    if kind == "torchao_int4" and wrong:
        raise ModelError(
            f"{wrong[0]} has rows of {widths[wrong[0]]} weights, and {kind} keeps "
            f"groups of {GROUP}",
            where="model.quantization",
            hint="model.quantization=nf4, or torchao_int8",
        )


def multiply_dequantized(model: nn.Module) -> list[Any]:
    """Make every map of torchao in the model one of these, 4 bits packed; returns them."""
    found: list[Any] = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and isinstance(module.weight, TorchAOBaseTensor)
    ]
    for module in found:
        weight: Any = module.weight
        if hasattr(weight, "target_dtype"):
            kept = PackedInt4.pack(weight.qdata, weight.scale, weight.dtype)
            module.weight = nn.Parameter(kept, requires_grad=False)
        module.__class__ = DequantizedTorchao
    return found
