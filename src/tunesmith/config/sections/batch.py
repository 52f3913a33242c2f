"""The recipe's section `batch`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from tunesmith.config.sections.base import Count, Section, one_of


class BatchSection(Section):
    """What one optimizer step learns from."""

    documents: Count | None = Field(
        default=None,
        ge=1,
        description="documents a step, over all devices; 32 where tokens is not given",
    )
    tokens: Count | None = Field(
        default=None, ge=1, description="instead: tokens a step, repeats counted"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, values: Any) -> Any:
        return one_of(values, "batch", {"documents": 32, "tokens": None})
