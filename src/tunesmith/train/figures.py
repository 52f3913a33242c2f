"""The figures of micro-batches, read from their device in one go.

Invariant: between a step's first micro-batch and this reading nothing asks the device for a value,
so that it always has work queued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tunesmith.transfer import to_host
from tunesmith.types import LossOutput


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
        known = [] if output.effective is None else [output.effective]
        asked += [output.loss_sum, output.token_loss, *output.stats.values(), *known]
    values = iter(to_host([*asked, *more]))
    figures = [
        Figures(
            loss_sum=float(next(values)),
            token_loss=next(values),
            stats={name: float(next(values)) for name in output.stats},
            effective=None if output.effective is None else next(values),
        )
        for output in outputs
    ]
    return figures, [float(value) for value in values]
