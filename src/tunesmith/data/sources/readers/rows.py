"""What a reader yields: a row's values, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from tunesmith.data.row_errors import Fault
from tunesmith.errors import DataError

Raw = tuple["dict[str, Any] | None", "Fault | None"]
"""Values and no fault, or a fault and no values."""

BATCH_ROWS = 1024
"""Rows that are turned from columns into Python objects at a time."""


_OBJECT = 'a row is an object of columns: {"prompt": "...", "completion": "..."}'


LONGEST = 1 << 28
"""Bytes of a line, or characters of a value, that are read; far above what a row may teach."""


USUAL = 1 << 30
"""Bytes to which any file may expand."""
TIMES = 5000
"""How many times its size it may have beyond that."""
LONG = 1 << 18
"""Bytes of a row from which on it is a `LongRow`."""
_MOST_VALUES = 1 << 24


class LongRow(dict[str, Any]):
    """A row so long that few may be held at a time."""


def lines_of(file: Any, name: str) -> Iterator[bytes]:
    """The lines of a file.

    Raises:
        DataError: one is so long that the file, which may be small and compressed, is no data.
    """
    for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), start=1):
        if len(line) >= LONGEST:
            raise too_long(f"line {number}", name)
        yield line


def too_many(text: str | bytes) -> bool:
    """Whether JSON text may hold so many values that they fill the memory: each, be it written in
    two bytes, is an object of its own.
    """
    if len(text) <= _MOST_VALUES:
        return False
    marks = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    return sum(text.count(cast("Any", mark)) for mark in marks) > _MOST_VALUES


def check_expansion(size: int, read: int, name: str, *, times: int = TIMES) -> None:
    """Raises DataError if `read` bytes of a file have become `size` bytes, more than rows that are
    alike explain.
    """
    if size > USUAL and size > times * read:
        raise DataError(
            f"the file expands to more than {times:,} times its size",
            where=name,
            hint="rows are not that much alike; if these are, write the file without compression",
        )


def too_long(what: str, name: str) -> DataError:
    """The error of a line or value that is not read on."""
    return DataError(
        f"{what} is longer than {LONGEST >> 20} MiB",
        where=name,
        hint="a row is one object on one line; is the file what its name says?",
    )


def object_row(values: Any, place: str, *, size: int = 0) -> Raw:
    """A row from parsed JSON of `size` bytes: anything but an object is a fault, which names
    `place`.
    """
    if isinstance(values, dict):
        row = cast("dict[str, Any]", values)
        return (LongRow(row) if size >= LONG else row), None
    words = {"list": "a list", "str": "a string", "bool": "true or false", "NoneType": "null"}
    kind = words.get(type(values).__name__, "a number")
    return None, Fault("invalid-json", f"{place} is {kind}, not an object", _OBJECT)
