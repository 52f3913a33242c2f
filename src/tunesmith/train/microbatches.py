"""A step's micro-batches, assigned to data-parallel ranks, and this rank's shard of each.

The next step is planned while the device works on this one: once a step's micro-batches are queued,
the host has nothing to do until their numbers are there. A thread for it would only compete with
the queueing for Python.

Invariant: a step gets what planning in its own turn gives. Planning depends on nothing but the
documents and `micro_tokens`, so a plan made for another `micro_tokens` isn't used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.microbatch.planner import MicrobatchPlan, Part, plan_step
from tunesmith.distributed.context_parallel import ContextParallel
from tunesmith.distributed.load_balance import IDLE, assign, idle_fraction
from tunesmith.distributed.model_parallel_group import ModelParallelGroup
from tunesmith.distributed.world import World
from tunesmith.model.layers import attention_width
from tunesmith.transfer import to_device
from tunesmith.types import Batch, Document, IntArray, TargetOwners

TRIES = 5
"""How often a step is cut anew to find micro-batches that fill the ranks."""


@dataclass(frozen=True, slots=True)
class WorkModel:
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


def model_work(model: Any) -> WorkModel:
    """Multiplications of a forward pass through a CausalLM; sliding windows count as whole."""
    config = model.config.get_text_config()
    embeddings = {id(p) for p in (model.base.get_input_embeddings().weight, model.head.weight)}
    inside = sum(p.numel() for p in model.decoder.parameters() if id(p) not in embeddings)
    head = sum(p.numel() for p in model.head.parameters())
    return WorkModel(token=float(inside), pair=2.0 * attention_width(config), target=float(head))


def plan_for_ranks(
    documents: Sequence[Document],
    ranks: int,
    *,
    work_model: WorkModel,
    micro_tokens: int,
    share_prefixes: bool = True,
    unpacked: bool = False,
) -> list[MicrobatchPlan]:
    """The micro-batches of a step, cut so that several ranks finish early; for one rank those of
    `plan_step`.

    A step of too few micro-batches is cut finer, down to its longest path: a prefix that is cut is
    then computed on several ranks. Of the cuts tried the one whose slowest rank has least work is
    taken. The same on every rank.
    """

    def cut(tokens: int) -> list[MicrobatchPlan]:
        return plan_step(
            documents, micro_tokens=tokens, share_prefixes=share_prefixes, unpacked=unpacked
        )

    best = cut(micro_tokens)
    if ranks == 1 or unpacked or not best:
        return best
    least = _time(best, ranks, work_model)
    wanted = -(-len(best) // ranks) * ranks
    size = sum(plan.tokens for plan in best) / wanted
    for number in range(TRIES):
        tokens = int(size * (1 + number / 8)) + 1
        if tokens >= micro_tokens:
            break
        plans = cut(tokens)
        time = _time(plans, ranks, work_model)
        if time < least:
            best, least = plans, time
    return best


def _time(plans: Sequence[MicrobatchPlan], ranks: int, work_model: WorkModel) -> float:
    work = [work_model.of(plan) for plan in plans]
    rounds = assign(work, ranks)
    return sum(max(work[n] for n in one if n != IDLE) for one in rounds)


def assigned_to(
    plans: Sequence[MicrobatchPlan], rank: int, *, ranks: int, work_model: WorkModel
) -> list[MicrobatchPlan]:
    """The micro-batches of one rank, as many as any other's; where it has none of its own it runs
    the smallest one without weight.
    """
    if ranks == 1:
        return list(plans)
    work = [work_model.of(plan) for plan in plans]
    filler = zero_weight(plans[int(np.argmin(work))])
    return [filler if one[rank] == IDLE else plans[one[rank]] for one in assign(work, ranks)]


def step_plans(
    documents: Sequence[Document],
    world: World,
    *,
    work_model: WorkModel,
    micro_tokens: int,
    share_prefixes: bool = True,
    unpacked: bool = False,
) -> list[MicrobatchPlan]:
    """The micro-batches of a step for all ranks, each of `micro_tokens` for every rank that shares
    it.
    """
    return plan_for_ranks(
        documents,
        world.dp_size,
        work_model=work_model,
        micro_tokens=micro_tokens * world.cp.size,
        share_prefixes=share_prefixes,
        unpacked=unpacked,
    )


def local_plans(
    plans: Sequence[MicrobatchPlan], world: World, *, work_model: WorkModel
) -> list[MicrobatchPlan]:
    """What this rank runs of the micro-batches of a step."""
    assigned = assigned_to(plans, world.dp_rank, ranks=world.dp_size, work_model=work_model)
    return [local_part(plan, world.model_parallel) for plan in assigned]


def local_part(plan: MicrobatchPlan, group: ModelParallelGroup) -> MicrobatchPlan:
    """What this rank does of a micro-batch that several work on together. The parts of all of them
    have every target once.
    """
    if group.size == 1:
        return plan
    if isinstance(group, ContextParallel):
        return _local_shard(plan, group)
    return _local_targets(plan, group)


def _local_shard(plan: MicrobatchPlan, cp: ContextParallel) -> MicrobatchPlan:
    """A slice of the tokens, with the targets of its sources.

    A target's id goes with its source, so nothing is looked for beyond a slice's end.
    """
    layout = cp.shard(plan.layout)
    local = layout.local
    ids = np.pad(plan.ids, (0, len(layout.position) - len(plan.ids)), mode="edge")[local]
    kept = np.flatnonzero((plan.source >= local.start) & (plan.source < local.stop)).astype(
        np.int32
    )
    part = Part(plan, kept, tokens=len(ids))
    return replace(
        plan, ids=ids, layout=layout, part=part, **_targets_of(plan, kept, start=local.start)
    )


def _local_targets(plan: MicrobatchPlan, split: ModelParallelGroup) -> MicrobatchPlan:
    """All tokens, with a share of the targets."""
    size = -(-len(plan.source) // split.size)
    kept = np.arange(len(plan.source), dtype=np.int32)[split.rank * size :][:size]
    part = Part(plan, kept, tokens=plan.tokens if split.rank == 0 else 0)
    return replace(plan, part=part, **_targets_of(plan, kept, start=0))


def _targets_of(plan: MicrobatchPlan, kept: IntArray, *, start: int) -> dict[str, Any]:
    """The fields of a plan with only those targets, whose sources count from token `start`."""
    number = np.full(len(plan.source), -1, np.int32)
    number[kept] = np.arange(len(kept), dtype=np.int32)
    kept_owners = number[plan.owners.target] >= 0
    return {
        "source": plan.source[kept] - start,
        "target": plan.target[kept],
        "weight": plan.weight[kept],
        "owners": TargetOwners(
            number[plan.owners.target[kept_owners]],
            plan.owners.document[kept_owners],
            plan.owners.weight[kept_owners],
        ),
    }


def idle_fraction_of(
    plans: Sequence[MicrobatchPlan], *, ranks: int, work_model: WorkModel
) -> float:
    """The share of all ranks' time that such a step leaves idle."""
    work = [work_model.of(plan) for plan in plans]
    return idle_fraction(assign(work, ranks), work)


