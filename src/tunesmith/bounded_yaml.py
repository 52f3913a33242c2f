"""YAML with a bound on what its aliases expand to (the "billion laughs" attack)."""

from __future__ import annotations

from typing import Any, cast

import yaml

MOST_VALUES = 100_000
"""Values of a document with every alias followed. A recipe has some hundreds."""


class TooLargeError(yaml.YAMLError):
    """The document's aliases expand to too many values."""

    def __init__(self) -> None:
        super().__init__(f"more than {MOST_VALUES:,} values once its aliases are followed")


def bound(node: yaml.Node | None) -> yaml.Node | None:
    """The node, if what it expands to is small enough.

    Aliases lead to the same node again, so nodes are few even where values are many: each is
    counted once, and its count is used wherever it is met. An anchor that holds itself counts as
    nothing here; whoever makes values of it must notice.

    Raises:
        TooLargeError: it is not.
        RecursionError: it is nested too deeply.
    """
    if node is not None and _expanded(node, {}) > MOST_VALUES:
        raise TooLargeError
    return node


def safe_load(text: str) -> Any:
    """`yaml.safe_load` within the bound.

    Raises:
        yaml.YAMLError: it is no YAML, or too large.
        ValueError: a value has the form of a date and is none.
        RecursionError: it is nested too deeply.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = bound(loader.get_single_node())
        return None if node is None else cast("Any", loader).construct_document(node)
    finally:
        cast("Any", loader).dispose()


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = 0  # while it is counted
    count = 1
    if isinstance(node, yaml.MappingNode):
        count += sum(_expanded(key, known) + _expanded(value, known) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_expanded(item, known) for item in node.value)
    known[id(node)] = count
    return count
