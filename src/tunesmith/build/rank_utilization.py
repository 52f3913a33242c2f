"""Warns when data-parallel ranks idle because a step has too few micro-batches."""

from __future__ import annotations

from tunesmith.build.job import Job
from tunesmith.config.schema import Recipe
from tunesmith.train.microbatches import WorkModel, idle_fraction_of, plan_for_ranks
from tunesmith.types import Document

SAMPLED = 4
"""Steps that are looked at."""
SAID_FROM = 0.15
"""Idle share of the ranks' time from which it is said."""
MOST_DOCUMENTS = 4096
"""Larger steps are not tried."""


def idle_line(job: Job, ranks: int, *, together: int = 1) -> list[str]:
    """What share of the ranks' time a step leaves idle and which batch would fill it, if that is
    much. `ranks` counts those that share a micro-batch, `together` of them, as one.
    """
    if ranks == 1:
        return []
    share = _idle_share(job, ranks, 1)
    if share < SAID_FROM:
        return []
    whose = f"{ranks * together} ranks"
    text = f"ranks: {share:.0%} of the time of {whose} is idle, since a step is too small"
    times = 2
    while times * _step_documents(job) <= min(len(job.data.documents), MOST_DOCUMENTS):
        if _idle_share(job, ranks, times) < SAID_FROM / 2:
            larger = _larger(job.choices.recipe, times)
            return [f"{text}; {larger} fills it, and changes what is learned"]
        times *= 2
    useful = _useful(job, ranks) * together
    return [f"{text}; fewer ranks learn the same as fast: device.ranks={useful}"]


def _larger(recipe: Recipe, times: int) -> str:
    if recipe.batch.tokens:
        return f"batch.tokens={recipe.batch.tokens * times}"
    return f"batch.documents={(recipe.batch.documents or 1) * times}"


def _useful(job: Job, ranks: int) -> int:
    fitting = [n for n in range(2, ranks) if _idle_share(job, n, 1) < SAID_FROM]
    return max(fitting, default=1)


def _step_documents(job: Job) -> int:
    return len(job.data.sampler.step_indices(0))


def _idle_share(job: Job, ranks: int, times: int) -> float:
    """Mean over some steps, or of one with as many documents as `times` of the run's steps."""
    groups = min(SAMPLED, job.training.total_steps) if times == 1 else 1
    shares: list[float] = []
    for group in range(groups):
        numbers = range(group * times, min((group + 1) * times, job.training.total_steps))
        documents = [d for number in numbers for d in _documents(job, number)]
        shares.append(_idle_of(job, documents, ranks, job.microbatching.work))
    return sum(shares) / len(shares)


def _documents(job: Job, step: int) -> list[Document]:
    return [job.data.documents[int(number)] for number in job.data.sampler.step_indices(step)]


def _idle_of(job: Job, documents: list[Document], ranks: int, work_model: WorkModel) -> float:
    plans = plan_for_ranks(
        documents, ranks, work_model=work_model,
        micro_tokens=job.microbatching.micro_tokens * job.training.world.cp.size,
        share_prefixes=job.microbatching.share_prefixes, unpacked=job.training.model.unpacked,
    )  # fmt: skip
    return idle_fraction_of(plans, ranks=ranks, work_model=work_model)
