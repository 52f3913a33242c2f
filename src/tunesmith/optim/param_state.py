"""A parameter with what an optimizer keeps of it, and its float32 master in whichever form."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.optim.master_weights import join, split_
from tunesmith.optim.multi_tensor import Bundle


@dataclass(slots=True)
class Slot:
    """A parameter and its state, flat [n]; the float32 master has one of three forms."""

    parameter: Tensor
    # int16 remainder of a bfloat16 parameter; None for a float32 one; else the float32 master
    rest: Tensor | None
    decay: bool
    lr_factor: float = 1.0
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    stack: int = 1  # parameters of one shape that are updated together, along the first dimension

    @property
    def flat(self) -> Tensor:
        """The parameter's memory, without history."""
        return self.parameter.detach().view(-1)


@torch.no_grad()
def new_slot(parameter: Tensor, *, decay: bool) -> Slot:
    """A slot without state; the parameter lies in one piece afterwards."""
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
    flat = parameter.detach().view(-1)
    rest: Tensor | None = None
    if flat.dtype == torch.bfloat16:
        rest = torch.zeros_like(flat, dtype=torch.int16)
    elif flat.dtype != torch.float32:
        rest = flat.to(torch.float32)
    return Slot(parameter, rest, decay)


def joint_slot(bundle: Bundle) -> Slot:
    """What a rule sees of a bundle; the parameter has a shape only."""
    first = bundle.members[0]
    shape = torch.empty(bundle.shape, dtype=first.parameter.dtype, device="meta")
    return Slot(
        shape, bundle.rest, first.decay, first.lr_factor, bundle.state,
        stack=len(bundle.members) if bundle.stacked else 1,
    )  # fmt: skip


def shaped(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What is kept of each element, in the parameter's shape; anything else as it is."""
    return tensor.view(parameter.shape) if tensor.shape == (parameter.numel(),) else tensor


def master_of(slot: Slot) -> Tensor:
    """The float32 master [n]: the live tensor, or a copy where it is in two halves."""
    if slot.rest is None:
        return slot.flat
    if slot.rest.dtype != torch.int16:
        return slot.rest
    return join(slot.flat, slot.rest, out=torch.empty_like(slot.flat, dtype=torch.float32))


def set_master(slot: Slot, master: Tensor) -> None:
    """Take over a master [n], and with it the parameter's value."""
    flat = slot.flat
    if slot.rest is None:
        flat.copy_(master)
    elif slot.rest.dtype != torch.int16:
        slot.rest.copy_(master)
        flat.copy_(slot.rest)
    else:
        copy = master.to(device=flat.device, dtype=torch.float32, copy=True)
        split_(copy, upper=flat, low=slot.rest)
