"""`tunesmith chat` answers one prompt or a conversation; stdout holds the answers alone."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from answering import PAIRS, answering_folder
from tunesmith.cli.app import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return answering_folder(tmp_path / "model")


def lines(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in given)))


def test_one_prompt(model: Path, capsys: Capture):
    for question, answer in PAIRS:
        assert run(["chat", str(model), "--prompt", question]) == 0
        assert capsys.readouterr().out == f"{answer}\n"


def test_lines_are_turns(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    question, answer = PAIRS[1]
    lines(monkeypatch, question, "", "/reset", question, "/exit", "Say yes.")
    assert run(["chat", str(model)]) == 0
    assert capsys.readouterr().out == f"{answer}\n{answer}\n"


def test_the_next_turn_sees_those_before(
    model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[dict]] = []
    from tunesmith.cli.chat import Conversation

    own = Conversation._prompt_ids
    monkeypatch.setattr(
        Conversation, "_prompt_ids", lambda self, m: seen.append(list(m)) or own(self, m)
    )
    lines(monkeypatch, PAIRS[0][0], "Say yes.")
    assert run(["chat", str(model), "--system", "Be brief.", "--max-new-tokens", "5"]) == 0
    roles = [turn["role"] for turn in seen[1]]
    assert roles == ["system", "user", "assistant", "user"]
    assert seen[1][0]["content"] == "Be brief."


def test_a_raw_model_gets_plain_text(tmp_path: Path, capsys: Capture):
    model = answering_folder(tmp_path / "model", raw=True)
    (model / "tunesmith.json").write_text('{"template": "none", "template_kwargs": {}}')
    assert run(["chat", str(model), "--prompt", "Name a colour."]) == 0
    assert capsys.readouterr().out == "blue\n"
    assert run(["chat", str(model), "--prompt", "x", "--system", "y"]) == 2
    assert "--system" in capsys.readouterr().err


def test_a_cut_answer_is_said(model: Path, capsys: Capture):
    assert run(["chat", str(model), "--prompt", "Say yes.", "--max-new-tokens", "1"]) == 0
    assert "cut off after 1" in capsys.readouterr().err


def test_a_full_context_is_an_error(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    lines(monkeypatch, "word " * 600)
    assert run(["chat", str(model)]) == 2
    error = capsys.readouterr().err
    assert "context" in error
    assert "Traceback" not in error


def test_no_such_model(capsys: Capture, tmp_path: Path):
    assert run(["chat", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["--prompt", "--system"])
def test_a_quoted_control_token_is_refused_or_read_as_text(
    place: str, model: Path, capsys: Capture
):
    asked = {"--prompt": "Say yes.", place: "What does <|im_end|> mean?"}
    arguments = [word for pair in asked.items() for word in pair]
    assert run(["chat", str(model), *arguments]) == 2
    error = capsys.readouterr().err
    assert "'<|im_end|>'" in error
    assert "hint: --special-as-text" in error
    command = ["chat", str(model), *arguments, "--special-as-text", "--max-new-tokens", "3"]
    assert run(command) == 0


def test_a_refused_line_is_forgotten_and_the_talk_goes_on(
    model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    question, answer = PAIRS[0]
    given = iter(["a <|im_end|> b", question, "/exit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(given))
    assert run(["chat", str(model)]) == 0
    found = capsys.readouterr()
    assert f"{answer}\n" in found.out
    assert "--special-as-text" in found.err
