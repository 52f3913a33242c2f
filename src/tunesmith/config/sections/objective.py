"""The recipe's section `objective`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.config.sections.base import Section


class ObjectiveSection(Section):
    """The loss."""

    name: Literal["nll"] = Field(default="nll", description="nll: -log p(target)")
