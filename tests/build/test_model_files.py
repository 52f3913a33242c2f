"""A run keeps the model's named chat templates, and refuses ids that the model has no embedding
for.
"""

from __future__ import annotations

import pytest

import tunesmith
from tiny import CHATML, chat_rows, tiny_folder, tiny_tokenizer, write_jsonl
from tunesmith.config.read import read_recipe
from tunesmith.errors import ModelError
from tunesmith.estimate.forecast import forecast

TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds.",
          "parameters": {"type": "object", "properties": {}}}}]  # fmt: skip
SETTINGS = ["train.steps=1", "batch.documents=4", "model.dtype=float32", "device.cache=false"]


def prompt(folder) -> str:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "What?"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=False)


def test_named_chat_templates_travel_with_the_model(tmp_path):
    base = tiny_folder(tmp_path / "base", num_hidden_layers=1)
    tokenizer = tiny_tokenizer()
    tool_use = "{{ 'TOOLS ' }}{{ tools | tojson }}\n" + CHATML
    tokenizer.chat_template = {"default": CHATML, "tool_use": tool_use}
    tokenizer.save_pretrained(base)
    rows = [{**row, "tools": TOOLS} for row in chat_rows(4)]
    tunesmith.train(model=str(base), data=rows, out=tmp_path / "run", overrides=SETTINGS)
    assert prompt(base).startswith("TOOLS")
    assert prompt(tmp_path / "run" / "model") == prompt(base)


def test_a_chosen_template_leaves_the_models_named_ones_behind(tmp_path):
    base = tiny_folder(tmp_path / "base", num_hidden_layers=1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}" + CHATML}
    tokenizer.save_pretrained(base)
    chosen = [*SETTINGS, "data.template=chatml"]
    tunesmith.train(model=str(base), data=chat_rows(4), out=tmp_path / "run", overrides=chosen)
    assert not (tmp_path / "run" / "model" / "additional_chat_templates").exists()


@pytest.mark.parametrize("part", ["train", "eval"])
def test_ids_beyond_the_embedding_are_an_error_of_train_and_plan(part, tmp_path):
    base = tiny_folder(tmp_path / "base", num_hidden_layers=1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(60)])
    tokenizer.save_pretrained(base)
    good = write_jsonl(tmp_path / "good.jsonl", chat_rows(4))
    bad = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]}
           for text in ("b", "<extra_58> <extra_59>", "<extra_3>")]  # fmt: skip
    path = write_jsonl(tmp_path / "bad.jsonl", bad)
    files = {"train": str(path)} if part == "train" else {"train": str(good), "eval": str(path)}
    given = {"model": {"name": str(base)}, "data": files}
    with pytest.raises(ModelError, match="id 479; the model has 448") as raised:
        forecast(read_recipe(given, SETTINGS))
    assert str(raised.value.where).endswith("bad.jsonl:1")
    with pytest.raises(ModelError, match="id 479; the model has 448"):
        tunesmith.train(given, out=tmp_path / "run", overrides=SETTINGS)
