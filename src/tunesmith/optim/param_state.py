"""The state of one parameter: the optimizer's tensors and the float32 master in one of three
forms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.optim.master_weights import join_master, split_master_
from tunesmith.optim.multi_tensor import TensorGroup


@dataclass(slots=True)
class ParamState:
    """A parameter and its state, flat [n]; the float32 master has one of three forms."""

    parameter: Tensor
    # int16 remainder of a bfloat16 parameter; None for a float32 one; else the float32 master
    low_bits: Tensor | None
    decay: bool
    lr_factor: float = 1.0
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    stack: int = 1  # parameters of one shape that are updated together, along the first dimension

    @property
    def flat(self) -> Tensor:
        """The parameter's memory, without history."""
        return self.parameter.detach().view(-1)


@torch.no_grad()
def new_param_state(parameter: Tensor, *, decay: bool) -> ParamState:
    """A slot without state; the parameter lies in one piece afterwards."""
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
    flat = parameter.detach().view(-1)
    rest: Tensor | None = None
    if flat.dtype == torch.bfloat16:
        rest = torch.zeros_like(flat, dtype=torch.int16)
    elif flat.dtype != torch.float32:
        rest = flat.to(torch.float32)
    return ParamState(parameter, rest, decay)


def group_state(group: TensorGroup) -> ParamState:
    """What a rule sees of a bundle; the parameter has a shape only."""
    first = group.members[0]
    shape = torch.empty(group.shape, dtype=first.parameter.dtype, device="meta")
    return ParamState(
        shape, group.low_bits, first.decay, first.lr_factor, group.state,
        stack=len(group.members) if group.stacked else 1,
    )  # fmt: skip


def shaped(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What is kept of each element, in the parameter's shape; anything else as it is."""
    return tensor.view(parameter.shape) if tensor.shape == (parameter.numel(),) else tensor


def master_of(param: ParamState) -> Tensor:
    """The float32 master [n]: the live tensor, or a copy where it is in two halves."""
    if param.low_bits is None:
        return param.flat
    if param.low_bits.dtype != torch.int16:
        return param.low_bits
    return join_master(
        param.flat, param.low_bits, out=torch.empty_like(param.flat, dtype=torch.float32)
    )


def set_master(param: ParamState, master: Tensor) -> None:
    """Take over a master [n], and with it the parameter's value."""
    flat = param.flat
    if param.low_bits is None:
        flat.copy_(master)
    elif param.low_bits.dtype != torch.int16:
        param.low_bits.copy_(master)
        flat.copy_(param.low_bits)
    else:
        copy = master.to(device=flat.device, dtype=torch.float32, copy=True)
        split_master_(copy, upper=flat, low=param.low_bits)
