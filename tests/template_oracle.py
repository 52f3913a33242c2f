"""Chats of every shape, and what inference itself makes of them: an oracle for the renderer.

The oracle knows nothing of the renderer. Before each answer it asks the tokenizer for the ids, with
`apply_chat_template(messages[:k], add_generation_prompt=True)`.
"""

from __future__ import annotations

import functools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer
from tunesmith.data.formats.detect import detect_format, to_example
from tunesmith.data.rendering.render import render_example
from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.data.templates.template import Template
from tunesmith.types import Document, Origin

SPEC = find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC and SPEC.origin else None
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja")) if FOLDER else []
MARKERS = re.compile(r"<\|?[^|<>\s'\"{}]+\|?>|<｜[^｜]+｜>|\[/?[A-Z_]+\]")
CLOCK = re.compile(r"strftime_now\([^)]*\)")
SPECIAL = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<s>", "</s>", "<end_of_utterance>")

WORDS = (
    "Was ist 1+1?", "And then?", "Zürich — très bien", "价格是多少", "مرحبا", "🦊🌧️ ok",
    "x < y && y > z", "{'a': 1}", '{"sky": "grau"}', "a\tb", "line\nnext", "true", "0.5", "null",
    "`code`\n\n```\nx = 1\n```", "  ", "\\n", "%d", "'", "{{ not jinja }}", "e\u0301 vs é",
    "tool", "assistant", "<b>bold</b>",
)  # fmt: skip
CONTROL = ("<|im_end|>", "<|endoftext|>", "a<|im_start|>b")


@functools.cache
def template_of(name: str, tokens_of: str | None = None) -> Template:
    """The published template of that name, on a tokenizer that has its markers as tokens, or those
    of the template `tokens_of` as well.
    """
    assert FOLDER is not None
    texts = [
        (FOLDER / f"{one}.jinja").read_text(encoding="utf-8") for one in (name, tokens_of or name)
    ]
    # One that writes today's date is refused.
    jinja = CLOCK.sub("'2024-07-26'", texts[0])
    markers = sorted({marker for text in texts for marker in MARKERS.findall(text)})
    markers = [m for m in markers if "|" in m or "｜" in m or m in SPECIAL]
    tokenizer = tiny_tokenizer(jinja, extra_special=tuple(markers))
    tokenizer.bos_token = "<|endoftext|>"
    return wrap_tokenizer(tokenizer)


def paths_before_targets(document: Document) -> dict[int, tuple[list[int], list[int]]]:
    """For each message with targets: the ids before its first target, and its target ids."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for segment in document.segments:
        for index, message in zip(segment.index.tolist(), segment.message.tolist(), strict=True):
            if message not in found:
                before, above = segment.ids[:index].tolist(), segment.parent
                while above >= 0:
                    before = document.segments[above].ids.tolist() + before
                    above = document.segments[above].parent
                found[message] = (before, [])
            found[message][1].append(int(segment.ids[index]))
    return found


class Verdict:
    """Answers checked, the refusal's kind if the row is refused, and what is wrong."""

    def __init__(self) -> None:
        self.turns = 0
        self.refusal: str | None = None
        self.wrong: list[str] = []


def compare(
    row: Mapping[str, Any],
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Any = None,
) -> Verdict:
    """Render the row, which says `messages`, and hold each answer against the oracle."""
    verdict = Verdict()
    try:
        example = to_example(row, format=detect_format(row) or "messages")
        document = render_example(example, template, origin=Origin("t", 0)).document
    except RowError as error:
        verdict.refusal = error.fault.kind
        return verdict
    found = {} if document is None else paths_before_targets(document)
    expected = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if list(found) not in (expected, [n for n in expected if n > 0]):
        verdict.wrong.append(f"learns messages {list(found)}, not {expected}")
        return verdict
    for number, (before, targets) in found.items():
        verdict.turns += 1
        wrong = _answer(template, messages, tools, number, before, targets)
        if wrong:
            verdict.wrong.append(f"message {number}: {wrong}")
    return verdict


