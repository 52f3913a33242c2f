"""The recipe's section `data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.config.sections.base import Count, Section
from tunesmith.config.sections.sources import (
    Columns,
    EvalSource,
    Sources,
    SourceSection,
    check_held_out,
    check_mixture,
)


class DataSection(Section):
    """The demonstrations and how they become tokens."""

    train: Sources = Field(
        default_factory=list[SourceSection], description="what is learned from, in this order"
    )
    mix_by: Literal["rows", "tokens"] = Field(
        default="rows", description="whether weights share out documents or their tokens"
    )
    mix_stop: Literal["all_exhausted", "first_exhausted"] = Field(
        default="all_exhausted",
        description="with weights a pass ends when all sources have been seen, or before any "
        "repeats",
    )
    eval: EvalSource | None = Field(
        default=None,
        description="held-out data: files, {name: files}, a share of the training rows (2%) or "
        "a number of them",
    )
    columns: Columns | None = Field(
        default=None, description="our name: the data's name, e.g. {prompt: question}"
    )
    template: str | None = Field(
        default=None,
        description="chat template: a .jinja file, another model's folder or hub id, chatml "
        "(built in), or none (train raw); default: the model's own",
    )
    template_kwargs: dict[str, str | bool | int | float] = Field(
        default_factory=dict,
        description="arguments of the chat template, e.g. {enable_thinking: false}",
    )
    train_on: Literal["auto", "assistant", "last", "completion", "all"] | list[str] = Field(
        default="auto",
        description="which tokens are targets: answers, the last answer, completions, everything, "
        "or what these roles say",
    )
    max_length: Literal["auto"] | Annotated[Count, Field(ge=2)] = Field(
        default="auto",
        description="longest path of a document in tokens; auto: the model's context",
    )
    too_long: Literal["error", "drop", "truncate", "split"] = Field(
        default="error", description="what to do with longer rows"
    )
    bad_rows: Literal["error", "drop"] = Field(
        default="error", description="what to do with rows that can't be trained on"
    )
    shuffle: bool = Field(
        default=True, description="a new seeded order each epoch; false: the order of the data"
    )

    @model_validator(mode="after")
    def _mixture(self) -> DataSection:
        check_mixture(self.train, mix_by=self.mix_by, mix_stop=self.mix_stop)
        if isinstance(self.eval, dict):
            check_held_out(self.eval)
        return self
