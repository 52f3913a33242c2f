"""Whatever chat format a row has, its messages and its prompt and completion teach the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_document_store import same

from tiny import CHATML, tiny_tokenizer
from tunesmith.data.formats.convert import convert_row
from tunesmith.data.formats.detect import COLUMNS, FORMATS, to_example
from tunesmith.data.rendering.render import Rendered, render_example
from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.types import Origin

# Tools and a template's argument show in the text, so that one that is lost is seen.
SHOWN = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}"
TEMPLATE = wrap_tokenizer(tiny_tokenizer(SHOWN + CHATML))

words = st.lists(
    st.sampled_from(["river", "42", "Oslo?", "é", "日本", "{}", '"', "I'll"]),
    min_size=1,
    max_size=6,
).map(" ".join)
tool = st.fixed_dictionaries({"name": words, "description": words, "parameters": st.just({})})
more = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.lists(tool, min_size=1, max_size=2),
        "chat_template_kwargs": st.fixed_dictionaries({"mood": words}),
        "id": st.integers(),
    },
)


def said(role: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"role": st.just(role), "content": words},
        optional={"train": st.booleans(), "weight": st.sampled_from([0.5, 1, 2])}
        if role == "assistant"
        else {},
    )


@st.composite
def turns(draw, least: int = 1) -> list[dict[str, Any]]:
    found = [draw(said("system"))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(least, 3))):
        found += [draw(said("user")), draw(said("assistant"))]
    return found


def turned(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in chat]


def preference_row(chat: list[dict[str, Any]]) -> dict[str, Any]:
    return {"chosen": chat, "rejected": [*chat[:-1], {**chat[-1], "content": "something else"}]}


pairs = st.lists(st.tuples(words, words), max_size=2)
ROWS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "messages": turns().map(lambda chat: {"messages": chat}),
    "sharegpt": turns().map(lambda chat: {"conversations": turned(chat)}),
    "preference": st.one_of(
        turns().map(preference_row),
        st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}),
    ),
    "prompt_completion": st.one_of(
        st.fixed_dictionaries({"prompt": words, "completion": words}),
        turns().map(lambda chat: {"prompt": chat[:-1], "completion": chat[-1:]}),
    ),
    "alpaca": st.fixed_dictionaries(
        {"instruction": words, "output": words},
        optional={"input": st.one_of(words, st.just("")), "history": pairs, "system": words},
    ),
}


def learned(row: dict[str, Any], format: str) -> Rendered | str:
    """What the row teaches, or the kind of its refusal."""
    try:
        return render_example(to_example(row, format=format), TEMPLATE, origin=Origin("made", 0))
    except RowError as error:
        return error.fault.kind


def converted(messages: dict[str, Any]) -> dict[str, Any] | None:
    """As prompt and completion; None for a chat that has more than one answer."""
    answers = [turn for turn in messages["messages"] if turn["role"] == "assistant"]
    if len(answers) == 1:
        return convert_row(messages, format="messages", to="prompt_completion")
    with pytest.raises(RowError) as caught:
        convert_row(messages, format="messages", to="prompt_completion")
    assert caught.value.fault.kind == "not-convertible"
    return None


def teach_the_same(one: Rendered | str, other: Rendered | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if one.document is None or other.document is None:
        return one.document is other.document
    return same(one.document, other.document)


@pytest.mark.parametrize("format", ROWS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_row_as_messages_and_back_teaches_the_same(format, data):
    row = {**data.draw(ROWS[format]), **data.draw(more)}
    before = learned(row, format)
    messages = convert_row(row, format=format, to="messages")
    assert teach_the_same(learned(messages, "messages"), before)
    assert messages.get("id") == row.get("id")
    assert not (set(messages) & set(COLUMNS[format])) - {
        "messages",
        "tools",
        "chat_template_kwargs",
    }
    back = converted(messages)
    if back is None:
        return
    assert teach_the_same(learned(back, "prompt_completion"), before)
    again = convert_row(back, format="prompt_completion", to="messages")
    assert teach_the_same(learned(again, "messages"), before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(row=ROWS["prompt_completion"], other=more)
def test_a_completion_comes_back_from_messages(row, other):
    row = {**row, **other}
    direct = convert_row(row, format="prompt_completion", to="prompt_completion")
    assert teach_the_same(learned(direct, "prompt_completion"), learned(row, "prompt_completion"))


@pytest.mark.parametrize("format", sorted(set(FORMATS) - set(ROWS)))
def test_what_is_no_chat_is_refused(format):
    values = {
        "text": "a",
        "segments": [{"text": "a<|im_end|>", "train": True}],
        "input_ids": [5, 2],
    }
    row = {name: values[name] for name in FORMATS[format]}
    with pytest.raises(RowError) as caught:
        convert_row(row, format=format, to="messages")
    assert caught.value.fault.kind == "not-convertible"
    assert caught.value.fault.hint
