"""Checks of a rendered chat: every message's content is in the text, and no content holds a control
token.

Templates may silently drop a field that they do not know. A content that holds the text of a
control token would be read as one, which is a prompt injection.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, cast

from tunesmith.data.fields.table import REASONING
from tunesmith.data.formats.examples import Chat, Message
from tunesmith.data.row_errors import Fault, RowError
from tunesmith.data.templates.template import Template

_THINK_END = "</think>"


def check_special_tokens(chat: Chat, template: Template) -> None:
    """Raises RowError if a string of the chat holds the text of a special token."""
    for number, message in enumerate(chat.messages):
        fields = [message.content, message.fields] if message.fields else message.content
        for text in _strings(fields):
            refuse_special_tokens(text, template, f"message {number} ({message.role})")
    for text in _strings(chat.tools):
        refuse_special_tokens(text, template, "the tools")


def refuse_special_tokens(
    text: str, template: Template, place: str, *, hint: str | None = None
) -> None:
    """Raises RowError if the text holds the text of a special token."""
    texts = template.special_texts
    if not any(opening in text for opening in _openings(texts)):
        return
    token = next((token for token in texts if token in text), None)
    if token is not None:
        raise RowError(
            Fault(
                "special-token-in-content",
                f"{place} holds {token!r}, which the tokenizer reads as a control token",
                hint or "remove it from the data, or write it in another way",
            )
        )


@lru_cache(maxsize=8)
def _openings(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The common beginning of the texts that begin with the same character, for a fast first
    check.
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[:1], []).append(text)
    return tuple(_shared(min(group), max(group)) for group in groups.values())


def _shared(first: str, last: str) -> str:
    """The common beginning of both."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(one for one, _ in same)


def check_contents(text: str, chat: Chat, last: int, *, target: str | None = None) -> None:
    """Check that the contents of messages 0 to `last` and of the tools are in `text`.

    The reasoning of earlier turns may be missing, since templates drop it on purpose. The content
    and reasoning of message `last` must be in `target`.

    Raises:
        RowError: something is missing.
    """
    for name in _tool_names(chat.tools):
        if not _holds(text, name):
            raise _dropped("the tools", name)
    wanted: Counter[str] = Counter()
    for number, message in enumerate(chat.messages[: last + 1]):
        supervised = target is not None and number == last
        place = target if supervised and target is not None else text
        if supervised:
            _check_reasoning(place, message, number)
        for piece in _content_pieces(message.content, whole=supervised):
            # A content that two messages share must appear at least twice.
            wanted[piece] += 1
            if not (_holds(place, piece) and (wanted[piece] == 1 or _count(text, piece, wanted))):
                raise _dropped(f"the content of message {number} ({message.role})", piece)
        for piece in _call_pieces(message):
            if not _holds(place, piece):
                raise _dropped(f"a tool call of message {number} ({message.role})", piece)


def _check_reasoning(text: str, message: Message, number: int) -> None:
    for key in REASONING:
        reasoning = message.fields.get(key)
        if isinstance(reasoning, str) and not _holds(text, reasoning.strip()):
            raise _dropped(f"`{key}` of message {number} ({message.role})", reasoning.strip())


def _content_pieces(content: str | None, *, whole: bool) -> Iterator[str]:
    """The pieces of a content that must be found; its reasoning only with `whole`."""
    parts = (content or "").split(_THINK_END)
    for part in parts if whole else parts[-1:]:
        piece = part.strip().removeprefix("<think>").strip() if len(parts) > 1 else part.strip()
        if piece:
            yield piece


def _call_pieces(message: Message) -> Iterator[str]:
    for call in cast("list[dict[str, Any]]", message.fields.get("tool_calls") or []):
        function = cast("dict[str, Any]", call.get("function", call))
        yield str(function.get("name"))
        yield from (piece for piece in _leaves(function.get("arguments")) if piece)


def _tool_names(tools: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    for tool in tools or ():
        name = cast("dict[str, Any]", tool.get("function", tool)).get("name")
        if isinstance(name, str):
            yield name


def _leaves(value: Any) -> Iterator[str]:
    """Yield all strings and numbers in a value; templates write true, false and null in many
    ways.
    """
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[str, Any]", value).items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[str, Any]", value).items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from _strings(item)


def _spellings(piece: str) -> Iterator[str]:
    """The piece as it is, and as templates write it inside JSON."""
    yield piece
    yield json.dumps(piece, ensure_ascii=False)[1:-1]
    yield json.dumps(piece)[1:-1]


def _holds(text: str, piece: str) -> bool:
    return piece in text or any(spelling in text for spelling in _spellings(piece))


def _count(text: str, piece: str, wanted: Counter[str]) -> bool:
    return any(text.count(spelling) >= wanted[piece] for spelling in _spellings(piece))


def _dropped(what: str, piece: str) -> RowError:
    shown = piece if len(piece) <= 60 else f"{piece[:57]}..."
    return RowError(
        Fault(
            "dropped-content",
            f"the chat template leaves out {what}: {shown!r} is not in its text",
            "remove it from the data, or use a template that renders it: data.template=FILE.jinja",
        )
    )
