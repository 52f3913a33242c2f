"""The argument of an objective: the logits of a few targets, with log-probabilities and entropy.

The softmax of a chunk is made once. Log-probability, log-sum, entropy and likeliest token come from
it, their gradients are multiples of it, and the statistics of a step are the same numbers.

Letters: n targets of the chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(slots=True)
class Chunk:
    """A few targets with their logits; all but `progress` are tensors over the targets.

    `logprob`, `log_sum` and `entropy` carry gradients to `logits`, which may be used as well.
    """

    logits: Tensor  # [n, V] float32, after the model's own transform
    target: Tensor  # [n] int64
    logprob: Tensor  # [n] log p(target)
    log_sum: Tensor  # [n] log of the sum of exp(logits)
    entropy: Tensor  # [n] in nats
    argmax: Tensor  # [n] int64
    progress: float = 0.0  # share of the run's steps that are done, 0 to below 1
    old_logprob: Tensor | None = None  # [n] log p(target) at the start of the outer batch
    base_logits: Tensor | None = None  # [n, V] of the base model; `divergence` uses them up
    notes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    grad_weight: Tensor | None = None

    def note(self, name: str, value: Tensor) -> None:
        """Have the mean of `value` [n] over the step's targets reported under `name`."""
        self.notes[name] = value.detach()

    def set_grad_weight(self, grad_weight: Tensor) -> None:
        """Say that the loss has the gradient of -strength * log p(target); `strength` [n].

        From it the step reports quantiles of strength / p, the weight of a target in a policy
        gradient.
        """
        self.grad_weight = grad_weight.detach()


Objective = Callable[[Chunk], Tensor]
"""A loss: chunk -> loss of each target [n], differentiable in the chunk's logits. A target's loss
must not depend on the chunk's other targets.
"""


def make_chunk(logits: Tensor, target: Tensor, *, reusable: bool = False, **sides: Any) -> Chunk:
    """The chunk of `logits` [n, V] and `target` [n].

    Its gradient can be taken once, since that overwrites the softmax; `reusable` allows more.
    """
    scores = cast(
        "tuple[Tensor, Tensor, Tensor, Tensor]",
        _Scores.apply(logits, target, reusable),  # pyright: ignore[reportUnknownMemberType]
    )
    return Chunk(logits, target, *scores, **sides)


class _Scores(torch.autograd.Function):
    """(log-probability, log-sum, entropy, likeliest token) of each row from one softmax."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, reusable: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        top, argmax = logits.max(-1)
        p = torch.softmax(logits, -1)
        # The largest p is at least 1/V, so its logarithm is exact where that of others underflows.
        log_sum = top - p.gather(1, argmax[:, None]).squeeze(1).log()
        logprob = logits.gather(1, target[:, None]).squeeze(1) - log_sum
        expected = torch.bmm(p[:, None], logits[:, :, None]).view(-1)
        entropy = log_sum - expected
        ctx.reusable = reusable
        ctx.save_for_backward(logits, target, p, expected)
        ctx.mark_non_differentiable(argmax)
        return logprob, log_sum, entropy, argmax

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        of_logprob, of_log_sum, of_entropy, _ = grads
        logits, target, p, expected = ctx.saved_tensors
        # d log_sum = p;  d logprob = onehot - p;  d entropy = -p * (logits - expected)
        factor = torch.zeros_like(expected)
        if of_log_sum is not None:
            factor = factor + of_log_sum
        if of_logprob is not None:
            factor = factor - of_logprob
        if of_entropy is not None:
            factor = torch.addcmul(
                (factor + of_entropy * expected)[:, None], logits, of_entropy[:, None], value=-1
            )
        else:
            factor = factor[:, None]
        grad = p * factor if ctx.reusable else p.mul_(factor)
        if of_logprob is not None:
            rows = torch.arange(len(target), device=target.device)
            grad[rows, target] += of_logprob
        return grad, None, None
