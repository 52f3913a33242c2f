"""Gradient clipping by the global norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over the gradients of all parameters: a float32 scalar on their device.

    Gradients are read once and left as they are; parameters without one count as zero. The same
    gradients on the same number of threads give the same bits. The caller decides when to wait for
    the device by reading the value.
    """
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    # on a GPU many tensors at a time
    norms = torch._foreach_norm(grads, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def clip_factor(norm: float, max_norm: float | None) -> float:
    """The factor that scales gradients of this norm down to `max_norm`; 1.0 where they are below it
    or it is None.

    It is max_norm / (norm + 1e-6), as in `torch.nn.utils.clip_grad_norm_`.
    """
    if max_norm is None:
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
