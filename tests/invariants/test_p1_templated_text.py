"""P1 for texts that a template has written: what the same chat as messages teaches, or refused."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from template_oracle import NAMES, make_chat, template_of
from tunesmith.data.formats.detect import to_example
from tunesmith.data.formats.examples import read_chat
from tunesmith.data.rendering.render import render_example
from tunesmith.data.rendering.turns import render_all
from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.template import Template
from tunesmith.data.templates.turn_pattern import find_turn_pattern
from tunesmith.types import Document, Origin

pytestmark = pytest.mark.skipif(not NAMES, reason="trl, whose templates these are, is missing")
CHATS = 20
PLAIN = {"cohere", "gemma3", "lfm2", "llama3_1", "phi3", "qwen2_5", "qwen3_instruct_2507"}
"""Some templates under which every answer of a text stands there as the model must write it."""


def document(row: dict, template: Template, train_on: str) -> Document | str | None:
    """The document, or the refusal's kind."""
    format = "messages" if "messages" in row else "templated_text"
    try:
        example = to_example(row, format=format)
        return render_example(
            example, template, train_on=train_on, origin=Origin("made", 0)
        ).document
    except RowError as error:
        return error.fault.kind


def answers(document: Document) -> list[tuple[list[int], list[int]]]:
    """The ids before each learned run and those of the run, found without message numbers."""
    found: list[tuple[list[int], list[int]]] = []
    for segment in document.segments:
        above: list[int] = []
        parent = segment.parent
        while parent >= 0:
            above = document.segments[parent].ids.tolist() + above
            parent = document.segments[parent].parent
        ids, places = segment.ids.tolist(), segment.index.tolist()
        for number, place in enumerate(places):
            if number and places[number - 1] == place - 1:
                found[-1][1].append(ids[place])
            else:
                found.append((above + ids[:place], [ids[place]]))
    return sorted(found)


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_a_templated_chat_is_the_chat_or_refused(name, train_on):
    outcomes = compared(name, train_on, random.Random(name))
    if name in PLAIN:
        assert set(outcomes) == {"same"}


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    name=st.sampled_from(NAMES or ["none"]),
    train_on=st.sampled_from(["assistant", "last"]),
    draw=st.randoms(use_true_random=False),
)
def test_any_templated_chat_is_the_chat_or_refused(name, train_on, draw):
    compared(name, train_on, draw, chats=1)


def compared(name: str, train_on: str, draw: random.Random, chats: int = CHATS) -> Counter[str]:
    """What became of the texts of chats that can be learned as messages."""
    template = template_of(name)
    outcomes: Counter[str] = Counter()
    for _ in range(chats):
        chat = make_chat(draw)
        asked = document(chat, template, train_on)
        if not isinstance(asked, Document):
            continue
        text = render_all(read_chat(chat), template)
        given = document({"text": text}, template, "auto" if train_on == "assistant" else "last")
        if isinstance(given, Document):
            assert answers(given) == answers(asked), text
        outcomes[given if isinstance(given, str) else "same"] += 1
    return outcomes


@pytest.mark.parametrize("name", NAMES or ["none"])
def test_a_quoted_control_token_is_found(name):
    template = template_of(name)
    plain = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "No."}]
    if not isinstance(document({"text": written(template, plain)}, template, "auto"), Document):
        pytest.skip("no such text is read")
    tokens = {token for ends in find_turn_pattern(template).gaps for token in ends if token}
    bad = []
    for quoted in (*sorted(tokens), find_turn_pattern(template).opening):
        for number in range(2):
            chat = [dict(turn) for turn in plain]
            chat[number]["content"] = f"Say {quoted} please."
            text = written(template, chat)
            if f"Say {quoted}" not in text:
                continue  # the template itself takes it out
            if isinstance(document({"text": text}, template, "auto"), Document):
                bad.append((quoted, number))
    # Nothing ends a turn of this template, so one that is quoted is one.
    assert bad == ([("<|user|>", 0)] if name == "glm4moe_training" else [])


def written(template: Template, messages: list[dict]) -> str:
    try:
        return template.render(messages)
    except RowError:
        return ""
