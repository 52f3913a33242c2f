"""`tunesmith score` against plain transformers, a row at a time; IFD with answers cut by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import CHATML, chat_rows, tiny_folder, tiny_tokenizer, write_jsonl
from tunesmith.cli.app import run

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + "
    "eos_token }}{% else %}{{ '[' + m['content'] + ']' }}{% endif %}{% endfor %}"
)
HEADER = "<|im_start|>assistant\n"


def scored(model: Path, rows: list[dict], tmp_path: Path, *more: str) -> list[dict]:
    data, out = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "scores.parquet"
    words = ["score", "--model", str(model), "--data", str(data), "--out", str(out), "--overwrite"]
    assert run([*words, "model.dtype=float32", *more]) == 0
    return pyarrow.parquet.read_table(out).to_pylist()


class Oracle:
    """Plain transformers, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def logprobs(self, before: list[int], after: list[int]) -> torch.Tensor:
        """[k, V] of each id of `after`; `before` is not empty."""
        logits = self.model(torch.tensor([before + after])).logits[0].double()
        return torch.log_softmax(logits[len(before) - 1 : -1], -1)

    def answers(self, messages: list[dict], thought: str = "") -> list[tuple[list[int], list[int]]]:
        """(prompt, `thought` and answer with its stop token) of each assistant turn."""
        found = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.tokenizer.apply_chat_template(
                    messages[:at], tokenize=False, add_generation_prompt=True
                )
                answer = [*self.ids(thought + message["content"]), self.tokenizer.eos_token_id]
                found.append((self.ids(prompt), answer))
        return found

    def expected(self, answers, opening: list[int]) -> dict[str, float]:
        losses, apart, correct, entropy = [], [], [], []
        for before, after in answers:
            target = torch.tensor(after)
            logp = self.logprobs(before, after)
            losses += (-logp.gather(1, target[:, None])[:, 0]).tolist()
            correct += (logp.argmax(-1) == target).tolist()
            entropy += (-(logp.exp() * logp).sum(-1)).tolist()
            alone = self.logprobs(opening, after)
            apart += (-alone.gather(1, target[:, None])[:, 0]).tolist()
        inverse = np.exp(losses)
        loss = float(np.mean(losses))
        return {
            "target_tokens": len(losses),
            "loss": loss,
            "perplexity": math.exp(loss),
            "accuracy": float(np.mean(correct)),
            "entropy": float(np.mean(entropy)),
            "loss_alone": float(np.mean(apart)),
            "ifd": loss / float(np.mean(apart)),
            "inverse_p_mean": float(inverse.mean()),
            "inverse_p_p50": float(np.quantile(inverse, 0.5)),
            "inverse_p_p90": float(np.quantile(inverse, 0.9)),
            "inverse_p_p99": float(np.quantile(inverse, 0.99)),
            "inverse_p_max": float(inverse.max()),
        }


def check(row: dict, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        rel = 1e-5
        if name == "perplexity" or name.startswith("inverse_p"):
            rel *= max(1.0, math.log(value))  # what 1e-5 of the loss makes of its exponential
        assert row[name] == pytest.approx(value, rel=rel), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("micro_tokens", [64, 4096])
def test_chats_score_as_in_plain_transformers(family: str, micro_tokens: int, tmp_path: Path):
    model = tiny_folder(tmp_path / "model", family)
    rows = chat_rows(5)
    found = scored(model, rows, tmp_path, f"device.micro_tokens={micro_tokens}")
    oracle = Oracle(model)
    assert [row["row"] for row in found] == [0, 1, 2, 3, 4]
    for row, given in zip(found, rows, strict=True):
        check(row, oracle.expected(oracle.answers(given["messages"]), oracle.ids(HEADER)))
        assert row["status"] == "trained"
        assert row["reason"] is None


@pytest.mark.parametrize(
    ("bos", "template", "opening"),
    [
        ("<|im_start|>", CHATML, HEADER),  # BOS opens each turn: once is enough
        ("<|endoftext|>", "{{ bos_token }}" + CHATML, "<|endoftext|>" + HEADER),
        ("<|endoftext|>", CHATML, HEADER),  # the template does not use it
        ("<|endoftext|>", PLAIN, "<|endoftext|>"),  # nothing opens an answer
    ],
)
def test_opening_is_bos_and_header(bos, template, opening, tmp_path: Path):
    model = tiny_folder(tmp_path / "model")
    tiny_tokenizer(template, bos_token=bos).save_pretrained(model)
    rows = chat_rows(3)
    oracle = Oracle(model)
    for row, given in zip(scored(model, rows, tmp_path), rows, strict=True):
        check(row, oracle.expected(oracle.answers(given["messages"]), oracle.ids(opening)))


def test_raw_completions_leave_out_the_token_that_nothing_predicts(llama_folder, tmp_path):
    rows = [{"prompt": "What is 1 plus 2? ", "completion": "three, said the fox"}]
    (row,) = scored(llama_folder, rows, tmp_path, "data.template=none")
    oracle = Oracle(llama_folder)
    before = oracle.ids(rows[0]["prompt"])
    after = [*oracle.ids(rows[0]["completion"]), oracle.tokenizer.eos_token_id]
    with_prompt = -oracle.logprobs(before, after).gather(1, torch.tensor(after)[:, None])[:, 0]
    alone = -oracle.logprobs(after[:1], after[1:]).gather(1, torch.tensor(after[1:])[:, None])[:, 0]
    assert row["target_tokens"] == len(after)
    assert row["loss"] == pytest.approx(float(with_prompt.mean()), rel=1e-5)
    assert row["loss_alone"] == pytest.approx(float(alone.mean()), rel=1e-5)
    assert row["ifd"] == pytest.approx(float(with_prompt[1:].mean() / alone.mean()), rel=1e-5)


def test_texts_and_whole_conversations_have_no_prompt_to_leave_out(llama_folder, tmp_path):
    (row,) = scored(llama_folder, [{"text": "The fox runs."}], tmp_path)
    assert row["loss"] > 0
    assert row["ifd"] is None
    (row, *_) = scored(llama_folder, chat_rows(1), tmp_path, "data.train_on=all")
    assert row["loss"] > 0
    assert row["ifd"] is None


def test_weights_of_messages_count_in_means(llama_folder, tmp_path):
    turns = [
        {"role": "user", "content": "What is 1 plus 2?"},
        {"role": "assistant", "content": "three", "weight": 0.5},
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "yes, yes"},
    ]
    (row,) = scored(llama_folder, [{"messages": turns}], tmp_path)
    oracle = Oracle(llama_folder)
    plain = [{k: v for k, v in turn.items() if k != "weight"} for turn in turns]
    total = weights = 0.0
    for (before, after), weight in zip(oracle.answers(plain), (0.5, 1.0), strict=True):
        logp = oracle.logprobs(before, after).gather(1, torch.tensor(after)[:, None])
        total += weight * float(-logp.sum())
        weights += weight * len(after)
    assert row["loss"] == pytest.approx(total / weights, rel=1e-5)


