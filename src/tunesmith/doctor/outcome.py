"""The result of a check: where, how often, how severe, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "info", "warning", "error")
"""From harmless to bad."""
FEW = 0.01
"""Share up to which what merely wastes or blurs training is noted and not warned of."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One place with what is wrong there; `where` is `file:row` or a file of the model."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check found among `of` things called `unit`; without hits it is fine."""

    hits: Sequence[Hit]
    of: int
    unit: str
    level: Level
    hint: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A check's outcome under its name; `level` is ok where there are no hits."""

    check: str
    title: str
    level: Level
    count: int
    of: int
    unit: str
    examples: tuple[Hit, ...]
    hint: str

    @property
    def share(self) -> float:
        """Hits among what was looked at, 0..1."""
        return self.count / self.of if self.of else 0.0

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "check": self.check,
            "title": self.title,
            "level": self.level,
            "count": self.count,
            "of": self.of,
            "unit": self.unit,
            "share": self.share,
            "examples": [{"where": hit.where, "text": hit.text} for hit in self.examples],
            "hint": self.hint if self.count else None,
        }


def by_share(hits: Sequence[Hit], of: int) -> Level:
    """A warning above FEW of all, below it for information."""
    return "warning" if len(hits) > FEW * of else "info"


def quote(text: str, length: int = 60) -> str:
    """The text in quotes on one line, shortened in the end."""
    shown = " ".join(text[: 4 * length].split())
    return repr(shown if len(shown) <= length else f"{shown[: length - 3]}...")
