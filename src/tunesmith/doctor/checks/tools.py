"""Checks of tool calls: known tools, arguments that fit their JSON schema, answers in order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

from tunesmith.data.formats.examples import Chat, Message
from tunesmith.doctor.checks.faults import of_tools, refusal
from tunesmith.doctor.corpus import ASSISTANT, Corpus, Setup
from tunesmith.doctor.outcome import Hit, Level, Outcome, quote
from tunesmith.doctor.schema_fit import misfits

_WRITTEN = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_SHOWN = 2  # misfits of one row


def calls(corpus: Corpus, setup: Setup) -> Outcome:
    """Chats with a call that can't be read, of no tool given, or with arguments that don't fit."""
    unread = [
        Hit(str(case.origin), case.fault.message)
        for case in corpus.cases
        if case.fault is not None and of_tools(case)
    ]
    hits: list[Hit] = []
    chats = 0
    for case in corpus.cases:
        if not isinstance(case.example, Chat):
            continue
        chats += bool(case.example.tools or any(_calls(m) for m in case.messages))
        hits += [Hit(str(case.origin), wrong) for wrong in islice(_wrong(case.example), 1)]
    level: Level = refusal(setup) if unread else "warning"
    hint = "mend the call or the tool's schema: the model learns to call as it is shown"
    return Outcome([*unread, *hits], chats + len(unread), "chats with tools", level, hint)


def results(corpus: Corpus, setup: Setup) -> Outcome:
    """Chats with a tool's result for a call that was not made, or a call that is passed over."""
    hits: list[Hit] = []
    chats = 0
    for case in corpus.cases:
        if not any(_calls(message) or message.role == "tool" for message in case.messages):
            continue
        chats += 1
        hits += [Hit(str(case.origin), wrong) for wrong in islice(_unmatched(case.messages), 1)]
    hint = "each call is followed by its result, under the same tool_call_id, before the next turn"
    return Outcome(hits, chats, "chats with calls", "warning", hint)


def _calls(message: Message) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", message.fields.get("tool_calls") or [])


def _wrong(chat: Chat) -> Iterator[str]:
    tools = {str(tool.get("name")): tool for tool in map(_function, chat.tools or [])}
    for number, message in enumerate(chat.messages):
        for call in map(_function, _calls(message)):
            yield from _wrong_call(call, tools, f"message {number}")
        if message.role == ASSISTANT and "<tool_call>" in (message.content or ""):
            yield from _wrong_text(message.content or "", f"message {number}")


def _function(value: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = value.get("function", value)
    return cast("Mapping[str, Any]", inner) if isinstance(inner, Mapping) else {}


def _wrong_call(
    call: Mapping[str, Any], tools: Mapping[str, Mapping[str, Any]], place: str
) -> Iterator[str]:
    name = str(call.get("name"))
    if not tools:
        yield f"{place} calls {name}, but the row has no tools"
    elif name not in tools:
        yield f"{place} calls {name}; the tools are {', '.join(list(tools)[:5])}"
    else:
        schema = tools[name].get("parameters")
        wrong = list(islice(misfits(call.get("arguments") or {}, schema), _SHOWN))
        if wrong:
            yield f"{place} calls {name}: {'; '.join(wrong)}"


def _wrong_text(content: str, place: str) -> Iterator[str]:
    for found in _WRITTEN.finditer(content):
        try:
            json.loads(found.group(1))
        except ValueError as error:
            # Some families write calls as tags: only what begins as JSON must be JSON.
            if found.group(1).lstrip().startswith(("{", "[")):
                yield f"{place} writes a call that is not JSON ({error}): {quote(found.group(1))}"


def _unmatched(messages: tuple[Message, ...]) -> Iterator[str]:
    """Ids are looked at where both sides have them, else calls and results are counted."""
    waiting: list[str | None] = []
    for number, message in enumerate(messages):
        if message.role == "tool":
            given = message.fields.get("tool_call_id")
            if not waiting:
                yield f"message {number} (tool) answers a call that nothing made"
            elif given is None or None in waiting:
                waiting.pop(0)
            elif given not in waiting:
                yield f"message {number} (tool) answers {given!r}; waiting are {waiting}"
            else:
                waiting.remove(str(given))
            continue
        if waiting:
            place = f"message {number} ({message.role})"
            yield f"{place} comes before the results of {len(waiting)} calls"
        waiting = [_id(call) for call in _calls(message)] if message.role == ASSISTANT else []


def _id(call: Mapping[str, Any]) -> str | None:
    found = call.get("id")
    return None if found is None else str(found)
