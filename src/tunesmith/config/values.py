"""Recipe values with a grammar of their own: durations, percentages, column mappings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

_DURATION = re.compile(
    r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(step|steps|epoch|epochs|min|minute|minutes)?\s*$"
)
_PERCENT = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*%\s*$")
_PAIR = re.compile(r"^\s*([^:=\s]+)\s*[:=]\s*(\S.*?)\s*$")


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happens: a number of steps, epochs (may be a share) or minutes."""

    value: float
    unit: Literal["steps", "epochs", "minutes"]

    def __str__(self) -> str:
        words = {"steps": "", "epochs": " epoch", "minutes": " min"}
        return f"{_shortest(self.value)}{words[self.unit]}"

    def plain(self) -> int | str:
        """What a recipe says: the number itself where it counts steps, else text."""
        return int(self.value) if self.unit == "steps" else str(self)


@dataclass(frozen=True, slots=True)
class Holdout:
    """Held-out rows taken from the training rows: a share (0..1) or a number of rows."""

    share: float | None = None
    rows: int | None = None

    def __str__(self) -> str:
        if self.share is not None:
            return f"{_shortest(round(self.share * 100, 12))}%"
        return str(self.rows)

    def plain(self) -> int | str:
        """What a recipe says: `2%` or the number itself."""
        return str(self) if self.rows is None else self.rows


def _shortest(number: float) -> str:
    """The fewest digits that read back as the same float, without a trailing `.0`."""
    return str(int(number)) if number == int(number) else repr(number)


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
    number, word = float(match[1]), match[2] or "steps"
    unit = {"s": "steps", "e": "epochs", "m": "minutes"}[word[0]]
    if number <= 0 or (unit == "steps" and number != int(number)):
        raise ValueError(f"{value!r} must be above zero, and a whole number where it counts steps")
    return Duration(number, unit)  # pyright: ignore[reportArgumentType]


def parse_number(value: Any) -> Any:
    """A float from text such as `2e-5`; everything but a bool is left to the field's own check."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a number") from None
    return refuse_bool(value)


def refuse_bool(value: Any) -> Any:
    """The value, unless it is true or false, which would otherwise pass as 1 or 0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def parse_holdout(value: Any) -> Holdout | None:
    """A Holdout from `2%` or a number of rows (`200`), None where the value is of another kind.

    Raises:
        ValueError: a share outside 0..100% or fewer rows than one.
    """
    if isinstance(value, Holdout):
        return value
    if isinstance(value, str) and (match := _PERCENT.match(value)):
        share = float(match[1]) / 100
        if not 0 < share < 1:
            raise ValueError(f"{value} must lie between 0% and 100%")
        return Holdout(share=share)
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value < 1 or value != int(value):
        raise ValueError(f"{value} is not a number of rows; a share is written with a sign: 2%")
    return Holdout(rows=int(value))


def parse_words(value: Any) -> Any:
    """A list from a single word; everything else is left to the field's own check."""
    return [value] if isinstance(value, str) else value


def parse_columns(value: Any) -> Any:
    """A mapping from `prompt: question, completion: answer`, as it is typed on a command line."""
    if not isinstance(value, str):
        return value
    pairs = [_PAIR.match(part) for part in value.strip(" {}").split(",")]
    if not all(pairs):
        raise ValueError(f"{value!r} is not a mapping such as {{prompt: question}}")
    return {match[1]: match[2] for match in cast("list[re.Match[str]]", pairs)}
