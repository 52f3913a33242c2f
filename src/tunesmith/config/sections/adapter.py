"""The recipe's section `adapter`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.config.fields import Number
from tunesmith.config.sections.base import Count, Section


class AdapterSection(Section):
    """Which parameters are trained."""

    kind: Literal["none", "lora"] = Field(
        default="none", description="none: all parameters; lora: low-rank additions"
    )
    rank: Count = Field(default=16, ge=1, description="rank of the additions")
    alpha: Number = Field(default=32, gt=0, description="scale of the additions: alpha / rank")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="dropout on the additions' input")
    targets: str | list[str] = Field(
        default="all-linear",
        description="all-linear, a regular expression on module names, or a list of name endings",
    )
