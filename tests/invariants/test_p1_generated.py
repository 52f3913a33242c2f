"""P1 over generated chats, for published templates and, where there are some, real tokenizers."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from template_oracle import CONTROL, NAMES, compare, make_chat, tally, template_of
from tunesmith.data.templates.load import load_template

pytestmark = pytest.mark.skipif(not NAMES, reason="trl, whose templates these are, is missing")


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(name=st.sampled_from(NAMES or ["none"]), draw=st.randoms(use_true_random=False))
def test_a_generated_chat_is_as_at_inference_or_refused(name, draw):
    chat = make_chat(draw)
    verdict = compare(chat, template_of(name), chat["messages"], chat.get("tools"))
    assert not verdict.wrong
    assert verdict.turns or verdict.refusal


@pytest.mark.parametrize("name", NAMES or ["none"])
def test_every_published_template_is_as_at_inference_or_refuses(name):
    draw = random.Random(f"all {name}")
    chats = [make_chat(draw) for _ in range(8)]
    result = tally([compare(c, template_of(name), c["messages"], c.get("tools")) for c in chats])
    assert not result["wrong"]
    assert result["turns"] or sum(result["refused"].values()) == len(chats)


def test_the_generated_chats_are_of_every_shape():
    draw = random.Random(3)
    chats = [make_chat(draw) for _ in range(400)]
    turns = [turn for chat in chats for turn in chat["messages"]]
    said = [turn["content"] for turn in turns]
    starts = Counter(chat["messages"][0]["role"] for chat in chats)
    assert starts["system"] > 50
    assert starts["user"] > 50
    assert sum("tools" in chat for chat in chats) > 50
    assert sum(turn["role"] == "tool" for turn in turns) > 50
    assert sum(len(turn.get("tool_calls", ())) > 1 for turn in turns) > 10
    assert sum("reasoning_content" in turn for turn in turns) > 50
    assert sum(not text for text in said) > 20
    assert sum(not text.isascii() for text in said) > 200
    assert all(any(control in text for text in said) for control in CONTROL)
    assert sum(chat["messages"][-1]["role"] == "user" for chat in chats) > 20


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss", "glm4moe_training", "qwen3_6"])
def test_most_generated_chats_are_taken(name):
    draw = random.Random(name)
    chats = [make_chat(draw) for _ in range(30)]
    result = tally([compare(c, template_of(name), c["messages"], c.get("tools")) for c in chats])
    assert not result["wrong"]
    assert result["taken"] > 12
    assert result["turns"] > 30


def test_the_oracle_sees_what_is_not_as_at_inference():
    chat = {
        "messages": [
            {"role": "user", "content": "And 3+4?"},
            {"role": "assistant", "content": "Seven."},
        ]
    }
    template = template_of("qwen2_5")
    assert not compare(chat, template, chat["messages"]).wrong
    question, answer = chat["messages"]
    other = [{**question, "content": "And 3+5?"}, answer]
    assert "not those of inference" in compare(chat, template, other).wrong[0]
    other = [question, {**answer, "content": "Eight."}]
    assert "not the ids of the answer" in compare(chat, template, other).wrong[0]
    assert "learns messages" in compare(chat, template, [question]).wrong[0]


def _real_tokenizers():
    root = os.environ.get("TUNESMITH_TOKENIZERS")
    return sorted({path.parent for path in Path(root).rglob("tokenizer.json")}) if root else []


@pytest.mark.slow
@pytest.mark.parametrize("folder", _real_tokenizers(), ids=str)
def test_real_tokenizers_are_as_at_inference(folder):
    """TUNESMITH_TOKENIZERS names a folder with tokenizers of real models somewhere below it."""
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if not settings.get("chat_template") and not (folder / "chat_template.jinja").is_file():
        pytest.skip("it has no chat template")
    template = load_template(folder)
    draw = random.Random(7)
    chats = [make_chat(draw) for _ in range(150)]
    result = tally([compare(c, template, c["messages"], c.get("tools")) for c in chats])
    assert not result["wrong"]
    assert result["turns"] > 100
