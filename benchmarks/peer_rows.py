"""The rows that both sides of a comparison train on, written once as a JSONL file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from calendar_events import rows as calendar_rows


def write_rows(
    data: Path | None, count: int, out: Path, *, answers: int = 1, tools: str = "template"
) -> str:
    """Write `count` rows with a prompt and a completion, as chats; return the name of the data.

    Chats with `messages` become a row an answer, each in the context it is given in, those of one
    chat in a row. Of `answers` rows in a row, all have the first one's prompt: many answers to one
    question.

    Args:
        tools: `template` gives the chats' tools to the chat template; `text` writes them into a
            system message, for templates that take none.
    """
    found = list(islice(_rows(data, tools), count))
    if len(found) < count:
        raise SystemExit(f"error: {data} has {len(found)} rows, {count} are needed")
    with out.open("w", encoding="utf-8") as file:
        for number, row in enumerate(found):
            asked = found[number - number % answers]
            file.write(json.dumps({**row, "prompt": asked["prompt"]}) + "\n")
    name = "calendar example" if data is None else f"{data.parent.name}/{data.name}"
    return name if answers == 1 else f"{name}, {answers} answers a prompt"


def _rows(data: Path | None, tools: str) -> Iterator[dict[str, Any]]:
    if data is None:
        for row, _ in calendar_rows(10_000, seed=7):
            yield _asked(row["prompt"], row["completion"])
        return
    with data.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "messages" in row:
                yield from per_turn(row, tools=tools)
            else:
                question = row.get("prompt", row.get("question"))
                yield _asked(question, row.get("completion", row.get("answer")))


def _asked(prompt: str, completion: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def per_turn(row: dict[str, Any], *, tools: str = "template") -> Iterator[dict[str, Any]]:
    """A row for each answer of a chat, in the context it is given in: what Tunesmith learns."""
    messages, own = row["messages"], row.get("tools")
    if own and tools == "text":
        # Templates that take no tools know neither calls nor the role of their results.
        messages = [
            {"role": "system", "content": "Tools: " + json.dumps(own)},
            *map(_plain, messages),
        ]
    for at, message in enumerate(messages):
        if message["role"] == "assistant" and at:
            turn = {"prompt": messages[:at], "completion": [message]}
            yield {**turn, "tools": own} if own and tools == "template" else turn


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    role = "user" if message["role"] == "tool" else message["role"]
    content = json.dumps([call["function"] for call in calls]) if calls else message["content"]
    return {"role": role, "content": content}
