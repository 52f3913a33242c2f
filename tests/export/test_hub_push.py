"""Only chosen files leave, and the repository is private unless said otherwise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from tunesmith.errors import ModelError
from tunesmith.export.hub import files_to_push, push

PRIVATE = ["rows.parquet", "ledger.json", "data.jsonl", "samples.jsonl", "metrics.jsonl", "a.py"]


class FakeHub:
    def __init__(self, private: bool) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.private = private

    def create_repo(self, name: str, **options) -> str:
        self.calls.append(("create", {"name": name, **options}))
        return f"address of {name}"

    def model_info(self, name: str):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options) -> None:
        self.calls.append(("upload", options))


def filled(folder: Path) -> Path:
    for name in ["config.json", "model.safetensors", "README.md", *PRIVATE]:
        (folder / name).write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "tokenizer.json").symlink_to(folder / "rows.parquet")
    return folder


def test_rows_and_links_stay(tmp_path: Path) -> None:
    assert files_to_push(filled(tmp_path)) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("public", [False, True])
def test_push_is_private_unless_asked(public: bool, tmp_path: Path, monkeypatch) -> None:
    hub = FakeHub(private=not public)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert push(filled(tmp_path), "org/name", public=public) == "address of org/name"
    (_, created), (_, sent) = hub.calls
    assert created["private"] is not public
    assert sent["allow_patterns"] == ["README.md", "config.json", "model.safetensors"]


def test_a_public_repository_that_exists_is_refused(tmp_path: Path, monkeypatch) -> None:
    hub = FakeHub(private=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    with pytest.raises(ModelError, match="public"):
        push(filled(tmp_path), "org/name")
    assert [call for call, _ in hub.calls] == ["create"]


def test_a_wrong_name_is_refused_before_anything(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ORG/NAME"):
        push(filled(tmp_path), "../x")
