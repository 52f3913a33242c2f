import pytest

from tunesmith.data.formats.detect import detect_format, to_example
from tunesmith.data.formats.examples import Chat, Completion, Message, Text
from tunesmith.data.row_errors import RowError

ASK = {"role": "user", "content": "2+2?"}
SAY = {"role": "assistant", "content": "4"}


def chat(*messages, **columns):
    return to_example({"messages": list(messages), **columns}, format="messages")


def fault(format="messages", **values):
    with pytest.raises(RowError) as caught:
        to_example(values, format=format)
    return caught.value.fault


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None, "text": "x"}, "text"),
        ({"prompt": "p", "completion": "c", "text": "x"}, "prompt_completion"),
        ({"text": None}, "text"),
        ({"prompt": "p"}, None),
        ({"question": "q", "answer": "a"}, None),
    ],
)
def test_the_format_is_told_by_the_columns(values, format):
    assert detect_format(values) == format


def test_train_and_weight_are_taken_out_of_what_the_template_sees():
    example = chat(ASK, {**SAY, "train": False, "weight": 2, "name": "Ann", "tool_calls": None})
    answer = example.messages[1]
    assert (answer.train, answer.weight) == (False, 2.0)
    assert answer.to_dict() == {"role": "assistant", "content": "4", "name": "Ann"}


def test_tool_calls_and_tools_become_objects():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    example = chat(
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        SAY,
        tools='[{"type": "function", "function": {"name": "add"}}]',
        chat_template_kwargs={"enable_thinking": False, "other": None},
    )
    calling = example.messages[1]
    assert calling.content is None
    assert calling.fields["tool_calls"][0]["function"]["arguments"] == {"a": 2}
    assert example.tools == [{"type": "function", "function": {"name": "add"}}]
    assert example.template_kwargs == {"enable_thinking": False}
    assert not calling.empty


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert chat({"role": "user", "content": parts}, SAY).messages[0].content == "2+2?"


def test_strings_become_two_turns_or_stay_raw():
    row = {"prompt": "2+2?", "completion": "4"}
    templated = to_example(row, format="prompt_completion", templated=True)
    assert templated == Chat(
        (Message("user", "2+2?"), Message("assistant", "4")), first_completion=1
    )
    raw = to_example(row, format="prompt_completion", templated=False)
    assert raw == Completion("2+2?", "4")


def test_message_lists_keep_where_the_completion_begins():
    row = {"prompt": [ASK, SAY, ASK], "completion": [SAY]}
    example = to_example(row, format="prompt_completion")
    assert isinstance(example, Chat)
    assert len(example.messages) == 4
    assert example.first_completion == 3


def test_text_is_text():
    assert to_example({"text": "abc"}, format="text") == Text("abc")


@pytest.mark.parametrize("turns", [[SAY, ASK, SAY], [ASK, ASK, SAY], [ASK, SAY, ASK]])
def test_unusual_orders_of_turns_are_not_bad(turns):
    assert [message.to_dict() for message in chat(*turns).messages] == turns


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("hello", "wrong-type"),
        ({"content": "x"}, "unknown-role"),
        ({"role": "", "content": "x"}, "unknown-role"),
        ({"role": 3, "content": "x"}, "unknown-role"),
        ({"role": "user", "content": 3}, "wrong-type"),
        ({"role": "user", "content": [{"type": "image"}]}, "wrong-type"),
        ({"role": "user", "content": None}, "wrong-type"),
        ({"role": "assistant", "content": None}, "empty-answer"),
        ({**SAY, "train": "yes"}, "wrong-type"),
        ({**SAY, "weight": -1}, "wrong-type"),
        ({**SAY, "weight": float("nan")}, "wrong-type"),
        ({**SAY, "weight": float("inf")}, "wrong-type"),
        ({**SAY, "weight": True}, "wrong-type"),
        ({**SAY, "tool_calls": {"name": "f"}}, "wrong-type"),
        ({**SAY, "tool_calls": [{"function": {"arguments": {}}}]}, "wrong-type"),
        ({**SAY, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "wrong-type"),
        ({**SAY, "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}, "wrong-type"),
    ],
)
def test_bad_messages_name_their_place(message, kind):
    found = fault(messages=[ASK, message])
    assert found.kind == kind
    assert "messages[1]" in found.message


@pytest.mark.parametrize(
    ("values", "format", "kind"),
    [
        ({"messages": []}, "messages", "empty-messages"),
        ({"messages": "hello"}, "messages", "wrong-type"),
        ({"prompt": "p"}, "prompt_completion", "missing-column"),
        ({"prompt": "p", "completion": None}, "prompt_completion", "missing-column"),
        ({"prompt": "p", "completion": " \n"}, "prompt_completion", "empty-answer"),
        ({"prompt": "p", "completion": [SAY]}, "prompt_completion", "wrong-type"),
        ({"prompt": 1, "completion": 2}, "prompt_completion", "wrong-type"),
        ({"prompt": [ASK], "completion": []}, "prompt_completion", "empty-messages"),
        ({"text": 3}, "text", "wrong-type"),
        ({"text": ""}, "text", "empty-text"),
        ({"messages": [SAY], "tools": "{"}, "messages", "wrong-type"),
        ({"messages": [SAY], "tools": [1]}, "messages", "wrong-type"),
        ({"messages": [SAY], "chat_template_kwargs": 1}, "messages", "wrong-type"),
    ],
)
def test_bad_rows_have_a_kind(values, format, kind):
    assert fault(format, **values).kind == kind


@pytest.mark.parametrize(
    ("message", "empty"),
    [
        (Message("assistant", " "), True),
        (Message("assistant", "x"), False),
        (Message("assistant", "", {"reasoning_content": "hm"}), False),
        (Message("assistant", "", {"tool_calls": []}), True),
    ],
)
def test_an_empty_turn_says_nothing(message, empty):
    assert message.empty is empty
