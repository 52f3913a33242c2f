"""Checks of a user's objective: shapes, gradients by finite differences, and independence of
targets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tunesmith.objectives.losses import Objective, make_chunk

ROWS, VOCABULARY = 5, 11
STEP = 1e-6
"""Of the central differences, in float64."""
TOLERANCE = 1e-6

Losses = Callable[..., Tensor]


def find_fault(objective: Objective) -> str | None:
    """What is wrong with the objective, tried on a few random logits in float64; None if nothing.

    Whatever the objective itself raises goes through.
    """
    generator = torch.Generator().manual_seed(0)

    def logits() -> Tensor:
        return 2 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)

    scores, base = logits(), logits()
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    old = scores.log_softmax(-1).gather(1, target[:, None]).squeeze(1) - 0.05

    def losses(leaf: Tensor, rows: slice, held: _Held | None = None) -> Tensor:
        chunk = make_chunk(
            leaf, target[rows], reusable=True, progress=0.5, old_logprob=old[rows],
            base_logits=base[rows].clone(),
        )  # fmt: skip
        with held or nullcontext():
            return objective(chunk)

    with torch.enable_grad():
        return (
            _shape_fault(losses(scores, slice(None)))
            or _mixing(losses, scores)
            or _wrong_gradient(losses, scores)
        )


def _shape_fault(found: Any) -> str | None:
    if not isinstance(found, Tensor):
        return f"must return a tensor, not {type(found).__name__}"
    if found.shape != (ROWS,):
        return (
            f"must return one loss for each target, so [{ROWS}] for {ROWS} targets, "
            f"not {list(found.shape)}"
        )
    return None if bool(found.isfinite().all()) else "gives losses that are not finite"


def _mixing(losses: Losses, logits: Tensor) -> str | None:
    leaf = logits.clone().requires_grad_()
    whole = losses(leaf, slice(None))
    if not torch.equal(losses(leaf, slice(None)).detach(), whole.detach()):
        return "gives another loss the second time for the same logits"
    if whole.grad_fn is None:
        return "does not depend on the logits, so there is nothing to learn"
    for row in range(ROWS):
        (grad,) = torch.autograd.grad(whole[row], leaf, retain_graph=True)
        if bool(torch.cat([grad[:row], grad[row + 1 :]]).any()):
            return "mixes targets: the loss of one depends on the logits of others"
    alone = torch.cat([losses(leaf[i : i + 1], slice(i, i + 1)) for i in range(ROWS)])
    if not torch.allclose(alone, whole, rtol=1e-9, atol=1e-12):
        return "mixes targets: a target alone has another loss than among others"
    return None


def _wrong_gradient(losses: Losses, logits: Tensor) -> str | None:
    """Gradients against central differences, in which what the objective detaches stands still."""
    leaf = logits.clone().requires_grad_()
    held = _Held()
    found = losses(leaf, slice(None), held)
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    for place in range(logits.numel()):
        sums: list[float] = []
        for step in (STEP, -STEP):
            moved = logits.clone()
            moved.view(-1)[place] += step
            sums.append(losses(moved.requires_grad_(), slice(None), held.replayed()).sum().item())
        expected = (sums[0] - sums[1]) / (2 * STEP)
        if abs(float(grad.view(-1)[place]) - expected) > TOLERANCE * max(1.0, abs(expected)) * 10:
            return (
                f"has a wrong gradient: {float(grad.view(-1)[place]):.6g} where a small step of "
                f"the logits gives {expected:.6g}"
            )
    return None


class _Held(TorchFunctionMode):
    """Remembers what is detached, or computed without gradients, and gives it back `again`."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Any] = []
        self._next: int | None = None
        self._stopped = False  # inside torch.no_grad(), but not inside a Function's own forward

    def replayed(self) -> _Held:
        self._next, self._stopped = 0, False
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:  # pyright: ignore[reportPrivateUsage]
            self._stopped = not args[0]
        detached = func is Tensor.detach or getattr(func, "__self__", None) is Tensor.data
        if not isinstance(found, Tensor) or not (detached or self._stopped):
            return found
        if self._next is None:
            self._values.append(found)
            return found
        self._next += 1
        return self._values[self._next - 1]
