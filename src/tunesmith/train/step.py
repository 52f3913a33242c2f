"""One optimizer step with gradient accumulation. Nothing here logs or saves.

Invariant (P3): the gradient is sum(weight * loss) / sum(weight) over all documents of the step,
however they are cut into micro-batches and on however many ranks; gradients are added up in
float32. Between a step's first micro-batch and `read_figures` nothing asks the device for a value,
so that it always has work queued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.microbatch.planner import MicrobatchPlan
from tunesmith.distributed.grad_sync import NoSync
from tunesmith.errors import NonFiniteError
from tunesmith.metrics.records import EMPTY_HISTOGRAM, log_histogram, quantiles
from tunesmith.model.causal_lm import CausalLM
from tunesmith.optim import clip_factor
from tunesmith.transfer import to_host
from tunesmith.types import LossOutput, StepMetrics, TargetOwners

MicroLoss = Callable[[CausalLM, MicrobatchPlan, torch.device], LossOutput]
"""The loss of a micro-batch, differentiable; `train.loss` makes it."""

NO_SYNC = NoSync()


class GradSync(Protocol):
    """How the ranks of a step add up; `distributed.reduce` has them. Alone, sums stay as they
    are.
    """

    @property
    def is_main(self) -> bool: ...
    def all_ranks_or_none(self) -> AbstractContextManager[None]: ...
    def all_reduce_sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def begin_microbatch(self, *, last: bool) -> None: ...
    def sync_gradients(self) -> None: ...


class Optimizer(Protocol):
    """What a step needs of an optimizer."""

    def grad_norm(self) -> Tensor: ...
    def step(self, lr: float, grad_scale: float = 1.0) -> None: ...
    def zero_grad(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sums over the whole step, and each document's share of them; the same on every rank."""

    loss_sum: float
    weight_sum: float
    grad_norm: float
    stats: dict[str, float]  # means per weight, and quantiles
    document_loss: NDArray[np.float64]  # sum of weight * loss of each document
    document_weight: NDArray[np.float64]
    computed_tokens: int
    target_tokens: int  # repeats counted
    finite: bool = True  # loss and gradient, on every rank
    micro_losses: Sequence[
        tuple[MicrobatchPlan, Tensor]
    ] = ()  # of this rank: [N] by target, in the host's memory

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
    grad_sync: GradSync = NO_SYNC,
    begin: Callable[[], None] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> StepResult:
    """Learn from the micro-batches of one step, of which `plans` are this rank's; `begin` is what
    the loss does before the first of them, and `meanwhile` what the host does while the device
    still works on them.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite; the weights are then unchanged.
    """
    total = _total_weight(plans, grad_sync)
    outputs: list[LossOutput] = []  # on the device, without their graphs
    with grad_sync.all_ranks_or_none():
        if begin is not None:
            begin()
        for number, plan in enumerate(plans, start=1):
            grad_sync.begin_microbatch(last=number == len(plans))
            output = loss(model, plan, device)
            (output.loss_sum / total).backward()
            outputs.append(replace(output, loss_sum=output.loss_sum.detach()))
    grad_sync.sync_gradients()
    norm = optimizer.grad_norm()
    if meanwhile is not None:
        meanwhile()
    figures, (grad_norm,) = read_figures(outputs, norm)
    result = _sum_up(plans, figures, documents=documents, grad_norm=grad_norm, grad_sync=grad_sync)
    if not result.finite:
        optimizer.zero_grad()
        raise NonFiniteStep(result)
    optimizer.step(lr, clip_factor(grad_norm, max_grad_norm))
    optimizer.zero_grad()
    return result


def _total_weight(plans: Sequence[MicrobatchPlan], grad_sync: GradSync) -> float:
    """The weight of all targets of the step, on all ranks."""
    local = sum(plan.weight.sum(dtype=np.float64) for plan in plans)
    return float(grad_sync.all_reduce_sum(np.asarray([local], np.float64))[0])


