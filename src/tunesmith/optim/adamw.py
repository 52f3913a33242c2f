"""AdamW whose updates are exact to float32 whatever the precision of the parameters it trains.

A bfloat16 parameter is one half of its float32 master: the parameter holds the upper 16 bits,
rounded to nearest with halves away from zero, and an int16 tensor holds what the rounding took
away. Joined they are the master to the last bit, so a weight takes 2 + 2 + 8 bytes with its two
moments instead of 2 + 4 + 8.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.optim.decay import no_decay
from tunesmith.optim.norm import clip_factor, grad_norm

CPU_CHUNK = 1 << 15
"""Elements a CPU thread updates at a time: parameter, gradient and moments of a chunk stay in the
cache.
"""
DEVICE_CHUNK = 1 << 24
"""Elements updated at a time on an accelerator, where only launches and the size of the scratch
buffers count.
"""


def join(upper: Tensor, low: Tensor, *, out: Tensor) -> Tensor:
    """float32 `out` [n] from its bfloat16 part and the int16 remainder of its rounding."""
    bits = out.view(torch.int32)
    bits.copy_(upper.view(torch.int16)).bitwise_left_shift_(16).add_(low)
    return out


def split_(master: Tensor, *, upper: Tensor, low: Tensor) -> None:
    """Inverse of `join`: writes `upper` bfloat16 and `low` int16 and destroys `master`; all [n].

    The remainder bits - (upper << 16) lies in [-32768, 32767] just because halves are rounded away
    from zero, and is then the lower 16 bits of the master read as a signed number.
    """
    bits = master.view(torch.int32)
    low.copy_(bits)
    upper.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


@dataclass(slots=True)
class Slot:
    """A parameter and its state, flat [n]; the float32 master has one of three forms."""

    parameter: Tensor
    # int16 remainder of a bfloat16 parameter; None for a float32 one; else the float32 master
    rest: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decay: bool
    lr_factor: float = 1.0

    @property
    def flat(self) -> Tensor:
        """The parameter's memory, without history."""
        return self.parameter.detach().view(-1)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on float32 masters.

    A parameter without a gradient is updated as if it were zero, so that a run doesn't depend on
    whether a buffer happens to exist.

    Args:
        named_parameters: what is trained; those that don't require gradients are left out.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: share of lr by which weights shrink each step.
        undecayed: names that don't shrink; by default what `no_decay` says of name and shape alone.
        lr_factors: what the learning rate is multiplied by, by name; 1 for names not in it.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        undecayed: Collection[str] | None = None,
        lr_factors: Mapping[str, float] | None = None,
    ) -> None:
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.steps = 0
        self._clip = 1.0
        self._scratch: dict[torch.device, Tensor] = {}
        self._slots: dict[str, Slot] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                spared = no_decay(name, parameter) if undecayed is None else name in undecayed
                slot = _new_slot(parameter, decay=not spared)
                slot.lr_factor = (lr_factors or {}).get(name, 1.0)
                self._slots[name] = slot

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trained parameters."""
        return tuple(self._slots)

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters."""
        return [slot.parameter for slot in self._slots.values()]

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """The norm of all gradients; the next `step` scales them down to `max_norm` as it goes.

        The gradients themselves stay as they are, which saves writing them once more. On an
        accelerator this waits for the norm, which a step has to look at anyway.
        """
        norm = grad_norm(self.parameters)
        self._clip = 1.0 if max_norm is None else clip_factor(float(norm), max_norm)
        return norm

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update every parameter with its gradient times `grad_scale`; the gradients are left as
        they are.
        """
        self.steps += 1
        grad_scale, self._clip = grad_scale * self._clip, 1.0
        counters: dict[torch.device, Tensor] = {}
        for slot in self._slots.values():
            device = slot.parameter.device
            if device not in counters:
                counters[device] = torch.full((), float(self.steps), device=device)
            self._update(slot, lr=lr, grad_scale=grad_scale, counter=counters[device])

    def zero_grad(self) -> None:
        """Give the gradients' memory to the next forward pass, which runs before there are any."""
        self._clip = 1.0
        for slot in self._slots.values():
            slot.parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as float32 tensors `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` and
        the int64 `steps`.

        The masters are there whatever the form they are kept in, so that a state loads into
        parameters of any precision. Moments, and the masters of float32 parameters, are the live
        tensors, not copies.
        """
        state = {"steps": torch.tensor(self.steps)}
        for name, slot in self._slots.items():
            shape = slot.parameter.shape
            state[f"master.{name}"] = _master(slot).view(shape)
            state[f"exp_avg.{name}"] = slot.exp_avg.view(shape)
            state[f"exp_avg_sq.{name}"] = slot.exp_avg_sq.view(shape)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, the parameters' values included.

        Raises:
            KeyError: a tensor is missing or there is one too many.
            ValueError: a shape differs.
        """
        kinds = ("master", "exp_avg", "exp_avg_sq")
        wanted = {"steps"} | {f"{kind}.{name}" for kind in kinds for name in self._slots}
        if wanted != set(state):
            odd = sorted(wanted ^ set(state))
            raise KeyError(f"the state has other tensors than the optimizer, {odd[0]} for one")
        for name, slot in self._slots.items():
            for kind in kinds:
                if state[f"{kind}.{name}"].shape != slot.parameter.shape:
                    raise ValueError(f"the shape of {kind}.{name} differs from the parameter's")
        self.steps = int(state["steps"])
        for name, slot in self._slots.items():
            slot.exp_avg.copy_(state[f"exp_avg.{name}"].reshape(-1))
            slot.exp_avg_sq.copy_(state[f"exp_avg_sq.{name}"].reshape(-1))
            _set_master(slot, state[f"master.{name}"].reshape(-1))

    def _update(self, slot: Slot, *, lr: float, grad_scale: float, counter: Tensor) -> None:
        grad = slot.parameter.grad
        flat_grad = None if grad is None else grad.detach().reshape(-1)
        parameter = slot.flat
        for span in _spans(parameter):
            master, scratch_grad = self._buffers(parameter.device, span.stop - span.start)
            if flat_grad is None:
                scratch_grad.zero_()
            elif grad_scale == 1.0 and flat_grad.dtype == torch.float32:
                scratch_grad = flat_grad[span]
            else:
                scratch_grad.copy_(flat_grad[span]).mul_(grad_scale)
            if slot.rest is None:
                master = parameter[span]
            elif slot.rest.dtype == torch.int16:
                join(parameter[span], slot.rest[span], out=master)
            else:
                master = slot.rest[span]
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                [master],
                [scratch_grad],
                [slot.exp_avg[span]],
                [slot.exp_avg_sq[span]],
                [],
                [counter],
                lr=lr * slot.lr_factor,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=self.weight_decay if slot.decay else 0.0,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )
            if slot.rest is None:
                continue
            if slot.rest.dtype == torch.int16:
                split_(master, upper=parameter[span], low=slot.rest[span])
            else:
                parameter[span].copy_(master)

    def _buffers(self, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
        if device not in self._scratch or self._scratch[device].shape[1] < count:
            longest = max(p.numel() for p in self.parameters if p.device == device)
            size = min(longest, _chunk(device))
            self._scratch[device] = torch.empty(2, size, dtype=torch.float32, device=device)
        master, grad = self._scratch[device]
        return master[:count], grad[:count]


def _chunk(device: torch.device) -> int:
    return CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else DEVICE_CHUNK


def _spans(flat: Tensor) -> Iterator[slice]:
    size = _chunk(flat.device)
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))


@torch.no_grad()
def _new_slot(parameter: Tensor, *, decay: bool) -> Slot:
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
    flat = parameter.detach().view(-1)
    rest: Tensor | None = None
    if flat.dtype == torch.bfloat16:
        rest = torch.zeros_like(flat, dtype=torch.int16)
    elif flat.dtype != torch.float32:
        rest = flat.to(torch.float32)
    exp_avg = torch.zeros_like(flat, dtype=torch.float32)
    return Slot(parameter, rest, exp_avg, torch.zeros_like(exp_avg), decay)


def _master(slot: Slot) -> Tensor:
    if slot.rest is None:
        return slot.flat
    if slot.rest.dtype != torch.int16:
        return slot.rest
    return join(slot.flat, slot.rest, out=torch.empty_like(slot.exp_avg))


def _set_master(slot: Slot, master: Tensor) -> None:
    flat = slot.flat
    if slot.rest is None:
        flat.copy_(master)
    elif slot.rest.dtype != torch.int16:
        slot.rest.copy_(master)
        flat.copy_(slot.rest)
    else:
        copy = master.to(device=flat.device, dtype=torch.float32, copy=True)
        split_(copy, upper=flat, low=slot.rest)
