"""Examples: chats with messages, tools and tool calls, completions, texts, segments and token
ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from tunesmith.data.fields.table import REASONING
from tunesmith.data.row_errors import kind_of, refuse, wrong_type


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `fields` is what else the template may read: tool_calls, reasoning_content, ...

    `train` and `weight` are the row's own wishes for this turn, None where it has none.
    """

    role: str
    content: str | None
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    train: bool | None = None
    weight: float | None = None

    @property
    def empty(self) -> bool:
        """True if the turn says nothing: no content, no tool call, no reasoning."""
        said = (self.fields.get(name) for name in ("tool_calls", *REASONING))
        return not (self.content or "").strip() and not any(said)

    def to_dict(self) -> dict[str, Any]:
        """What the chat template sees; `content` is None where the row has none."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns that go through the chat template.

    Turns from `first_completion` on are the completion of a prompt+completion row; None elsewhere.
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    first_completion: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what must follow it, both raw: no template."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Language modelling: every token is a target."""

    text: str


@dataclass(frozen=True, slots=True)
class Parts:
    """Texts of a row in order, without a chat template; of each whether it is learned.

    Special tokens written in them are read as such.
    """

    parts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class TemplatedText:
    """A whole conversation as a chat template has written it, control tokens and all."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids that somebody else made; of each whether it is learned."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    weights: tuple[float, ...] | None = None  # of each id; None: all alike


Example: TypeAlias = Chat | Completion | Text | Parts | TemplatedText | Tokens


def prompt_completion(values: Mapping[str, Any], *, templated: bool) -> Example:
    """A prompt with its completion; with `templated`, strings become two turns."""
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            refuse("empty-answer", "`completion` is empty", "fill it, or take the row out")
        if not templated:
            return Completion(prompt, completion)
        turns = (Message("user", prompt), Message("assistant", completion))
        return _chat(values, turns, first_completion=1)
    if isinstance(prompt, str) or isinstance(completion, str):
        refuse(
            "wrong-type",
            f"`prompt` is {kind_of(prompt)} but `completion` is {kind_of(completion)}; "
            "both must be strings or both lists of messages",
            'a string is the list [{"role": "user" or "assistant", "content": "..."}]',
        )
    asked = _messages(prompt, "prompt")
    answered = _messages(completion, "completion")
    return _chat(values, asked + answered, first_completion=len(asked))


def read_chat(values: Mapping[str, Any]) -> Chat:
    """The chat in the column `messages`."""
    return _chat(values, _messages(values["messages"], "messages"))


def _chat(
    values: Mapping[str, Any], messages: tuple[Message, ...], first_completion: int | None = None
) -> Chat:
    kwargs = values.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        wrong_type("chat_template_kwargs", "an object", kwargs)
    given = cast("Mapping[str, Any]", kwargs or {})
    return Chat(
        messages,
        tools=_tools(values.get("tools")),
        template_kwargs={key: value for key, value in given.items() if value is not None},
        first_completion=first_completion,
    )


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        wrong_type(column, "a list of messages", value)
    items = cast("list[Any]", value)
    if not items:
        refuse("empty-messages", f"`{column}` is an empty list", "take the row out")
    return tuple(_message(item, f"{column}[{at}]") for at, item in enumerate(items))


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        wrong_type(place, "an object with role and content", value)
    # Columnar files fill fields that only other messages have with null: as good as absent.
    fields = {key: item for key, item in _items(value) if item is not None}
    role = fields.pop("role", None)
    if not isinstance(role, str) or not role:
        hint = 'a message is {"role": "user", "content": "..."}'
        if "from" in fields and "value" in fields:
            hint += "; turns of `from` and `value` belong in a column `conversations`"
        refuse("unknown-role", f"`{place}.role` is {kind_of(role)}, not a role's name", hint)
    train = fields.pop("train", None)
    if train is not None and not isinstance(train, bool):
        wrong_type(f"{place}.train", "true or false", train)
    weight = fields.pop("weight", None)
    weight = None if weight is None else read_weight(weight, f"{place}.weight")
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], f"{place}.tool_calls")
    if not isinstance(fields.get("reasoning_content", ""), str):
        wrong_type(f"{place}.reasoning_content", "a string", fields["reasoning_content"])
    content = _content(fields.pop("content", None), f"{place}.content")
    said = any(fields.get(name) for name in ("tool_calls", *REASONING))
    if content is None and not said:
        refuse(
            "empty-answer" if role == "assistant" else "wrong-type",
            f"`{place}` ({role}) has no content" + (" and no tool_calls" * (role == "assistant")),
            "give it a content, or take the row out",
        )
    return Message(role, content, fields, train, weight)


def read_weight(value: Any, place: str) -> float:
    """The weight of a message or a token, a finite number that is not negative.

    Raises:
        RowError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        wrong_type(place, "a number", value)
    if not math.isfinite(value) or value < 0:
        refuse(
            "wrong-type",
            f"`{place}` is {value}; it must be finite and at least 0",
            "0 leaves it out, 1 is the usual weight",
        )
    return float(value)


