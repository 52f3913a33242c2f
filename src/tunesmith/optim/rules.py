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
    """A rule that keeps one tensor for a weight."""

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """The momentum."""
        return {"momentum": self.zeros(param)}


class SGD(_OneMoment):
    """Gradient descent with momentum: m = momentum * m + g, w = w - lr * m, with decoupled decay.

    Args:
        named_parameters: what is trained.
        momentum: share of the running sum that each step keeps.
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
        """One step of descent."""
        buffer = param.state["momentum"][span].mul_(self.momentum).add_(grad)
        master.mul_(1 - lr * self.decay(param)).add_(buffer, alpha=-lr)


class Lion(_OneMoment):
    """The sign of an interpolated momentum (Chen et al., arXiv 2302.06675, algorithm 2).

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
        """One step of Lion."""
        momentum = param.state["momentum"][span]
        direction = (momentum * self.betas[0]).add_(grad, alpha=1 - self.betas[0]).sign_()
        master.mul_(1 - lr * self.decay(param)).add_(direction, alpha=-lr)
        momentum.mul_(self.betas[1]).add_(grad, alpha=1 - self.betas[1])


class Adafactor(Optimizer):
    """Second moments as row and column means (Shazeer and Stern, arXiv 1804.04235), at a given
    learning rate: no first moment, no scaling by the parameter's size.

    The second moment's decay at step t is 1 - t^-0.8; an update whose root mean square is above 1
    is scaled down to 1. Vectors keep their whole second moment.
    """

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """Means over the last and the last but one dimension; of a vector the second moment."""
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
        """Always: the update's size is that of the whole parameter."""
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
        """One step of Adafactor."""
        kept = 1.0 - math.pow(self.steps, -0.8)
        grad = grad.view(param.parameter.shape)
        square = grad.square().add_(1e-30)
        if "row" in param.state:
            row, column = param.state["row"], param.state["column"]
            row.mul_(kept).add_(square.mean(dim=-1), alpha=1 - kept)
            column.mul_(kept).add_(square.mean(dim=-2), alpha=1 - kept)
            row_root = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            update = torch.mul(row_root, column.unsqueeze(-2).rsqrt()).mul_(grad)
        else:
            moment = param.state["exp_avg_sq"]
            moment.mul_(kept).add_(square.view(-1), alpha=1 - kept)
            update = moment.rsqrt().mul_(grad.reshape(-1))
        if param.stack == 1:
            size = update.norm(2) / update.numel() ** 0.5
            update.div_(size.clamp_(min=1.0)).mul_(lr)
        else:  # each by its own size
            each = update.view(param.stack, -1)
            size = each.norm(2, dim=1, keepdim=True) / each.shape[1] ** 0.5
            each.div_(size.clamp_(min=1.0)).mul_(lr)
        master.mul_(1 - lr * self.decay(param)).sub_(update.view(-1))


MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_STEPS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T of [..., rows, columns], in bfloat16.

    Five iterations X = a X + (b A + c A A) X, A = X X^T, of Jordan et al. (Muon, 2024), which
    bring singular values to between about 0.7 and 1.2.
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
    """Momentum made orthogonal, for matrices inside the decoder; AdamW for all others.

    m = momentum * m + (1 - momentum) * g, and the step is the orthogonal factor of
    (1 - momentum) * g + momentum * m times lr * 0.2 * sqrt(max(rows, columns)), whose root mean
    square is about that of AdamW's steps (Liu et al., arXiv 2502.16982), so that one learning rate
    suits both. Each matrix of a stack of experts is its own.

    Args:
        named_parameters: what is trained.
        matrices: names that get Muon; by default all of two or more dimensions that decay.
        momentum: share of the running mean that each step keeps.
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
        """The momentum of a matrix, two moments of others."""
        chosen = param.decay if self.matrices is None else name in self.matrices
        if chosen and param.parameter.ndim >= 2:
            return {"momentum": self.zeros(param)}
        return super().new_state(name, param)

    def whole(self, param: ParamState) -> bool:
        """For matrices."""
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
        """One step of Muon or AdamW."""
        if "momentum" not in param.state:
            super().rule(param, span, master=master, grad=grad, lr=lr, counter=counter)
            return
        momentum = param.state["momentum"].lerp_(grad, 1 - self.momentum)
        shape = param.parameter.shape
        update = orthogonalised(grad.lerp(momentum, self.momentum).view(shape))
        rate = lr * 0.2 * math.sqrt(max(shape[-2:]))
        master.mul_(1 - lr * self.decay(param)).add_(update.reshape(-1), alpha=-rate)
