"""The frozen parts of a training job that the trainer works with: data, training, micro-batching.

`build/` makes them from a recipe. Nothing in this room opens a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tunesmith.checkpoint.manager import CheckpointOptions
from tunesmith.config.values import Duration
from tunesmith.data.preprocess.prepare import Prepared
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.data.templates.template import Template
from tunesmith.distributed.grad_sync import NoSync
from tunesmith.distributed.world import World
from tunesmith.model.adapters.state import NO_ADAPTER, AdapterState
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.source import ModelSource
from tunesmith.optim import Optimizer
from tunesmith.train.loss import StepLoss
from tunesmith.train.microbatches import WorkModel
from tunesmith.types import Document


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Held-out documents under a name."""

    name: str
    documents: Sequence[Document]
    content_hash: str


@dataclass(frozen=True, slots=True)
class RunData:
    """The rendered documents of a run, and which of them each step learns from."""

    template: Template
    prepared: Prepared
    eval_sets: Sequence[EvalSet]
    sampler: BatchSampler

    @property
    def documents(self) -> Sequence[Document]:
        """The training documents."""
        return self.prepared.documents


@dataclass(frozen=True, slots=True)
class Training:
    """The model with all that updates it."""

    model: CausalLM
    source: ModelSource | None  # None: the caller passed a model object
    optimizer: Optimizer
    loss: StepLoss
    lr: Callable[[int], float]  # learning rate of a step, counted from 0
    total_steps: int
    device: torch.device
    world: World = field(default_factory=World)
    grad_sync: NoSync = field(default_factory=NoSync)
    trained_parameters: int = 0
    adapter: AdapterState = NO_ADAPTER  # what the export must know of it


@dataclass(frozen=True, slots=True)
class MicroBatching:
    """How a step is cut into micro-batches. By P3 this changes speed and memory only."""

    micro_tokens: int
    share_prefixes: bool
    work: WorkModel = field(default_factory=WorkModel)


@dataclass(frozen=True, slots=True)
class TrainerOptions:
    """What the trainer is told besides the parts: seeds, limits, and when to do what."""

    seed: int = 0
    max_grad_norm: float | None = 1.0
    non_finite: Literal["stop", "skip"] = "stop"
    spike_limits: Mapping[str, float | None] = field(default_factory=dict[str, Any])
    stop_on_spike: bool = False
    watchdog: float | Literal["auto"] | None = "auto"  # minutes
    eval_every: Duration | None = None
    save_every: Duration | None = None
    save_best: bool = False  # save the checkpoint of the best evaluation
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
