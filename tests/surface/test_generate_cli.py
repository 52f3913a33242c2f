"""`tunesmith generate` answers every row of a file and writes JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from answering import PAIRS, answering_folder, chat_rows
from tiny import write_jsonl
from tunesmith.cli.app import run

QUESTIONS = [{"question": question, "answer": answer} for question, answer in PAIRS]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return answering_folder(tmp_path / "model")


def answer(model: Path, rows: list[dict], tmp_path: Path, *more: str) -> list[dict]:
    data, out = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "new" / "out.jsonl"
    code = run(["generate", str(model), "--data", str(data), "--out", str(out), *more])
    assert code == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_one_object_a_row_in_order(model: Path, tmp_path: Path):
    rows = answer(model, chat_rows(), tmp_path, "--max-new-tokens", "20")
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["generated"] for row in rows] == [a for _, a in PAIRS]
    assert [row["reference"] for row in rows] == [a for _, a in PAIRS]
    assert all(row["stopped"] for row in rows)
    assert rows[0]["source"] == str(tmp_path / "data.jsonl")
    assert rows[0]["prompt"].endswith("What is 1 plus 2?<|im_end|>\n<|im_start|>assistant\n")


def test_limit_of_tokens(model: Path, tmp_path: Path):
    rows = answer(model, chat_rows(), tmp_path, "--max-new-tokens", "1")
    assert not any(row["stopped"] for row in rows)


def test_prompts_without_answers(model: Path, tmp_path: Path):
    strings = [{"prompt": question} for question, _ in PAIRS]
    expected = [a for _, a in PAIRS]
    assert [row["generated"] for row in answer(model, strings, tmp_path)] == expected
    lists = [{"prompt": [{"role": "user", "content": question}]} for question, _ in PAIRS]
    more = ("--overwrite",)
    assert [row["generated"] for row in answer(model, lists, tmp_path, *more)] == expected
    chats = [{"messages": [{"role": "user", "content": question}]} for question, _ in PAIRS]
    rows = answer(model, chats, tmp_path, *more)
    assert [row["generated"] for row in rows] == expected
    assert "reference" not in rows[0]


def test_columns_and_limit(model: Path, tmp_path: Path):
    columns = "data.columns={prompt: question, completion: answer}"
    rows = answer(model, QUESTIONS, tmp_path, columns, "--limit", "2")
    assert [row["generated"] for row in rows] == ["three", "it is eight"]


def test_raw_prompts(tmp_path: Path):
    model = answering_folder(tmp_path / "model", raw=True)
    strings = [{"prompt": q, "completion": a} for q, a in PAIRS]
    rows = answer(model, strings, tmp_path, "data.template=none")
    assert [row["generated"] for row in rows] == [a for _, a in PAIRS]
    assert rows[0]["prompt"] == "What is 1 plus 2?"
    (model / "tunesmith.json").write_text('{"template": "none", "template_kwargs": {}}')
    assert answer(model, strings, tmp_path, "--overwrite") == rows


def test_an_existing_file_stays(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows())
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert run(["generate", str(model), "--data", str(data), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_bad_rows(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    write_jsonl(data, [*chat_rows(), {"messages": 3}])
    with data.open("a") as file:
        file.write("{broken\n")
    arguments = ["generate", str(model), "--data", str(data), "--out", str(out)]
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert f"{data}:4" in shown
    assert f"{data}:5" in shown
    assert not out.exists()
    assert run([*arguments, "data.bad_rows=drop"]) == 0
    assert len(out.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--top-p", "0"], "top_p"),
        (["nonsense"], "argument too many"),
        (["data.colums=3"], "columns"),
    ],
)
def test_wrong_arguments(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, out = write_jsonl(tmp_path / "d.jsonl", chat_rows()), tmp_path / "out.jsonl"
    code = run(["generate", "nowhere/x", "--data", str(data), "--out", str(out), *more])
    assert code == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_quoted_control_tokens_are_refused_or_read_as_text(model: Path, tmp_path: Path, capsys):
    rows = [{"prompt": "What is <|im_end|>?"}, {"prompt": PAIRS[0][0]}]
    data, out = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    command = ["generate", str(model), "--data", str(data), "--out", str(out)]
    assert run(command) == 2
    error = capsys.readouterr().err
    assert f"{data}:0" in error
    assert "--special-as-text" in error
    assert run([*command, "--special-as-text", "--max-new-tokens", "3"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in found] == [0, 1]
    assert "What is <|im_end|>?" in found[0]["prompt"]


def test_tools_and_template_arguments_of_a_prompt_are_used(model: Path, tmp_path: Path):
    template = (model / "chat_template.jinja").read_text()
    shown = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}"
    (model / "chat_template.jinja").write_text(shown + template)
    tool = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
    row = {"prompt": "Hi", "tools": json.dumps([tool]), "chat_template_kwargs": {"mood": "calm"}}
    (found,) = answer(model, [row], tmp_path, "--max-new-tokens", "1")
    wrapped = {"type": "function", "function": tool}
    assert json.loads(found["prompt"].split("calm")[0]) == [wrapped]


def test_a_run_is_asked_under_the_arguments_it_was_trained_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from tunesmith.cli.chat import Conversation
    from tunesmith.run import train

    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("<{{ mood }}>" + template)
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows())
    for name, kwargs in (("calm", {"mood": "calm"}), ("none", {})):
        out = tmp_path / name
        recipe = {
            "model": str(model), "batch": 4, "train": {"steps": 1}, "device": {"threads": 1},
            "data": {"train": str(rows), "template_kwargs": kwargs},
        }  # fmt: skip
        train(recipe, out=out, progress=False)
        mood = kwargs.get("mood", "")
        more = ("--max-new-tokens", "1", "--overwrite")
        for folder in (out, out / "model"):
            assert answer(folder, [{"prompt": "Hi"}], tmp_path, *more)[0]["prompt"].startswith(
                f"<{mood}><|im_start|>user"
            )
        row = {"prompt": "Hi", "chat_template_kwargs": {"mood": "wild"}}
        assert answer(out, [row], tmp_path, *more)[0]["prompt"].startswith("<wild>")
        seen: list[str] = []
        own = Conversation._prompt_ids

        def noted(self, turns, own=own, seen=seen):
            ids = own(self, turns)
            seen.append(self.session.template.decode(ids))
            return ids

        with monkeypatch.context() as patch:
            patch.setattr(Conversation, "_prompt_ids", noted)
            assert run(["chat", str(out), "--prompt", "Hi", "--max-new-tokens", "1"]) == 0
        assert seen[0].startswith(f"<{mood}>")
    weights = [
        (tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("calm", "none")
    ]
    assert weights[0] != weights[1]
