"""The recipe: every section, and what its short forms stand for.

`model data batch objective adapter optim train` change what is learned; `device` changes only how
fast; `checkpoint eval log` change neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import Field, model_validator

from tunesmith.config.sections.adapter import AdapterSection
from tunesmith.config.sections.base import Section
from tunesmith.config.sections.batch import BatchSection
from tunesmith.config.sections.data import DataSection
from tunesmith.config.sections.device import DeviceSection
from tunesmith.config.sections.model import ModelSection
from tunesmith.config.sections.objective import ObjectiveSection
from tunesmith.config.sections.optim import OptimSection
from tunesmith.config.sections.sources import SourceSection
from tunesmith.config.sections.train import TrainSection
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
    """A whole run."""

    model: ModelSection = Field(description="the pretrained model")
    data: DataSection = Field(
        default=DataSection(), description="the demonstrations and how they become tokens"
    )
    batch: BatchSection = Field(
        default=BatchSection(), description="what one optimizer step learns from"
    )
    objective: ObjectiveSection = Field(default=ObjectiveSection(), description="the loss")
    adapter: AdapterSection = Field(
        default=AdapterSection(), description="which parameters are trained"
    )
    optim: OptimSection = Field(
        default=OptimSection(), description="the optimizer and its schedule"
    )
    train: TrainSection = Field(
        default=TrainSection(), description="how long, from which seed, and which weights are kept"
    )
    device: DeviceSection = Field(
        default=DeviceSection(),
        description="where and how fast: never changes what is learned beyond rounding",
    )
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(), description="when to save and how much to keep"
    )
    eval: EvalSection = Field(
        default=EvalSection(), description="when and how held-out data is looked at"
    )
    log: LogSection = Field(
        default=LogSection(), description="where the numbers go besides metrics.jsonl"
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
"""The key a scalar given for a whole section stands for: `model: M` is `model: {name: M}`."""


def expand_section(name: str, value: Any) -> Any:
    """The mapping that a section's short form stands for; {} where nothing is written."""
    if name not in MAIN_KEYS or isinstance(value, Mapping | Section):
        return cast(Any, value)
    return {} if value is None else {MAIN_KEYS[name]: value}
