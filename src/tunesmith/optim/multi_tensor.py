"""Multi-tensor updates (as apex's multi_tensor_apply and torch's foreach): small parameters are
updated together, since on a GPU a kernel launch takes longer than the work on few elements.

The state tensors of a group lie end to end in one flat tensor, and each member's own state is a
view of it, so states are saved and loaded as if nothing were grouped. A step copies gradients and
parameters into flat tensors, runs the rule once, and copies the parameters back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.optim.param_state import ParamState, join_master, split_master_

SMALL = 1 << 20
"""Elements above which a parameter is updated alone."""
MOST = 1 << 22
"""Elements of a group: 40 MiB while it is updated, with its gradients and masters."""


@dataclass(slots=True)
class TensorGroup:
    """Parameters of one device, dtype and rule that are updated in one call.

    `stacked`: the rule needs whole parameters; they have one shape and are stacked along a new
    first dimension. Otherwise the elements of all parameters form one vector.
    """

    members: Sequence[ParamState]
    stacked: bool
    low_bits: Tensor | None
    state: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.members[0].parameter.device

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter that the rule sees."""
        if self.stacked:
            return (len(self.members), *self.members[0].parameter.shape)
        return (sum(member.flat.numel() for member in self.members),)

    @torch.no_grad()
    def update(self, rule: Callable[[Tensor, Tensor], None], *, grad_scale: float) -> None:
        """Call `rule(master, grad)` once, which changes the master [n] in place; both float32."""
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
    params: Iterable[ParamState], *, stacks: Callable[[ParamState], bool]
) -> tuple[list[TensorGroup], list[ParamState]]:
    """Group small parameters; returns the groups, and the parameters that are updated alone.

    Alone are those above `SMALL` elements and those with no other of their kind. `stacks` tells
    whether the rule needs a parameter whole.
    """
    by_kind: dict[tuple[Any, ...], list[ParamState]] = {}
    alone: list[ParamState] = []
    for param in params:
        if 0 < param.flat.numel() <= SMALL:
            by_kind.setdefault(_kind(param, stacks(param)), []).append(param)
        else:
            alone.append(param)
    groups: list[TensorGroup] = []
    for same_kind in by_kind.values():
        for members in _bounded(same_kind):
            if len(members) == 1:
                alone += members
            else:
                groups.append(_group(members, stacked=stacks(members[0])))
    return groups, alone


def group_state(group: TensorGroup) -> ParamState:
    """The state that a rule sees of a group; its parameter is a meta tensor that has a shape only.

    A rule reads the shape and the flat state tensors; the values go in and out through
    `TensorGroup.update`.
    """
    first = group.members[0]
    shape = torch.empty(group.shape, dtype=first.parameter.dtype, device="meta")
    return ParamState(
        shape, group.low_bits, first.decay, first.lr_factor, group.state,
        stack=len(group.members) if group.stacked else 1,
    )  # fmt: skip


def _kind(param: ParamState, stacked: bool) -> tuple[Any, ...]:
    """All that must be equal for two parameters to be updated in one call."""
    parameter, low_bits = param.parameter, param.low_bits
    return (
        parameter.device,
        parameter.dtype,
        None if low_bits is None else low_bits.dtype,
        param.decay,
        param.lr_factor,
        tuple((name, tensor.dtype) for name, tensor in param.state.items()),
        tuple(parameter.shape) if stacked else None,
    )


def _bounded(params: Sequence[ParamState]) -> Iterator[list[ParamState]]:
    """The parameters in runs of at most `MOST` elements, which bounds the copies of a step."""
    run: list[ParamState] = []
    size = 0
    for param in params:
        count = param.flat.numel()
        if run and size + count > MOST:
            yield run
            run, size = [], 0
        run.append(param)
        size += count
    yield run


@torch.no_grad()
def _group(members: Sequence[ParamState], *, stacked: bool) -> TensorGroup:
    """Move the members' states into flat tensors, of which each member keeps a view."""
    first = members[0]
    low_bits = None
    if first.low_bits is not None:
        low_bits, views = _flatten([m.low_bits for m in members if m.low_bits is not None])
        for member, view in zip(members, views, strict=True):
            member.low_bits = view
    state: dict[str, Tensor] = {}
    for name, tensor in first.state.items():
        whole, views = _flatten([member.state[name] for member in members])
        for member, view in zip(members, views, strict=True):
            member.state[name] = view
        # A state of another size than the parameter (Adafactor's rows) keeps its shape in the
        # stack.
        flat = not stacked or tensor.shape == (first.flat.numel(),)
        state[name] = whole if flat else whole.view(len(members), *tensor.shape)
    return TensorGroup(members, stacked, low_bits, state)


def _flatten(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One flat tensor with the values of all, and views of it in their shapes."""
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
    parts = whole.split([tensor.numel() for tensor in tensors])
    return whole, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _flat_gradient(param: ParamState) -> Tensor:
    grad = param.parameter.grad
    if grad is None:
        return torch.zeros((), device=param.parameter.device).expand(param.flat.numel())
    return grad.detach().reshape(-1)