def zero_weight(plan: MicrobatchPlan) -> MicrobatchPlan:
    """The micro-batch with no weight on its targets, and nobody's: its gradient is zero."""
    none = np.empty(0, np.int32)
    owners = TargetOwners(none, none, np.empty(0, np.float32))
    return replace(plan, weight=np.zeros_like(plan.weight), owners=owners)


class Cut(Protocol):
    """How steps are cut; `train.job.MicroBatching`."""

    @property
    def micro_tokens(self) -> int: ...
    @property
    def share_prefixes(self) -> bool: ...
    @property
    def work(self) -> WorkModel: ...


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step's documents and micro-batches."""

    documents: list[Document]
    plans: list[MicrobatchPlan]  # of all ranks
    local: list[MicrobatchPlan]  # what this rank runs of them


class StepPlanner:
    """Plans the steps of a run, counted from 0. Keeps the present step and the next one."""

    def __init__(
        self,
        documents: Sequence[Document],
        step_indices: Callable[[int], IntArray],
        total_steps: int,
        world: World,
        *,
        unpacked: Callable[[], bool],
    ) -> None:
        self._documents = documents
        self._step_indices = step_indices
        self._total_steps = total_steps
        self._world = world
        self._unpacked = unpacked
        self._made: dict[tuple[int, int], PlannedStep] = {}

    def step(self, number: int, cut: Cut) -> PlannedStep:
        """The micro-batches of a step, planned now unless that was done ahead."""
        key = (number, cut.micro_tokens)
        if key not in self._made:
            self._made = {key: self._plan(number, cut)}
        return self._made[key]

    def prepare(self, number: int, cut: Cut) -> None:
        """Plan the step that follows. An error is dropped here; it comes again in `step`."""
        kept = (number - 1, cut.micro_tokens)
        self._made = {key: planned for key, planned in self._made.items() if key == kept}
        if number < self._total_steps:
            with suppress(Exception):
                self._made[number, cut.micro_tokens] = self._plan(number, cut)

    def _plan(self, number: int, cut: Cut) -> PlannedStep:
        documents = [self._documents[int(i)] for i in self._step_indices(number)]
        plans = step_plans(
            documents, self._world, work_model=cut.work, micro_tokens=cut.micro_tokens,
            share_prefixes=cut.share_prefixes, unpacked=self._unpacked(),
        )  # fmt: skip
        return PlannedStep(documents, plans, local_plans(plans, self._world, work_model=cut.work))


def collate(plan: MicrobatchPlan, device: torch.device | str = "cpu") -> Batch:
    """The plan's arrays as tensors on the device; ids and positions as int64, weights as
    float32.
    """

    def tensor(array: NDArray[np.int32]) -> torch.Tensor:
        return to_device(array.astype(np.int64), device)

    return Batch(
        input_ids=tensor(plan.ids),
        position_ids=tensor(plan.layout.position[plan.layout.local]),
        layout=plan.layout if plan.packed else None,
        source=tensor(plan.source),
        target=tensor(plan.target),
        weight=to_device(plan.weight, device),
        owners=plan.owners,
    )
