"""The recipe's schema (a pydantic model): its sections, and the short form of each.

The sections `model data batch objective adapter optim train` change what is learned. `device`
changes only how fast that is computed. `checkpoint eval log` change neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import Field, model_validator

from tunesmith.config.sections.base import Section
from tunesmith.config.sections.data import DataSection, SourceSection
from tunesmith.config.sections.device import DeviceSection
from tunesmith.config.sections.model import AdapterSection, ModelSection
from tunesmith.config.sections.objective import ObjectiveSection
from tunesmith.config.sections.training import BatchSection, OptimSection, TrainSection
from tunesmith.config.sections.upkeep import CheckpointSection, EvalSection, LogSection
from tunesmith.config.values import Duration, Holdout

__all__ = [
    "MAIN_KEYS",
    "SCIENCE",
    "DataSection",
    "Duration",
    "Holdout",
    "Recipe",
    "Section",
    "SourceSection",
]


class Recipe(Section):
    """A recipe: all that a run is made from."""

    model: ModelSection = Field(description="the pretrained model")
    data: DataSection = Field(
        default=DataSection(),
        description="the training and evaluation data, and how rows become tokens",
    )
    batch: BatchSection = Field(
        default=BatchSection(), description="what one optimizer step learns from"
    )
    objective: ObjectiveSection = Field(
        default=ObjectiveSection(), description="the loss and its regularizers"
    )
    adapter: AdapterSection = Field(
        default=AdapterSection(), description="which parameters are trained"
    )
    optim: OptimSection = Field(
        default=OptimSection(), description="the optimizer and its learning-rate schedule"
    )
    train: TrainSection = Field(
        default=TrainSection(),
        description="how long the run is, its seed, and which weights it keeps",
    )
    device: DeviceSection = Field(
        default=DeviceSection(),
        description="where and how fast the run computes; it never changes what is learned beyond "
        "rounding",
    )
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(),
        description="when checkpoints are written and how many are kept",
    )
    eval: EvalSection = Field(
        default=EvalSection(), description="when and how the evaluation data is used"
    )
    log: LogSection = Field(
        default=LogSection(),
        description="where metrics go besides metrics.jsonl, and what counts as a spike",
    )

    @model_validator(mode="before")
    @classmethod
    def _main_keys(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = cast("Mapping[str, Any]", values)
        return {name: expand_section(name, value) for name, value in given.items()}


SCIENCE = ("model", "data", "batch", "objective", "adapter", "optim", "train")
"""Sections that change what is learned."""

MAIN_KEYS = {
    "model": "name",
    "data": "train",
    "batch": "documents",
    "objective": "name",
    "adapter": "kind",
    "optim": "name",
    "train": "epochs",
    "device": "kind",
    "checkpoint": "every",
    "eval": "every",
    "log": "to",
}
"""The key that a plain value for a section stands for: `model: M` means `model: {name: M}`."""


def expand_section(name: str, value: Any) -> Any:
    """The mapping that a section's short form stands for; {} for an empty section."""
    if name not in MAIN_KEYS or isinstance(value, Mapping | Section):
        return cast(Any, value)
    return {} if value is None else {MAIN_KEYS[name]: value}
