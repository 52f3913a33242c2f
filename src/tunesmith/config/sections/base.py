"""The base class of the recipe's sections (pydantic), and the types of fields that several
share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from tunesmith.config.values import Duration, parse_duration, parse_number, refuse_bool

Count = Annotated[int, BeforeValidator(refuse_bool)]
"""A whole number; true and false are not numbers."""

Number = Annotated[float, BeforeValidator(parse_number)]
"""A float; `2e-5`, which YAML 1.1 reads as a string, is one too."""

Momentum = Annotated[float, BeforeValidator(parse_number), Field(ge=0, lt=1)]
"""The decay rate of a running mean."""

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
"""An interval: `200` (steps), `0.25 epoch` or `10 min`."""


class Section(BaseModel):
    """The base of all sections: frozen, unknown keys are errors, no NaN and no infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def one_of(values: Any, section: str, defaults: dict[str, Any]) -> Any:
    """The values of a section in which at most one key of `defaults` may be given.

    Where none is given, the default that is not None is filled in.

    Raises:
        ValueError: more than one of the keys is given.
    """
    if not isinstance(values, Mapping):
        return values
    filled = dict(cast("Mapping[str, Any]", values))
    given = [key for key in defaults if filled.get(key) is not None]
    if len(given) > 1:
        names = " and ".join(f"{section}.{key}" for key in given)
        raise ValueError(f"{names} exclude each other; give one")
    if not given:
        filled.update({key: value for key, value in defaults.items() if value is not None})
    return filled
