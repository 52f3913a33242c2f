"""A training job: data, training, choices and micro-batching, four frozen parts made by `build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.manager import CheckpointOptions
from tunesmith.checkpoint.optimizer import SavedOptimizer
from tunesmith.config.dump import science_dict
from tunesmith.config.schema import Recipe
from tunesmith.metrics.records import Sink
from tunesmith.train.job import MicroBatching, RunData, TrainerOptions, Training
from tunesmith.train.trainer import Trainer
from tunesmith.train.user_objective import UserObjective


@dataclass(frozen=True, slots=True)
class Choices:
    """What was asked for, and what every `auto` became."""

    recipe: Recipe  # with every science value resolved
    resolved: Mapping[str, Any]  # what `auto` became, for machine.json
    user_objective: UserObjective | None = None
    notes: Sequence[str] = field(default_factory=tuple)  # the lines printed at the start


@dataclass(frozen=True, slots=True)
class Job:
    """A run, ready to start."""

    data: RunData
    training: Training
    choices: Choices
    microbatching: MicroBatching


def make_trainer(job: Job, folder: Path, sinks: Sequence[Sink] = ()) -> Trainer:
    """The trainer of a job. Its records go to `sinks`, its checkpoints into `folder`."""
    options = trainer_options(job)
    return Trainer(job.data, job.training, job.microbatching, options, folder=folder, sinks=sinks)


def saved_optimizer(job: Job) -> SavedOptimizer:
    """The job's optimizer, as checkpoints hold it."""
    training = job.training
    return SavedOptimizer(training.optimizer, training.grad_sync.sharded, training.world)


def trainer_options(job: Job) -> TrainerOptions:
    """What the trainer needs to know of the recipe."""
    recipe, resolved = job.choices.recipe, job.choices.resolved
    return TrainerOptions(
        seed=recipe.train.seed,
        max_grad_norm=recipe.optim.max_grad_norm,
        non_finite=recipe.train.non_finite,
        spike_limits={"loss": recipe.log.spike_loss, "grad_norm": recipe.log.spike_grad_norm},
        stop_on_spike=recipe.log.on_spike == "stop",
        watchdog=recipe.device.watchdog,
        eval_every=recipe.eval.every,
        save_every=recipe.checkpoint.every,
        save_best=recipe.train.result == "best",
        checkpoint=CheckpointOptions(
            keep=recipe.checkpoint.keep,
            background=recipe.checkpoint.background,
            identity={
                "science": science_dict(recipe),
                "device": str(job.training.device.type),
                "kernels": resolved["kernels"],
                "compile": resolved["compile"],
                "deterministic": recipe.device.deterministic,
                "data": dict(job.data.prepared.content_hashes),
            },
        ),
    )
