"""`section.key=value`: changes to a recipe from a command line or from keywords."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import yaml

from tunesmith.bounded_yaml import safe_load
from tunesmith.config.document import Document, Path, as_plain, dotted
from tunesmith.config.schema import MAIN_KEYS, expand_section
from tunesmith.config.sections.data import parse_sources

_EXCLUSIVE = {
    ("batch", "documents"): ("batch", "tokens"),
    ("batch", "tokens"): ("batch", "documents"),
    ("train", "epochs"): ("train", "steps"),
    ("train", "steps"): ("train", "epochs"),
}


@dataclass(frozen=True, slots=True)
class Override:
    """A value to put at a path; `where` names it in errors."""

    path: Path
    value: Any
    where: str


def apply_overrides(document: Document, overrides: list[Override | str]) -> None:
    """Change the document's data in place, in order; what can't be done is noted as a problem."""
    _expand(document)
    given: set[Path] = set()
    for item in overrides:
        override = item if isinstance(item, Override) else _parse(document, item)
        if override is not None:
            _apply(document, override, given)


def _expand(document: Document) -> None:
    """Write short forms out, so that overrides can reach inside them."""
    for name in list(document.data):
        document.data[name] = expand_section(name, document.data[name])
    data = document.data.get("data")
    if isinstance(data, dict) and "train" in data:
        data["train"] = parse_sources(data["train"])


def _parse(document: Document, text: str) -> Override | None:
    key, equals, value = text.partition("=")
    where = f"override {text}"
    if not equals or not all(key.strip().split(".")):
        document.places[("",)] = where
        document.complain(("",), "not of the form section.key=value")
        return None
    path = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
    try:
        return Override(path, parse_value(value), where)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        document.places[path] = where
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        document.complain(path, f"the value is not YAML: {problem}")
        return None


def parse_value(text: str) -> Any:
    """A value as YAML; `a: b, c: d` without braces is a mapping.

    Raises:
        yaml.YAMLError: it is neither.
        ValueError: it has the form of a date and is none.
        RecursionError: an anchor holds itself.
    """
    try:
        return as_plain(safe_load(text))
    except yaml.YAMLError:
        if ":" not in text or text.lstrip().startswith(("{", "[")):
            raise
        value = safe_load(f"{{{text}}}")
        if not isinstance(value, dict) or None in cast("dict[Any, Any]", value).values():
            raise
        return cast(Any, value)


def _apply(document: Document, override: Override, given: set[Path]) -> None:
    path, value = override.path, as_plain(override.value)
    if len(path) == 1 and path[0] in MAIN_KEYS:
        # A mapping changes the keys it names; anything else is the section's main key.
        section = cast("Mapping[str, Any]", expand_section(str(path[0]), value))
        for key, inner in section.items():
            _apply(document, Override((*path, key), inner, override.where), given)
        document.data.setdefault(str(path[0]), {})
        return
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places[path] = override.where
    other = _EXCLUSIVE.get(cast("tuple[str, str]", path))
    if other is not None and other not in given and value is not None:
        section = document.data.get(other[0])
        if isinstance(section, dict):
            cast("dict[str, Any]", section).pop(other[1], None)
    given.add(path)
    if path == ("data", "train"):
        value = parse_sources(value)
    try:
        _put(document.data, path, value)
    except LookupError as error:
        document.complain(path, str(error.args[0]))


def _put(data: Any, path: Path, value: Any) -> None:
    """Set the value at the path, making the mappings on the way.

    Raises:
        LookupError: the way leads through a scalar, or past the end of a list.
    """
    for depth, part in enumerate(path[:-1]):
        key = _check(data, part, path[:depth])
        following = path[depth + 1]
        if isinstance(data, list):
            items = cast("list[Any]", data)
            if key == len(items):
                items.append({})
            data = items[cast(int, key)]
            continue
        mapping = cast("dict[str, Any]", data)
        if mapping.get(str(key)) is None:
            mapping[str(key)] = [] if isinstance(following, int) else {}
        data = mapping[str(key)]
    key = _check(data, path[-1], path[:-1])
    if isinstance(data, list):
        items = cast("list[Any]", data)
        items[cast(int, key) : cast(int, key) + 1] = [value]
    else:
        data[str(key)] = value


def _check(data: Any, part: str | int, path: Path) -> str | int:
    if isinstance(data, dict):
        return str(part)
    if not isinstance(data, list):
        raise LookupError(f"{dotted(path)} is {data!r} and holds no {part}")
    length = len(cast("list[Any]", data))
    if not isinstance(part, int):
        raise LookupError(f"{dotted(path)} is a list; name an item by its number: {dotted(path)}.0")
    if part > length:
        raise LookupError(f"{dotted(path)} has {length} items, counted from 0")
    return part
