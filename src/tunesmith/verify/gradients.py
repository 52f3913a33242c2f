"""Losses and gradients of documents, by plain transformers and by a training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.build.job import Job
from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.selftest_probe import native
from tunesmith.objectives import nll
from tunesmith.train.loss import StepLoss
from tunesmith.train.step import train_step
from tunesmith.types import Document, IntArray

SMALL = 1e-3
"""A gradient of less than this share of the whole norm is compared with that share: what is zero
but for rounding has no relative error.
"""


@dataclass(frozen=True, slots=True)
class Learned:
    """What a step over documents computes."""

    loss: float  # sum(weight * loss) / sum(weight)
    document_loss: NDArray[np.float64]  # sums by document
    gradients: dict[str, Tensor]
    computed_tokens: int


def plain(model: CausalLM, documents: Sequence[Document]) -> Learned:
    """One path at a time through the model as transformers runs it, with labels made by hand."""
    total = sum(float(s.weight.sum(dtype=np.float64)) for d in documents for s in d.segments)
    losses = np.zeros(len(documents))
    tokens = 0
    _forget(model)
    with native(model):
        for number, document in enumerate(documents):
            for ids, places, weights in _paths(document):
                path = torch.from_numpy(ids.astype(np.int64)).to(model.head.weight.device)
                logits = model.model(input_ids=path[None], use_cache=False).logits[0].float()
                at = torch.from_numpy(places.astype(np.int64)).to(path.device)
                each = torch.nn.functional.cross_entropy(logits[at - 1], path[at], reduction="none")
                weighted = (each * torch.from_numpy(weights).to(path.device)).sum()
                (weighted / total).backward()
                losses[number] += float(weighted.detach())
                tokens += len(ids)
    return Learned(float(losses.sum()) / total, losses, _taken(model), tokens)


def packed(
    job: Job,
    documents: Sequence[Document],
    *,
    micro_tokens: int,
    share_prefixes: bool,
    loss: StepLoss | None = None,
) -> Learned:
    """The same by one step of this package with that layout; nothing is learned. `loss` is nll
    unless given.
    """
    loss = loss or StepLoss(objective=nll, steps=1, offload=job.training.loss.offload)
    plans = plan_step(
        documents, micro_tokens=micro_tokens,
        share_prefixes=share_prefixes and not job.training.model.unpacked,
        unpacked=job.training.model.unpacked,
    )  # fmt: skip
    _forget(job.training.model)
    keeper = _Keeper(job.training.model)

    def planned(_: int) -> tuple[Sequence[Document], Sequence[MicrobatchPlan]]:
        return documents, plans

    loss.begin(job.training.model, 0, planned, job.training.device)
    result = train_step(
        job.training.model, keeper, plans, loss,
        documents=len(documents), lr=0.0, max_grad_norm=None, device=job.training.device,
    )  # fmt: skip
    return Learned(result.loss, result.document_loss, keeper.gradients, result.computed_tokens)


def largest_difference(found: Learned, reference: Learned) -> tuple[float, str]:
    """The largest relative difference of the loss, of a document's loss or of a parameter's
    gradient, and what it is of.
    """
    documents = np.abs(found.document_loss - reference.document_loss)
    scale = np.maximum(np.abs(reference.document_loss), 1e-12)
    differences = {
        "the loss": abs(found.loss - reference.loss) / max(abs(reference.loss), 1e-12),
        "a document's loss": float(np.max(documents / scale)),
    }
    norms = {name: float(g.norm()) for name, g in reference.gradients.items()}
    whole = float(np.sqrt(sum(norm**2 for norm in norms.values())))
    for name, gradient in reference.gradients.items():
        other = found.gradients.get(name)
        apart = norms[name] if other is None else float((other - gradient).norm())
        differences[f"the gradient of {name}"] = apart / max(norms[name], SMALL * whole, 1e-30)
    for name, gradient in found.gradients.items():
        if name not in reference.gradients:
            differences[f"the gradient of {name}"] = float(gradient.norm()) / max(whole, 1e-30)
    name, value = max(differences.items(), key=lambda item: _order(item[1]))
    return value, name


def _order(value: float) -> float:
    return float("inf") if value != value else value


class _Keeper:
    """Stands in for the optimizer: keeps the gradients, changes nothing."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.gradients: dict[str, Tensor] = {}

    def grad_norm(self) -> Tensor:
        return torch.zeros((), device=next(self._model.parameters()).device)

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        self.gradients = _taken(self._model)

    def zero_grad(self) -> None:
        _forget(self._model)


def _forget(model: CausalLM) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _taken(model: CausalLM) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.float().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    _forget(model)
    return found


def _paths(document: Document) -> Iterator[tuple[IntArray, IntArray, NDArray[np.float32]]]:
    """Ids from the root, places of the targets in them, and weights, of each segment with
    targets.
    """
    for number, last in enumerate(document.segments):
        if not len(last.index):
            continue
        chain, above = [document.segments[number].ids], last.parent
        while above >= 0:
            chain.append(document.segments[above].ids)
            above = document.segments[above].parent
        yield np.concatenate(chain[::-1]), last.start + last.index, last.weight
