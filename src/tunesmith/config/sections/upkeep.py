"""The recipe's sections `checkpoint`, `eval` and `log`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunesmith.config.fields import Every, Number, Tracker
from tunesmith.config.sections.base import Count, Section
from tunesmith.config.values import Duration, parse_words


class CheckpointSection(Section):
    """When to save and how much to keep."""

    every: Every | None = Field(
        default=Duration(1, "epochs"),
        description="200 (steps), 0.25 epoch or 10 min; null: only at the end",
    )
    keep: Count = Field(
        default=2, ge=1, description="newest checkpoints kept; the best one is spared"
    )
    background: Literal["auto"] | bool = Field(
        default="auto",
        description="write beside the next steps, from a copy; auto: where memory for it is free",
    )


class EvalSection(Section):
    """When and how held-out data is looked at."""

    every: Every | None = Field(
        default=Duration(1, "epochs"),
        description="200 (steps), 0.25 epoch or 10 min; null: before and after",
    )
    samples: Count = Field(
        default=0,
        ge=0,
        description="held-out prompts answered at each evaluation, kept in samples.jsonl",
    )
    max_new_tokens: Count = Field(default=256, ge=1, description="longest answer of a sample")


class LogSection(Section):
    """Where the numbers go besides metrics.jsonl."""

    to: Annotated[list[Tracker], BeforeValidator(parse_words)] = Field(
        default_factory=list[Tracker], description="trackers (extra `logging`)"
    )
    project: str = Field(
        default="tunesmith", description="the trackers' name for the group of runs"
    )
    spike_loss: Annotated[Number, Field(gt=1)] | None = Field(
        default=None,
        description="a step with a loss of this many times the running median is a spike",
    )
    spike_grad_norm: Annotated[Number, Field(gt=1)] | None = Field(
        default=None, description="the same for the gradient norm before clipping"
    )
    on_spike: Literal["report", "stop"] = Field(
        default="report", description="a spike's rows are named and kept; stop: and the run ends"
    )
