"""The losses: NLL with label smoothing, DFT (arXiv 2508.05629), EAFT (arXiv 2601.02151), PSFT
(arXiv 2508.17784), and the regularizers z-loss (arXiv 2204.02311) and KL to the base model.

Each takes a `Chunk` of n targets and returns their losses [n]; the weights of the targets and the
sum over them are the head's. The softmax of a chunk is computed once: log-probability, log-sum,
entropy and most probable token come from it, and their gradients are multiples of it.

Letters: n targets of the chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

EAFT_TOP_K = 20
"""Number of most probable tokens whose entropy weights a target in EAFT."""

EAFT_ENTROPY_SCALE = 3.0
"""About log(20), the largest entropy that 20 tokens can have."""


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


def nll(chunk: Chunk) -> Tensor:
    """Negative log-likelihood of each target, -log p(target): the loss of supervised
    fine-tuning.
    """
    chunk.set_grad_weight(torch.ones_like(chunk.logprob))
    return -chunk.logprob


def cross_entropy(chunk: Chunk, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing (Szegedy et al., 2016, arXiv 1512.00567).

    It is -sum over the vocabulary of q * log p, where q = (1 - smoothing) * onehot(target) +
    smoothing / V.
    """
    if smoothing == 0:
        return -chunk.logprob
    # -mean over the vocabulary of log p; log p = logits - log_sum.
    uniform = chunk.log_sum - chunk.logits.mean(-1)
    return smoothing * uniform - (1 - smoothing) * chunk.logprob


def dft(chunk: Chunk, *, smoothing: float = 0.0) -> Tensor:
    """Dynamic fine-tuning: -p(target) * log p(target), with no gradient through the factor p.

    Source: Wu et al., 2025, arXiv 2508.05629.
    """
    return _weighted(chunk, chunk.logprob.detach().exp(), smoothing)


def eaft(chunk: Chunk, *, alpha: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """Entropy-adaptive fine-tuning (2026, arXiv 2601.02151): -h^alpha * log p(target).

    h is the entropy of the 20 most probable tokens, renormalised, divided by 3; no gradient flows
    through it. Targets at which the model is sure of another token so get little weight.
    """
    with torch.no_grad():
        top = chunk.logits.topk(min(EAFT_TOP_K, chunk.logits.shape[1]), -1).values
        log_p = top.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
    return _weighted(chunk, (entropy / EAFT_ENTROPY_SCALE) ** alpha, smoothing)


def _weighted(chunk: Chunk, grad_weight: Tensor, smoothing: float) -> Tensor:
    chunk.note("mean_weight", grad_weight)
    chunk.set_grad_weight(grad_weight)
    return grad_weight * cross_entropy(chunk, smoothing)


def psft(chunk: Chunk, *, eps_low: float = 0.2, eps_high: float = 0.28) -> Tensor:
    """Proximal supervised fine-tuning (2025, arXiv 2508.17784): PPO's clipped ratio.

    The loss is -min(r, clip(r, 1 - eps_low, 1 + eps_high)) with r = p(target) / p_old(target),
    where p_old is the old policy, the model at the last refresh. The lower bound never changes the
    loss, since the minimum takes r itself there; the share of targets below it is reported as
    `fallen`. Without `old_logprob` the old policy is the model itself, and the gradient is that of
    `nll`.
    """
    old = chunk.logprob.detach() if chunk.old_logprob is None else chunk.old_logprob
    ratio = (chunk.logprob - old).exp()
    clipped = ratio.detach() > 1 + eps_high
    chunk.note("clipped", clipped.float())
    chunk.note("fallen", (ratio.detach() < 1 - eps_low).float())
    chunk.set_grad_weight(ratio.detach().masked_fill(clipped, 0.0))
    return -torch.minimum(ratio, ratio.clamp(1 - eps_low, 1 + eps_high))


def z_loss(chunk: Chunk) -> Tensor:
    """z-loss: the squared log-sum-exp of the logits (Chowdhery et al., 2022, arXiv 2204.02311).

    The loss of a target does not change when a constant is added to all its logits. This term keeps
    that constant near zero, and so the logits in the range where bfloat16 is fine-grained.
    """
    return chunk.log_sum.square()


def divergence(chunk: Chunk) -> Tensor:
    """KL divergence from the base model, KL(base || model), in nats over the whole vocabulary.

    It overwrites `chunk.base_logits`, which saves a second tensor [n, V].
    """
    assert chunk.base_logits is not None, "the chunk has no logits of the base model"
    found = cast(
        Tensor,
        _Divergence.apply(  # pyright: ignore[reportUnknownMemberType]
            chunk.logits, chunk.log_sum, chunk.base_logits
        ),
    )
    chunk.base_logits = None
    chunk.note("kl", found)
    return found


class _Divergence(torch.autograd.Function):
    """sum q * (log q - logits + log_sum), q = softmax(base); gradients: -q in logits, 1 in
    log_sum.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_sum: Tensor, base: Tensor) -> Tensor:
        q = torch.softmax(base, -1)
        # In place: base becomes log q - log p, so that only q is kept for the backward pass.
        base -= base.logsumexp(-1, keepdim=True)
        base -= logits
        base += log_sum[:, None]
        ctx.save_for_backward(q)
        return torch.bmm(q[:, None], base[:, :, None]).view(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (q,) = ctx.saved_tensors
        return q.mul_(-grads[0][:, None]), grads[0], None


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
