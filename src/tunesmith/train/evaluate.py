"""Evaluation: held-out negative log-likelihood, through the same packing, model and head as
training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.distributed.world import World
from tunesmith.model.causal_lm import CausalLM
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import WorkModel, collate, local_plans, step_plans
from tunesmith.train.step import add_document_losses, read_figures
from tunesmith.types import Document, LossOutput

SINGLE_WORLD, WORK_MODEL = World(), WorkModel()
GROUP_TOKENS = 8
"""Documents are planned together until they hold this many times `micro_tokens`, so that shared
prefixes meet.
"""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Means per weight over all targets of the documents."""

    nll: float
    accuracy: float
    entropy: float
    target_tokens: int
    documents: int
    document_nll: NDArray[np.float64]  # mean per weight of each document

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(min(self.nll, 700.0))


@torch.no_grad()
def evaluate(
    model: CausalLM,
    documents: Sequence[Document],
    *,
    micro_tokens: int,
    device: torch.device | str = "cpu",
    world: World = SINGLE_WORLD,
    work_model: WorkModel = WORK_MODEL,
    before_each: Callable[[], None] | None = None,
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> EvalResult:
    """NLL and accuracy of the documents' targets, on every rank. The model's training mode and
    random state are left as they were. `before_each` is called before each micro-batch; `together`
    is where ranks agree that all got through.
    """
    head = functools.partial(head_loss, objective=nll)
    training, at_once = model.training, micro_tokens * world.cp.size
    model.eval()
    loss, weight = np.zeros(len(documents)), np.zeros(len(documents))
    sums = {"accuracy": 0.0, "entropy": 0.0}
    try:
        with together():
            for first, group in document_groups(documents, at_once * GROUP_TOKENS):
                numbers = slice(first, first + len(group))
                plans = step_plans(
                    group,
                    world,
                    work_model=work_model,
                    micro_tokens=micro_tokens,
                    unpacked=model.unpacked,
                )
                local, outputs = (
                    local_plans(plans, world, work_model=work_model),
                    list[LossOutput](),
                )
                for plan in local:
                    if before_each is not None:
                        before_each()
                    outputs.append(model(collate(plan, device), head))
                for plan, found in zip(local, read_figures(outputs)[0], strict=True):
                    add_document_losses(
                        loss[numbers], weight[numbers], plan.owners, found.token_loss
                    )
                    for name in sums:
                        sums[name] += found.stats[name]
    finally:
        model.train(training)
    measured = world.all_reduce_sum(np.concatenate([loss, weight, list(sums.values())]))
    loss, weight, (accuracy, entropy) = np.split(measured, [len(loss), 2 * len(loss)])
    total = float(weight.sum())
    return EvalResult(
        nll=float(loss.sum()) / total,
        accuracy=float(accuracy) / total,
        entropy=float(entropy) / total,
        target_tokens=sum(document.target_tokens for document in documents),
        documents=len(documents),
        document_nll=loss / np.maximum(weight, 1e-30),
    )


def document_groups(
    documents: Sequence[Document], tokens: int
) -> Iterator[tuple[int, Sequence[Document]]]:
    """The documents in order, in groups of at least `tokens` tokens, each with the number of its
    first.
    """
    start = held = 0
    for number, document in enumerate(documents):
        held += document.tokens
        if held >= tokens:
            yield start, documents[start : number + 1]
            start, held = number + 1, 0
    if start < len(documents):
        yield start, documents[start:]
