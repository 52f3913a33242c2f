"""`tunesmith preview`: one object a row, a readable view, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tiny import chat_rows, tiny_tokenizer, write_jsonl
from tunesmith.cli.app import run


@pytest.fixture
def model(tmp_path):
    """A model's folder without weights: preview must not miss them."""
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 512, "model_type": "llama"}')
    return str(folder)


def test_json_is_one_object_a_row(model, chats, capsys):
    assert run(["preview", "--model", model, "--data", str(chats), "--json", "--rows", "3"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["row"] for o in objects] == [0, 1, 2]
    for found in objects:
        assert found["status"] == "trained"
        assert found["reason"] is None
        assert found["source"] == str(chats)
        assert found["targets"]
        for target in found["targets"]:
            ids = found["segments"][target["segment"]]["ids"]
            assert ids[target["index"]] == target["id"]
            assert target["weight"] == 1.0
    assert {t["message"] for t in objects[1]["targets"]} == {2, 4}


def test_a_bad_row_ends_with_2_after_the_good_ones(model, tmp_path, capsys):
    rows = chat_rows(3)
    rows[1] = {"messages": [{"role": "user", "content": "a<|im_end|>"}, rows[1]["messages"][-1]]}
    data = str(write_jsonl(tmp_path / "bad.jsonl", rows))
    assert run(["preview", "--model", model, "--data", data, "--json"]) == 2
    captured = capsys.readouterr()
    assert [json.loads(line)["row"] for line in captured.out.splitlines()] == [0]
    assert f"{data}:1" in captured.err
    assert "hint:" in captured.err
    assert run(["preview", "--model", model, "--data", data, "--json", "data.bad_rows=drop"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["status"] for o in objects] == ["trained", "dropped", "trained"]
    assert objects[1]["segments"] == []
    assert "special-token-in-content" in objects[1]["reason"]


def test_the_view_marks_targets_without_colour(model, chats, capsys):
    assert run(["preview", "--model", model, "--data", str(chats), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "⟦0<|im_end|>⟧" in out or "⟦1<|im_end|>⟧" in out
    assert "\x1b" not in out
    assert f"{chats}:0" in out


def test_preview_loads_no_torch_weights_library(model, chats):
    code = (
        "import sys; from tunesmith.cli.app import run;"
        f"run(['preview', '--model', {model!r}, '--data', {str(chats)!r}, '--json']);"
        "sys.exit('transformers.modeling_utils' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
