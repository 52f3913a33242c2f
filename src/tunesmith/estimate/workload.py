"""Token counts of a run: of its data, of what is computed, and of what padded batches would
compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tunesmith.build.job import Job
from tunesmith.build.sources import is_mixture
from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.data.preprocess.document_store import token_counts
from tunesmith.data.sampling.prefix_groups import PrefixGroups
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.packed_weight import parameter_count
from tunesmith.train.path_hash import path_ends
from tunesmith.types import Document

MOST_STEPS = 200
"""Steps that are laid out to count their tokens; of a longer run so many, evenly spread."""


@dataclass(frozen=True, slots=True)
class Work:
    """Sums over all steps; scaled up where `counted` is less than `steps`."""

    steps: int
    counted: int
    tokens: int  # of the documents, repeats counted
    computed: int  # that go through the decoder
    unshared: int  # if no prefix were shared, without padding
    padded: int  # each path as a row, padded to the longest row of its step
    target_tokens: int
    largest_step: int  # number of the counted step with the largest micro-batch, from 0
    largest: int  # tokens of that micro-batch
    grouped: int | None = None  # `computed` if steps were grouped by prefix; None where they can't


def planned(
    job: Job, step: int, *, share_prefixes: bool | None = None, sampler: BatchSampler | None = None
) -> list[MicrobatchPlan]:
    """The micro-batches of a step, as the trainer cuts it; in another order than the job's, if one
    is given.
    """
    return plan_step(
        documents_of(job, step, sampler=sampler),
        micro_tokens=job.microbatching.micro_tokens * job.training.world.cp.size,
        share_prefixes=job.microbatching.share_prefixes
        if share_prefixes is None
        else share_prefixes,
        unpacked=job.training.model.unpacked,
    )


def documents_of(job: Job, step: int, *, sampler: BatchSampler | None = None) -> list[Document]:
    """The documents of a step, counted from 0."""
    return [
        job.data.documents[int(number)]
        for number in (sampler or job.data.sampler).step_indices(step)
    ]


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, evenly spread, the first among them."""
    taken = min(count, most)
    return [number * count // taken for number in range(taken)]


def count_work(job: Job, *, most: int = MOST_STEPS) -> Work:
    """Lay out steps of the run and add up their tokens."""
    steps = evenly_spaced(job.training.total_steps, most)
    names = ("tokens", "computed", "unshared", "padded", "target_tokens")
    sums: dict[str, int] = dict.fromkeys(names, 0)
    largest_step = largest = 0
    for step in steps:
        documents, plans = documents_of(job, step), planned(job, step)
        rows = row_lengths(documents)
        sums["tokens"] += sum(document.tokens for document in documents)
        sums["target_tokens"] += sum(document.target_tokens for document in documents)
        sums["computed"] += sum(plan.tokens for plan in plans)
        sums["unshared"] += sum(rows)
        sums["padded"] += len(rows) * max(rows, default=0)
        most_here = max((plan.tokens for plan in plans), default=0)
        if most_here > largest:
            largest, largest_step = most_here, step
    other = _grouped_order(job)
    if other is not None:
        sums["grouped"] = sum(plan.tokens for n in steps for plan in planned(job, n, sampler=other))
    scaled = {name: value * job.training.total_steps // len(steps) for name, value in sums.items()}
    return Work(
        job.training.total_steps, len(steps), largest_step=largest_step, largest=largest, **scaled
    )


def _grouped_order(job: Job) -> BatchSampler | None:
    """The job's order as batch.group_by_prefix would make it; None where it is that already, or
    excluded, or of no use.
    """
    recipe = job.choices.recipe
    batch = recipe.batch
    excluded = batch.packing != "none" or not recipe.data.shuffle or is_mixture(recipe.data.train)
    if (
        batch.group_by_prefix
        or excluded
        or not job.microbatching.share_prefixes
        or job.training.model.unpacked
    ):
        return None
    groups = PrefixGroups(job.data.documents)
    if not groups.grouped:
        return None
    return BatchSampler(
        token_counts(job.data.documents),
        documents=None if batch.tokens else batch.documents,
        tokens=batch.tokens,
        seed=recipe.train.seed,
        shuffle=True,
        groups=groups,
    )


def row_lengths(documents: Sequence[Document]) -> list[int]:
    """Tokens of each path that is learned from, if every path were a row of its own."""
    return [length for document in documents for length in path_ends(document).values()]


def training_flops(model: CausalLM, *, tokens: int, targets: int) -> float:
    """Operations of the products with weights in the forward and backward pass of `tokens` computed
    tokens with `targets` distinct targets.

    With m the weights of the decoder's matrices that a token meets and h those of the head:
    tokens * (4 m_frozen + 6 m_trained) + targets * (4 or 6) h. Each weight is multiplied and added
    once forward (2), once for the gradient of its input (2), and, if it is trained, once for its
    own (2). Of stacked experts a token meets the share that the router chooses. Not counted are
    lookups, attention's scores, element by element work, what is computed twice to save memory, and
    passes of a base model.
    """
    head = model.head.weight
    embedding = model.base.get_input_embeddings().weight
    outside = {id(head), id(embedding)}
    met = _expert_share(model)
    per_token = 0.0
    for parameter in model.decoder.parameters():
        if parameter.dim() > 1 and id(parameter) not in outside:
            share = met if parameter.dim() == 3 else 1.0
            per_token += share * parameter_count(parameter) * _each(parameter)
    return per_token * tokens + float(parameter_count(head) * _each(head)) * targets


def _each(parameter: Tensor) -> int:
    """Operations a weight: two forward, two for its input's gradient, two for its own."""
    return 6 if parameter.requires_grad else 4


def _expert_share(model: CausalLM) -> float:
    """The share of the experts that a token goes through; 1 without experts."""
    config: Any = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((value for name in names if (value := getattr(config, name, None))), None)
    return chosen / count if chosen and count else 1.0
