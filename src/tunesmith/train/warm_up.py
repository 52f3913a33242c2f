"""A discarded forward and backward pass over the longest document, before the first step.

A micro-batch that does not fit fails at once instead of after an hour. It also makes the allocator
ask for its largest blocks first, as the memory probe of `estimate/` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.data.preprocess.document_store import longest_paths
from tunesmith.train.job import Training
from tunesmith.train.microbatches import local_part
from tunesmith.types import Document


def longest_document(documents: Sequence[Document]) -> Document:
    """The document with the longest path."""
    return documents[int(longest_paths(documents).argmax())]


def run_longest(
    training: Training,
    longest: Document,
    micro_tokens: int,
    *,
    part: Callable[[MicrobatchPlan], MicrobatchPlan] | None = None,
) -> None:
    """Forward and backward of its first micro-batch; the caller drops the gradients.

    `part` gives what a rank computes of a micro-batch, by default this rank's.
    """
    model, world = training.model, training.world
    plans = plan_step([longest], micro_tokens=micro_tokens, unpacked=model.unpacked)
    with training.grad_sync.all_ranks_or_none():
        for plan in plans[:1]:
            local = local_part(plan, world.model_parallel) if part is None else part(plan)
            training.loss.probe(model, longest, local, training.device).loss_sum.backward()
