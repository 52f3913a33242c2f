"""Update rules with at most one state tensor: SGD, Lion (arXiv 2302.06675), Adafactor (arXiv
1804.04235), Muon.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from tunesmith.optim.adamw import AdamW
from tunesmith.optim.optimizer import Optimizer, ParamState


class _OneMoment(Optimizer):
    """An optimizer with one state tensor per parameter, the momentum."""

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """The momentum."""
        return {"momentum": self.zeros(param)}


class SGD(_OneMoment):
    """SGD with momentum and decoupled decay: m = momentum * m + g, w = w - lr * m.

    Args:
        named_parameters: the trained parameters.
        momentum: decay rate of the momentum, a running sum.
        shared: arguments of `Optimizer`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        momentum: float = 0.95,
        **shared: Any,
    ) -> None:
        self.momentum = momentum
        super().__init__(named_parameters, **shared)

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
        """One SGD step on a chunk."""
        buffer = param.state["momentum"][span].mul_(self.momentum).add_(grad)
        master.mul_(1 - lr * self.decay(param)).add_(buffer, alpha=-lr)


class Lion(_OneMoment):
    """Lion: the sign of an interpolated momentum (Chen et al., 2023, arXiv 2302.06675, algorithm
    2).

    w = w - lr * (sign(b1 * m + (1 - b1) * g) + decay * w), then m = b2 * m + (1 - b2) * g.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        **shared: Any,
    ) -> None:
        self.betas = betas
        super().__init__(named_parameters, **shared)

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
        """One Lion step on a chunk."""
        momentum = param.state["momentum"][span]
        direction = (momentum * self.betas[0]).add_(grad, alpha=1 - self.betas[0]).sign_()
        master.mul_(1 - lr * self.decay(param)).add_(direction, alpha=-lr)
        momentum.mul_(self.betas[1]).add_(grad, alpha=1 - self.betas[1])


class Adafactor(Optimizer):
    """Adafactor: factored second moments, as row and column means (arXiv 1804.04235).

    Source: Shazeer and Stern, 2018; without a first moment, and with a given learning rate that is
    not scaled by the parameter's size. The decay rate of the second moment at step t is 1 - t^-0.8.
    An update whose root mean square is above 1 is scaled down to 1. Vectors keep their whole second
    moment.
    """

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """Means over the last and the last but one dimension; for a vector the second moment."""
        shape = param.parameter.shape
        if len(shape) < 2:
            return {"exp_avg_sq": self.zeros(param)}
        flat = param.flat
        options: dict[str, Any] = {"dtype": torch.float32, "device": flat.device}
        return {
            "row": torch.zeros(shape[:-1], **options),
            "column": torch.zeros((*shape[:-2], shape[-1]), **options),
        }

    def whole(self, param: ParamState) -> bool:
        """Always true: the update is scaled by its root mean square over the whole parameter."""
        return True

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
        """One Adafactor step on a whole parameter, or on a stack of parameters of one shape."""
        decay = 1.0 - math.pow(self.steps, -0.8)
        grad = grad.view(param.parameter.shape)
        square = grad.square().add_(1e-30)
        if "row" in param.state:
            row, column = param.state["row"], param.state["column"]
            row.mul_(decay).add_(square.mean(dim=-1), alpha=1 - decay)
            column.mul_(decay).add_(square.mean(dim=-2), alpha=1 - decay)
            row_root = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            update = torch.mul(row_root, column.unsqueeze(-2).rsqrt()).mul_(grad)
        else:
            moment = param.state["exp_avg_sq"]
            moment.mul_(decay).add_(square.view(-1), alpha=1 - decay)
            update = moment.rsqrt().mul_(grad.reshape(-1))
        if param.stack == 1:
            rms = update.norm(2) / update.numel() ** 0.5
            update.div_(rms.clamp_(min=1.0)).mul_(lr)
        else:  # each parameter of the stack by its own root mean square
            each = update.view(param.stack, -1)
            rms = each.norm(2, dim=1, keepdim=True) / each.shape[1] ** 0.5
            each.div_(rms.clamp_(min=1.0)).mul_(lr)
        master.mul_(1 - lr * self.decay(param)).sub_(update.view(-1))


MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_STEPS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """The orthogonal factor U V^T of each matrix U S V^T [..., rows, columns], approximately, bf16.

    Five Newton-Schulz iterations X = a X + (b A + c A A) X with A = X X^T (Jordan et al., Muon,
    2024), which bring all singular values to between about 0.7 and 1.2.
    """
    a, b, c = MUON_COEFFICIENTS
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    shape = x.shape
    if x.ndim > 2:
        x = x.reshape(-1, *shape[-2:])
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(MUON_STEPS):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x


class Muon(AdamW):
    """Muon for the matrices inside the decoder, AdamW for all other parameters (arXiv
    2502.16982).

    m = momentum * m + (1 - momentum) * g. The step is the orthogonal factor of the Nesterov
    momentum (1 - momentum) * g + momentum * m, times lr * 0.2 * sqrt(max(rows, columns)). Its root
    mean square is about that of AdamW's steps (Liu et al., 2025), so that one learning rate suits
    both. Each matrix of a stack of experts is orthogonalised on its own.

    Args:
        named_parameters: the trained parameters.
        matrices: names that get Muon; None: all of two or more dimensions with weight decay.
        momentum: decay rate of the momentum, a running mean.
        options: arguments of `AdamW`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        matrices: Collection[str] | None = None,
        momentum: float = 0.95,
        **options: Any,
    ) -> None:
        self.momentum = momentum
        self.matrices = matrices
        super().__init__(named_parameters, **options)

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """The momentum of a Muon matrix, the two moments of all others."""
        chosen = param.decay if self.matrices is None else name in self.matrices
        if chosen and param.parameter.ndim >= 2:
            return {"momentum": self.zeros(param)}
        return super().new_state(name, param)

    def whole(self, param: ParamState) -> bool:
        """True for Muon matrices, which are orthogonalised as a whole."""
        return "momentum" in param.state

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
        """One Muon step on a matrix, or one AdamW step on a chunk."""
        if "momentum" not in param.state:
            super().rule(param, span, master=master, grad=grad, lr=lr, counter=counter)
            return
        momentum = param.state["momentum"].lerp_(grad, 1 - self.momentum)
        shape = param.parameter.shape
        update = orthogonalised(grad.lerp(momentum, self.momentum).view(shape))
        rate = lr * 0.2 * math.sqrt(max(shape[-2:]))
        master.mul_(1 - lr * self.decay(param)).add_(update.reshape(-1), alpha=-rate)
