"""Field accounting of a chat: differential rendering says which fields of its messages the chat
template reads.

A field is read if the text of the conversation changes when the field is taken out. The
conversation is rendered to its end and up to the message itself, because templates may leave
reasoning out of earlier turns. What was found is kept with the template, for other messages of the
same kind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tunesmith.data.fields.table import COLUMNS, MESSAGE_COLUMNS, REASONING, STANDARD_ROLES
from tunesmith.data.fields.unread import (
    unknown_role,
    unread_columns,
    unread_fields,
    unread_in_segments,
    unread_parts,
)
from tunesmith.data.formats.examples import Chat, Completion, Example, Parts
from tunesmith.data.row_errors import UNREAD, Fault, Field, RowError
from tunesmith.data.templates.template import Template


def account(
    values: Mapping[str, Any],
    format: str,
    example: Example,
    template: Template,
    *,
    roles: Collection[str] = (),
) -> tuple[Field, ...]:
    """The fields of the row that hold something and that nothing reads; empty for most rows.

    `roles` are names of roles that the recipe knows.

    Raises:
        RowError: one of them looks like input or like a wish.
    """
    found = dict.fromkeys(unread_columns(values, format, raw=isinstance(example, Completion)))
    if isinstance(example, Parts):
        found.update(dict.fromkeys(unread_in_segments(values)))
    elif isinstance(example, Chat):
        found.update(dict.fromkeys(_in_chat(values, format, example, template, roles)))
    if not found:
        return ()
    fields = tuple(found)
    refused = [field for field in fields if field.state == "refused"]
    if refused:
        raise RowError(_fault(refused, fields))
    return fields


def _fault(refused: list[Field], fields: tuple[Field, ...]) -> Fault:
    names = ", ".join(f"`{field.path}`" for field in refused)
    dropped = all(field.path.rpartition("[].")[2] in REASONING and "[]" in field.path
                  for field in refused)  # fmt: skip
    what = "the chat template leaves out" if dropped else "nothing reads"
    hint = "; ".join(dict.fromkeys(field.hint for field in refused))
    if dropped:
        hint = f"use a template that renders it: data.template=FILE.jinja; or {hint}"
    kind = "dropped-content" if dropped else UNREAD
    return Fault(kind, f"{what} {names}, which looks like input or a wish", hint, fields)


def _in_chat(
    values: Mapping[str, Any],
    format: str,
    chat: Chat,
    template: Template,
    roles: Collection[str],
) -> Iterator[Field]:
    columns = [name for name in MESSAGE_COLUMNS if name in COLUMNS[format] and name != "rejected"]
    lists = [c for c in columns if isinstance(values.get(c), list | tuple)]
    column = lists[0] if lists else "messages"
    reads = Probe(chat, template)
    for number, message in enumerate(chat.messages):
        if message.fields:
            yield from unread_fields(column, number, message.fields, reads)
        role = message.role
        if role not in STANDARD_ROLES and role not in roles and not template.names_role(role):
            yield unknown_role(column, role)
    for name in lists:
        yield from unread_parts(values, name)


class Probe:
    """Says whether the template reads a field of a message, by rendering the chat without it."""

    def __init__(self, chat: Chat, template: Template) -> None:
        self._chat = chat
        self._template = template

    def __call__(self, number: int, name: str) -> bool:
        """True if the text changes without the field, or if the row can't be rendered at all."""
        known = self._template.memo.reads
        message = self._chat.messages[number]
        last = number == len(self._chat.messages) - 1
        if known.get((message.role, name)):
            return True
        value = message.fields[name]
        shape = type(value).__name__
        kind = (message.role, name, shape, bool(value), last, bool(message.content))
        found = known.get(kind)
        if found is not None:
            return found
        try:
            found = self._differs(number, name)
        except RowError:
            return True  # rendering the row says what is wrong
        known[kind] = found
        if found:
            known[message.role, name] = True
        return found

    def _differs(self, number: int, name: str) -> bool:
        whole = [message.to_dict() for message in self._chat.messages]
        less = [*whole]
        less[number] = {key: value for key, value in whole[number].items() if key != name}
        return any(
            self._text(whole[:end]) != self._text(less[:end])
            for end in dict.fromkeys((len(whole), number + 1))
        )

    def _text(self, messages: list[dict[str, Any]]) -> str:
        chat = self._chat
        return self._template.render(messages, tools=chat.tools, kwargs=chat.template_kwargs)
