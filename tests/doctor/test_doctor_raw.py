"""Raw prompts and completions, texts, and the real tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from planted import Writer
from test_model_checks import corpus_of, template_of

from tiny import write_jsonl
from tunesmith.cli.app import run
from tunesmith.doctor.catalogue import run_check
from tunesmith.doctor.corpus import Setup

SMOLLM2 = os.environ.get("TUNESMITH_SMOLLM2")


def test_a_raw_completion_that_merges_with_its_prompt() -> None:
    template = template_of(None)
    rows = [
        {"prompt": "The answer is:", "completion": " 42"},
        {"prompt": "The c", "completion": "apital of France"},
    ]
    found = run_check("boundary", corpus_of(rows, template), Setup(template))
    assert [hit.where for hit in found.examples] == ["rows:1"]
    assert "'The c' then 'apital" in found.examples[0].text


def test_texts_are_looked_at_as_answers_to_nothing() -> None:
    writer = Writer(4)
    texts = [writer.text() for _ in range(30)]
    rows = [{"text": text} for text in [*texts, texts[3], f"{texts[4]} {'and on ' * 12}"]]
    template = template_of(None)
    corpus, setup = corpus_of(rows, template), Setup(template)
    assert [hit.where for hit in run_check("duplicates", corpus, setup).examples] == ["rows:30"]
    assert [hit.where for hit in run_check("loops", corpus, setup).examples] == ["rows:31"]
    for check in ("several-answers", "repeated-answers", "prompt-echo", "role-order", "leakage"):
        assert run_check(check, corpus, setup).level == "ok"


def test_an_answer_of_no_weight_leaves_nothing_to_learn() -> None:
    template = template_of()
    writer = Writer(5)
    silent = writer.row()
    silent["messages"][1]["weight"] = 0
    found = run_check("unsupervised", corpus_of([silent, writer.row()], template), Setup(template))
    assert (found.level, found.count, found.examples[0].where) == ("warning", 1, "rows:0")
    alone = run_check("unsupervised", corpus_of([silent], template), Setup(template))
    assert alone.level == "error"


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="TUNESMITH_SMOLLM2 names no folder")
def test_the_example_task_is_clean_under_the_real_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import calendar_events

    calendar_events.write(tmp_path)
    data = ["--data", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "test.jsonl")]
    capsys.readouterr()
    assert run(["doctor", "--model", str(SMOLLM2), *data, "--json", "--strict"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert {check["check"] for check in page["checks"] if check["level"] != "ok"} <= {
        "pad-is-stop",
        "small-data",
    }
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    sick = write_jsonl(
        tmp_path / "sick.jsonl", [*rows, {**rows[0], "completion": "caf\u00c3\u00a9"}]
    )
    assert run(["doctor", "--model", str(SMOLLM2), "--data", str(sick), "--strict"]) == 1
    assert f"{sick}:{len(rows)}: message 1" in capsys.readouterr().out
