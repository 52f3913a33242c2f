"""The recipe's section `optim`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.fields import Momentum, Number
from tunesmith.config.sections.base import Section

Factor = Annotated[Number, Field(ge=0)]


class OptimSection(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw_8bit", "adafactor", "lion", "muon", "sgd"] = Field(
        default="adamw", description="the rule of the updates"
    )
    lr: Literal["auto"] | Annotated[Number, Field(gt=0)] = Field(
        default="auto", description="peak learning rate"
    )
    betas: tuple[Momentum, Momentum] = Field(
        default=(0.9, 0.999), description="decay of the two moments"
    )
    momentum: Momentum = Field(default=0.95, description="muon and sgd: decay of the momentum")
    eps: Number = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: Number = Field(
        default=0.0, ge=0, description="not applied to norms, biases and embeddings"
    )
    lr_factors: dict[str, Factor] = Field(
        default_factory=dict[str, Factor],
        description="factors of lr, by embeddings, head, lora_b, or expression on names",
    )
    schedule: Literal["cosine", "linear", "constant", "exponential", "quarter_cosine", "wsd"] = (
        Field(default="cosine", description="shape of the learning rate after the warm-up")
    )
    min_lr: Number = Field(
        default=0.0, ge=0, le=1, description="share of lr that the schedule falls to instead of 0"
    )
    decay: Number = Field(
        default=0.2, gt=0, le=1, description="wsd: share of the steps after the warm-up that fall"
    )
    warmup: Number = Field(
        default=0.03, ge=0, description="below 1 a share of all steps, else a number of steps"
    )
    max_grad_norm: Number | None = Field(
        default=1.0, gt=0, description="gradients are scaled down to this norm; null: never"
    )
