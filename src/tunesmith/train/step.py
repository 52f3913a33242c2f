"""One optimizer step. Nothing here logs or saves.

Invariant (P3): the gradient is sum(weight * loss) / sum(weight) over all documents of the step,
however they are cut into micro-batches; gradients are added up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.packing import MicrobatchPlan
from tunesmith.errors import NonFiniteError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.train.quantiles import log_histogram, quantiles
from tunesmith.types import LossOutput, Shares

MicroLoss = Callable[[CausalLM, MicrobatchPlan, torch.device], LossOutput]
"""The loss of a micro-batch, differentiable; `train.loss` makes it."""


class Optimizer(Protocol):
    """What a step needs of an optimizer."""

    def clip_grad_norm(self, max_norm: float | None) -> Tensor: ...
    def step(self, lr: float) -> None: ...
    def zero_grad(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sums over the whole step, and each document's share of them."""

    loss_sum: float
    weight_sum: float
    grad_norm: float
    stats: dict[str, float]  # means per weight, and quantiles
    document_loss: NDArray[np.float64]  # sum of weight * loss of each document
    document_weight: NDArray[np.float64]
    computed_tokens: int
    target_tokens: int  # repeats counted

    @property
    def loss(self) -> float:
        """Mean loss per weight."""
        return self.loss_sum / self.weight_sum


class NonFiniteStep(NonFiniteError):
    """A step that was not taken, with its losses."""

    def __init__(self, result: StepResult) -> None:
        super().__init__(f"the loss is {result.loss:g} and the gradient norm {result.grad_norm:g}")
        self.result = result


def train_step(
    model: CausalLM,
    optimizer: Optimizer,
    plans: Sequence[MicrobatchPlan],
    loss: MicroLoss,
    *,
    documents: int,
    lr: float,
    max_grad_norm: float | None,
    device: torch.device,
) -> StepResult:
    """Learn from the micro-batches of one step.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite; the weights are then unchanged.
    """
    total = float(sum(plan.weight.sum(dtype=np.float64) for plan in plans))
    outputs: list[LossOutput] = []
    for plan in plans:
        output = loss(model, plan, device)
        (output.loss_sum / total).backward()
        outputs.append(_detached(output))
    grad_norm = float(optimizer.clip_grad_norm(max_grad_norm))
    result = _sum_up(plans, outputs, documents=documents, grad_norm=grad_norm)
    if not (math.isfinite(result.loss_sum) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise NonFiniteStep(result)
    optimizer.step(lr)
    optimizer.zero_grad()
    return result


def _detached(output: LossOutput) -> LossOutput:
    return replace(output, loss_sum=output.loss_sum.detach())


def _sum_up(
    plans: Sequence[MicrobatchPlan],
    outputs: Sequence[LossOutput],
    *,
    documents: int,
    grad_norm: float,
) -> StepResult:
    loss, weight = np.zeros(documents), np.zeros(documents)
    stats: dict[str, float] = {}
    for plan, output in zip(plans, outputs, strict=True):
        add_document_losses(loss, weight, plan.shares, output.token_loss)
        for name, value in output.stats.items():
            stats[name] = stats.get(name, 0.0) + float(value)
    weight_sum = float(weight.sum())
    means = {name: value / weight_sum for name, value in stats.items()}
    return StepResult(
        loss_sum=float(sum(float(output.loss_sum) for output in outputs)),
        weight_sum=weight_sum,
        grad_norm=grad_norm,
        stats={**means, **_effective_weight(plans, outputs)},
        document_loss=loss,
        document_weight=weight,
        computed_tokens=sum(plan.tokens for plan in plans),
        target_tokens=sum(len(plan.shares.weight) for plan in plans),
    )


def _effective_weight(
    plans: Sequence[MicrobatchPlan], outputs: Sequence[LossOutput]
) -> dict[str, float]:
    """Quantiles over the targets of strength / p: how much a target weighs in the gradient of the
    model's own expected choice.
    """
    known = [
        log_histogram(output.effective.to("cpu", torch.float64).numpy(), plan.weight)
        for plan, output in zip(plans, outputs, strict=True)
        if output.effective is not None and not bool(output.effective.isnan().any())
    ]
    found = quantiles(np.sum(known, axis=0)) if known else {}
    return {f"effective_weight_p{share * 100:g}": value for share, value in found.items()}


def add_document_losses(
    loss: NDArray[np.float64], weight: NDArray[np.float64], shares: Shares, token_loss: Tensor
) -> None:
    """Add a micro-batch's losses to those of the documents that asked for them; all arrays by
    document number.
    """
    losses = token_loss.detach().to("cpu", torch.float64).numpy()
    share = shares.weight.astype(np.float64)
    loss += np.bincount(shares.document, weights=share * losses[shares.target], minlength=len(loss))
    weight += np.bincount(shares.document, weights=share, minlength=len(weight))
