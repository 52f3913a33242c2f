"""Values of the recipe that have a small grammar of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(step|steps|epoch|epochs|min|minute|minutes)?\s*$")
_UNITS = {"step": "steps", "epoch": "epochs", "min": "minutes", "minute": "minutes"}


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happens: a number of steps, epochs (may be a share) or minutes."""

    value: float
    unit: Literal["steps", "epochs", "minutes"]

    def __str__(self) -> str:
        words = {"steps": "", "epochs": " epoch", "minutes": " min"}
        return f"{self.value:g}{words[self.unit]}"


def parse_duration(value: Any) -> Any:
    """A Duration from `200`, `0.25 epoch` or `10 min`.

    Raises:
        ValueError: anything else, zero or less, or a share of a step.
    """
    if value is None or isinstance(value, Duration):
        return value
    match = _DURATION.match(str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError(f"{value!r} is not a number of steps (200), `0.25 epoch` or `10 min`")
    number, unit = float(match[1]), match[2] or "steps"
    unit = _UNITS.get(unit, unit)
    if number <= 0 or (unit == "steps" and number != int(number)):
        raise ValueError(f"{value!r} must be above zero, and a whole number where it counts steps")
    return Duration(number, unit)  # pyright: ignore[reportArgumentType]


def parse_number(value: Any) -> Any:
    """A float from text such as `2e-5`; everything else is left to the field's own check."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a number") from None
    return value


@dataclass(frozen=True, slots=True)
class Holdout:
    """Held-out rows taken from the training rows: a share (0..1) or a number of rows."""

    share: float | None = None
    rows: int | None = None

    def __str__(self) -> str:
        return f"{self.share * 100:g}%" if self.share is not None else str(self.rows)


def parse_eval(value: Any) -> Any:
    """None, a Holdout (`2%`, `200`) or named sets of source mappings: {name: [source, ...]}.

    A path, a list of paths or of source mappings is one set named `eval`.
    """
    raise NotImplementedError


EvalSource = Annotated[Any, BeforeValidator(parse_eval)]
