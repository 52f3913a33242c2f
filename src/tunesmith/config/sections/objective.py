"""The recipe's section `objective`: the loss, its regularizers, and which keys each loss reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from tunesmith.config.sections.base import Count, Number, Section

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
"""The objectives that read each key; a key that is not here is read with all of them."""

DEFAULTS: dict[str, dict[str, float]] = {
    "eaft": {"alpha": 1.0},
    "psft": {"eps_low": 0.2, "eps_high": 0.28, "outer_steps": 8, "warmup_epochs": 0.0},
    "asft": {"kl": 0.05},
}
"""Default values of the keys that only some objectives read."""


def _known(value: Any) -> Any:
    if not isinstance(value, str) or value in NAMES or re.match(USER_FUNCTION, value):
        return value
    close = get_close_matches(value, NAMES, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"{value!r} is no objective; known are {', '.join(NAMES)} and "
        f"path/to/file.py:my_loss{guess}"
    )


def unfit(key: str, name: str) -> bool:
    """True if the objective does not read the key."""
    return key in BELONGS and name not in BELONGS[key]


class ObjectiveSection(Section):
    """The loss, and the regularizers and noise on top of it."""

    name: Annotated[
        str,
        BeforeValidator(_known),
        WithJsonSchema(
            {"anyOf": [{"enum": list(NAMES)}, {"type": "string", "pattern": USER_FUNCTION}]}
        ),
    ] = Field(
        default="nll",
        description="loss of each target. nll: negative log-likelihood; dft, eaft: nll weighted by "
        "the model's probability or entropy; psft: PPO's clipped ratio; asft: dft with a KL term "
        "to the base model; path/to/file.py:my_loss: a function of your own",
    )
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="nll, dft, eaft, asft: label smoothing, the probability that is spread over "
        "the vocabulary",
    )
    z_loss: Number = Field(
        default=0.0, ge=0, description="weight of the z-loss, the squared log-sum-exp of the logits"
    )
    entropy: Number = Field(
        default=0.0, ge=0, description="weight of the entropy bonus, which is subtracted"
    )
    kl: Annotated[Number, Field(ge=0)] | None = Field(
        default=None,
        description="weight of the divergence from the base model, KL(base || model); asft: 0.05 "
        "if not given",
    )
    alpha: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="eaft: exponent of the entropy; 1 if not given"
    )
    eps_low: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="psft: targets whose ratio is below 1 - eps_low are counted as `fallen`; 0.2 "
        "if not given",
    )
    eps_high: Annotated[Number, Field(ge=0)] | None = Field(
        default=None,
        description="psft: the ratio is clipped at 1 + eps_high; 0.28 if not given",
    )
    outer_steps: Annotated[Count, Field(ge=1)] | None = Field(
        default=None,
        description="psft: optimizer steps between updates of the old policy; 8 if not given",
    )
    warmup_epochs: Annotated[Number, Field(ge=0)] | None = Field(
        default=None, description="psft: epochs trained with nll before psft; 0 if not given"
    )
    neftune: Number = Field(
        default=0.0,
        ge=0,
        description="NEFTune: alpha of the noise on the embeddings during training; 0: none",
    )
    router_aux: Number = Field(
        default=0.0,
        ge=0,
        description="mixture-of-experts models: weight of the router's load-balancing loss",
    )
    scheduled_sampling: Number = Field(
        default=0.0,
        ge=0,
        le=1,
        description="scheduled sampling: fraction of target tokens whose input is replaced by the "
        "model's own prediction; it grows linearly to this value at the last step",
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
