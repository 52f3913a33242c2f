"""Conversion of rows of any chat format to messages or prompt-completion, with the same tokens
learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data.formats.detect import COLUMNS, FORMATS, to_example
from tunesmith.data.formats.examples import Chat, Completion, Message
from tunesmith.data.row_errors import refuse

TARGETS = ("messages", "prompt_completion")
"""Formats that rows can be converted to."""

_ASSISTANT = "assistant"


def convert_row(values: Mapping[str, Any], *, format: str, to: str) -> dict[str, Any]:
    """The row in the format `to`; columns that the format does not know are kept.

    Under `messages`, answers in the prompt of a completion get `train: false`, so that the same
    turns are learned as before.

    Raises:
        RowError: the row can't be read, or says what the other format can't.
    """
    example = to_example(values, format=format)
    if not isinstance(example, Chat):
        what = "raw text" if isinstance(example, Completion) else f"`{FORMATS[format][0]}`"
        refuse(
            "not-convertible",
            f"{what} is no chat, so it has no turns to write",
            "it is trained on as it is; chats alone are converted",
        )
    kept = {name: value for name, value in values.items() if name not in COLUMNS[format]}
    row = _messages(example) if to == "messages" else _prompt_completion(example)
    if example.tools:
        row["tools"] = example.tools
    if example.template_kwargs:
        row["chat_template_kwargs"] = dict(example.template_kwargs)
    return {**row, **kept}


def _messages(chat: Chat) -> dict[str, Any]:
    first = chat.first_completion or 0
    return {
        "messages": [
            _plain(message, asked=number < first) for number, message in enumerate(chat.messages)
        ]
    }


def _prompt_completion(chat: Chat) -> dict[str, Any]:
    first = chat.first_completion
    if first is None:
        first = len(chat.messages) - 1
        answers = [n for n, message in enumerate(chat.messages) if message.role == _ASSISTANT]
        if answers != [first] or first == 0:
            refuse(
                "not-convertible",
                f"the chat has {len(answers)} answers; a completion is one answer at the end",
                "--to messages keeps all of them",
            )
    both = (chat.messages[:first], chat.messages[first:])
    prompt, completion = ([_plain(message, asked=False) for message in part] for part in both)
    if _is_string(prompt, "user") and _is_string(completion, _ASSISTANT):
        return {"prompt": prompt[0]["content"], "completion": completion[0]["content"]}
    return {"prompt": prompt, "completion": completion}


def _is_string(messages: Sequence[Mapping[str, Any]], role: str) -> bool:
    """Whether these messages are what a plain string stands for."""
    return (
        len(messages) == 1
        and set(messages[0]) == {"role", "content"}
        and (messages[0]["role"] == role)
    )


def _plain(message: Message, *, asked: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role}
    if message.content is not None:
        row["content"] = message.content
    row.update(message.fields)
    if message.train is not None:
        row["train"] = message.train
    elif asked and message.role == _ASSISTANT:
        row["train"] = False
    if message.weight is not None:
        row["weight"] = message.weight
    return row
