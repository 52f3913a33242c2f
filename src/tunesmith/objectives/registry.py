"""The registry of objectives by name, and the regularizers on top of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from tunesmith.objectives.losses import (
    Chunk,
    Objective,
    cross_entropy,
    dft,
    divergence,
    eaft,
    nll,
    psft,
    z_loss,
)

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "nll": nll,
    "dft": dft,
    "psft": psft,
    "eaft": eaft,
    "asft": dft,  # with a divergence from the base, which `with_terms` adds
}


def with_terms(
    loss: Objective, *, z_weight: float = 0.0, entropy: float = 0.0, kl: float = 0.0
) -> Objective:
    """loss + z_weight * log_sum^2 - entropy * H + kl * KL(base || model), of each target."""

    def total(chunk: Chunk) -> Tensor:
        value = loss(chunk)
        if z_weight:
            value = value + z_weight * z_loss(chunk)
        if entropy:
            value = value - entropy * chunk.entropy
        if kl:
            value = value + kl * divergence(chunk)
        return value

    return total if z_weight or entropy or kl else loss


def smoothed_nll(smoothing: float) -> Objective:
    """`nll` with label smoothing."""

    def smoothed(chunk: Chunk) -> Tensor:
        nll(chunk)
        return cross_entropy(chunk, smoothing)

    return smoothed


def named_objective(name: str, *, smoothing: float = 0.0, **options: float) -> Objective:
    """The built-in loss `name`; `options` are its own: alpha (eaft), eps_low, eps_high (psft)."""
    if name == "nll":
        return smoothed_nll(smoothing) if smoothing else nll
    if smoothing:
        options["smoothing"] = smoothing
    return functools.partial(OBJECTIVES[name], **options) if options else OBJECTIVES[name]
