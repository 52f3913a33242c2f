"""Types of single fields of the recipe: how each is read, checked and written back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from tunesmith.config.values import Duration, parse_duration, parse_number

Number = Annotated[float, BeforeValidator(parse_number)]
"""A float; `2e-5`, which YAML 1.1 reads as a string, is one too."""

Momentum = Annotated[float, BeforeValidator(parse_number), Field(ge=0, lt=1)]
"""Decay of a running mean."""

Tracker = Literal["wandb", "tensorboard", "trackio", "mlflow"]

Every = Annotated[
    Duration,
    BeforeValidator(parse_duration),
    PlainSerializer(Duration.plain),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": "^[0-9.]+ ?(steps?|epochs?|min|minutes?)$"},
            ]
        }
    ),
]
"""`200` (steps), `0.25 epoch` or `10 min`."""
