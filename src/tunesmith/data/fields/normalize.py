"""Normalisation of a row's field names: known spellings of other trainers become ours, roles are
mapped, and fields that the recipe ignores are taken out.

Every change is a `Field`, so that the ledger can say what was read as what. A row in which nothing
is to be changed is returned as it is, after one look-up for each message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from tunesmith.data.fields.table import (
    MESSAGE_COLUMNS,
    ROLE_NAMES,
    SPELLINGS,
    STANDARD_ROLES,
)
from tunesmith.data.row_errors import Field


@dataclass(frozen=True, slots=True)
class Naming:
    """The recipe's own words about names: `roles` maps names of roles, `ignore` are fields that are
    taken out of columns, messages and content parts.
    """

    roles: Mapping[str, str] = field(default_factory=dict[str, str])
    ignore: tuple[str, ...] = ()


PLAIN = Naming()


def normalize(
    values: dict[str, Any], naming: Naming = PLAIN
) -> tuple[dict[str, Any], tuple[Field, ...]]:
    """The row with our names, and what was changed in it."""
    said: dict[Field, None] = {}
    changed: dict[str, Any] = {}
    for column in MESSAGE_COLUMNS:
        turns = values.get(column)
        if type(turns) is list or type(turns) is tuple:
            read = _turns(cast("list[Any]", turns), column, naming, said)
            if read is not None:
                changed[column] = read
    gone = [name for name in naming.ignore if name in values]
    if not changed and not gone:
        return values, ()
    made = type(values)((n, v) for n, v in {**values, **changed}.items() if n not in gone)
    said.update(dict.fromkeys(Field(name, "ignored", name) for name in gone))
    return made, tuple(said)


def _turns(
    turns: list[Any], column: str, naming: Naming, said: dict[Field, None]
) -> list[Any] | None:
    """The messages under our names; None where all of them have these already."""
    made: list[Any] | None = None
    for at, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            continue
        message = cast("Mapping[str, Any]", turn)
        role = message.get("role")
        known = isinstance(role, str) and role in STANDARD_ROLES
        plain = known and not naming.ignore and not naming.roles
        if plain and _usual(tuple(message)):
            continue
        read = _message(dict(message), column, naming, said)
        if read != message:
            made = list(turns) if made is None else made
            made[at] = read
    return made


@lru_cache(maxsize=4096)
def _usual(names: tuple[str, ...]) -> bool:
    """True for the fields of a message of which none has another spelling."""
    return not any(name in SPELLINGS for name in names)


def _message(
    message: dict[str, Any], column: str, naming: Naming, said: dict[Field, None]
) -> dict[str, Any]:
    if naming.ignore:
        message = _without(message, column, naming.ignore, said)
    for name in [name for name in message if name in SPELLINGS]:
        _respell(message, name, column, said)
    key = "from" if "from" in message and "role" not in message else "role"
    role = message.get(key)
    if isinstance(role, str):
        ours = _role(role, naming.roles, key)
        if ours != role:
            message[key] = ours
            said[Field(f"{column}[].{key}={role}", "mapped", f"{key} `{ours}`")] = None
    return message


def _without(
    message: dict[str, Any], column: str, ignore: tuple[str, ...], said: dict[Field, None]
) -> dict[str, Any]:
    for name in [name for name in ignore if name in message]:
        said[Field(f"{column}[].{name}", "ignored", name)] = None
    made = {name: value for name, value in message.items() if name not in ignore}
    content = made.get("content")
    if isinstance(content, list):
        parts: list[Any] = []
        for part in cast("list[Any]", content):
            fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
            for name in [name for name in ignore if name in fields]:
                said[Field(f"{column}[].content[].{name}", "ignored", name)] = None
            parts.append({n: v for n, v in fields.items() if n not in ignore} if fields else part)
        made["content"] = parts
    return made


def _role(role: str, roles: Mapping[str, str], key: str) -> str:
    """Our name of a role. The recipe's word comes first; `from` has a table of its own."""
    if role in roles:
        return roles[role]
    if key == "from" or role in STANDARD_ROLES:
        return role
    plain = role.strip().lower()
    return ROLE_NAMES.get(plain, plain if plain in STANDARD_ROLES else role)


def _respell(message: dict[str, Any], name: str, column: str, said: dict[Field, None]) -> None:
    """Put the field under our name if its value can be read so; else leave it, to be refused."""
    ours, value = SPELLINGS[name], message[name]
    read = _value(ours, value)
    if value is None or read is None or message.get(ours) not in (None, [], read):
        return
    message[ours] = read
    del message[name]
    said[Field(f"{column}[].{name}", "mapped", f"`{ours}`")] = None


def _value(ours: str, value: Any) -> Any:
    if ours == "train":
        return value == 1 if isinstance(value, bool | int) and value in (0, 1) else None
    if ours == "weight":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and 0 <= value < float("inf") else None
    if isinstance(value, Mapping) and isinstance(cast("Any", value).get("name"), str):
        call = {k: v for k, v in cast("Mapping[str, Any]", value).items() if v is not None}
        return [{"type": "function", "function": call}]
    return None
