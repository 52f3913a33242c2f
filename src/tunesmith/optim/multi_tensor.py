"""Multi-tensor updates: small parameters are updated together, since on a GPU a kernel launch takes
longer than the work on few elements.

What is kept of the members lies end to end in one tensor, of which each member's own is a view; so
states are saved and loaded as if nothing were joined. A step copies gradients and parameters end to
end, runs the rule once, and copies the parameters back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.optim.master_weights import join_master, split_master_

SMALL = 1 << 20
"""Elements above which a parameter is updated by itself."""
MOST = 1 << 22
"""Elements of a bundle: 40 MiB while it is updated, with its gradients and masters."""


class Member(Protocol):
    """A parameter and what is kept of it; `optim.base.Slot`."""

    parameter: Tensor
    low_bits: Tensor | None
    decay: bool
    lr_factor: float
    state: dict[str, Tensor]

    @property
    def flat(self) -> Tensor: ...


@dataclass(slots=True)
class TensorGroup:
    """Members on one device that are updated alike. Where a rule needs whole parameters they are of
    one shape, and a stack to it; else their elements are one row.
    """

    members: Sequence[Member]
    stacked: bool
    low_bits: Tensor | None
    state: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.members[0].parameter.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter that the rule sees."""
        if self.stacked:
            return (len(self.members), *self.members[0].parameter.shape)
        return (sum(member.flat.numel() for member in self.members),)

    @torch.no_grad()
    def update(self, rule: Callable[[Tensor, Tensor], None], *, grad_scale: float) -> None:
        """Run `rule` once, which changes the masters [n] in place by the gradients [n], both
        float32.
        """
        parts = [member.flat for member in self.members]
        sizes = [part.numel() for part in parts]
        grad = torch.cat([_flat_gradient(member) for member in self.members]).float()
        if grad_scale != 1.0:
            grad.mul_(grad_scale)
        if self.low_bits is None:
            back = torch.cat(parts)
            rule(back, grad)
        elif self.low_bits.dtype == torch.int16:
            back = torch.cat(parts)
            master = join_master(back, self.low_bits, out=torch.empty_like(grad))
            rule(master, grad)
            split_master_(master, upper=back, low=self.low_bits)
        else:
            back = self.low_bits
            rule(back, grad)
        torch._foreach_copy_(parts, list(back.split(sizes)))  # pyright: ignore[reportPrivateImportUsage]


def grouped(
    members: Iterable[Member], *, stacks: Callable[[Member], bool]
) -> tuple[list[TensorGroup], list[Any]]:
    """The members in bundles, and those that are too large or have none to go with; `stacks` says
    whether the rule needs a member's parameter whole.
    """
    alike: dict[tuple[Any, ...], list[Member]] = {}
    alone: list[Any] = []
    for member in members:
        if 0 < member.flat.numel() <= SMALL:
            alike.setdefault(_kind(member, stacks(member)), []).append(member)
        else:
            alone.append(member)
    groups: list[TensorGroup] = []
    for group in alike.values():
        for part in _parts(group):
            if len(part) == 1:
                alone += part
            else:
                groups.append(_group(part, stacked=stacks(part[0])))
    return groups, alone


def _kind(member: Member, stacked: bool) -> tuple[Any, ...]:
    parameter, rest = member.parameter, member.low_bits
    return (
        parameter.device,
        parameter.dtype,
        None if rest is None else rest.dtype,
        member.decay,
        member.lr_factor,
        tuple((name, tensor.dtype) for name, tensor in member.state.items()),
        tuple(parameter.shape) if stacked else None,
    )


def _parts(members: Sequence[Member]) -> Iterable[list[Member]]:
    held: list[Member] = []
    size = 0
    for member in members:
        count = member.flat.numel()
        if held and size + count > MOST:
            yield held
            held, size = [], 0
        held.append(member)
        size += count
    yield held


@torch.no_grad()
def _group(members: Sequence[Member], *, stacked: bool) -> TensorGroup:
    first = members[0]
    rest = None
    if first.low_bits is not None:
        rest, views = _flatten([m.low_bits for m in members if m.low_bits is not None])
        for member, view in zip(members, views, strict=True):
            member.low_bits = view
    state: dict[str, Tensor] = {}
    for name, tensor in first.state.items():
        whole, views = _flatten([member.state[name] for member in members])
        for member, view in zip(members, views, strict=True):
            member.state[name] = view
        flat = not stacked or tensor.shape == (first.flat.numel(),)
        state[name] = whole if flat else whole.view(len(members), *tensor.shape)
    return TensorGroup(members, stacked, rest, state)


def _flatten(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One flat tensor of their values, and views of it in their shapes."""
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
    parts = whole.split([tensor.numel() for tensor in tensors])
    return whole, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _flat_gradient(member: Member) -> Tensor:
    grad = member.parameter.grad
    if grad is None:
        return torch.zeros((), device=member.parameter.device).expand(member.flat.numel())
    return grad.detach().reshape(-1)
