"""Text of rows, files, models and recipes can't control the terminal that shows it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run
from tunesmith.display import shown
from tunesmith.errors import InputError

SOURCE = Path(tunesmith.__file__).parent
BAD = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eRLO\u2066\u200f\u2028\x7f\x08\r"
FOUND = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069]")
SHORT = ["batch.documents=2", "train.steps=2", "device.threads=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("terminals") / f"m{BAD}", num_hidden_layers=1)


def hostile_rows(good: int = 6) -> list[dict]:
    chats = [
        {
            "messages": [
                {"role": "user", "content": BAD + "a"},
                {"role": "assistant", "content": BAD},
            ]
        }
    ]
    return [*chats * 3, *chat_rows(good)]


def test_escape_sequences_are_shown_by_their_code() -> None:
    assert shown("\x1b[31mred\u202e") == "\\u001b[31mred\\u202e"
    assert shown("a\tb\nc é 漢 👍🏽") == "a\tb\nc é 漢 👍🏽"
    assert shown("\ud800") == "\\ud800"
    text = json.dumps({f"a{BAD}": [BAD, "\\u001b", "\\"]}, ensure_ascii=False)
    assert json.loads(shown(text)) == json.loads(text)  # so it can stand in JSON


def test_errors_hold_no_control_characters() -> None:
    assert not FOUND.search(str(InputError(BAD, where=BAD, hint=BAD)))


def test_no_command_prints_them(model: Path, tmp_path: Path, capfd) -> None:
    data = write_jsonl(tmp_path / f"rows{BAD}.jsonl".replace("\r", ""), hostile_rows())
    bad_role = write_jsonl(
        tmp_path / "role.jsonl", [{"messages": [{"role": BAD, "content": "x"}]}, *chat_rows(3)]
    )
    bad_column = write_jsonl(tmp_path / "column.jsonl", [{f"c{BAD}": "x", "d": BAD}] * 3)
    out = tmp_path / f"run{BAD}".replace("\r", "")
    both = ["--model", str(model), "--data"]
    for words in (
        ["train", *both, str(data), "--out", str(out), *SHORT],
        ["preview", *both, str(data)],
        ["preview", *both, str(data), "--json"],
        ["doctor", *both, str(data)],
        ["doctor", *both, str(data), "--json"],
        ["doctor", *both, str(bad_role)],
        ["doctor", *both, str(bad_column)],
        ["preview", *both, str(bad_role)],
        ["preview", *both, str(bad_column)],
        ["train", *both, str(bad_role), *SHORT],
        ["train", *both, str(bad_column), *SHORT],
        ["train", *both, str(tmp_path / f"no{BAD}")],
        ["train", *both, str(data), f"optim.{BAD}=1"],
        ["train", *both, str(data), f"--{BAD}"],
        ["train", str(tmp_path / f"no{BAD}.yaml")],
        ["chat", f"/no{BAD}"],
        ["chat", str(model), "--prompt", "x", "--max-new-tokens", "20", "--temperature", "9"],
        ["eval", str(model), "--data", str(data), "--max-new-tokens", "4"],
        ["convert", str(bad_column), "--out", str(tmp_path / "c.jsonl")],
        ["export", str(model), "--to", "hf", "--out", str(out / "hf")],
        [BAD],
    ):
        run(words)
        said = capfd.readouterr()
        text = said.out + said.err
        assert text, words
        assert not FOUND.search(text), (words, text)


def test_every_print_goes_through_one_function() -> None:
    """rich's consoles get texts that went through it: see the test above."""
    for path in SOURCE.rglob("*.py"):
        if path.name == "display.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}: put() of display.py"
