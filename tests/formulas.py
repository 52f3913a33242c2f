"""The objectives written from their formulas over all logits at once: the tests' oracle.

log_p is log softmax [n, V] of the model and log_q of the base, y [n] the targets, old [n] their
log-probability at the start of the outer batch. Each gives the loss of each target, [n].
"""

from __future__ import annotations

import torch


def nll(log_p, y, **_):
    return -log_p.gather(1, y[:, None]).squeeze(1)


def smoothed(log_p, y, **_):
    q = torch.nn.functional.one_hot(y, log_p.shape[1]) * 0.9 + 0.1 / log_p.shape[1]
    return -(q * log_p).sum(-1)


def dft(log_p, y, **_):
    p = log_p.exp().gather(1, y[:, None]).squeeze(1).detach()
    return p * nll(log_p, y)


def dft_smoothed(log_p, y, **_):
    p = log_p.exp().gather(1, y[:, None]).squeeze(1).detach()
    return p * smoothed(log_p, y)


def psft(log_p, y, *, old, low=0.2, high=0.28, **_):
    ratio = (-nll(log_p, y) - old).exp()
    clipped = torch.maximum(torch.minimum(ratio, torch.tensor(1 + high)), torch.tensor(1 - low))
    return -torch.where(ratio < clipped, ratio, clipped)


def eaft(log_p, y, *, alpha=1.0, **_):
    top = log_p.exp().sort(-1, descending=True).values[:, :20]
    top = top / top.sum(-1, keepdim=True)
    entropy = -(top * top.log()).sum(-1)
    return ((entropy / 3) ** alpha).detach() * nll(log_p, y)


def kl(log_p, log_q):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def asft(log_p, y, *, log_q, **_):
    return dft(log_p, y) + 0.05 * kl(log_p, log_q)


def with_z(log_p, y, *, logits, **_):
    return nll(log_p, y) + 0.01 * logits.logsumexp(-1) ** 2


def with_entropy(log_p, y, **_):
    return nll(log_p, y) - 0.1 * -(log_p.exp() * log_p).sum(-1)


def everything(log_p, y, *, logits, log_q, **_):
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (
        eaft(log_p, y, alpha=2.0)
        + 0.01 * logits.logsumexp(-1) ** 2
        - 0.1 * entropy
        + 0.3 * kl(log_p, log_q)
    )


def psft_anchored(log_p, y, *, old, log_q, **_):
    return psft(log_p, y, old=old, low=0.1, high=0.1) + 0.3 * kl(log_p, log_q)
