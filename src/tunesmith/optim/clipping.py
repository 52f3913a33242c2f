"""Gradient clipping by the global norm (`torch.nn.utils.clip_grad_norm_`).

The gradients are not changed: the optimizer takes the factor, which saves a pass over them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


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
