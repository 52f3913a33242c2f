"""P1: every target is predicted from exactly the ids that inference has, for real templates.

The oracle knows nothing of the renderer: before each answer it asks the tokenizer itself, with
`apply_chat_template(messages[:i], add_generation_prompt=True)`, for the ids.
"""

from __future__ import annotations

import pytest

from template_oracle import NAMES, paths_before_targets, template_of
from tunesmith.data.formats.detect import to_example
from tunesmith.data.rendering.render import render_example
from tunesmith.data.row_errors import RowError
from tunesmith.types import Origin

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich"}},
}
U1, A1 = {"role": "user", "content": "Was ist 1+1?"}, {"role": "assistant", "content": "Zwei."}
U2, A2 = {"role": "user", "content": "And 3+4?"}, {"role": "assistant", "content": "Seven: 7 ✓"}
SYSTEM = {"role": "system", "content": "Be brief — très bref."}
TOOL = {
    "role": "tool",
    "name": "get_weather",
    "tool_call_id": "call00001",
    "content": '{"sky": "grau"}',
}
CHATS = {
    "one": {"messages": [U1, A1]},
    "system": {"messages": [SYSTEM, U1, A1]},
    "turns": {"messages": [U1, A1, U2, A2]},
    "system_turns": {"messages": [SYSTEM, U1, A1, U2, A2, U1]},
    "reasoning": {
        "messages": [
            U1,
            {**A1, "reasoning_content": "one and one"},
            U2,
            {**A2, "reasoning_content": "3 then 4"},
        ]
    },
    "tools": {
        "tools": [WEATHER],
        "messages": [
            U1,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            TOOL,
            {"role": "assistant", "content": "Cloudy."},
            U2,
            A2,
        ],
    },
}

# What the templates can't do, by fault and case; a name stands for its _training form too.
CHAT_CASES = ("one", "system", "turns", "system_turns")
ALL_CASES = (*CHAT_CASES, "reasoning", "tools")
REFUSALS = [
    # Contents as strings are left out or refused: written for lists of image and text parts.
    ("dropped-content", (*CHAT_CASES, "reasoning"), "idefics3 smolvlm"),
    ("template-refused", ("tools",), "idefics3 smolvlm"),
    ("template-refused", ALL_CASES, "llava_next"),
    # No place for reasoning, or none for tools.
    ("dropped-content", ("reasoning",), "gemma4 gemma4_v2 gemma4_v3 gemma4_v4 lfm2_v2 llama3_1"),
    ("dropped-content", ("reasoning",), "llama3_2 qwen2_5 qwen3_instruct_2507 qwen3_vl"),
    ("dropped-content", ("reasoning", "tools"), "cohere cohere2 gemma gemma3 lfm2 llama3 phi3"),
    ("dropped-content", ("reasoning", "tools"), "phi3_5 qwen2_5_vl"),
    # The generation prompt opens the reasoning, or closes it, and a rendered answer does not.
    ("generation-prompt-mismatch", ALL_CASES, "deepseek_r1_distill"),
    ("generation-prompt-mismatch", (*CHAT_CASES, "reasoning"), "deepseekv3"),
    ("template-refused", ("tools",), "deepseekv3:own"),
    ("generation-prompt-mismatch", ("tools",), "deepseekv3_training:own"),
    (
        "generation-prompt-mismatch",
        (*CHAT_CASES, "tools"),
        "nemotron_3_5_lightning nemotron_3_nano",
    ),
    ("generation-prompt-mismatch", (*CHAT_CASES, "tools"), "nemotron_3_super nemotron_3_ultra"),
    ("generation-prompt-mismatch", ("reasoning",), "qwen3_5_nothink"),
    # An answer is closed by the header of the next turn, which is not there yet.
    ("no-stop-token", ALL_CASES, "glm4moe:own"),
    ("template-refused", ("system", "system_turns"), "gemma"),
]


def _refusal_table():
    table = {}
    for kind, cases, names in REFUSALS:
        for word in names.split():
            own = word.removesuffix(":own")
            for name in {own} if own != word else {own, f"{own}_training"}:
                table.update({(name, case): kind for case in cases if name in NAMES})
    return table


REFUSED = _refusal_table()


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_before_each_answer_are_those_of_inference(name, case):
    template, chat = template_of(name), CHATS[case]
    example = to_example(chat, format="messages", templated=True)
    if (name, case) in REFUSED:
        with pytest.raises(RowError) as caught:
            render_example(example, template, origin=Origin("t", 0))
        assert caught.value.fault.kind == REFUSED[name, case]
        return
    rendered = render_example(example, template, origin=Origin("t", 0))
    found = paths_before_targets(rendered.document)
    messages = chat["messages"]
    assert list(found) == [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    for number, (before, targets) in found.items():
        asked = template.tokenizer.apply_chat_template(
            messages[:number],
            tools=chat.get("tools"),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        assert before == asked
        answered = template.tokenizer.apply_chat_template(
            messages[: number + 1], tools=chat.get("tools"), tokenize=False
        )
        assert targets[-1] in template.stop_ids
        assert not set(targets[:-1]) & template.stop_ids
        question = template.tokenizer.apply_chat_template(
            messages[:number],
            tools=chat.get("tools"),
            add_generation_prompt=True,
            tokenize=False,
        )
        answer = template.tokenizer(answered[len(question) :], add_special_tokens=False)
        assert answered.startswith(question)
        assert targets == answer["input_ids"][: len(targets)]
        after = template.decode(answer["input_ids"][len(targets) :])
        assert after.strip() in ("", template.tokenizer.eos_token)  # phi3 closes a whole chat so
        assert messages[number]["content"] in template.decode(targets)
        assert messages[number].get("reasoning_content", "") in template.decode(targets)


def test_there_are_templates_to_check():
    pytest.importorskip("trl")
    assert len(NAMES) > 40
    assert set(REFUSED) <= {(name, case) for name in NAMES for case in CHATS}


def test_a_template_that_rewrites_history_branches_at_every_turn():
    pytest.importorskip("trl")
    example = to_example(CHATS["turns"], format="messages")
    branched = render_example(example, template_of("qwen3"), origin=Origin("t", 0)).document
    assert [segment.parent for segment in branched.segments] == [-1, 0, 0]
    straight = render_example(example, template_of("qwen2_5"), origin=Origin("t", 0)).document
    assert [segment.parent for segment in straight.segments] == [-1]
