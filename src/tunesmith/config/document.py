"""YAML recipes as plain data that remembers the line of every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, cast

import yaml
from pydantic import BaseModel

from tunesmith.bounded_yaml import bound

Path = tuple[str | int, ...]
"""Keys and list indices from the top of a recipe down to a value."""

_DEEPEST = 32


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe: the dotted key, what, and where it was written."""

    key: str
    message: str
    where: str
    hint: str | None = None

    def __str__(self) -> str:
        place = " ".join(part for part in (self.where, self.key) if part)
        return f"{place}: {self.message}" if place else self.message


@dataclass(slots=True)
class Document:
    """Plain data, the place of every path in it, and what was already wrong on reading it."""

    data: dict[str, Any]
    places: dict[Path, str] = field(default_factory=dict[Path, str])
    problems: list[Problem] = field(default_factory=list[Problem])

    def place(self, path: Path) -> str:
        """Where the path was written; else something inside it; else what holds it."""
        if path not in self.places:
            for known, place in self.places.items():
                if known[: len(path)] == path:
                    return place
        held_by = (path[:length] for length in range(len(path), -1, -1))
        return next((self.places[known] for known in held_by if known in self.places), "")

    def complain(self, path: Path, message: str, hint: str | None = None) -> None:
        """Note a problem at the path."""
        self.problems.append(Problem(dotted(path), message, self.place(path), hint))


def dotted(path: Path) -> str:
    """The path as an override names it: `data.train.0.path`."""
    return ".".join(str(part) for part in path)


def read_document(text: str, name: str) -> Document:
    """The recipe that stands in YAML text; problems in it are noted, never raised."""
    document = Document({}, {(): name})
    try:
        loader = yaml.SafeLoader(text)
        node = bound(loader.get_single_node())
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error, name))
        return document
    except RecursionError:
        document.complain((), "it is nested too deeply")
        return document
    if node is None:
        return document
    if not isinstance(node, yaml.MappingNode):
        document.complain((), "a recipe is a mapping of sections", "such as `model: NAME`")
        return document
    try:
        document.data = cast("dict[str, Any]", _Reader(loader, document, name).value(node, ()))
    except yaml.YAMLError as error:  # a merge of what is no mapping
        document.problems.append(_syntax_problem(error, name))
    return document


def plain_document(data: Mapping[str, Any], name: str) -> Document:
    """The recipe given as a mapping in Python; paths become text."""
    return Document(cast("dict[str, Any]", as_plain(data)), {(): name})


def as_plain(value: Any) -> Any:
    """The value with mappings and sections as dicts, tuples as lists and paths as text, copied."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(key): as_plain(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in cast("list[Any]", value)]
    return fspath(cast("PathLike[str]", value)) if isinstance(value, PathLike) else value


def _syntax_problem(error: yaml.YAMLError, name: str) -> Problem:
    if not isinstance(error, yaml.MarkedYAMLError):
        return Problem("", f"not YAML: {error}", name)
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}" if mark else name
    hint = "a tab can't indent YAML; use spaces" if "'\\t'" in str(error.problem) else None
    return Problem("", f"not YAML: {error.problem or error.context}", where, hint)


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, dict) and isinstance(second, dict):
        return {**cast("dict[str, Any]", first), **cast("dict[str, Any]", second)}
    return second


class _Reader:
    """Turns nodes into data, noting the line of every key, duplicates and unreadable values."""

    def __init__(self, loader: yaml.SafeLoader, document: Document, name: str) -> None:
        self.loader, self.document, self.name = loader, document, name
        self.flattened: set[int] = set()
        self.repeated: set[Path] = set()

    def value(self, node: yaml.Node, path: Path) -> Any:
        if len(path) > _DEEPEST:
            self.document.complain(path[:2], "nested too deep, or an anchor that holds itself")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*path, i)) for i, item in enumerate(node.value)]
        try:
            return cast(Any, self.loader.construct_object(node))  # pyright: ignore[reportUnknownMemberType]
        except (yaml.YAMLError, ValueError) as error:
            text = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
            self.document.complain(path, f"not a value: {text}")
            return None

    def _item(self, node: yaml.Node, path: Path) -> Any:
        self._mark(node, path)
        return self.value(node, path)

    def _mark(self, node: yaml.Node, path: Path) -> None:
        self.document.places[path] = f"{self.name}:{node.start_mark.line + 1}"

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        if id(node) not in self.flattened:  # an alias leads to the same node again
            self._refuse_duplicates(node, path)
            self.loader.flatten_mapping(node)
            self.flattened.add(id(node))
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            self._mark(key_node, (*path, key))
            value = self.value(value_node, (*path, key))
            # Of a key given twice all the contents are kept, so that errors in either are seen.
            twice = (*path, key) in self.repeated
            values[key] = _joined(values.get(key), value) if twice else value
        return values

    def _refuse_duplicates(self, node: yaml.MappingNode, path: Path) -> None:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines and key != "<<":
                self._mark(key_node, (*path, key))
                self.repeated.add((*path, key))
                self.document.complain(
                    (*path, key), f"given twice; the first is on line {lines[key]}"
                )
            lines.setdefault(key, line)
