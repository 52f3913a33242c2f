"""No file that can leave this machine tells where anything lies on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run
from tunesmith.errors import ModelError, RunError
from tunesmith.export.hub import files_to_push, push
from tunesmith.export.local_paths import is_local, public, public_yaml


class Hub:
    """Counts what is asked of it; the hub itself refuses cards with a wrong base_model so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.error = error

    def create_repo(self, name: str, **options) -> str:
        self.calls.append("create")
        return name

    def model_info(self, name: str):
        return SimpleNamespace(private=True)

    def upload_folder(self, **options) -> None:
        self.calls.append("upload")
        if self.error is not None:
            raise self.error


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A LoRA run with a base and rows in folders with telling names."""
    home = tmp_path / "home of jane" / "secret-project"
    home.mkdir(parents=True)
    model = tiny_folder(home / "base", num_hidden_layers=1)
    data = write_jsonl(home / "rows.jsonl", chat_rows(4))
    out = home / "run"
    words = ["train", "--model", str(model), "--data", str(data), "--out", str(out)]
    assert run([*words, "adapter=lora", "train.steps=1", "batch.documents=2"]) == 0
    return out


def test_pushed_files_tell_no_path(trained: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    out = tmp_path / "exported"
    words = ["export", str(trained), "--to", "hf", "--out", str(out), "--push", "org/name"]
    assert run(words) == 0
    assert hub.calls == ["create", "upload"]
    for name in files_to_push(out):
        content = (out / name).read_bytes()
        for telling in (str(tmp_path), "jane", "secret-project"):
            assert telling.encode() not in content, (name, telling)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front  # it is no model of the hub
    assert "`base`" in card
    assert "rows.jsonl" in (trained / "model" / "README.md").read_text()


def test_adapter_of_a_local_base_is_refused_before_anything_is_made(
    trained: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    out = tmp_path / "exported"
    words = ["export", str(trained), "--to", "adapter", "--out", str(out), "--push", "org/name"]
    assert run(words) == 2
    assert "which nobody else has" in capfd.readouterr().err
    assert not hub.calls
    assert not out.exists()


def test_a_path_in_a_file_is_found_before_anything_is_made(tmp_path: Path, monkeypatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    (tmp_path / "config.json").write_text(json.dumps({"a": [{"b": str(tmp_path / "x")}]}))
    with pytest.raises(ModelError, match="holds a path of this machine"):
        push(tmp_path, "org/name")
    assert not hub.calls


def test_what_the_hub_refuses_is_an_error_of_ours(tmp_path: Path, monkeypatch) -> None:
    hub = Hub(ValueError("Invalid metadata in README.md"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="Invalid metadata"):
        push(tmp_path, "org/name")


def test_texts_that_are_no_paths_stay(tmp_path: Path) -> None:
    ordinary = ["/no_think", "</think>", "a/b", "https://host/tmp/x", "/", "", "Qwen/Qwen3-0.6B"]
    assert not [text for text in ordinary if is_local(text)]
    assert public(ordinary) == ordinary
    assert is_local(str(tmp_path))
    assert is_local("~/models/x")
    text = "a: 1  # kept as it is\n"
    assert public_yaml(text) == text
    assert yaml.safe_load(public_yaml(f"a: [{tmp_path}/x.jsonl, b]\n")) == {"a": ["x.jsonl", "b"]}
