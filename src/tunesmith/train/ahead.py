"""The micro-batches of a run's steps; those of the next one are planned while the device works.

Once a step's micro-batches are queued, the host has nothing to do until their figures are there,
and plans the next step. A thread for it would only compete with the queueing for Python.

Invariant: a step gets what planning in its own turn gives. Planning depends on nothing but the
documents and `micro_tokens`, so what was made ahead for another `micro_tokens` isn't used.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from tunesmith.data.microbatch.planner import MicrobatchPlan
from tunesmith.train.job import Job
from tunesmith.train.microbatches import own_plans, step_plans
from tunesmith.types import Document


@dataclass(frozen=True, slots=True)
class Planned:
    """A step's documents and micro-batches."""

    documents: list[Document]
    plans: list[MicrobatchPlan]  # of all ranks
    own: list[MicrobatchPlan]  # what this rank runs of them


class Ahead:
    """Plans the steps of `job`, counted from 0. Keeps this one and the next."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._made: dict[tuple[int, int], Planned] = {}

    def step(self, number: int) -> Planned:
        """The micro-batches of a step, planned now unless they are there."""
        key = (number, self._job.micro_tokens)
        if key not in self._made:
            self._made = {key: self._plan(number)}
        return self._made[key]

    def prepare(self, number: int) -> None:
        """Plan the step that follows; if that fails, it will in its own turn."""
        kept = (number - 1, self._job.micro_tokens)
        self._made = {key: planned for key, planned in self._made.items() if key == kept}
        if number < self._job.total_steps:
            with suppress(Exception):
                self._made[number, self._job.micro_tokens] = self._plan(number)

    def _plan(self, number: int) -> Planned:
        job = self._job
        documents = [job.documents[int(i)] for i in job.order.step_indices(number)]
        plans = step_plans(
            documents, job.ranks, costs=job.costs,
            micro_tokens=job.micro_tokens, share=job.share, isolated=job.model.isolated,
        )  # fmt: skip
        return Planned(documents, plans, own_plans(plans, job.ranks, costs=job.costs))
