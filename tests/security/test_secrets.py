"""No password or token gets into what a run keeps, prints or says of an error."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run
from tunesmith.errors import InputError, RecipeError
from tunesmith.metrics.trackers import GuardedSink
from tunesmith.redact import redact, secret_keys

SECRETS = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlantedPlanted",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-word",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED12",
    "GITHUB_TOKEN": "planted-github-token",
    "MY_DB_PASSWORD": "planted-db-word",
    "OPENAI_API_KEY": "sk-plantedplantedplanted",
}
SHORT = ["batch.documents=4", "train.steps=3", "checkpoint.every=1", "device.threads=1"]


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def told(text: str) -> list[str]:
    return [name for name, value in SECRETS.items() if value in text]


def test_no_file_of_a_run_and_no_line_of_it_holds_a_secret(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    model = tiny_folder(tmp_path / "model", num_hidden_layers=1)
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    held = write_jsonl(tmp_path / "held.jsonl", chat_rows(3))
    out = tmp_path / "run"
    words = ["train", "--model", str(model), "--data", str(data), "--out", str(out), *SHORT]
    words += [f"data.eval={held}", "eval.samples=1", "log.to=[tensorboard]", "adapter=lora"]
    # What a wrapper may add to a command line is in it whether Tunesmith reads it or not.
    monkeypatch.setattr("sys.argv", ["tunesmith", *words, *SECRETS.values(), "s3://me:pw123@host"])
    assert run(words) == 0
    assert run(["export", str(out), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert run(["eval", str(out), "--data", str(held)]) == 0
    shown = capfd.readouterr()
    assert not told(shown.out + shown.err)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        assert not [name for name, v in SECRETS.items() if v.encode() in content], path
        assert b"pw123" not in content
    command = json.loads((out / "machine.json").read_text())["command"]
    assert command[:2] == ["tunesmith", "train"]
    assert command.count("***") == len(SECRETS)


@pytest.mark.parametrize(
    "override",
    [
        "data.train=https://me:{HF_TOKEN}@host/rows.jsonl",
        "data.train=https://me:word@host/rows.jsonl",
        "data.train=[{{path: rows.jsonl, columns: {{prompt: '{GITHUB_TOKEN}'}}}}]",
        "log.project={WANDB_API_KEY}",
        "model.name=s3://bucket/model?X-Amz-Signature=planted-db-word",
        "data.template_kwargs={{key: 'Bearer planted-github-token'}}",
        "model.name={HF_TOKEN}",
    ],
)
def test_recipe_with_a_secret_is_refused_without_telling_it(
    override: str, tmp_path: Path, capfd
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(2))
    out = tmp_path / "run"
    words = ["train", "--model", "some/model", "--data", str(data), "--out", str(out)]
    filled = override.format(**SECRETS)
    assert run([*words, filled]) == 2
    error = capfd.readouterr().err
    assert "password or an access token" in error
    assert override.split("=")[0] in error
    assert not told(error)
    assert not out.exists()


@pytest.mark.parametrize("name", SECRETS)
def test_errors_hide_secrets_wherever_they_come_from(name: str, tmp_path: Path, capfd) -> None:
    secret = SECRETS[name]
    error = InputError(f"at {secret}", where=f"https://u:{secret}@host/x", hint=f"not {secret}")
    assert not told(str(error))
    assert "***" in str(error)
    for words in (
        ["train", "--model", f"/{secret}", "--data", "x.jsonl"],
        ["train", secret],
        ["preview", "--model", str(tmp_path), "--data", secret],
        [secret],
        ["train", f"--{secret}"],
        ["train", "--model", "m", "--data", "d", f"optim.{secret}=1"],
        ["train", "--model", "m", "--data", "d", f"optim.lr={secret}"],
    ):
        assert run(words) == 2, words
        shown = capfd.readouterr()
        assert not told(shown.out + shown.err), words


def test_trackers_that_fail_do_not_tell(caplog) -> None:
    def fail():
        raise OSError(f"401 for key {SECRETS['WANDB_API_KEY']}")

    with caplog.at_level(logging.WARNING):
        GuardedSink("wandb", fail)
    assert "gets no more records" in caplog.text
    assert not told(caplog.text)


def test_python_errors_do_not_tell(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        tunesmith.train(model=SECRETS["HF_TOKEN"], data=[{"text": "x"}], out=tmp_path / "r")
    assert not told(str(caught.value))


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.1-8B", "data/tokens.jsonl", "keys: a, b", "step 0123456789abcdef",
        "C:\\users\\me", "a@b.org", "https://host/path?page=2", "hf_hub", "sk-learn", "token=4",
        "<|endoftext|>", "Bearer of news", "git@host:org/name", "data.train=a://b/c",
        "monkey=business",
    ],
)  # fmt: skip
def test_ordinary_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_short_values_of_the_environment_are_words(monkeypatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "auto")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a-long-enough-value")
    assert redact("device: auto, a-long-enough-value") == "device: auto, a-long-enough-value"


def test_keys_of_secrets_are_found_wherever_they_are() -> None:
    values = {"a": [{"b": SECRETS["HF_TOKEN"]}, 1, None], "c": {"d": "fine", "e": "x://u:p@h"}}
    assert list(secret_keys(values)) == ["a.0.b", "c.e"]