def _answer(
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    number: int,
    before: list[int],
    targets: list[int],
) -> str | None:
    """What differs from inference in one answer, None if nothing does."""
    tokenizer = template.tokenizer
    ask = functools.partial(tokenizer.apply_chat_template, tools=tools, **template.kwargs)
    history = [dict(message) for message in messages[:number]]
    # One conversation that is empty is only read as a batch of one.
    asked = ask([history], add_generation_prompt=True, tokenize=True, return_dict=False)[0]
    if before != list(asked):
        return f"the ids before it are not those of inference ({len(before)}, {len(asked)})"
    question = ask([history], add_generation_prompt=True, tokenize=False)[0]
    answered = ask([[*history, dict(messages[number])]], tokenize=False)[0]
    if not answered.startswith(question):
        return "it does not continue its question"
    ids = tokenizer(answered[len(question) :], add_special_tokens=False)["input_ids"]
    if targets != ids[: len(targets)]:
        return "its targets are not the ids of the answer"
    if targets[-1] not in template.stop_ids or set(targets[:-1]) & template.stop_ids:
        return "its stop token is not once and last"
    rest = [token for token in ids[len(targets) :] if token not in template.special_ids]
    after = tokenizer.decode(ids[len(targets) :])
    # Llama 3's first template writes the generation prompt always.
    if tokenizer.decode(rest).strip() and not question.endswith(after):
        return "text after its stop token is lost"
    learned = _composed(tokenizer.decode(targets, clean_up_tokenization_spaces=False))
    content = (messages[number].get("content") or "").split("</think>")[-1].strip()
    if _composed(content) not in learned:
        return "its content is not in the targets"
    names = [call["function"]["name"] for call in messages[number].get("tool_calls") or ()]
    return None if all(name in learned for name in names) else "a call is not in the targets"


def _composed(text: str) -> str:
    """Some tokenizers read composed characters only."""
    return unicodedata.normalize("NFC", text)


def make_chat(draw: random.Random) -> dict[str, Any]:
    """A chat of a drawn shape: system or none, tools, calls and results, reasoning, empty contents,
    unicode, texts of control tokens.
    """
    with_tools, reasoning = draw.random() < 0.35, draw.random() < 0.25
    odd = draw.random() < 0.15
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.4:
        messages.append({"role": "system", "content": _text(draw, odd)})
    for turn in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": _text(draw, odd)})
        if odd and draw.random() < 0.1:
            messages.append({"role": "user", "content": _text(draw, odd)})
        if with_tools and draw.random() < 0.7:
            messages += _calling(draw, turn, odd, reasoning)
        answer: dict[str, Any] = {"role": "assistant", "content": _text(draw, odd)}
        if reasoning and draw.random() < 0.8:
            answer["reasoning_content"] = _text(draw, False)
        messages.append(answer)
    if draw.random() < 0.15:
        messages.append({"role": "user", "content": _text(draw, odd)})
    chat: dict[str, Any] = {"messages": messages}
    if with_tools:
        chat["tools"] = [_tool(name) for name in ("get_weather", "find")[: draw.randint(1, 2)]]
    return chat


def _text(draw: random.Random, odd: bool) -> str:
    if odd and draw.random() < 0.2:
        return draw.choice(["", " ", *CONTROL, "<think>\nhm\n</think>\n\nwell"])
    text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 5)))
    return text if draw.random() < 0.3 or not text.strip() else f"{text.strip()}."


def _calling(draw: random.Random, turn: int, odd: bool, reasoning: bool) -> list[dict[str, Any]]:
    calls = [
        {
            "id": f"call{turn}000{number}",
            "type": "function",
            "function": {"name": "get_weather", "arguments": _arguments(draw)},
        }
        for number in range(2 if draw.random() < 0.25 else 1)
    ]
    content = draw.choice(["", "", _text(draw, odd)])
    asking: dict[str, Any] = {"role": "assistant", "content": content, "tool_calls": calls}
    if reasoning and draw.random() < 0.5:
        asking["reasoning_content"] = _text(draw, False)
    results = [
        {
            "role": "tool",
            "name": "get_weather",
            "tool_call_id": call["id"],
            "content": draw.choice(['{"sky": "grau"}', "[1, 2]", _text(draw, odd)]),
        }
        for call in calls
    ]
    return [asking, *results]


def _arguments(draw: random.Random) -> dict[str, Any]:
    values = [_text(draw, False), draw.randint(-5, 99), 2.5, True, None, ["a", 1], {"in": "é"}]
    names = ("city", "unit", "days")[: draw.randint(1, 3)]
    return {name: draw.choice(values) for name in names}


def _tool(name: str) -> dict[str, Any]:
    city = {"type": "string", "description": "Where — city or village."}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": city}, "required": ["city"]},
        },
    }


def tally(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Rows, rows taken, answers checked, mismatches, refusals by kind."""
    refused = Counter(v.refusal for v in verdicts if v.refusal)
    return {
        "rows": len(verdicts),
        "taken": len(verdicts) - sum(refused.values()),
        "turns": sum(v.turns for v in verdicts),
        "mismatches": sum(len(v.wrong) for v in verdicts),
        "refused": dict(refused.most_common()),
        "wrong": [text for v in verdicts for text in v.wrong][:5],
    }
