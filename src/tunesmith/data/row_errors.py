"""Errors of single rows: a `Fault` is a value between stages, a `RowError` an exception inside one.

Faults are collected over all rows and reported together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

UNREAD = "unread-field"
"""Kind of the fault of a row whose input or wish stands in a field that nothing reads."""


class Field(NamedTuple):
    """A field of a row that is not read as it stands, and what became of it.

    `path` is its place without the numbers of list items: `context`, `messages[].loss`. `refused`
    is the state of one that looks like input or like a wish and that nothing reads. `hint` is the
    line of the recipe that mends it, or what it was read as.
    """

    path: str
    state: Literal["unread", "refused", "mapped", "ignored"]
    hint: str


@dataclass(frozen=True, slots=True)
class Fault:
    """The reason why a row can't be trained on; `kind` is a stable slug to count by
    (`invalid-json`).

    `fields` are those that nothing reads. A fault with a refused one stops a run under
    `bad_rows: drop` too.
    """

    kind: str
    message: str
    hint: str | None = None
    fields: tuple[Field, ...] = ()

    @property
    def stops(self) -> bool:
        """True if the row may not be dropped either."""
        return any(field.state == "refused" for field in self.fields)


_MESSAGE = '{"role": "user", "content": "..."}'
_TURN = '{"from": "human", "value": "..."}'
_CALL = '{"name": "...", "arguments": {"...": "..."}}'
_SHAPES = {
    "a string": '"..."',
    "a number": "1.0",
    "a list of numbers": "[0, 1, 0.5, ...]",
    "true or false": "true",
    "an object": '{"...": "..."}',
    "an object with role and content": _MESSAGE,
    "a list of messages": f"[{_MESSAGE}, ...]",
    "a string or a list of messages": f'"..." or [{_MESSAGE}, ...]',
    "an object with from and value": _TURN,
    "a list of turns": f"[{_TURN}, ...]",
    "a string or a list of text parts": '"..." or [{"type": "text", "text": "..."}]',
    "a text part": '{"type": "text", "text": "..."}',
    "a function call with name and arguments": _CALL,
    "a list of tool calls": f'[{{"type": "function", "function": {_CALL}}}]',
    "a list of tool descriptions": '[{"type": "function", "function": {"name": "...", '
    '"description": "...", "parameters": {...}}}]',
    "a list of pairs: question, answer": '[["...", "..."]]',
    "a pair: question, answer": '["...", "..."]',
    "an object with text and train": '{"text": "...", "train": true}',
    "a list of segments": '[{"text": "...", "train": true}, ...]',
    "a list of whole numbers": "[17, 4, 203]",
    "a list of 0 and 1": "[0, 0, 1]",
}
"""Expected types in words, and an example of each."""


class RowError(Exception):
    """A row is bad. `prepare` collects these, so the user never sees one as an exception."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def listing(values: Mapping[str, Any]) -> str:
    """The names of the row's columns, for a message."""
    return ", ".join(f"`{name}`" for name in values) or "no columns"


def kind_of(value: Any) -> str:
    """The value's type in JSON's words."""
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
    """Raises RowError because the value at `place` is not of the expected type."""
    hint = f"it is written like {_SHAPES[wanted]}"
    if place.isidentifier():
        hint += f"; if another column holds it: data.columns={{{place}: OTHER}}"
    refuse("wrong-type", f"`{place}` must be {wanted}, but it is {kind_of(value)}", hint)


NOT_UTF8 = "save the file as UTF-8; half of a surrogate pair, as in \\ud83d, is no character"
"""Hint for text that is not valid UTF-8."""
NOT_JSON = "a row is one object on one line, with double quotes and without a comma at its end"
"""Hint for a line that is not JSON."""


def refuse(kind: str, message: str, hint: str) -> NoReturn:
    """Raises RowError."""
    raise RowError(Fault(kind, message, hint))
