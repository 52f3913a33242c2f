"""The result of rendering a row, and the error of a row that exceeds `max_length`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from tunesmith.data.row_errors import Fault, Field, RowError
from tunesmith.types import Document, IntArray

Wanted = tuple[str, bool]
"""A text to tokenize, and whether the tokenizer adds its special tokens."""

TOO_LONG = "too-long"
NO_TARGETS = "no-targets"


@dataclass(frozen=True, slots=True)
class Rendered:
    """The result of rendering a row.

    `tokens` counts all tokens of the row, kept or not. `unused` counts those after the last target,
    which are never in a document. The tokens in neither were cut off, for `reason`. Nothing
    reads the row's `fields`.
    """

    document: Document | None
    status: str  # trained | truncated | dropped
    reason: str | None
    tokens: int
    unused: int = 0
    fields: tuple[Field, ...] = ()


Rendering = Generator[Sequence[Wanted], Sequence[IntArray], Rendered]
"""A row that is being rendered: a generator that yields texts, receives their ids and returns a
result.
"""

Limit = tuple["int | None", str]
"""The longest path in tokens (None: no limit), and what happens to a longer one."""


def over_long(length: int, max_length: int) -> RowError:
    """The error of a row whose longest path has `length` tokens."""
    return RowError(
        Fault(
            TOO_LONG,
            f"its longest path is {length:,} tokens; data.max_length allows {max_length:,}",
            "data.too_long=drop, truncate or split, or a larger data.max_length",
        )
    )
