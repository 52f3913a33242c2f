"""All objects of a run, put together by `build` and used up by `fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tunesmith.config.schema import Recipe
from tunesmith.data.preprocess.prepare import Prepared
from tunesmith.data.sampling.sampler import StepOrder
from tunesmith.data.templates.template import Template
from tunesmith.distributed.grad_sync import Alone
from tunesmith.distributed.world import World
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.source import ModelSource
from tunesmith.optim import Optimizer
from tunesmith.train.loss import StepLoss
from tunesmith.train.microbatches import Costs
from tunesmith.train.user_objective import OwnObjective
from tunesmith.types import Document


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Held-out documents under a name."""

    name: str
    documents: Sequence[Document]
    content_hash: str


@dataclass(slots=True)
class Job:
    """A run, ready to start. `recipe` has every science value resolved."""

    recipe: Recipe
    model: CausalLM
    source: ModelSource | None  # None: the user gave the model
    template: Template
    prepared: Prepared
    eval_sets: Sequence[EvalSet]
    order: StepOrder
    total_steps: int
    lr: Callable[[int], float]
    optimizer: Optimizer
    loss: StepLoss
    device: torch.device
    micro_tokens: int
    share: bool
    trained_parameters: int
    chosen: dict[str, Any]  # what `auto` became, for machine.json
    own_objective: OwnObjective | None = None
    ranks: World = field(default_factory=World)
    reduce: Alone = field(default_factory=Alone)
    costs: Costs = field(default_factory=Costs)
    notes: list[str] = field(default_factory=list)  # for the start-up lines

    @property
    def documents(self) -> Sequence[Document]:
        """The documents that are learned from."""
        return self.prepared.documents
