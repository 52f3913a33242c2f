"""FSDP2 of 4-bit bases: packed weights that ranks hold in shards.

FSDP2 gathers plain tensors: what bitsandbytes keeps on its own kind of tensor, the scales, is gone
from what it gathers. So the packed weights become plain tensors here, their bytes read as numbers
of the precision the model computes in, which gathering copies bit for bit; the scales, an eighth of
the packed weights' size or less, stay whole beside them on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model.quantization.bnb import Dequantized4bit


class Sharded4bit(Dequantized4bit):
    """A 4-bit linear map whose packed weight is a plain tensor [bytes / size of a number]."""

    scales: Any

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the map stands for, while its part is gathered."""
        packed = self.weight.detach().view(torch.uint8).view(-1, 1)
        return dequantize_4bit(packed, self.scales).to(dtype)


def make_spreadable(model: nn.Module, *, device: torch.device, compute: torch.dtype) -> int:
    """Let every 4-bit map of the model be spread, to compute on `device`; returns how many.

    Raises:
        ModelError: a map's bytes are no whole numbers of the precision computed in.
    """
    found = [m for m in model.modules() if isinstance(m, Dequantized4bit)]
    for module in found:
        weight: Any = module.weight
        packed = weight.data.contiguous().view(torch.uint8).view(-1)
        if packed.numel() % compute.itemsize:
            raise ModelError(
                f"a weight of {packed.numel()} packed bytes can't be spread in parts of "
                f"{compute.itemsize}",
                where="device.shard",
                hint="device.shard=none, or model.quantization=none",
            )
        module.scales = weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        module.scales.to(device)
        module.weight = nn.Parameter(packed.view(compute), requires_grad=False)
        module.__class__ = Sharded4bit
    return len(found)


def mark_packed(model: nn.Module) -> None:
    """Let whoever counts weights see how many the spread maps stand for."""
    for module in model.modules():
        if isinstance(module, Sharded4bit):
            module.weight.quant_state = module.scales  # pyright: ignore[reportAttributeAccessIssue]
