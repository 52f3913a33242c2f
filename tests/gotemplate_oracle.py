"""Oracle of what a TEMPLATE writes: an interpreter of Go's text/template, as far as the Modelfiles
here use it, with the runtime's own merging of messages before it.

Known are `range .Messages`, `range $i, $_ := .Messages`, `if`, `else`, `end`, `eq`, `ne`, `not`,
`and`, fields, variables, text in quotes, numbers and the dashes that trim space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:\\.|[^"\\])*"|\(|\)|[^\s()]+')
_RANGE = re.compile(r"range (?:\$(\w+), \$\w+ := )?\.(\w+)")
_SPACE = " \t\r\n"


@dataclass(slots=True)
class _Node:
    kind: str  # text, value, if, range
    words: str = ""
    inside: list[_Node] = field(default_factory=list["_Node"])
    otherwise: list[_Node] = field(default_factory=list["_Node"])


def render(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the messages, ready for an answer.

    Raises:
        ValueError: the template uses something unknown here.
    """
    system, merged = collate(messages)
    fields = {"System": system, "Messages": merged, "Tools": [], "Response": ""}
    return _run(_parse(template), fields, fields, {})


def collate(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, str]]]:
    """All system prompts joined, and the messages with neighbours of one role joined."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    return system, merged


def _parse(template: str) -> list[_Node]:
    root = _Node("range")
    stack, branch = [root], [root.inside]
    at, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip(_SPACE) if trim else text
        text = text.rstrip(_SPACE) if match[1] else text
        at, trim = match.end(), bool(match[3])
        if text:
            branch[-1].append(_Node("text", text))
        _take(match[2], stack, branch)
    text = template[at:]
    if len(stack) != 1:
        raise ValueError(f"{stack[-1].words} has no end")
    root.inside.append(_Node("text", text.lstrip(_SPACE) if trim else text))
    return root.inside


def _take(words: str, stack: list[_Node], branch: list[list[_Node]]) -> None:
    first, _, rest = words.partition(" ")
    if first in ("if", "range"):
        node = _Node(first, rest if first == "if" else words)
        branch[-1].append(node)
        stack.append(node)
        branch.append(node.inside)
    elif first == "else":
        branch[-1] = stack[-1].otherwise
        if rest:
            raise ValueError("else if is written as an if inside an else here")
    elif first == "end":
        stack.pop()
        branch.pop()
        if not stack:
            raise ValueError("an end too many")
    else:
        branch[-1].append(_Node("value", words))


def _run(
    nodes: list[_Node], dot: Mapping[str, Any], root: Mapping[str, Any], variables: dict[str, Any]
) -> str:
    out: list[str] = []
    for node in nodes:
        if node.kind == "text":
            out.append(node.words)
        elif node.kind == "value":
            out.append(str(_value(node.words, dot, root, variables)))
        elif node.kind == "if":
            branch = node.inside if _value(node.words, dot, root, variables) else node.otherwise
            out.append(_run(branch, dot, root, variables))
        else:
            out.append(_repeat(node, root, variables))
    return "".join(out)


def _repeat(node: _Node, root: Mapping[str, Any], variables: dict[str, Any]) -> str:
    match = _RANGE.fullmatch(node.words)
    if match is None:
        raise ValueError(f"{node.words} is unknown here")
    parts: list[str] = []
    for number, item in enumerate(root[match[2]]):
        if match[1]:
            variables = {**variables, match[1]: number}
        parts.append(_run(node.inside, item, root, variables))
    return "".join(parts)


def _value(
    words: str, dot: Mapping[str, Any], root: Mapping[str, Any], variables: Mapping[str, Any]
) -> Any:
    parts = _WORD.findall(words)
    value, rest = _call(parts, dot, root, variables)
    if rest:
        raise ValueError(f"{words} is unknown here")
    return value


def _call(
    parts: list[str], dot: Mapping[str, Any], root: Mapping[str, Any], variables: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    name, rest = parts[0], parts[1:]
    if name not in _FUNCTIONS:
        return _term(parts, dot, root, variables)
    values: list[Any] = []
    while rest and rest[0] != ")":
        value, rest = _term(rest, dot, root, variables)
        values.append(value)
    return _FUNCTIONS[name](values), rest


def _term(
    parts: list[str], dot: Mapping[str, Any], root: Mapping[str, Any], variables: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    word, rest = parts[0], parts[1:]
    if word == "(":
        value, rest = _call(rest, dot, root, variables)
        if rest[:1] != [")"]:
            raise ValueError("a parenthesis is open")
        return value, rest[1:]
    if word.startswith('"'):
        return json.loads(word), rest
    if word.isdigit():
        return int(word), rest
    if word.startswith("$."):
        return root[word[2:]], rest
    if word.startswith("$"):
        return variables[word[1:]], rest
    if word.startswith(".") and word[1:] in dot:
        return dot[word[1:]], rest
    raise ValueError(f"{word} is unknown here")


_FUNCTIONS: dict[str, Any] = {
    "eq": lambda v: v[0] == v[1],
    "ne": lambda v: v[0] != v[1],
    "not": lambda v: not v[0],
    "and": lambda v: next((x for x in v if not x), v[-1]),
    "or": lambda v: next((x for x in v if x), v[-1]),
}
