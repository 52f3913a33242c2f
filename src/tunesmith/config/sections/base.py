"""The base class of the recipe's sections (pydantic)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict

from tunesmith.config.values import refuse_bool

Count = Annotated[int, BeforeValidator(refuse_bool)]
"""A whole number; true and false are not numbers."""


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def one_of(values: Any, section: str, defaults: dict[str, Any]) -> Any:
    """The values, with the default where no key of `defaults` is given; two are refused."""
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
