"""Prompts of a document: the ids before its last answer, with that answer as reference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.formats.examples import Chat, Completion, Example, TemplatedText, Text
from tunesmith.data.rendering.content_checks import check_special_tokens, refuse_special_tokens
from tunesmith.data.rendering.pretokenized import prompt_of_row_text
from tunesmith.data.rendering.templated import find_answers
from tunesmith.data.row_errors import refuse
from tunesmith.data.templates.template import Template
from tunesmith.generate.batched import visible_text
from tunesmith.types import NO_MESSAGE, Document, IntArray


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids to continue, their text, and the reference answer where the data has one."""

    ids: tuple[int, ...]
    text: str
    reference: str | None = None


def prompt_from(example: Example, template: Template, *, special_as_text: bool = False) -> Prompt:
    """The prompt before the last assistant turn or completion; all of it where nothing answers.

    A text is a prompt as a whole, without reference. Rows with their own control tokens or ids are
    asked for their last learned run. With `special_as_text`, a control token's text in a message or
    a raw prompt is read as the characters that it is written with.

    Raises:
        RowError: a message or a raw prompt holds a control token's text, as in training.
    """
    if isinstance(example, Chat):
        return _chat_prompt(example, template, special_as_text)
    if isinstance(example, Completion):
        reference = example.completion or None
        return _raw_prompt(example.prompt, template, special_as_text, reference=reference)
    if isinstance(example, Text):
        return _raw_prompt(example.text, template, special_as_text, reference=None)
    if isinstance(example, TemplatedText):
        text, spans = find_answers(example, template, last_only=True)
        start, end = spans[-1]
        asked, answer = template.encode([text[:start], text[start:end]])
        return Prompt(tuple(asked), text[:start], _until_stop(answer, template))
    asked, answer = prompt_of_row_text(example, template)
    reference = None if answer is None else _until_stop(answer, template)
    return Prompt(tuple(asked), template.decode(asked), reference)


def _chat_prompt(chat: Chat, template: Template, special_as_text: bool) -> Prompt:
    quotes = Quotes(template) if special_as_text else None
    if quotes is None:
        check_special_tokens(chat, template)
    messages = [message.to_dict() for message in chat.messages]
    answered = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    before = answered[-1] if answered and answered[-1] == len(messages) - 1 else len(messages)
    keywords = {"tools": chat.tools, "kwargs": chat.template_kwargs or None}
    asked = messages[:before] if quotes is None else quotes.taken_out(messages[:before])
    text = template.render(asked, add_generation_prompt=True, **keywords)
    ids = template.encode([text])[0] if quotes is None else quotes.encode(text)
    reference = None
    if before < len(messages) and quotes is None:
        whole = template.render(messages[: before + 1], **keywords)
        if whole.startswith(text):
            reference = _until_stop(template.encode([whole[len(text) :]])[0], template)
    elif before < len(messages):
        reference = messages[before]["content"]
    shown = text if quotes is None else quotes.put_back(text)
    return Prompt(tuple(int(i) for i in ids), shown, reference)


def _raw_prompt(
    text: str, template: Template, special_as_text: bool, *, reference: str | None
) -> Prompt:
    bos = "" if template.bos_id is None else template.token_text(template.bos_id)
    if special_as_text:
        quotes = Quotes(template)
        opened = template.encode([""], add_special_tokens=True)[0]
        ids = [*opened, *quotes.encode(quotes.mark(text))]
    else:
        refuse_special_tokens(text.removeprefix(bos), template, "the prompt")
        ids = template.encode([text], add_special_tokens=True)[0]
    # Some tokenizers close every text with their end token; nothing would follow that.
    while len(ids) > 1 and ids[-1] in template.stop_ids:
        ids = ids[:-1]
    return Prompt(tuple(int(i) for i in ids), text, reference)


def _until_stop(ids: Any, template: Template) -> str:
    kept: list[int] = []
    for token in ids:
        if int(token) in template.stop_ids:
            break
        kept.append(int(token))
    return visible_text(kept, template)


def prompts_from_document(
    document: Document, template: Template, *, completion: bool = False
) -> Prompt | None:
    """The prompt and reference of the last message that a rendered row trains.

    These are the very ids of training, so the question is the one the model has learned to answer.
    Targets without a message are an answer too where the row is a raw `completion`. None for
    running text, and for an answer that was cut off or apart: there is nothing to compare.
    """
    last = max((int(m) for s in document.segments for m in s.message), default=NO_MESSAGE)
    if last == NO_MESSAGE and not completion:
        return None
    holding = [segment for segment in document.segments if last in segment.message]
    segment = holding[0]
    chosen = segment.index[segment.message == last]
    first, end = int(chosen[0]), int(chosen[-1]) + 1
    before = np.concatenate([_path(document, segment.parent), segment.ids[:first]])
    answer = segment.ids[first:end]
    whole = len(holding) == 1 and int(answer[-1]) in template.stop_ids
    if not whole or len(before) == 0:
        return None
    ids = tuple(int(i) for i in before)
    return Prompt(ids, template.decode(list(ids)), _until_stop(answer, template))


def _path(document: Document, number: int) -> IntArray:
    """Ids from the root to the end of a segment."""
    parts: list[IntArray] = []
    while number >= 0:
        parts.append(document.segments[number].ids)
        number = document.segments[number].parent
    return np.concatenate(parts[::-1]) if parts else np.zeros(0, np.int32)


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
