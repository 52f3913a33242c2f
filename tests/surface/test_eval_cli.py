"""`tunesmith eval` measures loss like plain transformers, and answers by generating them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from answering import PAIRS, UNLEARNED, answering_folder, chat_rows
from tiny import write_jsonl
from tunesmith.cli.app import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return answering_folder(tmp_path / "model")


def measured(model: Path, data: Path, capsys: Capture, *more: str) -> dict:
    assert run(["eval", str(model), "--data", str(data), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def plain_nll(folder: Path, pairs) -> tuple[float, int]:
    """Mean loss of the answers and their stop tokens, and how many tokens that is."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for question, answer in pairs:
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(after)) * len(after))
        count += len(after)
    return total / count, count


def test_numbers_are_those_of_plain_transformers(model: Path, tmp_path: Path, capsys: Capture):
    pairs = [*PAIRS, UNLEARNED]
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(pairs))
    result = measured(model, data, capsys, "model.dtype=float32", "--max-new-tokens", "20")
    nll, tokens = plain_nll(model, pairs)
    assert result["target_tokens"] == tokens
    assert result["nll"] == pytest.approx(nll, rel=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert result["rows"] == result["answered"] == 5
    assert result["exact_match"] == pytest.approx(0.8)
    assert 0 < result["token_accuracy"] < 1
    assert 0.8 <= result["ended"] <= 1


def test_limit_and_columns(model: Path, tmp_path: Path, capsys: Capture):
    rows = [{"question": question, "answer": f"  {answer}"} for question, answer in PAIRS]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    columns = "data.columns={prompt: question, completion: answer}"
    result = measured(model, data, capsys, columns, "--limit", "2", "--max-new-tokens", "20")
    assert result["rows"] == 2
    assert result["exact_match"] == 1.0  # but for spaces around


def test_a_run_brings_its_columns_and_template(model: Path, tmp_path: Path, capsys: Capture):
    rows = [{"question": question, "answer": answer} for question, answer in PAIRS]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    folder = tmp_path / "run"
    answering_folder(folder / "model")
    (folder / "model" / "tunesmith.json").write_text('{"template": "own", "template_kwargs": {}}')
    (folder / "recipe.yaml").write_text(
        "model: base\n"
        "data: {train: gone.jsonl, eval: 2%, columns: {prompt: question, completion: answer}}\n"
        "train: {result: best}\n"
    )
    for name in (folder, folder / "model"):
        result = measured(name, data, capsys, "--max-new-tokens", "20")
        assert result["exact_match"] == 1.0


def test_raw_completions_are_answered(tmp_path: Path, capsys: Capture):
    model = answering_folder(tmp_path / "model", raw=True)
    (model / "tunesmith.json").write_text('{"template": "none", "template_kwargs": {}}')
    rows = [{"prompt": question, "completion": answer} for question, answer in PAIRS]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    result = measured(model, data, capsys, "--max-new-tokens", "20")
    assert result["exact_match"] == result["ended"] == 1.0
    everything = measured(model, data, capsys, "data.train_on=all", "--max-new-tokens", "20")
    assert everything["exact_match"] == 1.0
    assert everything["target_tokens"] > result["target_tokens"]


def test_text_has_no_answers(model: Path, tmp_path: Path, capsys: Capture):
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "The quick brown fox."}])
    result = measured(model, data, capsys)
    assert "exact_match" not in result
    assert result["target_tokens"] > 3


def test_table(model: Path, tmp_path: Path, capsys: Capture):
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows())
    assert run(["eval", str(model), "--data", str(data), "--max-new-tokens", "20"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in shown if line.startswith("exact match")] == ["100.00%"]
    assert len({len(line) for line in shown}) == 1


def test_bad_data_is_refused(model: Path, tmp_path: Path, capsys: Capture):
    assert run(["eval", str(model), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
