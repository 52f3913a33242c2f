"""What every reader yields: a row's values, or why it has none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from tunesmith.data.faults import Fault
from tunesmith.errors import DataError

Raw = tuple["dict[str, Any] | None", "Fault | None"]
"""Values and no fault, or a fault and no values."""

BATCH_ROWS = 1024
"""Rows that are turned from columns into Python objects at a time."""


_OBJECT = 'a row is an object of columns: {"prompt": "...", "completion": "..."}'


LONGEST = 1 << 28
"""Bytes of a line, or characters of a value, that are read; far above what a row may teach."""


def lines_of(file: Any, name: str) -> Iterator[bytes]:
    """The lines of a file.

    Raises:
        DataError: one is so long that the file, which may be small and compressed, is no data.
    """
    for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), start=1):
        if len(line) >= LONGEST:
            raise too_long(f"line {number}", name)
        yield line


def too_long(what: str, name: str) -> DataError:
    """The error of a line or value that is not read on."""
    return DataError(
        f"{what} is longer than {LONGEST >> 20} MiB",
        where=name,
        hint="a row is one object on one line; is the file what its name says?",
    )


def object_row(values: Any, place: str) -> Raw:
    """A row from parsed JSON: anything but an object is a fault, which names `place`."""
    if isinstance(values, dict):
        return cast("dict[str, Any]", values), None
    words = {"list": "a list", "str": "a string", "bool": "true or false", "NoneType": "null"}
    kind = words.get(type(values).__name__, "a number")
    return None, Fault("invalid-json", f"{place} is {kind}, not an object", _OBJECT)
