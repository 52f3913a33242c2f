"""Field accounting: the columns, message fields, content parts and roles of a row that hold
something and that its format does not read.

Whether a chat template reads a field of a message is asked of the template, by `reads`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from tunesmith.data.fields.misspelt import meant_by
from tunesmith.data.fields.table import (
    COLUMN_TARGETS,
    COLUMNS,
    COMMON,
    FIELD_TARGETS,
    MEANT,
    MESSAGE_READ,
    PART_READ,
    PLAIN_TEXT_LABELS,
    REFUSED,
    ROLE_NAMES,
    SEGMENT_READ,
    STANDARD_ROLES,
    TOKEN_TARGETS,
)
from tunesmith.data.row_errors import Field

Reads = Callable[[int, str], bool]
"""Whether the template reads this field of the message of this number."""

_TEXTS = ("text", "templated_text", "segments")


def holds(value: Any) -> bool:
    """True unless the value is null, empty, or a list or object of such values alone."""
    waiting: list[Any] = [value]  # no recursion, since a row may be nested without end
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            waiting.extend(cast("Mapping[Any, Any]", one).values())
        elif isinstance(one, list | tuple):
            waiting.extend(cast("list[Any]", one))
        elif one is not None and one != "" and not (isinstance(one, float) and one != one):
            return True
    return False


def unread_columns(
    values: Mapping[str, Any], format: str, *, raw: bool = False
) -> tuple[Field, ...]:
    """The columns of a row that hold something and that its format does not read. `raw`: it is read
    as plain text, without turns.
    """
    found = _columns(tuple(values), format, raw)
    return tuple(field for field in found if holds(values[field.path])) if found else ()


@lru_cache(maxsize=1024)
def _columns(names: tuple[str, ...], format: str, raw: bool) -> tuple[Field, ...]:
    read = set(COLUMNS[format]) - (set(COMMON) if raw else set())
    fields: list[Field] = []
    for name in names:
        if name in read:
            continue
        targets = TOKEN_TARGETS if format == "tokens" else COLUMN_TARGETS
        free = [one for one in targets if one in read and one not in names]
        meant = MEANT.get(name) or (None if format in _TEXTS else meant_by(name, free))
        mend = f"data.ignore_fields=[{name}]"
        if meant in free:
            mend = f"data.columns={{{meant}: {name}}}, or {mend}"
        elif name == "context" and format == "alpaca" and "input" not in names:
            mend = f"data.columns={{input: {name}}}, or {mend}"
        harmless = format in _TEXTS and name in PLAIN_TEXT_LABELS
        refused = meant in free or (name in REFUSED and not harmless)
        fields.append(Field(name, "refused" if refused else "unread", mend))
    return tuple(fields)


def unread_fields(
    column: str, number: int, fields: Mapping[str, Any], reads: Reads
) -> Iterator[Field]:
    """The fields of a message that hold something and that neither we nor the template read."""
    for name in _strange(tuple(fields)):
        if holds(fields[name]) and not reads(number, name):
            yield _inside(f"{column}[].{name}", name)


@lru_cache(maxsize=4096)
def _strange(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in MESSAGE_READ)


def _inside(path: str, name: str) -> Field:
    """The unread field of a message, part or segment."""
    meant = meant_by(name, FIELD_TARGETS)
    mend = f"data.ignore_fields=[{name}]"
    if meant is not None:
        mend = f"write `{meant}` in the data, or {mend}"
    return Field(path, "refused" if meant or name in REFUSED else "unread", mend)


def unread_parts(values: Mapping[str, Any], column: str) -> Iterator[Field]:
    """The fields of content parts that hold something and are not read."""
    for turn in cast("Sequence[Any]", values.get(column) or ()):
        if not isinstance(turn, Mapping):
            continue
        message = cast("Mapping[str, Any]", turn)
        for place in ("content", "value"):
            parts = message.get(place)
            if isinstance(parts, list | tuple):
                path = f"{column}[].{place}[]"
                yield from _items(cast("list[Any]", parts), path, PART_READ)


def unread_in_segments(values: Mapping[str, Any]) -> Iterator[Field]:
    """The fields of segments that hold something and are not read."""
    return _items(cast("list[Any]", values["segments"]), "segments[]", SEGMENT_READ)


def _items(items: Sequence[Any], path: str, read: Collection[str]) -> Iterator[Field]:
    for item in items:
        if isinstance(item, Mapping):
            for name, value in cast("Mapping[str, Any]", item).items():
                if name not in read and holds(value):
                    yield _inside(f"{path}.{name}", name)


def unknown_role(column: str, role: str) -> Field:
    """The role of a message, which is none of those that are known."""
    near = meant_by(role, [*sorted(STANDARD_ROLES), *ROLE_NAMES]) or "user"
    ours = ROLE_NAMES.get(near, near)
    mend = f"data.roles={{{role}: {ours}}}, or data.roles={{{role}: {role}}} to keep it"
    return Field(f"{column}[].role={role}", "refused", mend)
