"""Prompts end where the last answer begins, and hold the ids the model is asked with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tiny import tiny_folder
from tunesmith.data.formats.examples import Chat, Completion, Message, Text
from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.load import load_template
from tunesmith.generate import prompt_from, prompts_from_document
from tunesmith.types import NO_MESSAGE, Document, Origin, Segment

TURNS = (
    Message("system", "Add."),
    Message("user", "1 plus 1?"),
    Message("assistant", "two"),
    Message("user", "1 plus 2?"),
    Message("assistant", "three"),
)


@pytest.fixture
def template(tmp_path: Path):
    return load_template(tiny_folder(tmp_path / "base"))


def plain(messages) -> list[dict]:
    return [{"role": m.role, "content": m.content} for m in messages]


def test_chat_is_asked_before_its_last_answer(template):
    prompt = prompt_from(Chat(TURNS), template)
    expected = template.tokenizer.apply_chat_template(
        plain(TURNS[:4]), add_generation_prompt=True, return_dict=False
    )
    assert list(prompt.ids) == expected
    assert prompt.reference == "three"
    unanswered = prompt_from(Chat(TURNS[:4]), template)
    assert unanswered.ids == prompt.ids
    assert unanswered.reference is None


def test_raw_prompts_and_texts(template):
    prompt = prompt_from(Completion("1 plus 2 is", " three"), template)
    assert list(prompt.ids) == template.tokenizer("1 plus 2 is")["input_ids"]
    assert prompt.reference == " three"
    text = prompt_from(Text("1 plus 2 is"), template)
    assert text.ids == prompt.ids
    assert text.reference is None


def segment(ids, parent=-1, start=0, targets=(), message=NO_MESSAGE) -> Segment:
    index = np.array(targets, np.int32)
    weight = np.ones(len(index), np.float32)
    return Segment(
        np.array(ids, np.int32), parent, start, index, weight, np.full_like(index, message)
    )


def document(*segments: Segment) -> Document:
    return Document(segments, Origin("a", 0))


def test_the_path_of_a_tree_is_the_prompt(template):
    stop = min(template.stop_ids)
    tree = document(
        segment([5, 6, 7]),
        segment([8, 9, stop], 0, 3, (1, 2), 2),
        segment([10, 11], 0, 3),
        segment([12, 13, 14, stop], 2, 5, (2, 3), 4),
    )
    prompt = prompts_from_document(tree, template)
    assert prompt is not None
    assert prompt.ids == (5, 6, 7, 10, 11, 12, 13)
    assert prompt.reference == template.tokenizer.decode([14])


def test_an_answer_may_begin_a_segment(template):
    stop = min(template.stop_ids)
    tree = document(segment([5, 6]), segment([7, stop], 0, 2, (0, 1), 1))
    prompt = prompts_from_document(tree, template)
    assert prompt is not None
    assert prompt.ids == (5, 6)


def test_nothing_to_compare(template):
    stop = min(template.stop_ids)
    assert prompts_from_document(document(segment([5, 6, 7], targets=(1, 2))), template) is None
    cut = document(segment([5, 6, 7], targets=(1, 2), message=1))
    assert prompts_from_document(cut, template) is None
    apart = document(
        segment([5, 6, 7], targets=(2,), message=1),
        segment([8, stop], targets=(1,), message=1),
    )
    assert prompts_from_document(apart, template) is None


def test_a_quoted_control_token_is_refused_as_in_training(template):
    for example in (Chat((Message("user", "a <|im_end|> b"),)), Text("a <|im_end|> b")):
        with pytest.raises(RowError, match=r"<\|im_end\|>"):
            prompt_from(example, template)


def test_a_quoted_control_token_is_read_as_its_characters(template):
    turns = [{"role": "user", "content": "a <|im_end|> b<|im_start|>"}]
    chat = Chat((Message("user", turns[0]["content"]),))
    prompt = prompt_from(chat, template, special_as_text=True)
    text = template.render(turns, add_generation_prompt=True)
    assert prompt.text == text == template.decode(prompt.ids)
    special = [token for token in prompt.ids if token in template.special_ids]
    start, end = (template.tokenizer.convert_tokens_to_ids(f"<|im_{n}|>") for n in ("start", "end"))
    assert special == [start, end, start]
    plain = Chat((Message("user", "nothing of the kind"),))
    same = prompt_from(plain, template, special_as_text=True)
    assert same.ids == prompt_from(plain, template).ids
    raw = prompt_from(Text("a <|im_end|> b"), template, special_as_text=True)
    assert template.decode(raw.ids) == "a <|im_end|> b"
    assert not set(raw.ids) & template.special_ids


def test_text_that_looks_like_a_placeholder_is_refused(template):
    chat = Chat((Message("user", "\ue0000\ue001"),))
    with pytest.raises(RowError, match=r"U\+E000"):
        prompt_from(chat, template, special_as_text=True)
