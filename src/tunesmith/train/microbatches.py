"""A step's micro-batches, assigned to data-parallel ranks, and this rank's shard of each.

The next step is planned while the device works on this one: once a step's micro-batches are queued,
the host has nothing to do until their numbers are there. A thread for it would only compete with
the queueing for Python.

Invariant: a step gets what planning in its own turn gives. Planning depends on nothing but the
documents and `micro_tokens`, so a plan made for another `micro_tokens` isn't used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.microbatch.planner import MicrobatchPlan, Part, plan_step
from tunesmith.distributed.context_parallel import Context
from tunesmith.distributed.load_balance import IDLE, deal, idle_share
from tunesmith.distributed.model_parallel_group import Sharers
from tunesmith.distributed.world import World
from tunesmith.types import Document, IntArray, Shares

if TYPE_CHECKING:
    from tunesmith.train.job import Job

TRIES = 5
"""How often a step is cut anew to find micro-batches that fill the ranks."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Work of one token, of one token that sees another, and of one target; in any unit."""

    token: float = 1.0
    pair: float = 0.0
    target: float = 0.0

    def of(self, plan: MicrobatchPlan) -> float:
        """The work of a micro-batch."""
        pairs = 0
        for chain in plan.layout.chains:
            length = chain.end - chain.start
            before = sum(end - start for start, end in chain.prefix)
            pairs += length * before + length * (length + 1) // 2
        return self.token * plan.tokens + self.pair * pairs + self.target * len(plan.source)


def model_costs(model: Any) -> Costs:
    """Multiplications of a forward pass through a CausalLM; sliding windows count as whole."""
    config = model.config.get_text_config()
    embeddings = {id(p) for p in (model.base.get_input_embeddings().weight, model.head.weight)}
    inside = sum(p.numel() for p in model.decoder.parameters() if id(p) not in embeddings)
    heads = getattr(config, "num_attention_heads", 1)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = sum(p.numel() for p in model.head.parameters())
    return Costs(
        token=float(inside), pair=2.0 * config.num_hidden_layers * width, target=float(head)
    )


def plan_for_ranks(
    documents: Sequence[Document],
    ranks: int,
    *,
    costs: Costs,
    micro_tokens: int,
    share: bool = True,
    isolated: bool = False,
) -> list[MicrobatchPlan]:
    """The micro-batches of a step, cut so that several ranks finish early; for one rank those of
    `plan_step`.

    A step of too few micro-batches is cut finer, down to its longest path: a prefix that is cut is
    then computed on several ranks. Of the cuts tried the one whose slowest rank has least work is
    taken. The same on every rank.
    """

    def cut(tokens: int) -> list[MicrobatchPlan]:
        return plan_step(documents, micro_tokens=tokens, share=share, isolated=isolated)

    best = cut(micro_tokens)
    if ranks == 1 or isolated or not best:
        return best
    least = _time(best, ranks, costs)
    wanted = -(-len(best) // ranks) * ranks
    size = sum(plan.tokens for plan in best) / wanted
    for number in range(TRIES):
        tokens = int(size * (1 + number / 8)) + 1
        if tokens >= micro_tokens:
            break
        plans = cut(tokens)
        time = _time(plans, ranks, costs)
        if time < least:
            best, least = plans, time
    return best


def _time(plans: Sequence[MicrobatchPlan], ranks: int, costs: Costs) -> float:
    work = [costs.of(plan) for plan in plans]
    rounds = deal(work, ranks)
    return sum(max(work[n] for n in dealt if n != IDLE) for dealt in rounds)


def dealt_to(
    plans: Sequence[MicrobatchPlan], rank: int, *, ranks: int, costs: Costs
) -> list[MicrobatchPlan]:
    """The micro-batches of one rank, as many as any other's; where it has none of its own it runs
    the smallest one without weight.
    """
    if ranks == 1:
        return list(plans)
    work = [costs.of(plan) for plan in plans]
    filler = weightless(plans[int(np.argmin(work))])
    return [filler if dealt[rank] == IDLE else plans[dealt[rank]] for dealt in deal(work, ranks)]


def step_plans(
    documents: Sequence[Document],
    ranks: World,
    *,
    costs: Costs,
    micro_tokens: int,
    share: bool = True,
    isolated: bool = False,
) -> list[MicrobatchPlan]:
    """The micro-batches of a step for all ranks, each of `micro_tokens` for every rank that shares
    it.
    """
    return plan_for_ranks(
        documents,
        ranks.groups,
        costs=costs,
        micro_tokens=micro_tokens * ranks.context.count,
        share=share,
        isolated=isolated,
    )


def own_plans(
    plans: Sequence[MicrobatchPlan], ranks: World, *, costs: Costs
) -> list[MicrobatchPlan]:
    """What this rank runs of the micro-batches of a step."""
    dealt = dealt_to(plans, ranks.own_group, ranks=ranks.groups, costs=costs)
    return [own_part(plan, ranks.sharers) for plan in dealt]


def own_part(plan: MicrobatchPlan, sharers: Sharers) -> MicrobatchPlan:
    """What this rank does of a micro-batch that several work on together. The parts of all of them
    have every target once.
    """
    if sharers.count == 1:
        return plan
    if isinstance(sharers, Context):
        return _own_slice(plan, sharers)
    return _own_targets(plan, sharers)


def _own_slice(plan: MicrobatchPlan, context: Context) -> MicrobatchPlan:
    """A slice of the tokens, with the targets of its sources.

    A target's id goes with its source, so nothing is looked for beyond a slice's end.
    """
    layout = context.spread(plan.layout)
    own = layout.own
    ids = np.pad(plan.ids, (0, len(layout.position) - len(plan.ids)), mode="edge")[own]
    kept = np.flatnonzero((plan.source >= own.start) & (plan.source < own.stop)).astype(np.int32)
    part = Part(plan, kept, tokens=len(ids))
    return replace(
        plan, ids=ids, layout=layout, part=part, **_targets_of(plan, kept, start=own.start)
    )


def _own_targets(plan: MicrobatchPlan, split: Sharers) -> MicrobatchPlan:
    """All tokens, with a share of the targets."""
    size = -(-len(plan.source) // split.count)
    kept = np.arange(len(plan.source), dtype=np.int32)[split.place * size :][:size]
    part = Part(plan, kept, tokens=plan.tokens if split.place == 0 else 0)
    return replace(plan, part=part, **_targets_of(plan, kept, start=0))


def _targets_of(plan: MicrobatchPlan, kept: IntArray, *, start: int) -> dict[str, Any]:
    """The fields of a plan with only those targets, whose sources count from token `start`."""
    number = np.full(len(plan.source), -1, np.int32)
    number[kept] = np.arange(len(kept), dtype=np.int32)
    shares = number[plan.shares.target] >= 0
    return {
        "source": plan.source[kept] - start,
        "target": plan.target[kept],
        "weight": plan.weight[kept],
        "shares": Shares(
            number[plan.shares.target[shares]],
            plan.shares.document[shares],
            plan.shares.weight[shares],
        ),
    }


def idle(plans: Sequence[MicrobatchPlan], *, ranks: int, costs: Costs) -> float:
    """The share of all ranks' time that such a step leaves idle."""
    work = [costs.of(plan) for plan in plans]
    return idle_share(deal(work, ranks), work)


def weightless(plan: MicrobatchPlan) -> MicrobatchPlan:
    """The micro-batch with no weight on its targets, and nobody's: its gradient is zero."""
    none = np.empty(0, np.int32)
    shares = Shares(none, none, np.empty(0, np.float32))
    return replace(plan, weight=np.zeros_like(plan.weight), shares=shares)


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
