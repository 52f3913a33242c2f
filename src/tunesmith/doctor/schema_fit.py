"""Whether a tool call's arguments fit the JSON schema of its tool, as far as schemas of tools go.

Read are `type`, `properties`, `required`, `additionalProperties`, `enum`, `const`, `items` and
`anyOf`; other keywords allow everything.

The package `jsonschema` is not used here, because it answers another question: whether a value is
valid by the letter of the standard. It refuses null for an optional parameter, takes a parameter
that the tool does not list, and ends with an exception at the types `str`, `dict` or `any`, at a
schema that is no object and at a schema that holds itself; tool schemas in data sets have all of
these (seen with jsonschema 4.26). It also fetches a `$ref` that names another host, and runs
regular expressions that a data row brings along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (Mapping,),
    "null": (type(None),),
}
_ALSO = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "double": "number",
    "list": "array", "tuple": "array", "dict": "object", "map": "object", "none": "null",
}  # fmt: skip
"""Names of types in other languages, which schemas in the wild use."""
_DEEPEST = 12


def misfits(value: Any, schema: Any, place: str = "", depth: int = 0) -> Iterator[str]:
    """What about the value the schema forbids, each with its place (`city`, `days[0].name`)."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return
    rules = cast("Mapping[str, Any]", schema)
    choices = rules.get("anyOf") or rules.get("oneOf")
    if isinstance(choices, list):
        fits = (
            not any(misfits(value, one, place, depth + 1)) for one in cast("list[Any]", choices)
        )
        if not any(fits):
            yield f"{_named(place)} fits none of its alternatives"
        return
    if not _has_type(value, rules.get("type"), nullable=bool(rules.get("nullable"))):
        yield f"{_named(place)} is {value!r}, not of type {rules['type']}"
        return
    yield from _wrong_value(value, rules, place)
    if isinstance(value, Mapping):
        yield from _wrong_fields(cast("Mapping[str, Any]", value), rules, place, depth)
    elif isinstance(value, list) and "items" in rules:
        for at, item in enumerate(cast("list[Any]", value)):
            yield from misfits(item, rules["items"], f"{place}[{at}]", depth + 1)


def _wrong_value(value: Any, rules: Mapping[str, Any], place: str) -> Iterator[str]:
    allowed = rules.get("enum")
    if isinstance(allowed, list) and value not in allowed and value is not None:
        shown = ", ".join(repr(item) for item in cast("list[Any]", allowed)[:5])
        yield f"{_named(place)} is {value!r}, not one of {shown}"
    if "const" in rules and value != rules["const"]:
        yield f"{_named(place)} is {value!r}, not {rules['const']!r}"


def _wrong_fields(
    value: Mapping[str, Any], rules: Mapping[str, Any], place: str, depth: int
) -> Iterator[str]:
    given = rules.get("properties")
    properties: Mapping[str, Any] = (
        cast("Mapping[str, Any]", given) if isinstance(given, Mapping) else {}
    )
    required = rules.get("required")
    for name in cast("list[Any]", required) if isinstance(required, list) else []:
        if name not in value:
            yield f"{_joined(place, name)} is required and missing"
    rest = rules.get("additionalProperties")
    for name, item in value.items():
        if name in properties:
            # Null stands for left out, unless the field must be there.
            if item is not None or name in (required or ()):
                yield from misfits(item, properties[name], _joined(place, name), depth + 1)
        elif isinstance(rest, Mapping):
            yield from misfits(item, rest, _joined(place, name), depth + 1)
        elif rest is False or (properties and rest is None):
            yield f"{_joined(place, name)} is no parameter; there are {', '.join(properties)}"


def _has_type(value: Any, wanted: Any, *, nullable: bool) -> bool:
    names = cast("list[Any]", wanted) if isinstance(wanted, list) else [wanted]
    if wanted is None or (nullable and value is None):
        return True
    return any(_is(value, name) for name in names)


def _is(value: Any, name: Any) -> bool:
    known = str(name).lower()
    kind = _ALSO.get(known, known)
    if kind not in _TYPES:
        return True
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _joined(place: str, name: Any) -> str:
    return f"{place}.{name}" if place else str(name)


def _named(place: str) -> str:
    return place or "the whole"