def test_dropped_rows_are_in_the_file_with_their_reason(llama_folder, tmp_path, capsys):
    rows = chat_rows(3)
    rows[1] = {"messages": [{"role": "user", "content": "nobody answers"}]}
    rows[2] = {"messages": "no list"}
    found = scored(llama_folder, rows, tmp_path, "data.bad_rows=drop", "--json")
    assert [row["status"] for row in found] == ["trained", "dropped", "dropped"]
    assert [row["reason"] for row in found] == [None, "no-targets", "wrong-type"]
    assert found[1]["loss"] is None
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["scored"]) == (3, 1)


def test_metadata_says_what_was_scored(llama_folder, tmp_path):
    scored(llama_folder, chat_rows(4), tmp_path, "--limit", "2")
    held = pyarrow.parquet.read_schema(tmp_path / "scores.parquet").metadata[b"tunesmith.scores"]
    about = json.loads(held)
    (source,) = about["sources"].values()
    assert source["rows"] == 2
    assert len(source["sha256"]) == 64
    assert about["model"] == str(llama_folder)
    assert about["dtype"] == "float32"


def test_wrong_use_is_refused(llama_folder, chats, tmp_path, capsys):
    words = ["score", "--model", str(llama_folder), "--data", str(chats)]
    assert run(words) == 2
    assert run([*words, "--out", str(tmp_path / "no" / "x.parquet")]) == 2
    assert run(["score", "--data", str(chats), "--out", str(tmp_path / "x.parquet")]) == 2
    there = tmp_path / "there.parquet"
    there.write_text("mine")
    assert run([*words, "--out", str(there)]) == 2
    assert there.read_text() == "mine"
    assert capsys.readouterr().err.count("error:") == 4


def test_history_that_the_template_rewrites(tmp_path: Path):
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
        "loop.last %}add {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = tiny_folder(tmp_path / "model", template=thinking)
    rows = chat_rows(3)
    oracle = Oracle(model)
    for row, given in zip(scored(model, rows, tmp_path), rows, strict=True):
        answers = oracle.answers(given["messages"], "add ")
        check(row, oracle.expected(answers, oracle.ids(HEADER)))


def test_a_recipe_and_a_run_bring_their_settings(llama_folder, tmp_path, capsys):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    rows = [{"q": "What is 1 plus 2?", "a": "three"}, {"q": "Say yes.", "a": "yes"}]
    write_jsonl(folder / "data.jsonl", rows)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {llama_folder}, dtype: float32}}\n"
        "data: {train: data.jsonl, columns: {prompt: q, completion: a}}\n"
    )
    out = tmp_path / "scores.parquet"
    assert run(["score", str(recipe), "--out", str(out), "--json", "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    (row,) = pyarrow.parquet.read_table(out).to_pylist()
    oracle = Oracle(llama_folder)
    turns = [{"role": "user", "content": rows[0]["q"]}, {"role": "assistant", "content": "three"}]
    check(row, oracle.expected(oracle.answers(turns), oracle.ids(HEADER)))
    (llama_folder / "tunesmith.json").write_text('{"template": "none", "template_kwargs": {}}')
    assert run(["score", str(recipe), "--out", str(out), "--overwrite"]) == 0
    first = pyarrow.parquet.read_table(out).to_pylist()[0]
    raw = [*oracle.ids("three"), oracle.tokenizer.eos_token_id]
    assert first["target_tokens"] == len(raw)
    logp = oracle.logprobs(oracle.ids(rows[0]["q"]), raw).gather(1, torch.tensor(raw)[:, None])
    assert first["loss"] == pytest.approx(float(-logp.mean()), rel=1e-5)


@pytest.mark.slow
def test_smollm2_scores_as_in_plain_transformers(smollm2, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in [("What is the capital of France?", "Paris."), ("Add 2 and 3.", "2 + 3 = 5")]
    ]
    oracle = Oracle(smollm2)
    for row, given in zip(scored(smollm2, rows, tmp_path), rows, strict=True):
        expected = oracle.expected(oracle.answers(given["messages"]), oracle.ids(HEADER))
        check(row, expected)
