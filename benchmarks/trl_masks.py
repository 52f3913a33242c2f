"""The tokens that trl's training templates mask as the assistant's, against our targets."""

from __future__ import annotations

from collections import Counter
from typing import Any

from template_oracle import NAMES, paths_before_targets, template_of
from tunesmith.data.formats.detect import to_example
from tunesmith.data.rendering.render import render_example
from tunesmith.data.row_errors import RowError
from tunesmith.types import Origin

Run = tuple[list[int], list[int]]
"""Ids before a run of learned ids, and the run."""

USER, ANSWER = {"role": "user", "content": "And 3+4?"}, {"role": "assistant", "content": "Seven."}
CALL = {
    "type": "function",
    "function": {"name": "find", "arguments": {"at": "Oslo"}},
    "id": "call00001",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": []},
    },
}
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER, ANSWER]},
    "two turns": {"messages": [USER, ANSWER, {**USER, "content": "1+1?"}, ANSWER]},
    "reasoning": {
        "messages": [
            USER,
            {**ANSWER, "reasoning_content": "3 then 4"},
            {**USER, "content": "1+1?"},
            {**ANSWER, "content": "Two.", "reasoning_content": "one and one"},
        ]
    },
    "tools": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "find", "content": "[1]", "tool_call_id": "call00001"},
            ANSWER,
        ],
        "tools": [TOOL],
    },
}

MEANINGS = {
    "refused here": "the row is refused, for the reason in brackets; trl masks what it gets",
    "refused by trl's": "the training template raises or has another number of runs of masked "
    "tokens than answers",
    "goes on after the stop": "trl also learns what the template writes after the stop token "
    "(a newline, mostly), which a model that stops never writes",
    "without its stop": "trl's mask ends before the stop token, so that the model does not learn "
    "to stop",
    "begins in the prompt": "trl also learns the end of the generation prompt, which is given at "
    "inference",
    "begins later": "trl leaves out the beginning of what the model must write",
    "joined at the border": "the same text, but trl's tokens are those of the whole text, in which "
    "prompt and answer merge or part otherwise than at inference",
    "other ids before": "the ids before the answer are not those of inference: an earlier turn's "
    "reasoning, which the template takes out, or an empty one, which it writes, is not the same",
    "learned as history": "an earlier answer is learned in the form that the history has: without "
    "its reasoning, or with another end, which is not what the model must write",
    "other ids learned": "the template's generation prompt is empty (after a tool's result), so "
    "that the model must write the header itself; trl does not learn it",
}


def compare_masks() -> list[dict[str, Any]]:
    """For each training template and chat: answers, those that are the same, differences."""
    pairs = [(f"{name}_training", name) for name in NAMES if f"{name}_training" in NAMES]
    return [
        {"template": theirs, "chat": title, **_compare(theirs, ours, chat)}
        for theirs, ours in pairs
        for title, chat in CHATS.items()
    ]


def _compare(theirs: str, ours: str, chat: dict[str, Any]) -> dict[str, Any]:
    answers = sum(message["role"] == "assistant" for message in chat["messages"])
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    same = 0

    def note(kind: str, shown: str, count: int = 1) -> None:
        kinds[kind] += count
        examples.setdefault(kind, shown.replace("\n", "\\n").replace("|", "\\|").replace("`", "'"))

    template = template_of(theirs, ours)
    marked = _marked(theirs, ours, chat)
    learned = _learned(ours, theirs, chat)
    if isinstance(learned, str):
        note("refused here", learned, answers)
    elif isinstance(marked, str) or len(marked) != len(learned):
        note("refused by trl's", marked if isinstance(marked, str) else str(len(marked)), answers)
    else:
        for number, (mine, other) in enumerate(zip(learned, marked, strict=True), start=1):
            found = _differences(mine, other, template, earlier=number < len(learned))
            same += not found
            for kind, shown in found:
                note(kind, shown)
    return {"answers": answers, "same": same, "differences": dict(kinds), "examples": examples}


def _learned(name: str, tokens_of: str, chat: dict[str, Any]) -> list[Run] | str:
    """Our answers under the template that the model is used with; the refusal's kind if refused."""
    template = template_of(name, tokens_of)
    try:
        example = to_example(chat, format="messages")
        document = render_example(example, template, origin=Origin("t", 0)).document
    except RowError as error:
        return error.fault.kind
    return list(paths_before_targets(document).values()) if document is not None else []


def _marked(name: str, tokens_of: str, chat: dict[str, Any]) -> list[Run] | str:
    """Runs of tokens that trl masks as the assistant's."""
    tokenizer = template_of(name, tokens_of).tokenizer
    try:
        out = tokenizer.apply_chat_template(
            chat["messages"],
            tools=chat.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:
        # A template is foreign code: whatever it raises is a refusal.
        return str(error).splitlines()[0]
    ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    starts = [at for at, one in enumerate(mask) if one and not (at and mask[at - 1])]
    ends = [at for at, one in enumerate([*mask, 0]) if not one and at and mask[at - 1]]
    return [(ids[:start], ids[start:end]) for start, end in zip(starts, ends, strict=True)]


def _differences(mine: Run, other: Run, template: Any, *, earlier: bool) -> list[tuple[str, str]]:
    """Kinds of difference, each with the tokens that show it."""
    (before, learned), (above, marked) = mine, other
    if before == above and learned == marked:
        return []
    found: list[tuple[str, str]] = []
    text, marked_text = template.decode(learned), template.decode(marked)
    start = marked_text.find(text)
    if start >= 0:
        lead, tail = marked_text[:start], marked_text[start + len(text) :]
        if tail:
            found.append(("goes on after the stop", tail))
    else:
        at = text.find(marked_text)
        lead = ""
        if at < 0:
            kind = "learned as history" if earlier else "other ids learned"
            return [(kind, f"{marked_text[:40]} / {text[:40]}")]
        if at > 0:
            found.append(("begins later", text[:at]))
            before = before + template.encode([text[:at]])[0]
        if text[at + len(marked_text) :]:
            found.append(("without its stop", text[at + len(marked_text) :]))
    prompt, theirs = template.decode(before), template.decode(above) + lead
    if lead:
        found.append(("begins in the prompt", lead))
    if prompt != theirs:
        found.append(("other ids before", _odd(prompt, theirs)))
    elif not found:
        found.append(("joined at the border", marked_text[:20]))
    return found


def _odd(mine: str, theirs: str) -> str:
    """Where two texts begin to differ: ours, then theirs."""
    same = next(
        (at for at, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), 0
    )
    return f"{mine[max(0, same - 10) : same + 20]} / {theirs[max(0, same - 10) : same + 20]}"
