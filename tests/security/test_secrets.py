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
    "PGPASSWORD": "planted-pg-word",
    "OPENAI_KEY": "planted-openai-key",
    "MYTOKEN": "planted-my-token",
    "GITHUB_PAT": "planted-github-pat",
    "DB_PASS": "planted-db-pass",
    "SERVICE_TOKEN_2": "planted-second-token",
    "CRM": "q7Rk2mZ9xLw4Tb8Vn3Yc6Hd1",
    "BILLING": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b",
    "RELAY": "p1/aB3dE5fG7hJ9kL2mN4pQ6r+s8",
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
        "log.project={PGPASSWORD}",
        "log.project={OPENAI_KEY}",
        "log.project=of-{CRM}-x",
        "log.project={BILLING}",
        "data.template_kwargs={{key: '{RELAY}'}}",
        "data.template_kwargs={{'{MYTOKEN}': 1}}",
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
        "monkey=business", "Qwen/Qwen2.5-0.5B-Instruct", "SmolLM2-1.7B-Instruct-Q4_K_M.gguf",
    "/data/9f86d081884c7d659a2feaa0c55ad015/rows.jsonl", "eyJ", "r8_x",
    ],
)  # fmt: skip
def test_ordinary_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_short_values_of_the_environment_are_words(monkeypatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "auto")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a-long-enough-value")
    assert redact("device: auto, a-long-enough-value") == "device: auto, a-long-enough-value"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GITHUB_SHA", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"),
        ("MODEL", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("BASE_MODEL_NAME", "q7Rk2mZ9xLw4Tb8Vn3Yc6Hd1"),
        ("PWD", "/home/me/tunesmith"),
        ("CONDA_DEFAULT_ENV", "training-environment-2026"),
        ("EXPERIMENT", "MyLongExperimentNumber2"),
        ("SSH_PUBLIC_KEY", "AAAAB3NzaC1yc2EAAAADAQABAAABAQ"),
        ("HF_TOKEN_PATH", "/root/.cache/huggingface/token"),
        ("CLUSTER_TOKEN", "/usr/bin/env"),
        ("TOKENIZER", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_variables_that_hold_no_secret_are_left(name: str, value: str, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("BILLING")
    monkeypatch.delenv("CRM")
    assert redact(f"x {value} y") == f"x {value} y"


@pytest.mark.parametrize(
    "token",
    [
        "ghs_PlantedPlantedPlanted", "npm_PlantedPlantedPlanted", "gsk_PlantedPlantedPlanted",
        "AIzaPlantedPlantedPlantedPlantedPlanted1234", "sk-proj-Planted_Planted-Planted",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.Planted_Planted", "nvapi-PlantedPlantedPlanted",
        "SG.PlantedPlantedPlanted.PlantedPlantedPlanted", "xoxe-PlantedPlantedPlanted",
        "-----BEGIN RSA PRIVATE KEY-----\nPlanted+Planted\n-----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_published_forms_of_tokens_are_known(token: str) -> None:
    assert "Planted" not in redact(f"a {token} b")
    assert list(secret_keys({"x": {"y": f"a {token} b"}})) == ["x.y"]


def test_secret_in_an_address_is_found_as_it_is_written_there() -> None:
    assert redact("s3://b?x=planted%2Faws%2Bsecret") == "s3://b?x=***"


def test_keys_of_secrets_are_found_wherever_they_are() -> None:
    values = {"a": [{"b": SECRETS["HF_TOKEN"]}, 1, None], "c": {"d": "fine", "e": "x://u:p@h"}}
    assert list(secret_keys(values)) == ["a.0.b", "c.e"]
