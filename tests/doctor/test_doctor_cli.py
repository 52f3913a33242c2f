"""`tunesmith doctor`: the page, the object, the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny import tiny_tokenizer, write_jsonl
from tunesmith.cli.app import run
from tunesmith.doctor.catalogue import CHECKS

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model's folder without weights: the doctor must not miss them."""
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    config = {"max_position_embeddings": 512, "model_type": "llama", "vocab_size": 448}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    return str(folder)


def rows(count: int = 60) -> list[dict]:
    return [
        {"prompt": f"What is {n} plus {n * 7}?", "completion": f"It is {n + n * 7}."}
        for n in range(count)
    ]


def test_a_clean_page_ends_with_0_and_has_a_line_for_each_check(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    data = str(write_jsonl(tmp_path / "clean.jsonl", rows()))
    assert run(["doctor", "--model", model, "--data", data]) == 0
    page = capsys.readouterr().out
    for check in CHECKS.values():
        assert page.count(check.title) == 1
    assert "0 errors, 0 warnings" in page
    assert "\x1b" not in page
    assert "60, 60 of them trained on" in page
