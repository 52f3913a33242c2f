"""A model of the hub is examined and previewed by its small files alone."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that a hub with one model was asked for; it hands out copies of them."""
    model, names = tiny_folder(tmp_path / "origin"), list[str]()
    folder = tmp_path / "cache" / "models--o--n" / "snapshots" / COMMIT
    folder.mkdir(parents=True)

    def download(name, *, revision=None, allow_patterns, ignore_patterns):
        assert name == "o/n"
        for path in model.iterdir():
            wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(path.name, one) for one in ignore_patterns):
                names.append(path.name)
                shutil.copy(path, folder / path.name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return names


def test_doctor_gets_no_weights(fetched: list[str], tmp_path: Path, capsys) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(12))
    assert run(["doctor", "--model", "o/n", "--data", str(data), "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["rows"] == 12
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(fetched)
    assert not [name for name in fetched if "safetensors" in name]


def test_preview_gets_no_weights(fetched: list[str], tmp_path: Path, capsys) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(2))
    assert run(["preview", "--model", "o/n", "--data", str(data), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert fetched
    assert not [name for name in fetched if "safetensors" in name]
