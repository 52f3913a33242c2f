"""What every reader yields: a row's values, or why it has none."""

from __future__ import annotations

from typing import Any, cast

from tunesmith.data.faults import Fault

Raw = tuple["dict[str, Any] | None", "Fault | None"]
"""Values and no fault, or a fault and no values."""

BATCH_ROWS = 1024
"""Rows that are turned from columns into Python objects at a time."""


def object_row(values: Any, place: str) -> Raw:
    """A row from parsed JSON: anything but an object is a fault, which names `place`."""
    if isinstance(values, dict):
        return cast("dict[str, Any]", values), None
    words = {"list": "a list", "str": "a string", "bool": "true or false", "NoneType": "null"}
    kind = words.get(type(values).__name__, "a number")
    return None, Fault("invalid-json", f"{place} is {kind}, not an object")
