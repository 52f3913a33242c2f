"""The loss mask of a chat: which turns are learned, with the prompt before each and the text to
learn.

The prompt of an answer is the chat template's text with `add_generation_prompt=True`, and must be a
prefix of the text with the answer; otherwise the model would be trained on another prompt than it
gets at inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data.formats.examples import Chat, Message
from tunesmith.data.rendering.content_checks import check_contents, check_special_tokens
from tunesmith.data.row_errors import Fault, RowError
from tunesmith.data.templates.template import Template

ASSISTANT = "assistant"
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Turn:
    """One learned message: `target` is predicted after `prompt`; an `answer` must end with a stop
    token.
    """

    message: int
    prompt: str
    target: str
    weight: float
    answer: bool


def read_turns(chat: Chat, template: Template, *, train_on: str | list[str]) -> list[Turn]:
    """The learned turns in order, each with the prompt that the model sees before it.

    Raises:
        RowError: the template refuses, drops or rewrites what must be learned.
    """
    check_special_tokens(chat, template)
    messages = [message.to_dict() for message in chat.messages]
    _check_null_contents(chat, messages, template)
    turns: list[Turn] = []
    for number, weight in choose_turns(chat, train_on):
        answer = chat.messages[number].role == ASSISTANT
        turn = (_answer if answer else _other_turn)(chat, messages, number, template)
        if turn is None:
            continue
        prompt, target = turn
        check_contents(prompt + target, chat, number, target=target)
        turns.append(Turn(number, prompt, target, weight, answer))
    return turns


def choose_turns(chat: Chat, train_on: str | list[str]) -> list[tuple[int, float]]:
    """The number and weight of each message that is learned.

    A message's own `train` overrides `train_on`. Its `weight` scales its loss; 0 excludes it.
    """
    first = chat.first_completion
    if train_on == "completion" and first is None:
        raise RowError(
            Fault(
                "no-completion",
                "train_on is completion, but the row is one list of messages",
                "give data.train_on=assistant, or the row as prompt and completion",
            )
        )
    if train_on == "auto":
        train_on = ASSISTANT if first is None else "completion"
    roles = {ASSISTANT} if isinstance(train_on, str) else set(train_on)
    last = max((n for n, m in enumerate(chat.messages) if m.role == ASSISTANT), default=-1)
    chosen: list[tuple[int, float]] = []
    for number, message in enumerate(chat.messages):
        wanted = message.role in roles
        wanted &= train_on != "last" or number == last
        wanted &= train_on != "completion" or number >= (first or 0)
        wanted = wanted if message.train is None else message.train
        weight = 1.0 if message.weight is None else message.weight
        if wanted and weight > 0:
            _check_not_empty(message, number)
            chosen.append((number, weight))
    return chosen


def render_all(chat: Chat, template: Template, end: int | None = None) -> str:
    """The text of the first `end` messages, of all by default."""
    messages = [message.to_dict() for message in chat.messages[:end]]
    return _render(chat, messages, template)


def _answer(
    chat: Chat, messages: list[dict[str, Any]], number: int, template: Template
) -> tuple[str, str] | None:
    """The prompt and target of an answer; None for a first message that no prompt can precede."""
    opening = number == 0 and chat.messages[0].train is None
    try:
        prompt = _render(chat, messages[:number], template, add_generation_prompt=True)
        full = _render(chat, messages[: number + 1], template)
    except RowError:
        if opening:
            return None
        raise
    if full.startswith(prompt):
        return prompt, full[len(prompt) :]
    if opening:
        return None
    same = next(
        (at for at, pair in enumerate(zip(prompt, full, strict=False)) if pair[0] != pair[1]),
        min(len(prompt), len(full)),
    )
    at = max(0, same - _SHOWN // 2)
    raise RowError(
        Fault(
            "generation-prompt-mismatch",
            f"message {number} ({ASSISTANT}) can't be learned: asked for it, the template writes "
            f"{_short(prompt, at)}, but with the answer it writes {_short(full, at)}",
            "give data.template_kwargs='{enable_thinking: false}' if the template knows it, give "
            "the answer's reasoning_content, or use another template",
        )
    )


def _other_turn(
    chat: Chat, messages: list[dict[str, Any]], number: int, template: Template
) -> tuple[str, str]:
    """The prompt and target of a message of another role: all that the template adds for it."""
    full = _render(chat, messages[: number + 1], template)
    before = ""
    if number > 0:
        before = _render(chat, messages[:number], template)
    if full.startswith(before):
        return before, full[len(before) :]
    role = chat.messages[number].role
    raise RowError(
        Fault(
            "rewritten-history",
            f"message {number} ({role}) can't be learned: the template changes what is before it",
            "leave this role out of data.train_on",
        )
    )


def _render(
    chat: Chat,
    messages: list[dict[str, Any]],
    template: Template,
    *,
    add_generation_prompt: bool = False,
) -> str:
    kwargs: Mapping[str, Any] = chat.template_kwargs
    return template.render(
        messages, tools=chat.tools, add_generation_prompt=add_generation_prompt, kwargs=kwargs
    )


def _check_null_contents(chat: Chat, messages: list[dict[str, Any]], template: Template) -> None:
    """Raises RowError if the template writes out a content that is null."""
    if not template.has_chat_template or all(m["content"] is not None for m in messages):
        return
    filled = [{**m, "content": "" if m["content"] is None else m["content"]} for m in messages]
    if _render(chat, messages, template) != _render(chat, filled, template):
        number = next(n for n, m in enumerate(messages) if m["content"] is None)
        raise RowError(
            Fault(
                "null-content",
                f"message {number} ({chat.messages[number].role}) has no content, and the template "
                "does not read that as empty",
                'write "content": ""',
            )
        )


def _check_not_empty(message: Message, number: int) -> None:
    if message.empty:
        raise RowError(
            Fault(
                "empty-answer",
                f"message {number} ({message.role}) is empty, so there is nothing to learn",
                "take the row out, or give the message train: false",
            )
        )


def _short(text: str, at: int) -> str:
    part = text[at : at + _SHOWN]
    return f"{'...' if at else ''}{part!r}{'...' if at + _SHOWN < len(text) else ''}"
