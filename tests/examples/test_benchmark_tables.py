"""The benchmark drivers' arithmetic, on runs made up here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gsm8k
import trl_run
import vs_trl


def _run(speed: float, losses: list[float], targets: list[int]) -> dict[str, Any]:
    return {
        "tokens_per_second": speed,
        "tokens": 30,
        "computed_tokens": 20,
        "peak_rss": 2**30,
        "losses": losses,
        "step_targets": targets,
    }


def test_ratios_are_taken_within_a_round():
    runs = {
        "tunesmith": [_run(100, [2.0, 1.0], [5, 5]), _run(300, [2.0, 1.0], [5, 5])],
        "default": [_run(50, [2.0, 1.25], [5, 5]), _run(100, [2.0, 1.25], [5, 5])],
    }
    peer = vs_trl.summarize(runs)["default"]
    assert peer["tunesmith_faster"] == {"min": 2.0, "median": 2.5, "max": 3.0}
    assert peer["largest_loss_gap"] == 0.25


def test_losses_over_other_documents_are_not_compared():
    runs = {
        "tunesmith": [_run(100, [2.0, 1.0], [5, 5])],
        "float32, packed to 512": [_run(50, [2.0], [10])],
    }
    assert "largest_loss_gap" not in vs_trl.summarize(runs)["float32, packed to 512"]


def test_speed_leaves_out_the_warm_up_and_padding():
    steps = [
        {"ended": 10.0, "tokens": 70, "targets": 7, "loss": 3.0},
        {"ended": 12.0, "tokens": 50, "targets": 5, "loss": 2.0},
        {"ended": 15.0, "tokens": 100, "targets": 9, "loss": 1.0},
        {"ended": 0.0, "tokens": 0, "targets": 0, "loss": 0.0},  # opened for a step that never came
    ]
    found = trl_run._summary(steps, warmup=1)
    assert (found["tokens"], found["seconds"]) == (150, 5.0)
    assert found["losses"] == [3.0, 2.0, 1.0]


def test_targets_end_at_the_stop_token():
    labels = torch.tensor([[-100, 5, 2, 9, -100, 6, 7, 2, 9]])
    ended = trl_run.end_at_stop({"labels": labels}, 2)["labels"]
    assert ended.tolist() == [[-100, 5, 2, -100, -100, 6, 7, 2, -100]]


def test_rows_keep_their_order_and_too_few_are_refused(tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in "123"))
    out = tmp_path / "rows.jsonl"
    vs_trl.write_rows(data, 2, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == ["q1", "q2"]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "a"}]
    vs_trl.write_rows(data, 3, out, answers=2)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == ["q1", "q1", "q3"]
    with pytest.raises(SystemExit, match="3 rows, 4 are needed"):
        vs_trl.write_rows(data, 4, out)


@pytest.mark.parametrize("tools", ["template", "text"])
def test_a_chat_becomes_a_row_an_answer_in_its_own_context(tmp_path: Path, tools: str):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    data, out = tmp_path / "chats.jsonl", tmp_path / "rows.jsonl"
    data.write_text(json.dumps(chat) + "\n")
    vs_trl.write_rows(data, 2, out, tools=tools)
    first, second = [json.loads(line) for line in out.read_text().splitlines()]
    assert second["completion"] == [{"role": "assistant", "content": "Two."}]
    if tools == "template":
        assert second["prompt"] == chat["messages"][:3]
        assert first["tools"] == chat["tools"]
    else:
        assert "tools" not in first
        assert [m["role"] for m in second["prompt"]] == ["system", "user", "assistant", "user"]
        assert '"add"' in first["prompt"][0]["content"]
        assert '"add"' in first["completion"][0]["content"]


def test_gsm8k_table_reads_the_metrics():
    train = {"kind": "train", "loss": 1.0, "tokens": 90, "seconds": 3.0, "peak_memory": 2**30}
    records = [
        {"kind": "eval", "step": 0, "nll": 1.5, "target_tokens": 11},
        {**train, "seconds": 100.0},
        train,
        {"kind": "event", "event": "checkpoint", "step": 2},
        train,
        {"kind": "eval", "step": 3, "nll": 0.75, "target_tokens": 11},
    ]
    summary = gsm8k.summarize(records, {"cpu": "C", "threads": 2})
    assert summary["tokens_per_second"] == 30
    text = gsm8k.table(summary)
    assert "| 0 | 1.5000 |" in text
    assert "| 3 | 0.7500 |" in text


def test_search_tries_every_shape_at_the_fastest_precision(monkeypatch: pytest.MonkeyPatch):
    def run_peer(name: str, job: dict[str, Any]) -> dict[str, Any]:
        return _run(50 if name.startswith("bf16") else 10, [1.0], [1])

    monkeypatch.setattr(vs_trl, "run_peer", run_peer)
    found = vs_trl.search({})
    assert set(found) <= set(trl_run.SETTINGS)
    assert {name for name in found if name.startswith("bf16")} == {
        f"bf16 weights, {shape}" for shape in trl_run.SHAPES
    }
    assert {"default", "float32, padded", "autocast, padded"} < set(found)
    assert next(iter(found)).startswith("bf16")


def test_earlier_search_counts_on_the_same_processor_only(tmp_path: Path):
    path = tmp_path / "trl_settings.json"
    assert vs_trl.searched_best(path) is None
    report = {"facts": {"processor": vs_trl.processor()}, "summary": {"default": 1, "x": 2}}
    path.write_text(json.dumps(report))
    assert vs_trl.searched_best(path) == "x"
    report["facts"]["processor"] = "another"
    path.write_text(json.dumps(report))
    assert vs_trl.searched_best(path) is None
