"""The recipe's section `adapter`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.fields import Number
from tunesmith.config.sections.base import Count, Section

Kind = Literal[
    "none", "lora", "rslora", "dora", "pissa", "olora", "loftq", "vera", "oft", "boft", "ia3",
    "loha", "lokr", "hra", "miss",
]  # fmt: skip
Rank = Annotated[Count, Field(ge=1)]
Alpha = Annotated[Number, Field(gt=0)]

LOW_RANK = ("lora", "rslora", "dora", "pissa", "olora", "loftq")
PATTERNED = (*LOW_RANK, "loha", "lokr")
ALL = (*PATTERNED, "vera", "oft", "boft", "ia3", "hra", "miss")
FITS: dict[str, tuple[str, ...]] = {
    "rank": (*PATTERNED, "vera", "hra", "miss"),
    "alpha": PATTERNED,
    "dropout": ("lora", "rslora", "dora", "vera"),
    "targets": ALL,
    "rank_pattern": PATTERNED,
    "alpha_pattern": PATTERNED,
    "rotation_size": ("oft", "boft"),
    "svd_iterations": ("pissa",),
    "lr_ratio": LOW_RANK,
    "parameters": ("none",),
    "top_layers": ("none",),
}
"""Kinds that a key has an effect on."""


def fits(key: str, kind: str) -> bool:
    """True if the key means something for this kind."""
    return kind in FITS.get(key, (*ALL, "none"))


class AdapterSection(Section):
    """Which parameters are trained."""

    kind: Kind = Field(
        default="none", description="none: the model's own parameters; lora: low-rank additions"
    )
    rank: Count = Field(default=16, ge=1, description="rank of the additions")
    alpha: Number = Field(
        default=32, gt=0, description="scale of the additions: alpha / rank; rslora: / its root"
    )
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="dropout on the additions' input")
    targets: str | list[str] = Field(
        default="all-linear",
        description="all-linear, a regular expression on module names, or a list of name endings",
    )
    rank_pattern: dict[str, Rank] = Field(
        default_factory=dict[str, Rank], description="other ranks, by a name's ending or expression"
    )
    alpha_pattern: dict[str, Alpha] = Field(
        default_factory=dict[str, Alpha], description="other alphas, in the same way"
    )
    rotation_size: Count | None = Field(
        default=None, ge=2, description="width of the rotations of oft (else 32) and boft (else 4)"
    )
    svd_iterations: Count | None = Field(
        default=None, ge=1, description="a faster, approximate start of pissa; 16 is close"
    )
    lr_ratio: Number | None = Field(
        default=None, gt=0, description="LoRA+: learning rate of the B matrices over optim.lr"
    )
    continue_from: str | None = Field(
        default=None, description="run or folder of an adapter to go on with"
    )
    parameters: str | None = Field(
        default=None, description="regular expression on names of parameters; all others are frozen"
    )
    top_layers: Count | None = Field(
        default=None, ge=1, description="train only this many last layers and what follows them"
    )
