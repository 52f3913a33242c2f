"""The result of rendering a row, and how a row that exceeds `max_length` is dropped or
truncated.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from tunesmith.data.row_errors import Fault, RowError
from tunesmith.types import Document, IntArray

Wanted = tuple[str, bool]
"""A text, and whether the tokenizer puts its own special tokens around it."""

TOO_LONG = "too-long"
NO_TARGETS = "no-targets"


@dataclass(frozen=True, slots=True)
class Rendered:
    """What became of a row.

    `tokens` counts all of the row, kept or not; `unused` those after the last thing to learn, which
    never were in the document. What is left over was cut off, for `reason`.
    """

    document: Document | None
    status: str  # trained | truncated | dropped
    reason: str | None
    tokens: int
    unused: int = 0


Rendering = Generator[Sequence[Wanted], Sequence[IntArray], Rendered]
"""A row that is being rendered: it says which texts it wants as ids, and returns the outcome."""

Limit = tuple["int | None", str]
"""The longest path allowed, and what to do with longer ones."""


def over_long(length: int, max_length: int) -> RowError:
    """The refusal of a row whose longest path has `length` tokens."""
    return RowError(
        Fault(
            TOO_LONG,
            f"its longest path is {length:,} tokens; data.max_length allows {max_length:,}",
            "data.too_long=drop, truncate or split, or a larger data.max_length",
        )
    )
