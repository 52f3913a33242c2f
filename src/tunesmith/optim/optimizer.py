"""The base of all optimizers: float32-exact updates for parameters of any precision, clipping, and
a state that is restored bitwise.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.optim.multi_tensor import TensorGroup, group_state, grouped
from tunesmith.optim.paging import Pages
from tunesmith.optim.param_state import (
    ParamState,
    join_master,
    master_of,
    new_param_state,
    set_master,
    shaped,
    split_master_,
)
from tunesmith.optim.weight_decay import no_decay

CPU_CHUNK = 1 << 15
"""Elements that a CPU thread updates at a time: the parameter, gradient and moments of a chunk fit
into the CPU's cache, so each is read from memory once.
"""
DEVICE_CHUNK = 1 << 24
"""Elements updated at a time on an accelerator, where only the number of kernel launches and the
size of the scratch buffers matter.
"""


class ShardedParameters(Protocol):
    """What an optimizer calls where its parameters are shards of weights (`distributed/`)."""

    def grad_norm(self, local_norm: Tensor) -> Tensor:
        """The global gradient norm, from the norm of this rank's shards."""
        ...

    def discard_gradients(self) -> None:
        """Free gradients that have not been reduced into the shards."""
        ...


class Optimizer:
    """The base of all optimizers: an update rule of a subclass, on float32 master weights.

    Weight decay is decoupled (Loshchilov and Hutter, 2019, arXiv 1711.05101). A parameter without a
    gradient is updated as if its gradient were zero, so that a run does not depend on whether a
    gradient buffer happens to exist.

    Args:
        named_parameters: the trained parameters; those that don't require gradients are left out.
        weight_decay: a step shrinks weights by lr * weight_decay.
        undecayed: names without weight decay; None: `no_decay` decides by name and shape alone.
        lr_factors: factors on the learning rate by name; 1 for names that are not in it.
        pages: where state tensors are kept between steps; None: on the parameter's device.
        group_small: whether small parameters are updated together; None: everywhere but on a CPU,
            which has no launch cost to save.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        weight_decay: float = 0.0,
        undecayed: Collection[str] | None = None,
        lr_factors: Mapping[str, float] | None = None,
        pages: Pages | None = None,
        group_small: bool | None = None,
    ) -> None:
        self.weight_decay = weight_decay
        self.pages = pages
        self.steps = 0
        self.shards: ShardedParameters | None = None
        self._scratch: dict[torch.device, Tensor] = {}
        self._states: dict[str, ParamState] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                exempt = no_decay(name, parameter) if undecayed is None else name in undecayed
                param = new_param_state(parameter, decay=not exempt)
                param.lr_factor = (lr_factors or {}).get(name, 1.0)
                param.state = self.new_state(name, param)
                self._states[name] = param
        self._groups, self._alone = self._grouped(group_small)

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """The state tensors of this parameter by kind; those of the parameter's size are flat."""
        raise NotImplementedError

    def rule(
        self,
        param: ParamState,
        span: slice,
        *,
        master: Tensor,
        grad: Tensor,
        lr: float,
        counter: Tensor,
    ) -> None:
        """Update `master` [n] and the `span` of the state tensors in place, by `grad` [n].

        Both are float32. `grad` may be the gradient itself and must not be changed. `lr` includes
        the parameter's factor. `counter` is the number of this step as a tensor on the device.
        """
        raise NotImplementedError

    def zeros(self, param: ParamState) -> Tensor:
        """A state tensor of float32 zeros [n], in the place where state is kept."""
        if self.pages is not None:
            return self.pages.zeros(param.flat)
        return torch.zeros_like(param.flat, dtype=torch.float32)

    def whole(self, param: ParamState) -> bool:
        """True if the rule needs the whole parameter at once instead of chunks of it."""
        return False

    def can_group(self, param: ParamState) -> bool:
        """True if the rule gives the same result on several parameters laid end to end."""
        return True

    def decay(self, param: ParamState) -> float:
        """The weight decay of this parameter, which is multiplied by lr."""
        return self.weight_decay if param.decay else 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trained parameters."""
        return tuple(self._states)

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters."""
        return [param.parameter for param in self._states.values()]

    @property
    def held_bytes(self) -> int:
        """Device bytes of master weights and state between steps, without parameters and
        gradients.
        """
        kept = (
            t for param in self._states.values() for t in (param.low_bits, *param.state.values())
        )
        return sum(t.numel() * t.element_size() for t in kept if t is not None) - self.paged_bytes

    @property
    def paged_bytes(self) -> int:
        """Bytes of the state that is kept outside of the device's memory."""
        return 0 if self.pages is None else self.pages.bytes

    @property
    def saved_bytes(self) -> int:
        """Bytes of `state_dict`."""
        kept = (t for param in self._states.values() for t in param.state.values())
        masters = 4 * sum(param.parameter.numel() for param in self._states.values())
        counter = 8  # of the steps
        return counter + masters + sum(t.numel() * t.element_size() for t in kept)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global norm of all gradients, a scalar on their device; this does not synchronize.

        To clip, pass its `clip_factor` to `step`. The gradients themselves are not scaled, which
        saves one pass over their memory.
        """
        norm = grad_norm(self.parameters)
        if self.shards is not None:
            norm = self.shards.grad_norm(norm)
        return norm

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update every parameter with its gradient times `grad_scale`; gradients stay unchanged."""
        self.steps += 1
        devices = {param.parameter.device for param in self._states.values()}
        counters = {one: torch.full((), float(self.steps), device=one) for one in devices}
        for group, param in self._groups:
            rule = functools.partial(
                self._group_rule, param, lr=lr * param.lr_factor, counter=counters[group.device]
            )
            group.update(rule, grad_scale=grad_scale)
        for param in self._alone:
            counter = counters[param.parameter.device]
            with nullcontext() if self.pages is None else self.pages.on_device(param):
                self._update(param, lr=lr, grad_scale=grad_scale, counter=counter)
        if self.pages is not None:
            self.pages.synchronize()

    def zero_grad(self) -> None:
        """Free the gradients, so that the next forward pass can use their memory."""
        for param in self._states.values():
            param.parameter.grad = None
        if self.shards is not None:
            self.shards.discard_gradients()

    def state_dict(self) -> dict[str, Tensor]:
        """The state: float32 `master.NAME`, state tensors `KIND.NAME`, and the int64 `steps`.

        It holds the float32 masters whatever form they are kept in, so that a state loads into
        parameters of any precision. State tensors and the masters of float32 parameters are the
        live tensors, not copies.
        """
        return dict(self.state_items())

    def state_items(self) -> Iterator[tuple[str, Tensor]]:
        """The entries of `state_dict` one at a time, so that only one joined master is in
        memory.
        """
        yield "steps", torch.tensor(self.steps)
        for name, param in self._states.items():
            yield f"master.{name}", master_of(param).view(param.parameter.shape)
            for kind, tensor in param.state.items():
                yield f"{kind}.{name}", shaped(tensor, param.parameter)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state, which sets the parameters' values as well.

        Raises:
            KeyError: a tensor is missing or there is one too many.
            ValueError: a shape differs.
        """
        shapes = {"steps": torch.Size()}
        for name, param in self._states.items():
            shapes[f"master.{name}"] = param.parameter.shape
            for kind, tensor in param.state.items():
                shapes[f"{kind}.{name}"] = shaped(tensor, param.parameter).shape
        if set(shapes) != set(state):
            odd = sorted(set(shapes) ^ set(state))
            raise KeyError(f"the state and the optimizer differ in their tensors, e.g. {odd[0]}")
        for key, shape in shapes.items():
            if state[key].shape != shape:
                raise ValueError(f"the shape of {key} differs from the parameter's")
        self.steps = int(state["steps"])
        for name, param in self._states.items():
            for kind, tensor in param.state.items():
                tensor.copy_(state[f"{kind}.{name}"].reshape(tensor.shape))
            set_master(param, state[f"master.{name}"].reshape(-1))

    def _grouped(
        self, group_small: bool | None
    ) -> tuple[list[tuple[TensorGroup, ParamState]], list[ParamState]]:
        """The groups, each with the state that stands for it, and the parameters in none."""
        groupable: list[ParamState] = []
        alone: list[ParamState] = []
        for param in self._states.values():
            off_cpu = param.parameter.device.type != "cpu"
            wanted = off_cpu if group_small is None else group_small
            possible = self.pages is None and self.can_group(param)
            (groupable if wanted and possible else alone).append(param)
        groups, others = grouped(groupable, stacks=self.whole)
        return [(group, group_state(group)) for group in groups], alone + others

    def _group_rule(
        self, param: ParamState, master: Tensor, grad: Tensor, *, lr: float, counter: Tensor
    ) -> None:
        span = slice(0, master.numel())
        self.rule(param, span, master=master, grad=grad, lr=lr, counter=counter)

    def _update(self, param: ParamState, *, lr: float, grad_scale: float, counter: Tensor) -> None:
        """Update one parameter, chunk by chunk, through float32 scratch buffers."""
        grad = param.parameter.grad
        flat_grad = None if grad is None else grad.detach().reshape(-1)
        parameter = param.flat
        whole = self.whole(param)
        for span in [slice(0, parameter.numel())] if whole else _spans(parameter):
            master, scratch_grad = self._buffers(parameter.device, span.stop - span.start)
            # The three forms of gradient and master meet here; where one is float32 already, the
            # rule
            # works on it directly instead of on a copy.
            if flat_grad is None:
                scratch_grad.zero_()
            elif grad_scale == 1.0 and flat_grad.dtype == torch.float32:
                scratch_grad = flat_grad[span]
            else:
                scratch_grad.copy_(flat_grad[span]).mul_(grad_scale)
            if param.low_bits is None:
                master = parameter[span]
            elif param.low_bits.dtype == torch.int16:
                join_master(parameter[span], param.low_bits[span], out=master)
            else:
                master = param.low_bits[span]
            self.rule(
                param,
                span,
                master=master,
                grad=scratch_grad,
                lr=lr * param.lr_factor,
                counter=counter,
            )
            if param.low_bits is None:
                continue
            if param.low_bits.dtype == torch.int16:
                split_master_(master, upper=parameter[span], low=param.low_bits[span])
            else:
                parameter[span].copy_(master)

    def _buffers(self, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
        """Scratch memory [count] for a master and a gradient, allocated once per device."""
        if device not in self._scratch or self._scratch[device].shape[1] < count:
            longest = max(p.numel() for p in self.parameters if p.device == device)
            size = max(count, min(longest, _chunk(device)))
            self._scratch[device] = torch.empty(2, size, dtype=torch.float32, device=device)
        master, grad = self._scratch[device]
        return master[:count], grad[:count]


def _chunk(device: torch.device) -> int:
    return CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else DEVICE_CHUNK


def _spans(flat: Tensor) -> Iterator[slice]:
    size = _chunk(flat.device)
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The L2 norm of the gradients of all parameters: a float32 scalar on their device.

    Parameters without a gradient count as zero. The same gradients on the same number of threads
    give the same bits. It does not synchronize; reading the value does.
    """
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    # One call for all tensors, which is a few kernel launches on a GPU.
    norms = torch._foreach_norm(grads, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def clip_factor(norm: float, max_norm: float | None) -> float:
    """The factor that scales gradients of this norm down to `max_norm`, at most 1.

    It is max_norm / (norm + 1e-6), as in `torch.nn.utils.clip_grad_norm_`; None does not clip.
    """
    if max_norm is None:
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
