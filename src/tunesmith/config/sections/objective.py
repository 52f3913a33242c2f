"""The recipe's section `objective`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from tunesmith.config.fields import Number
from tunesmith.config.sections.base import Count, Section

NAMES = ("nll", "dft", "psft", "eaft", "asft")
USER_FUNCTION = r"^.+\.py:[A-Za-z_]\w*$"
"""A function in a file of the user's: path/to/file.py:my_loss."""

BELONGS: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("nll", "dft", "eaft", "asft"),
    "alpha": ("eaft",),
    "eps_low": ("psft",),
    "eps_high": ("psft",),
    "outer_steps": ("psft",),
    "warmup_epochs": ("psft",),
}
"""Which objectives a key is for; keys that are not here go with all."""

DEFAULTS: dict[str, dict[str, float]] = {
    "eaft": {"alpha": 1.0},
    "psft": {"eps_low": 0.2, "eps_high": 0.28, "outer_steps": 8, "warmup_epochs": 0.0},
    "asft": {"kl": 0.05},
}
"""What an objective takes where its keys are not given."""


def _known(value: Any) -> Any:
    if not isinstance(value, str) or value in NAMES or re.match(USER_FUNCTION, value):
        return value
    close = get_close_matches(value, NAMES, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"{value!r} is no objective: {', '.join(NAMES)}, or path/to/file.py:my_loss{guess}"
    )


def unfit(key: str, name: str) -> bool:
    """True where the key has no meaning for the objective."""
    return key in BELONGS and name not in BELONGS[key]


class ObjectiveSection(Section):
    """The loss, and terms and noise on top of it."""

    name: Annotated[
        str,
        BeforeValidator(_known),
        WithJsonSchema(
            {"anyOf": [{"enum": list(NAMES)}, {"type": "string", "pattern": USER_FUNCTION}]}
        ),
    ] = Field(
        default="nll",
        description="nll: -log p(target); dft, eaft: weighted by the model's own certainty; psft: "
        "clipped steps; asft: dft held near the base; path/to/file.py:my_loss: your own",
    )
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="nll, dft, eaft, asft: share of the target spread over the vocabulary",
    )
    z_loss: Number = Field(default=0.0, ge=0, description="weight of (log sum of exp(logits))^2")
    entropy: Number = Field(default=0.0, ge=0, description="weight of the entropy, as a bonus")
    kl: Annotated[Number, Field(ge=0)] | None = Field(
        default=None,
        description="weight of the divergence from the base model, KL(base || model); asft: 0.05 "
        "where not given",
    )
    alpha: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="eaft: power of the entropy; 1 where not given"
    )
    eps_low: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="psft: fall of the ratio from which a target counts as fallen; 0.2 where not "
        "given",
    )
    eps_high: Annotated[Number, Field(ge=0)] | None = Field(
        default=None, description="psft: how far the ratio may rise; 0.28 where not given"
    )
    outer_steps: Annotated[Count, Field(ge=1)] | None = Field(
        default=None,
        description="psft: optimizer steps for which the old policy stands; 8 where not given",
    )
    warmup_epochs: Annotated[Number, Field(ge=0)] | None = Field(
        default=None, description="psft: epochs of nll before it begins; 0 where not given"
    )
    neftune: Number = Field(
        default=0.0, ge=0, description="NEFTune's alpha: noise on the embeddings in training"
    )
    router_aux: Number = Field(
        default=0.0, ge=0, description="weight of the load balancing loss of expert routers"
    )
    scheduled_sampling: Number = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of target tokens that the model reads as its own guesses, reached "
        "linearly at the last step",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_name(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(cast("Mapping[str, Any]", values))
        for key, value in DEFAULTS.get(str(filled.get("name", "nll")), {}).items():
            if filled.get(key) is None:
                filled[key] = value
        return filled
