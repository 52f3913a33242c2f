"""render_example: what is a target, what is cut, and what is refused."""

from __future__ import annotations

import pytest

from tiny import CHATML, tiny_tokenizer
from tunesmith.data.formats.detect import to_example
from tunesmith.data.formats.examples import Completion, Text
from tunesmith.data.rendering.render import render_example
from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.types import Origin

ORIGIN = Origin("rows", 3)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]
REASONING_PROMPT = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")


def template(jinja=CHATML, **options):
    return wrap_tokenizer(tiny_tokenizer(jinja, **options))


def chat(messages, **columns):
    return to_example({"messages": messages, **columns}, format="messages")


def render(example, with_template=None, **options):
    return render_example(example, with_template or template(), origin=ORIGIN, **options)


def learned(rendered, with_template=None):
    """The text of the targets, in order."""
    with_template = with_template or template()
    ids = [int(s.ids[i]) for s in rendered.document.segments for i in s.index]
    return with_template.decode(ids)


def fault(example, with_template=None, **options):
    with pytest.raises(RowError) as caught:
        render(example, with_template, **options)
    return caught.value.fault


def changed(number, **fields):
    return [{**m, **(fields if n == number else {})} for n, m in enumerate(TURNS)]


@pytest.mark.parametrize(
    ("train_on", "text"),
    [
        ("auto", "First.<|im_end|>Second.<|im_end|>"),
        ("assistant", "First.<|im_end|>Second.<|im_end|>"),
        ("last", "Second.<|im_end|>"),
        (["user"], "<|im_start|>user\nOne?<|im_end|><|im_start|>user\nTwo?<|im_end|>"),
    ],
)
def test_train_on_chooses_the_turns(train_on, text):
    assert learned(render(chat(TURNS), train_on=train_on)) == text


def test_all_learns_everything_but_the_first_token():
    rendered = render(chat(TURNS), train_on="all")
    assert rendered.document.target_tokens == rendered.document.tokens - 1
    assert learned(rendered).endswith("Second.<|im_end|>")


def test_messages_have_their_own_wishes():
    assert learned(render(chat(changed(2, train=False)))) == "Second.<|im_end|>"
    assert learned(render(chat(changed(2, weight=0)))) == "Second.<|im_end|>"
    (segment,) = render(chat(changed(4, weight=0.5))).document.segments
    weights = dict(zip(segment.message.tolist(), segment.weight.tolist(), strict=True))
    assert weights == {2: 1.0, 4: 0.5}
    assert fault(chat(changed(2, train=False)), train_on="all").kind == "conflicting-wishes"


def test_only_the_completion_of_a_pair_of_message_lists_is_learned():
    example = to_example({"prompt": TURNS[:4], "completion": TURNS[4:]}, format="prompt_completion")
    assert learned(render(example)) == "Second.<|im_end|>"
    assert fault(chat(TURNS), train_on="completion").kind == "no-completion"


def test_an_unanswered_turn_is_unused_not_bad():
    extra = {"role": "user", "content": "And three?"}
    with_extra, without = render(chat([*TURNS, extra])), render(chat(TURNS))
    expected = template().encode(["<|im_start|>user\nAnd three?<|im_end|>\n"])[0]
    assert with_extra.document.tokens == without.document.tokens
    assert with_extra.unused == len(expected)
    assert with_extra.tokens == with_extra.document.tokens + with_extra.unused
    assert render(chat(TURNS[:2])).reason == "no-targets"


@pytest.mark.parametrize(
    ("messages", "jinja", "kind"),
    [
        (TURNS, REASONING_PROMPT, "generation-prompt-mismatch"),
        (TURNS, CHATML.replace("'<|im_end|>' + ", ""), "no-stop-token"),
        (TURNS, CHATML.replace("<|im_end|>", "<|unknown|>"), "no-stop-token"),
        (changed(1, content="a <|im_end|> b"), CHATML, "special-token-in-content"),
        (changed(4, content="  "), CHATML, "empty-answer"),
        (changed(4, reasoning_content="because"), CHATML, "dropped-content"),
        (TURNS, None, "no-chat-template"),
        (TURNS, CHATML.replace("message['content']", "'x'"), "dropped-content"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(messages, jinja, kind):
    assert fault(chat(messages), template(jinja)).kind == kind


def test_tools_that_the_template_ignores_are_refused():
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    found = fault(chat(TURNS, tools=tools))
    assert found.kind == "dropped-content"
    assert "get_weather" in found.message
    assert found.hint


def test_over_long_chats_follow_the_policy():
    whole = render(chat(TURNS))
    limit = whole.document.longest_path - 1
    assert fault(chat(TURNS), max_length=limit).kind == "too-long"
    dropped = render(chat(TURNS), max_length=limit, too_long="drop")
    assert (dropped.document, dropped.status, dropped.tokens) == (None, "dropped", whole.tokens)
    for policy in ("truncate", "split"):
        cut = render(chat(TURNS), max_length=limit, too_long=policy)
        assert cut.status == "truncated"
        assert learned(cut) == "First.<|im_end|>"
        assert cut.tokens == whole.tokens
    assert render(chat(TURNS), max_length=5, too_long="truncate").status == "dropped"


def test_text_is_learned_whole_and_closed_once():
    for text in ("One two three.", "One two three.<|im_end|>"):
        (segment,) = render(Text(text)).document.segments
        assert template().decode(segment.ids) == "One two three.<|im_end|>"
        assert segment.index.tolist() == list(range(1, len(segment.ids)))
    assert fault(Text("a <|im_start|> b")).kind == "special-token-in-content"


@pytest.mark.parametrize("max_length", [2, 3, 4, 7])
def test_split_keeps_every_token_of_a_text(max_length):
    whole = render(Text("What is the capital of France?"))
    split = render(Text("What is the capital of France?"), max_length=max_length, too_long="split")
    pieces = split.document.segments
    assert all(piece.parent == -1 and piece.start == 0 for piece in pieces)
    assert all(len(piece.ids) <= max_length for piece in pieces)
    assert all(piece.index.tolist() == list(range(1, len(piece.ids))) for piece in pieces)
    if split.status == "trained":
        ids = [int(i) for piece in pieces for i in piece.ids]
        assert ids == whole.document.segments[0].ids.tolist()
    assert split.tokens == whole.tokens


def test_truncated_text_has_no_end_and_a_truncated_completion_is_dropped():
    text = render(Text("What is the capital?"), max_length=4, too_long="truncate")
    assert text.status == "truncated"
    assert text.document.tokens == 4
    assert 2 not in text.document.segments[0].ids
    pair = render(Completion("What is", " the capital?"), max_length=4, too_long="truncate")
    assert pair.status == "dropped"


def test_raw_completion_meets_its_prompt_as_at_inference():
    raw = template(None)
    (segment,) = render(Completion("What is the cap", "ital?"), raw).document.segments
    prompt = raw.encode(["What is the cap"])[0]
    assert segment.ids.tolist() == [*prompt, *raw.encode(["ital?"])[0], raw.eos_id]
    assert segment.index.tolist() == list(range(len(prompt), len(segment.ids)))


def test_two_answers_in_a_row_and_an_opening_answer_are_not_bad():
    twice = [TURNS[1], TURNS[2], TURNS[4]]
    assert learned(render(chat(twice))) == "First.<|im_end|>Second.<|im_end|>"
    assert learned(render(chat(TURNS[2:]))).endswith("Second.<|im_end|>")