def _sum_up(
    plans: Sequence[MicrobatchPlan],
    figures: Sequence[Figures],
    *,
    documents: int,
    grad_norm: float,
    grad_sync: GradSync,
) -> StepResult:
    """The step's numbers; those of all ranks are added in one go, so that what is decided by them
    is decided everywhere alike.
    """
    loss, weight = np.zeros(documents), np.zeros(documents)
    stats: dict[str, float] = {}
    for plan, found in zip(plans, figures, strict=True):
        add_document_losses(loss, weight, plan.owners, found.token_loss)
        for name, value in found.stats.items():
            stats[name] = stats.get(name, 0.0) + value
    names = list(stats)
    local = [
        np.asarray(
            [
                sum(found.loss_sum for found in figures),
                sum(plan.counted for plan in plans),
                sum(len(plan.owners.weight) for plan in plans),
                grad_norm if grad_sync.is_main else 0.0,
                not math.isfinite(grad_norm),
            ],
            np.float64,
        ),
        np.asarray([stats[name] for name in names]),
        loss,
        weight,
        _effective_weight(plans, figures).reshape(-1),
    ]
    summed = grad_sync.all_reduce_sum(np.concatenate(local))
    bounds = np.cumsum([len(part) for part in local])[:-1]
    sums, means, loss, weight, histogram = np.split(summed, bounds)
    weight_sum = float(weight.sum())
    shown = quantiles(histogram.reshape(2, -1)).items()
    return StepResult(
        loss_sum=float(sums[0]),
        weight_sum=weight_sum,
        grad_norm=float(sums[3]),
        stats={
            **{name: float(mean) / weight_sum for name, mean in zip(names, means, strict=True)},
            **{f"effective_weight_p{share * 100:g}": value for share, value in shown},
        },
        document_loss=loss,
        document_weight=weight,
        computed_tokens=int(sums[1]),
        target_tokens=int(sums[2]),
        finite=math.isfinite(sums[0]) and not sums[4],
        micro_losses=[(p, f.token_loss) for p, f in zip(plans, figures, strict=True)],
    )


def _effective_weight(
    plans: Sequence[MicrobatchPlan], figures: Sequence[Figures]
) -> NDArray[np.float64]:
    """Histogram over the targets of strength / p: how much a target weighs in the gradient of the
    model's own expected choice. Zero where it isn't known.
    """
    known = [
        log_histogram(found.effective.double().numpy(), plan.weight)
        for plan, found in zip(plans, figures, strict=True)
        if found.effective is not None and not bool(found.effective.isnan().any())
    ]
    return np.sum([EMPTY_HISTOGRAM, *known], axis=0)


def add_document_losses(
    loss: NDArray[np.float64], weight: NDArray[np.float64], owners: TargetOwners, token_loss: Tensor
) -> None:
    """Add a micro-batch's losses, in the host's memory, to those of the documents that asked for
    them; all arrays by document number.
    """
    losses = token_loss.double().numpy()
    share = owners.weight.astype(np.float64)
    loss += np.bincount(owners.document, weights=share * losses[owners.target], minlength=len(loss))
    weight += np.bincount(owners.document, weights=share, minlength=len(weight))


@dataclass(frozen=True, slots=True)
class Figures:
    """What the host keeps of a micro-batch's loss; tensors in its memory."""

    loss_sum: float
    token_loss: Tensor  # [N], unweighted
    stats: Mapping[str, float]  # sums
    effective: Tensor | None  # [N], see `LossOutput`


def read_figures(outputs: Sequence[LossOutput], *more: Tensor) -> tuple[list[Figures], list[float]]:
    """The figures of each output, and the values of `more`, scalars."""
    asked: list[Tensor] = []
    for output in outputs:
        known = [] if output.log_effective_weight is None else [output.log_effective_weight]
        asked += [output.loss_sum, output.token_loss, *output.stats.values(), *known]
    values = iter(to_host([*asked, *more]))
    figures = [
        Figures(
            loss_sum=float(next(values)),
            token_loss=next(values),
            stats={name: float(next(values)) for name in output.stats},
            effective=None if output.log_effective_weight is None else next(values),
        )
        for output in outputs
    ]
    return figures, [float(value) for value in values]


def step_metrics(
    result: StepResult,
    *,
    step: int,
    epoch: float,
    lr: float,
    tokens: Sequence[int],
    seconds: float,
    peak_memory: int,
) -> StepMetrics:
    """What metrics.jsonl holds of a step; `tokens` are those of each document."""
    return StepMetrics(
        step=step,
        epoch=epoch,
        loss=result.loss,
        lr=lr,
        grad_norm=result.grad_norm,
        documents=len(tokens),
        tokens=sum(tokens),
        computed_tokens=result.computed_tokens,
        target_tokens=result.target_tokens,
        weight_sum=result.weight_sum,
        seconds=seconds,
        tokens_per_second=sum(tokens) / seconds,
        stats=result.stats,
        peak_memory=peak_memory,
    )
