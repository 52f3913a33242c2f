"""The turn pattern of a chat template: headers and turn ends, found by rendering conversations of
known words.

It serves rows of text to which the template was applied already. Such a text is the template's own
if each stretch between two control tokens is one that the template writes there. A content that
quotes a control token puts it in a place where the template never writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.data.row_errors import Fault, RowError, refuse
from tunesmith.data.templates.template import Template

_WORD = re.compile(r"quern\d+")
_FIRST_LINE = re.compile(r"\s*[^\n]*\n?")
_EDGE = ""
"""Stands for the beginning of a text, where there is no token."""
_AS_MESSAGES = "give the rows as messages"

Piece = tuple[str, str, str]
"""A control token's text (or `_EDGE`), the stretch after it, and the next control token's text."""

_Chat = tuple["list[dict[str, Any]]", "list[dict[str, Any]] | None"]
"""Messages and tools."""


@dataclass(frozen=True, slots=True)
class Gap:
    """What may be between two control tokens: one of `fixed`, or any text that begins with a
    header.
    """

    fixed: frozenset[str]
    headers: frozenset[str]  # empty where only the fixed texts may stand here

    def allows(self, text: str) -> bool:
        return text in self.fixed or any(text.startswith(header) for header in self.headers)


@dataclass(frozen=True, slots=True)
class TurnPattern:
    """How a template opens answers, and what it writes between control tokens.

    `opening` is the generation prompt; `header` is what begins an answer in a finished text too.
    Both count only after `anchor`, which is empty if they begin with a control token. `rewrites`:
    earlier answers are rendered in another way than as the last one. `begins` is the BOS token's
    text if every text begins with it.
    """

    opening: str
    header: str
    anchor: str
    begins: str
    rewrites: bool
    gaps: Mapping[tuple[str, str], Gap]
    tokens: re.Pattern[str]

    def answers(self, text: str) -> int:
        """The number of answers in the text, with the generation prompt or without."""
        return text.count(self.anchor + (self.header if self.header.strip() else self.opening))

    def pieces(self, text: str) -> Iterator[Piece]:
        """Yield the stretch before each control token of the text."""
        before, start = _EDGE, 0
        for found in self.tokens.finditer(text):
            yield before, text[start : found.start()], found.group()
            before, start = found.group(), found.end()

    def odd_piece(self, text: str) -> Piece | None:
        """The first stretch that the template does not write; None if there is none."""
        for before, between, after in self.pieces(text):
            gap = self.gaps.get((before, after))
            if gap is None or not gap.allows(between):
                return before, between, after
        return None


def find_turn_pattern(template: Template) -> TurnPattern:
    """The turn pattern of a template, found once for each template.

    Raises:
        RowError: there is no chat template, or nothing distinguishes its answers from other text.
    """
    memo = template.memo
    if memo.turn_pattern is None:
        try:
            memo.turn_pattern = _find(template)
        except RowError as error:
            memo.turn_pattern = error.fault
    if isinstance(memo.turn_pattern, Fault):
        raise RowError(memo.turn_pattern)
    return memo.turn_pattern


def _find(template: Template) -> TurnPattern:
    tokens = _pattern(template)
    given = template.render([_message("user", 1)])
    opened = template.render([_message("user", 1)], add_generation_prompt=True)
    asked = _question(given, opened, tokens)
    opening = opened[len(asked) :]
    if not opening.strip():
        refuse(
            "no-turn-marker",
            "the chat template writes nothing before an answer by which one could be found",
            _AS_MESSAGES,
        )
    plain, calling = list(_texts(template, _chats())), list(_texts(template, _calling_chats()))
    bos = "" if template.bos_id is None else template.token_text(template.bos_id)
    pattern = TurnPattern(
        opening=opening,
        header=_header(template, asked, opening),
        anchor=_anchor(tokens, asked, opening),
        begins=bos if bos and all(text.startswith(bos) for text, _ in plain) else "",
        rewrites=_rewrites(template),
        gaps={},
        tokens=tokens,
    )
    found: dict[tuple[str, str], set[str]] = {}
    known = [text for text, answers in plain if pattern.answers(text) == answers]
    # Where answers can't be told apart in one conversation with tool calls, no such conversation is
    # used.
    if all(pattern.answers(text) == answers for text, answers in calling):
        known += [text for text, _ in calling]
    for text in known:
        for before, between, after in pattern.pieces(text):
            found.setdefault((before, after), set()).add(between)
    gaps = {ends: _gap(between) for ends, between in found.items()}
    return replace(pattern, gaps=gaps)


def _question(given: str, opened: str, tokens: re.Pattern[str]) -> str:
    """The common beginning of the texts with and without generation prompt, cut at a whole
    token.
    """
    same = len(_common_start(given, opened))
    cut = next((t.start() for t in tokens.finditer(opened) if t.start() < same < t.end()), same)
    return opened[:cut]


def _pattern(template: Template) -> re.Pattern[str]:
    longest = sorted(template.special_texts, key=len, reverse=True)
    if not longest:
        refuse("no-turn-marker", "the tokenizer has no control tokens to look for", _AS_MESSAGES)
    return re.compile("|".join(map(re.escape, longest)))


def _anchor(tokens: re.Pattern[str], asked: str, opening: str) -> str:
    """What must come before an opening that does not begin with a control token."""
    if tokens.match(opening):
        return ""
    last = next((found for found in reversed(list(tokens.finditer(asked)))), None)
    lead = asked if last is None else asked[last.start() :]
    if last is None or _WORD.search(lead):
        if tokens.search(opening):
            return ""
        refuse(
            "no-turn-marker",
            f"the chat template opens an answer with plain text alone ({opening!r}), which a "
            "content may hold as well",
            _AS_MESSAGES,
        )
    return lead


def _header(template: Template, asked: str, opening: str) -> str:
    """What an answer begins with, in a generation prompt and in a finished text alike."""
    header = opening
    for turns in (["user", "assistant"], ["user", "assistant", "user", "assistant"]):
        text = _rendered(template, [_message(role, n) for n, role in enumerate(turns, start=1)])
        if text is not None and text.startswith(asked):
            header = _common_start(header, text[len(asked) : text.find("quern2")])
    return header


def _common_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _rewrites(template: Template) -> bool:
    """True if an earlier answer is rendered in another way than the last one (its reasoning
    dropped, say).
    """
    for more in ({}, {"reasoning_content": "quern8"}, {"thinking": "quern8"}):
        turns = [_message("user", 1), {**_message("assistant", 2), **more}, _message("user", 3)]
        given = _rendered(template, turns[:2])
        later = _rendered(template, turns)
        if given is None or later is None:
            continue
        end = _end_of_answer(given, given.find("quern2"), template)
        if not later.startswith(given[:end]):
            return True
    return False


def _end_of_answer(text: str, start: int, template: Template) -> int | None:
    found = answer_end(text, start, template)
    return found if found is not None else start + len("quern2")


def answer_end(text: str, start: int, template: Template) -> int | None:
    """The place after the first stop token from `start` on; None without one."""
    ends = [
        at + len(stop)
        for stop in (template.token_text(token) for token in template.stop_ids)
        if (at := text.find(stop, start)) >= 0
    ]
    return min(ends, default=None)


def _gap(between: set[str]) -> Gap:
    headers = {
        _first_line(text[: found.start()])
        for text in between
        if (found := _WORD.search(text)) is not None
    }
    fixed = {text for text in between if not _WORD.search(text)}
    return Gap(
        frozenset(fixed), frozenset(headers | {_first_line(t) for t in fixed} if headers else ())
    )


def _first_line(text: str) -> str:
    found = _FIRST_LINE.match(text)
    return found.group() if found is not None else text


def _texts(template: Template, conversations: Iterable[_Chat]) -> Iterator[tuple[str, int]]:
    """The texts of the conversations that the template accepts, and the number of answers in
    each.
    """
    for turns, tools in conversations:
        for asked in (False, True):
            text = _rendered(template, turns, tools=tools, asked=asked)
            if text is not None:
                yield text, asked + sum(turn["role"] == "assistant" for turn in turns)


def _chats() -> Iterator[_Chat]:
    """Conversations of many shapes without tool calls."""
    user, answer, system = _message("user", 1), _message("assistant", 2), _message("system", 3)
    chats = [
        [user],
        [user, answer, user, answer],
        [system, user, answer, user, answer],
        [user, user, answer, answer, user],
        [answer, user, answer],
        *(
            [_message(role, 4), user, answer]
            for role in ("developer", "tool", "function", "ipython")
        ),
    ]
    for key in ("reasoning_content", "thinking"):
        thought = {**answer, key: "quern5"}
        chats += [[user, thought], [user, thought, user, thought]]
    tools = [_tool(6), _tool(7)]
    yield from ((chat, None) for chat in chats)
    yield from ((chat, tools) for chat in chats[:3])


def _calling_chats() -> Iterator[_Chat]:
    """Conversations with one and two tool calls, their results, and what follows them."""
    user, answer, system = _message("user", 1), _message("assistant", 2), _message("system", 3)
    tools = [_tool(6), _tool(7)]
    for content in ("", "quern8"):
        for count in (1, 2):
            called = _tool_turns(content, count)
            for turns in ([user, *called], [system, user, *called]):
                yield turns[:-count], tools
                yield turns, tools
                yield [*turns, answer], tools
                yield [*turns, answer, user], tools
                yield [*turns, *called, answer, user, answer], tools


def _message(role: str, number: int) -> dict[str, Any]:
    return {"role": role, "content": f"quern{number}"}


def _tool_turns(content: str, count: int) -> list[dict[str, Any]]:
    calls = [
        {
            "id": f"quern0000{number}",
            "type": "function",
            "function": {"name": "quern6", "arguments": _arguments(number)},
        }
        for number in range(count)
    ]
    results = [
        {"role": "tool", "name": "quern6", "tool_call_id": call["id"], "content": "quern9"}
        for call in calls
    ]
    return [{"role": "assistant", "content": content, "tool_calls": calls}, *results]


def _arguments(number: int) -> dict[str, Any]:
    values: list[Any] = ["quern10", 7, True, ["quern11", 1], {"quern12": "quern13"}, None]
    if number == 0:
        return {"quern14": values[0]}
    return {f"quern{15 + at}": value for at, value in enumerate(values)}


def _tool(number: int) -> dict[str, Any]:
    kinds = ("string", "integer", "number", "boolean", "array", "object")
    properties: dict[str, Any] = {
        f"quern{20 + at}": {"type": kind, "description": "quern19"}
        for at, kind in enumerate(kinds[: 1 if number == 6 else None])
    }
    schema = {"type": "object", "properties": properties, "required": ["quern20"]}
    function = {"name": f"quern{number}", "description": "quern18", "parameters": schema}
    return {"type": "function", "function": function}


def _rendered(
    template: Template,
    turns: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    asked: bool = False,
) -> str | None:
    try:
        return template.render(turns, tools=tools, add_generation_prompt=asked)
    except RowError:
        return None
