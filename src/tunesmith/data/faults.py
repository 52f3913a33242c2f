"""What is wrong with one row: a value between stages, an exception inside the one that found it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row can't be trained on; `kind` is a stable slug to count by (`invalid-json`)."""

    kind: str
    message: str
    hint: str | None = None


class RowError(Exception):
    """A row is bad. `prepare` collects these, so none of them ever reaches the user as such."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def listing(values: Mapping[str, Any]) -> str:
    """The row's columns, for a message."""
    return ", ".join(f"`{name}`" for name in values) or "no columns"


def kind_of(value: Any) -> str:
    """The value's type in the words of JSON."""
    names = {
        "NoneType": "null",
        "bool": "true or false",
        "int": "a number",
        "float": "a number",
        "str": "a string",
        "list": "a list",
        "tuple": "a list",
        "dict": "an object",
    }
    name = type(value).__name__
    return names.get(name, f"of Python type {name}")


def wrong_type(place: str, wanted: str, value: Any) -> NoReturn:
    """Raises RowError: the value at `place` is not what is `wanted`."""
    refuse("wrong-type", f"`{place}` must be {wanted}, but it is {kind_of(value)}")


def refuse(kind: str, message: str, hint: str | None = None) -> NoReturn:
    """Raises RowError."""
    raise RowError(Fault(kind, message, hint))
