"""The recipe's section `batch`."""

from __future__ import annotations

from typing import Any, Literal

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
    packing: Literal["none", "bfd", "bfd_split", "wrapped"] = Field(
        default="none",
        description="put documents in packs of at most pack_tokens; a pack then counts as a "
        "document of the step; bfd cuts off what a document has beyond a pack, bfd_split makes "
        "pieces of it, wrapped cuts one stream anywhere",
    )
    pack_tokens: Count | None = Field(
        default=None, ge=2, description="tokens of a pack; data.max_length where it is not given"
    )
    group_by_prefix: bool = Field(
        default=False,
        description="fill steps with documents that begin alike, and shuffle the steps",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, values: Any) -> Any:
        return one_of(values, "batch", {"documents": 32, "tokens": None})

    @model_validator(mode="after")
    def _one_way(self) -> BatchSection:
        if self.pack_tokens is not None and self.packing == "none":
            raise ValueError("batch.pack_tokens has no effect without batch.packing")
        if self.group_by_prefix and self.packing != "none":
            raise ValueError(
                "batch.group_by_prefix and batch.packing both say which documents meet; give one"
            )
        return self
