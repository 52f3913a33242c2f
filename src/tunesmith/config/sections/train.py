"""The recipe's section `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.config.fields import Number
from tunesmith.config.sections.base import Count, Section, one_of


class TrainSection(Section):
    """How long, from which seed, and which weights are kept."""

    epochs: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="passes over the data; 3 where steps is not given"
    )
    steps: Count | None = Field(default=None, ge=1, description="instead: optimizer steps")
    seed: Count = Field(
        default=42, ge=0, lt=2**32, description="of the order of the data, new weights and dropout"
    )
    result: Literal["last", "best"] = Field(
        default="last", description="which weights become model/: best needs data.eval"
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a step whose loss or gradient is not finite: stop, or leave it out, counted",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        return one_of(values, "train", {"epochs": 3, "steps": None})
