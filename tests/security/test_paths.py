"""Names that come with data or a model lead to no file outside; files named in rows stay shut."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tiny import chat_rows, tiny_folder, tiny_tokenizer, write_jsonl
from tunesmith.cli.app import run
from tunesmith.data.sources.files import folder_files, pattern_files
from tunesmith.data.sources.hub import _check_name
from tunesmith.errors import DataError
from tunesmith.storage.run_folder import open_run

_OPENED: list[str] = []
_HOOKED: list[bool] = []


@pytest.fixture
def opened() -> list[str]:
    """Every path that this process opens during the test."""
    if not _HOOKED:
        _HOOKED.append(True)

        def note(event: str, arguments: tuple) -> None:
            if event == "open" and isinstance(arguments[0], str | os.PathLike):
                _OPENED.append(os.fspath(arguments[0]))

        sys.addaudithook(note)
    _OPENED.clear()
    return _OPENED


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "model"


def test_files_that_rows_name_are_not_opened(model: Path, tmp_path: Path, opened) -> None:
    secret = tmp_path / "secret-file"
    secret.write_text("PRIVATE")
    names = [str(secret), f"file://{secret}", "../secret-file", f"@{secret}"]
    parts = [{"type": "image", "image": name} for name in names] + [
        {"type": "image_url", "image_url": {"url": name}} for name in names
    ]
    parts += [{"type": "audio", "path": name} for name in names]
    rows = chat_rows(1)
    rows += [{"messages": [{"role": "user", "content": [part]}]} for part in parts]
    rows += [{"prompt": name, "completion": name, "images": [name], "path": name} for name in names]
    rows += [{"messages": chat_rows(1)[0]["messages"], "tools": name} for name in names]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = ["preview", "--model", str(model), "--data", str(data), "--json", "--rows", "99"]
    opened.clear()  # of what was opened to write it
    assert run([*words, "data.bad_rows=drop"]) == 0
    assert any(path.endswith("rows.jsonl") for path in opened)
    assert not [path for path in opened if "secret-file" in path]


def test_links_in_a_folder_lead_nowhere(tmp_path: Path) -> None:
    outside = write_jsonl(tmp_path / "outside.jsonl", chat_rows(2))
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "own.jsonl", chat_rows(2))
    (folder / "alias.jsonl").symlink_to(folder / "own.jsonl")
    assert len(folder_files("set", folder)) == 2
    (folder / "link.jsonl").symlink_to(outside)
    with pytest.raises(DataError, match=r"link\.jsonl is a link to") as caught:
        folder_files("set", folder)
    assert "name the file itself" in str(caught.value)
    with pytest.raises(DataError, match="is a link to"):
        pattern_files(f"{folder}/*.jsonl")
    assert pattern_files(f"{tmp_path}/*/own.jsonl")
    (folder / "link.jsonl").unlink()
    (folder / "inside").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(DataError, match="is a link to"):
        pattern_files(f"{folder}/*/*.jsonl")


def test_cache_of_the_hub_keeps_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "x" / "blobs", tmp_path / "x" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (write_jsonl(blobs / "a.jsonl", chat_rows(2))).rename(blobs / "abc")
    (snapshot / "train.jsonl").symlink_to(blobs / "abc")
    assert len(folder_files("x", snapshot)) == 1
    (snapshot / "other.jsonl").symlink_to(write_jsonl(tmp_path / "o.jsonl", chat_rows(1)))
    with pytest.raises(DataError, match="is a link to"):
        folder_files("x", snapshot)


@pytest.mark.parametrize(
    "name",
    [
        "../x.jsonl",
        "a/../../x.jsonl",
        "/etc/passwd",
        "a//b.jsonl",
        "..\\x.jsonl",
        "C:/x.jsonl",
        ".",
    ],
)
def test_names_of_hub_files_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="leads out"):
        _check_name(name, "org/set")


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "..", ".", "a/..", "x\n/../y", "~", "-rf", "$(touch x)", ""]
)
def test_name_of_a_new_run_is_one_folder_in_runs(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_run(None, model_name=name) as folder:
        assert folder.path.resolve().parent == tmp_path / "runs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]


def test_chat_templates_with_names_that_lead_out_are_refused(
    model: Path, tmp_path: Path, capsys
) -> None:
    tokenizer = tiny_tokenizer()
    config = json.loads((model / "tokenizer_config.json").read_text())
    texts = [("default", tokenizer.chat_template), ("../../evil", tokenizer.chat_template)]
    config["chat_template"] = [{"name": name, "template": text} for name, text in texts]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(2))
    assert run(["preview", "--model", str(model), "--data", str(data)]) == 2
    assert "can't be a file name" in capsys.readouterr().err


def test_weights_that_an_index_looks_for_outside_are_refused(tmp_path: Path, capsys) -> None:
    model = tiny_folder(tmp_path / "whole", num_hidden_layers=1)
    victim = tmp_path / "elsewhere.safetensors"
    (model / "model.safetensors").rename(victim)
    (model / "x.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(4))
    out = tmp_path / "run"
    code = run(
        ["train", "--model", str(model), "--data", str(data), "--out", str(out), "train.steps=1"]
    )
    assert code == 2
    assert "not a file of the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["LICENSE", "LICENSE.md", "special_tokens_map.json", "modeling_x.py", "other.model"]
)
def test_links_in_a_model_folder_lead_nowhere(name: str, tmp_path: Path, capsys) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text('{"PRIVATE": 1}')
    model = tiny_folder(tmp_path / "model", num_hidden_layers=1)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(4))
    both = ["--model", str(model), "--data", str(data)]
    for words in (
        ["train", *both, "--out", str(tmp_path / "run"), "train.steps=1"],
        ["preview", *both],
        ["chat", str(model), "--prompt", "x"],
        ["export", str(model), "--to", "hf", "--out", str(tmp_path / "hf")],
    ):
        assert run(words) == 2, words
        error = capsys.readouterr().err
        assert "is a link that leaves the model's folder" in error
        assert str(model / name) in error
        assert "PRIVATE" not in error
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "hf").exists()


def test_only_known_names_are_copied_with_a_model(tmp_path: Path) -> None:
    """LICENSE-x is no licence, and a link whatever its name is left."""
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE")
    model = tiny_folder(tmp_path / "model", num_hidden_layers=1)
    (model / "LICENSE-x").symlink_to(secret)
    (model / "NOTICE-of-me").write_text("PRIVATE")
    (model / "notes.txt").write_text("PRIVATE")
    (model / "LICENSE").write_text("terms")
    (model / "USE_POLICY.md").symlink_to(model / "LICENSE")
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(4))
    out = tmp_path / "run"
    words = ["train", "--model", str(model), "--data", str(data), "--out", str(out)]
    assert run([*words, "train.steps=1", "batch.documents=2"]) == 0
    assert run(["export", str(model), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    for folder in (out / "model", tmp_path / "hf"):
        names = {path.name for path in folder.iterdir()}
        assert {"LICENSE", "USE_POLICY.md"} <= names
        assert not {"LICENSE-x", "NOTICE-of-me", "notes.txt"} & names
        assert not [path for path in folder.iterdir() if b"PRIVATE" in path.read_bytes()]


def test_a_snapshot_of_the_hubs_cache_is_a_model(tmp_path: Path) -> None:
    """Its files are links into `blobs`."""
    whole = tiny_folder(tmp_path / "whole", num_hidden_layers=1)
    blobs, snapshot = tmp_path / "x" / "blobs", tmp_path / "x" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in whole.iterdir():
        path.rename(blobs / f"b-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"b-{path.name}")
    assert run(["export", str(snapshot), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert not (tmp_path / "hf" / "model.safetensors").is_symlink()
    assert run(["chat", str(snapshot), "--prompt", "x", "--max-new-tokens", "1"]) == 0
