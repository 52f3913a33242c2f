"""The recipe's sections `checkpoint`, `eval` and `log`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunesmith.config.sections.base import Count, Every, Number, Section
from tunesmith.config.values import Duration, parse_words

Tracker = Literal["wandb", "tensorboard", "trackio", "mlflow"]


class CheckpointSection(Section):
    """When checkpoints are written and how many are kept."""

    every: Every | None = Field(
        default=Duration(1, "epochs"),
        description="interval between checkpoints: 200 (steps), 0.25 epoch or 10 min; null: only "
        "at the end",
    )
    keep: Count = Field(
        default=2,
        ge=1,
        description="number of newest checkpoints that are kept; the best one is kept as well",
    )
    background: Literal["auto"] | bool = Field(
        default="auto",
        description="asynchronous checkpointing: a thread writes a copy while training continues; "
        "auto: if there is memory for the copy",
    )


class EvalSection(Section):
    """When and how the evaluation data is used."""

    every: Every | None = Field(
        default=Duration(1, "epochs"),
        description="interval between evaluations: 200 (steps), 0.25 epoch or 10 min; null: before "
        "and after training only",
    )
    samples: Count = Field(
        default=0,
        ge=0,
        description="prompts of the evaluation data for which an answer is generated at each "
        "evaluation, written to samples.jsonl",
    )
    max_new_tokens: Count = Field(
        default=256, ge=1, description="largest number of tokens of a generated answer"
    )


class LogSection(Section):
    """Where metrics go besides metrics.jsonl, and what counts as a spike."""

    to: Annotated[list[Tracker], BeforeValidator(parse_words)] = Field(
        default_factory=list[Tracker],
        description="experiment trackers: wandb, tensorboard, trackio, mlflow (extra `logging`)",
    )
    project: str = Field(default="tunesmith", description="name of the project in the trackers")
    spike_loss: Annotated[Number, Field(gt=1)] | None = Field(
        default=None,
        description="a step is a loss spike if its loss is more than this many times the running "
        "median",
    )
    spike_grad_norm: Annotated[Number, Field(gt=1)] | None = Field(
        default=None, description="the same for the gradient norm before clipping"
    )
    on_spike: Literal["report", "stop"] = Field(
        default="report",
        description="what happens at a spike: report names the rows of the step and keeps them; "
        "stop ends the run as well",
    )
