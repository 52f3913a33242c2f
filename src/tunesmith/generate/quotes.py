"""Escaping of control tokens that a message only quotes: they are encoded as characters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data.row_errors import refuse
from tunesmith.data.templates.template import Template

_PLACE = re.compile("\ue000(\\d+)\ue001")
"""What stands for a quoted token while the template sees the text: characters of private use."""


class Quotes:
    """Takes quoted control tokens out of contents before rendering, and encodes them as text."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._tokens = template.special_texts
        texts = "|".join(map(re.escape, self._tokens))
        self._found = re.compile(texts) if texts else None
        self._count = 0

    def taken_out(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with a placeholder for each token that a content quotes."""
        return [
            {**m, "content": self.mark(m["content"]) if m["content"] else m["content"]}
            for m in messages
        ]

    def mark(self, text: str) -> str:
        """The text with a placeholder for each token in it.

        Raises:
            RowError: it holds the characters of a placeholder.
        """
        if _PLACE.search(text):
            refuse(
                "special-token-in-content",
                "the text holds U+E000 around a number, which stands for a control token here",
                "take it out",
            )
        if self._found is None:
            return text
        marked, count = self._found.subn(self._placeholder, text)
        self._count += count
        return marked

    def _placeholder(self, found: re.Match[str]) -> str:
        return f"\ue000{self._tokens.index(found.group())}\ue001"

    def put_back(self, text: str) -> str:
        """The text as it was written."""
        return _PLACE.sub(lambda found: self._tokens[int(found.group(1))], text)

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text, those of the quoted tokens made of their characters.

        Raises:
            RowError: the template left a quoted token out, or wrote it more than once.
        """
        pieces = _PLACE.split(text)
        if len(pieces) // 2 != self._count:
            refuse(
                "special-token-in-content",
                "the chat template does not write the quoted control tokens once each",
                "take them out of the message",
            )
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids += self._characters(int(piece)) if number % 2 else self._plain(piece)
        return ids

    def _plain(self, text: str) -> list[int]:
        return self._template.encode([text])[0] if text else []

    def _characters(self, number: int) -> list[int]:
        """The token's text in ordinary tokens."""
        text = self._tokens[number]
        found = self._template.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        ids = [int(token) for token in found]
        if set(ids) & self._template.special_ids:
            refuse(
                "special-token-in-content",
                f"this tokenizer reads {text!r} as a control token however it is written",
                "take it out of the message",
            )
        return ids
