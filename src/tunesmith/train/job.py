"""All objects of a run, put together by `build` and used up by `fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tunesmith.config.schema import Recipe
from tunesmith.data.preprocess.prepare import Prepared
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.data.templates.template import Template
from tunesmith.distributed.grad_sync import NoSync
from tunesmith.distributed.world import World
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.source import ModelSource
from tunesmith.optim import Optimizer
from tunesmith.train.loss import StepLoss
from tunesmith.train.microbatches import WorkModel
from tunesmith.train.user_objective import UserObjective
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
    sampler: BatchSampler
    total_steps: int
    lr: Callable[[int], float]
    optimizer: Optimizer
    loss: StepLoss
    device: torch.device
    micro_tokens: int
    share_prefixes: bool
    trained_parameters: int
    chosen: dict[str, Any]  # what `auto` became, for machine.json
    user_objective: UserObjective | None = None
    world: World = field(default_factory=World)
    grad_sync: NoSync = field(default_factory=NoSync)
    work: WorkModel = field(default_factory=WorkModel)
    notes: list[str] = field(default_factory=list)  # for the start-up lines

    @property
    def documents(self) -> Sequence[Document]:
        """The documents that are learned from."""
        return self.prepared.documents
