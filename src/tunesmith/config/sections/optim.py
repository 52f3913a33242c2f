"""The recipe's section `optim`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.fields import Momentum, Number
from tunesmith.config.sections.base import Section


class OptimSection(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw"] = Field(default="adamw", description="AdamW, decoupled weight decay")
    lr: Literal["auto"] | Annotated[Number, Field(gt=0)] = Field(
        default="auto", description="peak learning rate"
    )
    betas: tuple[Momentum, Momentum] = Field(
        default=(0.9, 0.999), description="decay of the two moments"
    )
    eps: Number = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: Number = Field(
        default=0.0, ge=0, description="not applied to norms, biases and embeddings"
    )
    schedule: Literal["cosine", "linear", "constant", "exponential", "quarter_cosine"] = Field(
        default="cosine", description="shape of the learning rate after the warm-up"
    )
    warmup: Number = Field(
        default=0.03, ge=0, description="below 1 a share of all steps, else a number of steps"
    )
    max_grad_norm: Number | None = Field(
        default=1.0, gt=0, description="gradients are scaled down to this norm; null: never"
    )
