"""Stop tokens of a chat template, found by rendering answers and looking at what closes them.

Many base models name another end token than the one that their chat template writes after an
answer. A model that is trained with such a template must stop at the template's token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.data.row_errors import RowError

if TYPE_CHECKING:
    from tunesmith.data.templates.template import Template

_PROBE = "tunesmith"
_TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "description": "Where."}},
            "required": ["at"],
        },
    },
}


def closing_tokens(template: Template, added: set[int]) -> set[int]:
    """The added tokens that close an answer, or an answer with a tool call, and are not known as
    stop tokens.
    """
    found: set[int] = set()
    plain = _turn_end(template, added)
    if plain is not None:
        found.add(plain)
    call = _call_end(template, template.stop_ids | found)
    return found if call is None else found | {call}


def _turn_end(template: Template, added: set[int]) -> int | None:
    """The added token that closes an answer; None if there is none, or it is a known stop token.

    Of several in a row it is the last: some model families close the content first and then the
    turn.
    """
    text = _rendered(template, {"content": _PROBE})
    _, found, rest = (text or "").rpartition(_PROBE)
    if not found:
        return None
    run: list[int] = []
    for token in template.encode([rest])[0]:
        if token in added:
            run.append(token)
        elif run:
            # A token with a word right after it opens the next turn, which some templates always
            # write.
            if len(run) > 1 and template.token_text(token)[:1].isalpha():
                run.pop()
            break
    return run[-1] if run and not template.stop_ids & set(run) else None


def _call_end(template: Template, stops: frozenset[int] | set[int]) -> int | None:
    """The special token that ends an answer with tool calls; None if a known stop token does.

    A token that also stands between two calls closes a call and not the turn.
    """
    text = _rendered(template, {"content": "", "tool_calls": _calls(1)}, tools=[_TOOL])
    _, found, rest = (text or "").rpartition(_PROBE)
    if not found:
        return None
    ids = template.encode([rest.rstrip()])[0]
    if not ids or ids[-1] not in template.special_ids or stops & set(ids):
        return None
    two = _rendered(template, {"content": "", "tool_calls": _calls(2)}, tools=[_TOOL])
    if two is not None:
        _, _, after = two.partition(_PROBE)
        if template.encode([after])[0].count(ids[-1]) != 1:
            return None
    return ids[-1]


def _calls(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call0000{number}",
            "type": "function",
            "function": {"name": "find", "arguments": {"at": _PROBE}},
        }
        for number in range(count)
    ]


def _rendered(
    template: Template, answer: dict[str, Any], *, tools: Sequence[dict[str, Any]] | None = None
) -> str | None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", **answer},
    ]
    try:
        return template.render(turns, tools=tools)
    except RowError:
        return None
