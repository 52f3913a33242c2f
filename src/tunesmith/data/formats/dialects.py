"""Formats of other trainers (ShareGPT, Alpaca, preference pairs) as messages or prompt and
completion.

Each function takes a row's values and gives those of one of our own two chat formats; columns that
every format may have (`tools`, `chat_template_kwargs`) go along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from tunesmith.data.fields.table import COMMON
from tunesmith.data.row_errors import kind_of, refuse, wrong_type

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "call"),
    **dict.fromkeys(
        ("tool", "observation", "function_response", "tool_response", "function"), "tool"
    ),
}


def sharegpt(values: Mapping[str, Any]) -> dict[str, Any]:
    """`conversations` of {from, value} turns, with `system` and `tools` beside them."""
    turns = values["conversations"]
    if not isinstance(turns, list | tuple):
        wrong_type("conversations", "a list of turns", turns)
    messages = [
        _turn(turn, f"conversations[{at}]") for at, turn in enumerate(cast("list[Any]", turns))
    ]
    return {"messages": messages, **_common(values)}


def with_system(
    values: Mapping[str, Any], column: str, templated: bool = True
) -> Mapping[str, Any]:
    """The row with its column `system` as the first turn of the messages in `column`.

    A string prompt becomes the turn after it. Without a chat template there are no turns, and the
    column stays unread.
    """
    system, asked = values.get("system"), values.get(column)
    if not system or (isinstance(asked, str) and not templated):
        return values
    if not isinstance(system, str):
        wrong_type("system", "a string", system)
    turn = {"role": "system", "content": system}
    if isinstance(asked, str):
        answer = values["completion"]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        return {**values, column: [turn, {"role": "user", "content": asked}], "completion": answer}
    if not isinstance(asked, list | tuple):
        return values  # reading it says what is wrong
    turns = list(cast("list[Any]", asked))
    first: Mapping[str, Any] = {}
    if turns and isinstance(turns[0], Mapping):
        first = cast("Mapping[str, Any]", turns[0])
    if first.get("role") not in ("system", "developer"):
        return {**values, column: [turn, *turns]}
    if first.get("content") != system:
        refuse(
            "conflicting-wishes",
            f"the column `system` and `{column}[0]` are two different system turns",
            "data.ignore_fields=[system] keeps that of the messages",
        )
    return values


def _turn(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        wrong_type(place, "an object with from and value", value)
    turn = dict(cast("Mapping[str, Any]", value))
    if "role" in turn and "from" not in turn:
        return turn
    said = turn.pop("from", None)
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        shown = repr(said) if isinstance(said, str) else kind_of(said)
        refuse(
            "unknown-role",
            f"`{place}.from` is {shown}, not a role's name",
            f"known are {', '.join(_ROLES)}",
        )
    content = turn.pop("value", None)
    if role == "call":
        # Empty, not missing: some templates look into it without asking whether it is there.
        calls = _calls(content, f"{place}.value")
        return {"role": "assistant", "content": "", "tool_calls": calls, **turn}
    return {"role": role, "content": content, **turn}


def _calls(value: Any, place: str) -> list[Any]:
    """Tool calls from one call or a list of them, as objects or as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            refuse(
                "wrong-type",
                f"`{place}` is no function call in JSON ({error})",
                'a call is {"name": "...", "arguments": {...}}, as an object or as JSON',
            )
    calls = cast("list[Any]", value) if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, Mapping):
            wrong_type(place, "a function call with name and arguments", call)
    return [
        call if "function" in call else {"type": "function", "function": dict(call)}
        for call in cast("list[Mapping[str, Any]]", calls)
    ]


def alpaca(values: Mapping[str, Any]) -> dict[str, Any]:
    """`instruction`, `input` and `output`, with `history` (pairs) and `system` before them.

    The input follows the instruction after a line's end. Only `output` is the completion.
    """
    asked = _string(values, "instruction")
    if values.get("input"):
        asked += "\n" + _string(values, "input")
    output = _string(values, "output")
    history = _history(values.get("history"))
    if not history:
        return {"prompt": asked, "completion": output, **_common(values)}
    prompt = [*history, {"role": "user", "content": asked}]
    answer = [{"role": "assistant", "content": output}]
    return {"prompt": prompt, "completion": answer, **_common(values)}


def _history(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        wrong_type("history", "a list of pairs: question, answer", value)
    messages: list[dict[str, Any]] = []
    for at, pair in enumerate(cast("list[Any]", value)):
        if not isinstance(pair, list | tuple) or len(cast("list[Any]", pair)) != 2:
            wrong_type(f"history[{at}]", "a pair: question, answer", pair)
        for role, text in zip(("user", "assistant"), cast("list[Any]", pair), strict=True):
            messages.append({"role": role, "content": text})
    return messages


def preference(values: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen side of a pair, after a `prompt` or after what both sides begin with."""
    chosen, rejected, prompt = (values.get(name) for name in ("chosen", "rejected", "prompt"))
    if isinstance(chosen, str):
        if prompt is None:
            refuse(
                "missing-column",
                "`chosen` is a string and there is no `prompt` that it answers",
                "name the prompt's column: data.columns={prompt: ...}",
            )
        answer: Any = chosen
        if isinstance(prompt, list | tuple):
            answer = [{"role": "assistant", "content": chosen}]
        return {"prompt": prompt, "completion": answer, **_common(values)}
    if not isinstance(chosen, list | tuple):
        wrong_type("chosen", "a string or a list of messages", chosen)
    turns = list(cast("list[Any]", chosen))
    if isinstance(prompt, list | tuple):
        return {"prompt": prompt, "completion": turns, **_common(values)}
    shared = _shared(turns, rejected)
    if isinstance(prompt, str) and shared == 0:
        asked = [{"role": "user", "content": prompt}]
        return {"prompt": asked, "completion": turns, **_common(values)}
    if shared == 0 or shared == len(turns):
        what = "nothing" if shared == 0 else "all of it"
        refuse(
            "no-answer",
            f"`chosen` shares {what} with `rejected`, so where its answer begins can't be told",
            "give the messages that both answer as `prompt`",
        )
    return {"prompt": turns[:shared], "completion": turns[shared:], **_common(values)}


def _shared(chosen: list[Any], rejected: Any) -> int:
    """How many messages both begin with; all but the last where there is no list to compare."""
    if not isinstance(rejected, list | tuple):
        return len(chosen) - 1
    count = 0
    for mine, other in zip(chosen, cast("list[Any]", rejected), strict=False):
        if mine != other:
            break
        count += 1
    return count


def _string(values: Mapping[str, Any], column: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        wrong_type(column, "a string", value)
    return value


def _common(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in COMMON if values.get(name) is not None}
