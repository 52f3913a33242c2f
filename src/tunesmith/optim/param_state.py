"""The state of one parameter: the optimizer's tensors, and its float32 master weights.

A bfloat16 parameter is one half of its master (a split master, as in "lo-hi" mixed precision): the
parameter holds the upper 16 bits, rounded to nearest with halves away from zero, and an int16
tensor holds what the rounding took away. Together they are the master to the last bit, in 2 + 2
bytes per element instead of 2 + 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class ParamState:
    """A parameter and its state, flat [n]; the float32 master has one of three forms."""

    parameter: Tensor
    # None for a float32 parameter, which is its own master; the int16 remainder for a bfloat16 one;
    # else (float16) the float32 master itself
    low_bits: Tensor | None
    decay: bool
    lr_factor: float = 1.0
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    stack: int = 1  # parameters of one shape that are updated together, along the first dimension

    @property
    def flat(self) -> Tensor:
        """The parameter's memory as a flat tensor [n] without autograd history."""
        return self.parameter.detach().view(-1)


@torch.no_grad()
def new_param_state(parameter: Tensor, *, decay: bool) -> ParamState:
    """A parameter without optimizer tensors yet; the parameter is contiguous afterwards."""
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
    flat = parameter.detach().view(-1)
    low_bits: Tensor | None = None
    if flat.dtype == torch.bfloat16:
        low_bits = torch.zeros_like(flat, dtype=torch.int16)
    elif flat.dtype != torch.float32:
        low_bits = flat.to(torch.float32)
    return ParamState(parameter, low_bits, decay)


def join_master(upper: Tensor, low: Tensor, *, out: Tensor) -> Tensor:
    """Write the float32 master into `out` [n], from its bfloat16 half and the int16 remainder."""
    bits = out.view(torch.int32)
    bits.copy_(upper.view(torch.int16)).bitwise_left_shift_(16).add_(low)
    return out


def split_master_(master: Tensor, *, upper: Tensor, low: Tensor) -> None:
    """Inverse of `join_master`: write `upper` bfloat16 and `low` int16; all [n].

    It destroys `master`, whose memory serves as scratch. The remainder bits - (upper << 16) lies in
    [-32768, 32767] because halves are rounded away from zero, and so it is the lower 16 bits of the
    master read as a signed number.
    """
    bits = master.view(torch.int32)
    low.copy_(bits)
    upper.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def shaped(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A state tensor with one element per parameter element, in the parameter's shape.

    Any other tensor is returned as it is.
    """
    return tensor.view(parameter.shape) if tensor.shape == (parameter.numel(),) else tensor


def master_of(param: ParamState) -> Tensor:
    """The float32 master [n]: the live tensor, or a copy where it is kept in two halves."""
    if param.low_bits is None:
        return param.flat
    if param.low_bits.dtype != torch.int16:
        return param.low_bits
    return join_master(
        param.flat, param.low_bits, out=torch.empty_like(param.flat, dtype=torch.float32)
    )


def set_master(param: ParamState, master: Tensor) -> None:
    """Set the master [n], and with it the parameter's value."""
    flat = param.flat
    if param.low_bits is None:
        flat.copy_(master)
    elif param.low_bits.dtype != torch.int16:
        param.low_bits.copy_(master)
        flat.copy_(param.low_bits)
    else:
        copy = master.to(device=flat.device, dtype=torch.float32, copy=True)
        split_master_(copy, upper=flat, low=param.low_bits)
