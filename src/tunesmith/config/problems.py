"""pydantic's validation errors in the words of the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pydantic import ValidationError

from tunesmith.config.document import Document, Path
from tunesmith.config.names import known_keys, nearest, suggest
from tunesmith.config.sections.data import SourceSection

_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_PAGED = (
    "device.paged_optimizer=true pages the state of any of these; "
    "optim.name=adamw_8bit keeps both moments in a byte each"
)


def note_findings(document: Document, error: ValidationError) -> None:
    """Add one problem for each place that pydantic complains about."""
    findings: dict[Path, list[Mapping[str, Any]]] = {}
    for finding in error.errors(include_url=False):
        if finding["type"] != "is_instance_of":  # only ever the other half of `data.eval`
            path = _path(document.data, finding["loc"], finding["type"])
            findings.setdefault(path, []).append(cast("Mapping[str, Any]", finding))
    for path, group in findings.items():
        if not any(_inside(other, path) for other in findings):
            document.complain(path, *_describe(path, group))


def _inside(path: Path, outer: Path) -> bool:
    """True where the outer path failed only as the wrong half of a union that fits inside."""
    return len(path) > len(outer) > 1 and path[: len(outer)] == outer


def _path(data: Any, loc: Sequence[str | int], kind: str) -> Path:
    """The part of pydantic's location that the recipe has: without names of types."""
    path: list[str | int] = []
    for number, part in enumerate(loc):
        if isinstance(data, dict) and part in data:
            data = cast("dict[str | int, Any]", data)[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(_items(data)):
            data = _items(data)[part]
        elif not (kind == "missing" and number == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _items(data: Any) -> list[Any]:
    return cast("list[Any]", data)


def _describe(path: Path, group: list[Mapping[str, Any]]) -> tuple[str, str | None]:
    first = group[0]
    kind = str(first["type"])
    if path[:1] == ("model",) and (
        kind == "missing" or (path[1:] == ("name",) and not first["input"])
    ):
        return (
            "is needed",
            "name the model: model: HUB-ID-OR-FOLDER, or --model on the command line",
        )
    if kind == "extra_forbidden":
        return "unknown key", _unknown(path)
    if kind == "missing":
        return "is needed", _missing(path)
    raised = [str(finding["ctx"]["error"]) for finding in group if finding["type"] == "value_error"]
    if raised and len(group) == 1:
        return raised[0], None
    if kind == "too_long":
        return f"must have {first['ctx']['max_length']} items", None
    if kind == "string_too_short":
        return "is empty", None
    value = first["input"]
    expected = _expected(group)
    hint = "put it in quotes" if expected == ["text"] and isinstance(value, int | float) else None
    if isinstance(value, str):
        choices = [word for item in group for word in _choices(item)]
        close = nearest(value, choices)
        hint = f"did you mean {close}?" if close else hint
        if path == ("optim", "name") and "paged" in value:
            hint = _PAGED
    return f"must be {' or '.join(expected)}, not {_shown(value)}", hint


def _expected(group: Iterable[Mapping[str, Any]]) -> list[str]:
    """What would be right, in words; where a bound is broken, the bound alone."""
    bounds: list[str] = []
    kinds: list[str] = []
    for finding in group:
        kind = str(finding["type"])
        context = cast("Mapping[str, Any]", finding.get("ctx", {}))
        if kind in _BOUNDS:
            name, word = _BOUNDS[kind]
            bounds.append(f"{word} {context[name]:g}")
        elif choices := _choices(finding):
            kinds.append(choices[0] if len(choices) == 1 else "one of " + ", ".join(choices))
        elif kind == "value_error":
            kinds.append("a number")
        else:
            message = str(finding["msg"]).removeprefix("Input should be ")
            kinds.append(_KINDS.get(kind, message[:1].lower() + message[1:]))
    return list(dict.fromkeys(bounds or kinds))


def _choices(finding: Mapping[str, Any]) -> list[str]:
    if finding["type"] != "literal_error":
        return []
    text = str(finding["ctx"]["expected"]).replace(" or ", ", ")
    return [word.strip("'") for word in text.split(", ")]


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(path: Path) -> str | None:
    *above, key = (str(part) for part in path)
    if len(above) > 1:  # only sources nest so deep
        close = nearest(key, SourceSection.model_fields)
        return f"did you mean {close}?" if close else suggest(key)
    section, _, inner = key.partition(".")
    if not above and inner in known_keys().get(section, ()):
        return f"dots are for the command line; in a recipe it is `{section}: {{{inner}: ...}}`"
    return suggest(key, section=above[0] if above else None)


def _missing(path: Path) -> str | None:
    return "a source is a path, or {path: FILE, ...}" if path[:1] == ("data",) else None