def _content(value: Any, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        wrong_type(place, "a string or a list of text parts", value)
    texts: list[str] = []
    for at, part in enumerate(cast("list[Any]", value)):
        text = part
        if isinstance(part, Mapping):
            fields = dict(_items(part))
            kind = fields.get("type", "text")
            if kind != "text":
                refuse(
                    "wrong-type",
                    f"`{place}[{at}]` is of type {kind!r}; only text is read",
                    "take out rows with images, audio or video",
                )
            text = fields.get("text")
        if not isinstance(text, str):
            wrong_type(f"{place}[{at}]", "a text part", text)
        texts.append(text)
    return "".join(texts)


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls with `arguments` as an object, which is what templates are written for."""
    if not isinstance(value, list | tuple):
        wrong_type(place, "a list of tool calls", value)
    return [_tool_call(item, f"{place}[{at}]") for at, item in enumerate(cast("list[Any]", value))]


def _tool_call(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        wrong_type(place, "an object", value)
    call = {key: item for key, item in _items(value) if item is not None}
    inner = call.get("function", call)
    if not isinstance(inner, Mapping):
        wrong_type(f"{place}.function", "an object", inner)
    function = dict(_items(inner))
    if not isinstance(function.get("name"), str):
        wrong_type(f"{place}.function.name", "a string", function.get("name"))
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not arguments.strip():
        function["arguments"] = {}
    elif isinstance(arguments, str):
        function["arguments"] = _parse(arguments, f"{place}.function.arguments", "an object")
    if not isinstance(function.get("arguments", {}), Mapping | None):
        wrong_type(f"{place}.function.arguments", "an object", function["arguments"])
    return {**call, "function": function} if "function" in call else function


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = _parse(value, "tools", "a list of tool descriptions") if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        wrong_type("tools", "a list of tool descriptions", value)
    tools: list[dict[str, Any]] = []
    for at, tool in enumerate(cast("list[Any]", value)):
        if not isinstance(tool, Mapping):
            wrong_type(f"tools[{at}]", "an object", tool)
        tools.append(_tool(dict(_items(tool))))
    return tools or None


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """The description in the shape that templates are written for: {type, function}."""
    if isinstance(tool.get("function"), Mapping):
        tool = {**tool, "function": _described(dict(_items(tool["function"])))}
        return {"type": "function", **{key: v for key, v in tool.items() if v is not None}}
    if isinstance(tool.get("name"), str) and tool.get("type") in (None, "function"):
        inner = {k: v for k, v in tool.items() if k != "type"}
        return {"type": "function", "function": _described(inner)}
    return tool


def _described(function: dict[str, Any]) -> dict[str, Any]:
    """The description of a function, with `parameters` as an object where they are JSON text."""
    parameters = function.get("parameters")
    if isinstance(parameters, str) and parameters.strip():
        parsed = _parse(parameters, "tools[].function.parameters", "an object")
        return {**function, "parameters": parsed}
    return function


def _parse(text: str, place: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(
            "wrong-type",
            f"`{place}` is a string that is not {wanted} in JSON ({error})",
            "write it as JSON with double quotes, not as Python prints it, or as the value itself",
        )


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    yield from cast("Mapping[str, Any]", value).items()
